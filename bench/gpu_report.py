"""What this GPU makes of the kernels: are they right, how fast are they, beside its own bandwidth and today's engines.

    make gpu-report [ARGS="--output gpu-report --minutes 8 --parts decoding,kernels"]

Writes OUTPUT.md, a page to read, and OUTPUT.json, every figure of it; both anew after every figure. In this order, each
part in a process of its own, which is ended where it gives no answer in time, and begun again behind the piece that
failed; what the minutes do not suffice for is named:
1. `bandwidth`, always, by the first process: a copy of 2 GB, bytes read and written over time;
2. `checks`: the self-check of every kernel, values and bits against the references (what `idlm doctor` runs);
3. `decoding`, and `adapter` with one of rank 128: Qwen3-8B with random weights, by the Triton kernels and by what
   `auto` takes: strided decoding against AR, token for token, sampled and greedy, recorded and eager; and the time of a
   step, on the host's clock, while a whole batch decodes. Floor: weights, adapter and KV once, at the bandwidth of
   part 1. Tokens/s are computed from that time, for an adapter of which 0.8 of the drafts stand;
4. `kernels` at the shapes of Qwen3-8B: results against the references in higher precision, the bits of rows alone and
   among others, and the time of a call: the median over replays of a CUDA graph of many calls, each on inputs of its
   own, together more than the L2 cache holds (where they are not, the figure is marked). Floor: the bytes that a call
   has to move (weights, KV, logits), each once, at the bandwidth of part 1. Peers: the fastest of the engines in
   bench/peers_h100_sxm.csv at the same shape, on an H100 SXM; where they were measured at another width (gate_up, LM
   head), their time is scaled by bytes and the page says so; attention of several rows is beside theirs of one row per
   request, which moves the same bytes.
Last line: VERDICT: and what was found. Exit status 1 where something is wrong or not there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers_h100_sxm.csv"
ORDER = ("bandwidth", "checks", "decoding", "adapter", "kernels")
MARK = "FOUND "  # before a finding, on the standard output of a process that measures
PIECE_SECONDS = 75.0  # without a word: kernels compile, 16 GB of weights are drawn; a kernel that hangs says nothing

Emit = Callable[[dict[str, Any]], None]


class Report:
    """What was found so far."""

    def __init__(self) -> None:
        self.machine: dict[str, str] = {}
        self.bandwidth = 0.0  # bytes per second
        self.checks: list[tuple[str, str, str]] = []  # backend, op, verdict
        self.exactness: list[tuple[str, str]] = []  # what, verdict
        self.figures: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def add(self, found: dict[str, Any]) -> None:
        kind, rest = found["kind"], {name: value for name, value in found.items() if name != "kind"}
        if kind == "machine":
            self.machine = rest
        elif kind == "bandwidth":
            self.bandwidth = rest["bytes_per_second"]
        elif kind == "check":
            self.checks.append((rest["backend"], rest["op"], rest["verdict"]))
        elif kind == "exactness":
            self.exactness.append((rest["what"], rest["verdict"]))
        elif kind == "left out":
            self.left_out.append(rest["what"])
        else:
            {"figure": self.figures, "step": self.steps}[kind].append(rest)

    def save(self, output: Path) -> None:
        """Both files, each whole at every moment."""
        for suffix, text in ((".md", page(self)), (".json", json.dumps(vars(self), indent=1) + "\n")):
            part = output.with_name(output.name + suffix + ".part")
            part.write_text(text)
            part.replace(output.with_name(output.name + suffix))


# A process that measures


def run_pieces(pieces: Any, emit: Emit, skip: int = 0, synchronize: Callable[[], None] | None = None) -> None:
    """Run the pieces after the first `skip`; what they find goes to `emit`. A fault of one piece leaves the others
    alone, unless the device keeps the error: then `synchronize` raises it, and this process is done."""
    for index, (name, run) in enumerate(pieces):
        if index < skip:
            continue
        emit({"kind": "begin", "index": index, "name": name})
        try:
            for found in run():
                emit(found)
        except Exception as error:  # a kernel may raise anything
            traceback.print_exc()
            words = " ".join(str(error).split())[:300]
            emit({"kind": "left out", "what": f"{name}: {type(error).__name__}: {words}"})
            if synchronize is not None:
                synchronize()


def measure_part(part: str, skip: int, bandwidth: float, peers: Path) -> None:
    """In a process of its own: the pieces of a part on the GPU, findings on standard output."""
    import torch

    import idlm_kernels
    from bench import gpu_parts
    from idlm_kernels.ops import _dispatch

    def emit(found: dict[str, Any]) -> None:
        print(MARK + json.dumps(found), flush=True)

    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_properties(device)
    versions = f"idlm_kernels {idlm_kernels.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    name = f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} SMs"
    emit({"kind": "machine", "device": name, "memory": f"{card.total_memory / 2**30:.0f} GiB", "versions": versions})
    usable = [b for b in _dispatch.checked_backends(device) if b.unusable(device) is None]
    setting = gpu_parts.Setting(
        device,
        bandwidth=bandwidth,
        peers=gpu_parts.read_peers(peers),
        backends={b.name: b.load() for b in usable},
        l2_bytes=card.L2_cache_size,
    )
    with torch.inference_mode():
        measure_pieces(setting, part, emit, skip, lambda: torch.cuda.synchronize(device))


def measure_pieces(setting: Any, part: str, emit: Emit, skip: int, synchronize: Callable[[], None]) -> None:
    """The pieces of a part, and before them the bandwidth, where it is not known yet."""
    from bench import gpu_parts

    def noting(found: dict[str, Any]) -> None:
        if found["kind"] == "bandwidth":
            setting.bandwidth = found["bytes_per_second"]
        emit(found)

    if not setting.bandwidth:
        run_pieces(gpu_parts.bandwidth_pieces(setting), noting, synchronize=synchronize)
    if not setting.bandwidth:
        emit({"kind": "left out", "what": f"{part}: no bandwidth to compare with"})
    elif part != "bandwidth":
        run_pieces(gpu_parts.PARTS[part](setting), emit, skip, synchronize)
    emit({"kind": "end"})


# The process that collects


def collect(
    command: Callable[[str, int, float], list[str]],
    report: Report,
    parts: list[str],
    seconds: float,
    save: Callable[[], None],
    piece_seconds: float = PIECE_SECONDS,
) -> None:
    """Run `command(part, skip, bandwidth)` for each part, and again behind each piece that took its process along.

    Nothing is begun after `seconds`, and nothing may then still run.
    """
    stop = time.monotonic() + seconds
    for part in parts:
        skip: int | None = 0
        while skip is not None:
            if time.monotonic() >= stop:
                report.left_out.append(f"{part}: no time was left" + (f" after {skip} pieces" if skip else ""))
                break
            begun = time.monotonic()
            skip = _one_process(command(part, skip, report.bandwidth), part, report, stop, save, piece_seconds)
            print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        save()


def _one_process(
    command: list[str], part: str, report: Report, stop: float, save: Callable[[], None], piece_seconds: float
) -> int | None:
    """Returns how many pieces the next process has to skip, None if there is no need of one."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    name, index = part, -1  # of the piece that is running; the bandwidth is none of those that can be skipped
    while True:
        wait = min(piece_seconds, stop - time.monotonic())
        try:
            line = lines.get(timeout=max(wait, 0.0))
        except queue.Empty:
            process.kill()
            process.wait()
            if time.monotonic() >= stop:
                report.left_out.append(f"{name}, and what comes after it: no time was left")
                return None
            report.left_out.append(f"{name}: no answer for {piece_seconds:.0f} s, a kernel that waits for ever?")
            return index + 1 if index >= 0 else None
        if line is None:
            code = process.wait()
            report.left_out.append(f"{name}: its process ended with status {code}")
            return index + 1 if index >= 0 else None
        if not line.startswith(MARK):
            print(line, end="", file=sys.stderr, flush=True)
            continue
        found = json.loads(line[len(MARK) :])
        if found["kind"] == "begin":
            name, index = found["name"], -1 if found["name"] == "bandwidth" else found["index"]
        elif found["kind"] == "end":
            process.wait()
            return None
        else:
            report.add(found)
            save()


