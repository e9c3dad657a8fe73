"""An adapter that learns from the traffic it serves, beside the same adapter that does not: traffic of one kind, then a
shift to another.

    python -m bench.learn [--minutes 20] [--old-minutes 2] [--seconds-per-text 3] [--max-tokens 64] [--threads 1]
                          [--steps 20] [--plan quadratic] [--stride 4] [--held-out 32] [--model default]
                          [--adapter FOLDER] [--plot FILE.svg] [--json FILE]

The engine of this process answers a prompt every few seconds, first of the built-in kinds (`training.prompts`), then
requests for SQL queries, and keeps traces. `idlm learn --watch` runs beside it as a process of its own, with a thread,
and the engine takes each version that it writes, in the middle of the traffic. Afterwards every text is decoded again:
in AR, which has to give the same tokens (exit status 1 if not), and with the adapter that learned nothing, which says
what would have been without the learner. Prompts of both kinds that were never served, and the learner's price in
tokens/s of a busy engine (its process stopped and continued in turns), end the report. Tokens per forward do not depend
on the machine; how much is learned within the minutes does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from idlm_kernels.generate import Engine, EngineOptions, Generator, Request, SamplingParams
from idlm_kernels.generate.batch_file import encoder
from idlm_kernels.learning.adapters import AdapterFolder
from idlm_kernels.learning.traces import TraceWriter
from idlm_kernels.model import load_adapter
from idlm_kernels.model.adapter import DEFAULT_ADAPTER
from idlm_kernels.training.prompts import prompts

TABLES = (
    "users", "orders", "products", "invoices", "employees", "payments", "books", "flights", "rooms", "songs",
)  # fmt: skip
COLUMNS = ("name", "price", "country", "created_at", "status", "total", "age", "rating", "email", "city")
WISHES = (
    "counts the {t} per {c}", "lists the {t} whose {c} is above {n}", "joins {t} and {u} on {c}",
    "deletes {t} older than {n} days", "sorts {t} by {c}", "finds duplicate {t} by {c}",
    "sums the {c} of {t} per month",
    "shows the {n} newest {t}", "updates the {c} of {t} to {n}", "averages the {c} of all {t}",
)  # fmt: skip
_AT_ONCE = 8
_LOOK_SECONDS = 2.0
_SMOOTH = 24  # texts of a point of the plot


def new_kind(count: int, seed: int) -> list[str]:
    """Distinct requests for SQL."""
    random, found = Random(seed), dict[str, None]()
    while len(found) < count:
        t, u = random.sample(TABLES, 2)
        wish = random.choice(WISHES).format(t=t, u=u, c=random.choice(COLUMNS), n=random.randrange(2, 200))
        found[f"Write a SQL query that {wish}."] = None
    return list(found)


@dataclass
class Served:
    """A text that was answered: when it ended, in minutes after the shift, and what it took."""

    prompt: list[int]
    minute: float
    token_ids: list[int]
    forwards: int
    adapter: str


class Traffic:
    """An engine whose texts leave traces, and which takes what the folder offers."""

    def __init__(self, generator: Generator, sizes: EngineOptions, max_tokens: int, folder: AdapterFolder):
        self.engine = Engine(generator.model, generator.tokenizer, options=sizes)
        self._params, self._folder, self._looked = SamplingParams(max_tokens=max_tokens), folder, 0.0
        self.takes_versions = True
        self.served: list[Served] = []
        self.taken: list[tuple[float, str]] = []
        self.shift = time.monotonic()
        self._name = self.engine.adapter_name

    def ask(self, prompt: list[int]) -> None:
        self.engine.submit(prompt, self._params, 0)

    def run_for(self, seconds: float) -> int:
        """Decode what was asked for, and wait where that is nothing; returns the tokens."""
        end, tokens = time.monotonic() + seconds, 0
        while (now := time.monotonic()) < end:
            if self.takes_versions and now > self._looked + _LOOK_SECONDS:
                self._looked = now
                self._folder.look(self.engine, take_newest=True)
            if not self.engine.busy:
                time.sleep(0.02)
                continue
            for request, event in self.engine.window():
                tokens += len(event.token_ids)
                if request.ended:
                    self._note(request)
            if self.engine.adapter_name != self._name:
                self._name = self.engine.adapter_name
                self.taken.append((self._minute(), self._name or ""))
        return tokens

    def _note(self, request: Request) -> None:
        result = request.output.result("", 0)
        name = self.engine.adapter_name or ""
        self.served.append(Served(request.prompt, self._minute(), result.token_ids, result.forwards, name))

    def _minute(self) -> float:
        return (time.monotonic() - self.shift) / 60


def learner(arguments: argparse.Namespace, traces: Path, versions: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from idlm_kernels.cli import main; main()",
        "learn",
        "--traces",
        traces,
        "--output",
        versions,
    ]
    command += ["--model", arguments.model, "--adapter", arguments.adapter, "--watch", "1", "--steps", arguments.steps]
    command += ["--threads", 1, "--max-tokens", 160]
    return subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


def decoded(
    generator: Generator, texts: Sequence[list[int]], max_tokens: int, **plan: Any
) -> list[tuple[list[int], int]]:
    """Token ids and forwards of each prompt."""
    done = generator.generate(list(texts), SamplingParams(max_tokens=max_tokens), **plan)
    return [(result.token_ids, result.forwards) for result in done]


def tpf(texts: Sequence[tuple[list[int], int]]) -> float:
    return sum(len(ids) for ids, _ in texts) / max(1, sum(forwards for _, forwards in texts))


def price(traffic: Traffic, process: subprocess.Popen[str], texts: Iterator[list[int]], seconds: float) -> float:
    """Tokens/s of a busy engine with the learner, as a share of those while it is stopped: medians of turns."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        runs = turn % 2 == 0
        process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
        while traffic.engine.num_running + traffic.engine.num_waiting < 4 * _AT_ONCE:
            traffic.ask(next(texts))
        start = time.monotonic()
        rates[runs].append(traffic.run_for(seconds) / (time.monotonic() - start))
    process.send_signal(signal.SIGCONT)
    return statistics.median(rates[True]) / statistics.median(rates[False])