# The page


def page(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# GPU report", ""]
    lines += [f"- {name}: {value}" for name, value in report.machine.items()]
    lines += [f"- bandwidth of a copy, read and written: {report.bandwidth / 1e12:.2f} TB/s"]
    if report.checks:
        lines += ["", "## Self-checks", "", "| backend | op | verdict |", "|---|---|---|"]
        lines += [f"| {backend} | {op} | {verdict} |" for backend, op, verdict in report.checks]
    if report.exactness:
        lines += ["", "## Strided decoding against AR", "", "| what | verdict |", "|---|---|"]
        lines += [f"| {what} | {verdict} |" for what, verdict in report.exactness]
    if report.steps:
        lines += ["", "## Steps", "", "Drafts: steps that had some. Tokens/s: computed, as if 0.8 of drafts stood.", ""]
        lines += ["| model | backend | plan | steps | batch | context | drafts | ms | floor ms | share | tokens/s |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        for s in report.steps:
            names = f"{s['model']} | {s['backend']} | {s['plan']} | {s['how']} | {s['batch']} | {s['context']}"
            times = f"{s['step_ms']:.2f} | {s['floor_ms']:.2f} | {s['share']:.0%} | {s['tokens_per_second']:.0f}"
            lines.append(f"| {names} | {s['drafted']:.0%} | {times} |")
    if report.figures:
        lines += ["", "## Kernels", ""]
        if any(f["in_l2"] for f in report.figures):
            lines += ["L2: the inputs of all timed calls fit into that cache: not the time of the memory.", ""]
        lines += ["| op | shape | backend | us | floor us | share | right | peer us | of the peer |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for f in report.figures:
            us = f["microseconds"]
            share = f"{us:.1f}{' (L2)' if f['in_l2'] else ''} | {f['floor_us']:.1f} | {f['floor_us'] / us:.0%}"
            peer = f"{f['peer_us']:.1f} ({f['peer']}) | {us / f['peer_us']:.2f}" if "peer" in f else " | "
            lines.append(f"| {f['op']} | {f['shape']} | {f['backend']} | {share} | {f['right']} | {peer} |")
    if report.left_out:
        lines += ["", "## Not there", ""] + [f"- {what}" for what in report.left_out]
    return "\n".join(lines) + "\n"


def faults(report: Report) -> int:
    """How much of what was checked is wrong."""
    words = [word for *_, word in (*report.checks, *report.exactness)] + [f["right"] for f in report.figures]
    return sum(word != "ok" for word in words)


def verdict(report: Report) -> str:
    """The report in a line."""
    good = faults(report) == 0 and not report.left_out
    words = [f"{'ok' if good else 'see the page'}: bandwidth {report.bandwidth / 1e12:.2f} TB/s"]
    if report.checks:
        words.append(f"{len(report.checks)} self-checks, {sum(w != 'ok' for *_, w in report.checks)} wrong")
    if report.exactness:
        words.append(f"{len(report.exactness)} decodes, {sum(w != 'ok' for _, w in report.exactness)} differ")
    if report.figures:
        shares = sorted((f["floor_us"] / f["microseconds"], f"{f['op']} {f['shape']}") for f in report.figures)
        words.append(f"{len(report.figures)} figures, {sum(f['right'] != 'ok' for f in report.figures)} wrong")
        words.append("lowest share of the floor: " + ", ".join(f"{name} {share:.0%}" for share, name in shares[:3]))
    words += [f"{s['plan']} {s['how']} b={s['batch']} {s['step_ms']:.2f} ms ({s['share']:.0%})" for s in report.steps]
    words += [f"NOT THERE {what}" for what in report.left_out[:4]]
    return "; ".join(words)[:1500]


def measuring(peers: Path, part: str, skip: int, bandwidth: float) -> list[str]:
    """The command of a process that measures."""
    how = ["--measure", part, str(skip), str(bandwidth), "--peers", str(peers)]
    return [sys.executable, "-X", "faulthandler", "-m", "bench.gpu_report", *how]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="path of the two files, less suffix")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after this many (default 8)")
    parser.add_argument("--parts", default=",".join(ORDER), help=f"some of {', '.join(ORDER)}, with commas")
    parser.add_argument("--peers", type=Path, default=PEERS, help="a file with the columns of the default one")
    parser.add_argument("--measure", nargs=3, metavar=("PART", "SKIP", "BANDWIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(ORDER):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; choose among {', '.join(ORDER)}")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu-report needs a CUDA device, and torch sees none here; without one see bench.counters")
    if arguments.measure:
        part, skip, bandwidth = arguments.measure
        measure_part(part, int(skip), float(bandwidth), arguments.peers)
        return
    seconds = 60 * arguments.minutes
    if given := os.environ.get("PHASE_SECONDS"):  # of gpu_day.sh: end in time to say what was found
        seconds = min(seconds, float(given) - 5)
    report = Report()

    command = functools.partial(measuring, arguments.peers)
    parts = [part for part in ORDER[1:] if part in arguments.parts.split(",")] or ["bandwidth"]
    collect(command, report, parts, seconds, lambda: report.save(arguments.output))
    print(page(report))
    print(f"wrote {arguments.output}.md and .json", file=sys.stderr)
    print(f"VERDICT: {verdict(report)}")
    if faults(report) or report.left_out:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