def smoothed(minutes: Sequence[float], texts: Sequence[tuple[list[int], int]]) -> list[tuple[float, float]]:
    """Tokens per forward of the latest texts at each moment."""
    return [
        (minutes[i - 1], tpf(texts[i - _SMOOTH : i])) for i in range(_SMOOTH, len(texts) + 1, max(1, len(texts) // 120))
    ]


def plot(lines: dict[str, list[tuple[float, float]]], taken: Sequence[tuple[float, str]]) -> str:
    """Two lines over time as SVG: the shift at 0, and a mark where a version was taken."""
    width, height, left, bottom = 760, 340, 56, 44
    points = [point for line in lines.values() for point in line]
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    y0, y1 = y0 - 0.05, y1 + 0.1

    def x(minute: float) -> float:
        return left + (minute - x0) / (x1 - x0) * (width - left - 20)

    def y(value: float) -> float:
        return height - bottom - (value - y0) / (y1 - y0) * (height - bottom - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for tenth in range(int(y0 * 10) + 1, int(y1 * 10) + 1, 2):
        at = y(tenth / 10)
        parts.append(f'<path d="M{left} {at:.1f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    for minute in range(int(x0), int(x1) + 1, 2):
        at = x(minute)
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">{minute}</text>')
    parts.append(f'<text x="{width // 2}" y="{height - 8}" text-anchor="middle">minutes after the shift</text>')
    parts.append(
        f'<text x="14" y="{height // 2}" transform="rotate(-90 14 {height // 2})" text-anchor="middle">'
        "tokens per forward</text>"
    )
    parts.append(f'<path d="M{x(0):.1f} 20V{height - bottom}" stroke="#888" stroke-dasharray="4 4"/>')
    for minute, name in taken:
        parts.append(
            f'<path d="M{x(minute):.1f} {height - bottom}v-8" stroke="#0a6" stroke-width="2">'
            f"<title>{name}</title></path>"
        )
    for (name, line), colour, down in zip(lines.items(), ("#999", "#0a6"), (34, 16), strict=True):
        path = "L".join(f"{x(minute):.1f} {y(value):.1f}" for minute, value in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 10}" y="{16 + down}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def measured(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    generator = Generator.from_pretrained(arguments.model, adapter=str(arguments.adapter))
    tokenizer, first = generator.tokenizer, load_adapter(arguments.adapter, generator.config)
    assert tokenizer is not None
    encode = encoder(tokenizer, tokenizer.has_chat_template, None)
    count = int(60 * (arguments.minutes + arguments.old_minutes) / arguments.seconds_per_text) + 400
    old = [encode({"prompt": one.text}) for one in prompts(count, 1)]
    new = [encode({"prompt": text}) for text in new_kind(min(count, 4000), 1)]
    keep = arguments.held_out
    (old_held, old), (new_held, new) = (old[:keep], old[keep:]), (new[:keep], new[keep:])
    plan = {"plan": arguments.plan, "stride": arguments.stride}
    traces, versions = work / "traces", work / "versions"
    versions.mkdir()
    sizes = EngineOptions(max_num_seqs=_AT_ONCE, max_model_len=1024, window_steps=8, **plan)
    traffic = Traffic(generator, sizes, arguments.max_tokens, AdapterFolder(versions))
    engine, old_texts, new_texts = traffic.engine, iter(old), iter(new)
    with TraceWriter(traces, generator.model.identity, generator.config.vocab_size) as writer:
        engine.on_trace = lambda request: writer.write(request.trace())
        process = learner(arguments, traces, versions)
        try:
            traffic.shift = time.monotonic() + 60 * arguments.old_minutes
            for minutes, texts in ((arguments.old_minutes, old_texts), (arguments.minutes, new_texts)):
                for _ in range(int(60 * minutes / arguments.seconds_per_text)):
                    traffic.ask(next(texts))
                    traffic.run_for(arguments.seconds_per_text)
                    if process.poll() is not None:
                        raise RuntimeError(f"the learner ended: {process.stderr and process.stderr.read()}")
            for _ in engine.events():  # what is still under way; noted by nobody
                pass
            served, taken = list(traffic.served), list(traffic.taken)
            traffic.takes_versions = False  # tokens/s are to be compared of one adapter
            share = price(traffic, process, new_texts, arguments.price_seconds)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()  # a shell may have had it ignore Ctrl-C
            said = process.communicate()[1]
    list(engine.events())
    last = engine.model.adapter
    assert last is not None
    learned = {
        kind: decoded(generator, texts, arguments.max_tokens, **plan)
        for kind, texts in (("old", old_held), ("new", new_held))
    }
    generator.model.install_adapter(generator.model.prepare_adapter(first))
    static = {
        kind: decoded(generator, texts, arguments.max_tokens, **plan)
        for kind, texts in (("old", old_held), ("new", new_held))
    }
    asked = [one.prompt for one in served]
    again = decoded(generator, asked, arguments.max_tokens, **plan)
    ar = decoded(generator, [*asked, *old_held, *new_held], arguments.max_tokens, plan="ar")
    all_texts = [one.token_ids for one in served] + [ids for kind in ("old", "new") for ids, _ in learned[kind]]
    differing = sum(ids != wanted for ids, (wanted, _) in zip(all_texts, ar, strict=True))
    minutes = [one.minute for one in served]
    own = [(one.token_ids, one.forwards) for one in served]
    return {
        "texts": len(all_texts),
        "different_from_ar": differing,
        "held_out": {kind: {"static": tpf(static[kind]), "learned": tpf(learned[kind])} for kind in static},
        "price": share,
        "taken": taken,
        "last": last.name,
        "lines": {"the adapter as it was": smoothed(minutes, again), "the adapter that learns": smoothed(minutes, own)},
        "learner": [line for line in said.splitlines() if line.startswith("round")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=20.0, help="of the new traffic")
    parser.add_argument("--old-minutes", type=float, default=2.0)
    parser.add_argument("--seconds-per-text", type=float, default=3.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the learner has one of its own")
    parser.add_argument("--steps", type=int, default=20, help="of a round of the learner")
    parser.add_argument("--plan", default="quadratic")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=32, help="prompts of each kind that are never served")
    parser.add_argument("--price-seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--model", default="default")
    parser.add_argument("--adapter", type=Path, default=DEFAULT_ADAPTER)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        found = measured(arguments, Path(work))
    for line in found["learner"]:
        print(line)
    print(f"versions taken: {', '.join(f'{name} at {minute:.1f} min' for minute, name in found['taken']) or 'none'}")
    print(f"{'held-out prompts':<18}{'static':>8}{'learned':>9}")
    for kind, row in found["held_out"].items():
        print(f"{kind:<18}{row['static']:>8.2f}{row['learned']:>9.2f}  {row['learned'] / row['static'] - 1:+.1%}")
    print(f"a busy engine keeps {found['price']:.0%} of its tokens/s beside the learner")
    print(f"{found['texts']} texts, {found['different_from_ar']} different from AR")
    if arguments.plot is not None:
        arguments.plot.write_text(plot(found["lines"], found["taken"]), encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if found["different_from_ar"] else 0)


if __name__ == "__main__":
    main()
