"""What this GPU makes of the kernels: are they right, how fast are they, beside its own bandwidth and today's engines.

    make gpu-report [ARGS="--output gpu-report --minutes 8"]

Writes OUTPUT.md, a page to read, and OUTPUT.json, every figure of it. In this order, each part for itself, so that one
that fails is reported and leaves the rest alone; what the minutes do not suffice for is named:
1. the machine, and its bandwidth: a copy of 2 GB, bytes read and written over time;
2. the self-check of every kernel, values and bits against the references (what `idlm doctor` runs);
3. Qwen3-8B with random weights and recorded steps, without and with an adapter of rank 128: strided decoding against
   AR, token for token, sampled and greedy; and the time of a step, on the host's clock, while a whole batch decodes.
   Floor: weights, adapter and KV once, at the bandwidth of part 1;
4. the kernels at the shapes of Qwen3-8B: results against the references in higher precision, the bits of rows alone
   and among others, and the time of a call: the median over replays of a CUDA graph of many calls, each on inputs of
   its own, together more than the L2 cache holds. Floor: the bytes that a call has to move (weights, KV, logits), each
   once, at the bandwidth of part 1. Peers: the fastest of the engines in bench/peers_h100_sxm.csv at the same shape, on
   an H100 SXM; attention of several rows is beside theirs of one row per request, which moves the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import idlm_kernels
from bench.gpu_cases import PAGE_SIZE, RANK, Call, Case, cases
from idlm_kernels.generate import Engine, EngineOptions, GenerationResult, Generator, SamplingParams
from idlm_kernels.model import ModelConfig, Transformer
from idlm_kernels.model.adapter import MODULES, Adapter
from idlm_kernels.model.random_weights import SHAPES, RandomCheckpoint
from idlm_kernels.ops import OPS, _dispatch
from idlm_kernels.ops.self_check import self_check

PEERS = Path(__file__).parent / "peers_h100_sxm.csv"
TOLERANCE = 1e-2  # norm of the error over norm of the result: a few roundings of bf16 (2^-9 each)

# Median microseconds of one of the calls; every call has inputs of its own.
Timer = Callable[[list[Call]], float]


@dataclass
class Figure:
    """One measured call. floor_us: its bytes at the measured bandwidth. right: what is wrong with its result, or ok."""

    op: str
    backend: str
    shape: str
    microseconds: float
    floor_us: float
    right: str
    peer: str = ""
    peer_us: float | None = None


class Report:
    """What was found so far; every part adds to it and says where it failed."""

    def __init__(self, minutes: float):
        self._stop = time.monotonic() + 60 * minutes
        self.machine: dict[str, str] = {}
        self.bandwidth = 0.0  # bytes per second
        self.checks: list[tuple[str, str, str]] = []  # backend, op, verdict
        self.exactness: list[tuple[str, str]] = []
        self.figures: list[Figure] = []
        self.steps: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._stop

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        """Run a piece of the report; whatever happens to it, the others are worth having."""
        if self.is_late:
            self.left_out.append(f"{name}: no time was left")
            return
        try:
            run()
        except Exception as error:  # a kernel may raise anything
            traceback.print_exc()
            self.left_out.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def part(self, name: str, run: Callable[[], None]) -> None:
        start = time.monotonic()
        self.attempt(name, run)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


# Time


def graph_timer(calls: list[Call]) -> float:
    """By replays of a CUDA graph that makes each call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which made the inputs
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]  # kept, so that no call overwrites the result of another
    graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    stop = time.monotonic() + 0.25
    while len(found) < 10 or time.monotonic() < stop:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    del results
    return statistics.median(found) * 1e3 / len(calls)


def copy_bandwidth(device: torch.device, timer: Timer, num_bytes: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer([lambda: target.copy_(source)] * 4) * 1e6


# The kernels


def difference(got: Any, wanted: Any) -> str:
    """`ok`, or how far a result is from the reference."""
    if isinstance(got, tuple):
        found = [difference(x, y) for x, y in zip(got, wanted, strict=True)]
        return next((word for word in found if word != "ok"), "ok")
    if not got.is_floating_point():
        count = int((got != wanted).sum())
        return "ok" if count == 0 else f"{count} of {got.numel()} differ"
    error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    return "ok" if error <= TOLERANCE else f"off by {error:.2g}"  # NaN is no number below the tolerance


def measure(case: Case, backend: str, bandwidth: float, timer: Timer, peers: dict[tuple[str, ...], Any]) -> Figure:
    with idlm_kernels.use_backend(backend):
        problem = case.make()
        right = difference(problem.call(), problem.reference())
        if problem.alone is not None and right == "ok":
            alone, among = (x.contiguous().view(torch.int16) for x in problem.alone())
            right = "ok" if torch.equal(alone, among) else "bits of rows alone differ"
        copies = min(max(256_000_000 // case.bytes, 8), 64)
        microseconds = timer([case.make().call for _ in range(copies)])
    peer = peers.get(case.peer) if case.peer else None
    figure = Figure(case.op, backend, case.shape, microseconds, case.bytes / bandwidth * 1e6, right)
    return figure if peer is None else dataclasses.replace(figure, peer=peer[0], peer_us=peer[1])


def read_peers(path: Path) -> dict[tuple[str, ...], tuple[str, float]]:
    """The fastest engine at each shape: (op, rows or batch, N or heads, K or KV heads, context)."""
    columns = ("op", "m_or_batch", "n_or_q_heads", "k_or_kv_heads", "kv_len")
    best: dict[tuple[str, ...], tuple[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key, found = tuple(row[c] for c in columns), (row["engine"], float(row["latency_us"]))
            if key not in best or found[1] < best[key][1]:
                best[key] = found
    return best


# Whole decodes


def random_adapter(config: ModelConfig, device: torch.device, rank: int) -> Adapter:
    pairs = {}
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        if len(parts) > 4 and parts[4] in MODULES and name.endswith("weight"):
            a = torch.randn(rank, shape[1], device=device) * shape[1] ** -0.5
            pairs[int(parts[2]), parts[4]] = a, torch.randn(shape[0], rank, device=device) * rank**-0.5
    return Adapter("random", rank, 0.5, torch.randn(config.hidden_size, device=device), pairs)


PLANS: tuple[tuple[Any, int], ...] = (("ar", 2), ("chain", 4), ("branched", 4))


def _whole_text(result: GenerationResult) -> list[int]:
    if result.finish_reason != "length":
        raise RuntimeError(f"a text ended early: {result.error or result.finish_reason}")
    return result.token_ids


def check_decoding(generator: Generator, name: str, prompts: list[list[int]], tokens: int) -> Iterator[tuple[str, str]]:
    """Strided decoding against AR, as (what, verdict)."""
    for temperature in (0.0, 0.9):
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
        ar, *others = (
            [_whole_text(r) for r in generator.generate(prompts, params, plan=plan, stride=stride)]
            for plan, stride in PLANS
        )
        for (plan, stride), texts in zip(PLANS[1:], others, strict=True):
            equal = sum(a == b for a, b in zip(ar, texts, strict=True))
            word = "ok" if equal == len(prompts) else f"{len(prompts) - equal} of {len(prompts)} texts differ from AR"
            yield f"{name}, {plan} N={stride}, T={temperature}, {tokens} tokens", word


def step_figures(
    generator: Generator, name: str, bandwidth: float, batch: int, context: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by plan, while all requests run. Drafts stand with probability .8, so that text grows as
    with an adapter that was trained."""
    model, config = generator.model, generator.config
    prompts = torch.randint(0, config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()
    weights = sum(x.numel() * x.element_size() for x in _weights(model))
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    floor = (weights + batch * (context + tokens / 2) * kv) / bandwidth
    options = EngineOptions(max_batch=batch, max_len=context + tokens, page_size=PAGE_SIZE, synthetic_acceptance=0.8)
    for plan, stride in PLANS:
        engine = Engine(model, None, generator.policy(plan, stride), "match", options)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        requests = [engine.submit(prompt, params, seed) for seed, prompt in enumerate(prompts)]
        running: set[int] = set()
        begin = end = 0.0
        steps = emitted = 0
        for request, event in engine.events():
            now = time.perf_counter()
            if any(r.ended for r in requests):
                break
            if len(running) == batch:
                emitted += len(event.token_ids)
                if request is requests[-1]:
                    steps, end = steps + 1, now
            else:
                running.add(request.arrival)
                begin = now
        for request in requests:
            if request.output.error:
                raise RuntimeError(f"{plan}: {request.output.error}")
        if steps == 0:
            raise RuntimeError(f"{plan}: a text ended before all had begun; more tokens are needed")
        seconds = end - begin
        yield {
            "model": name,
            "plan": plan if plan == "ar" else f"{plan} N={stride}",
            "batch": batch,
            "context": context,
            "step_ms": seconds / steps * 1e3,
            "floor_ms": floor * 1e3,
            "share": floor * steps / seconds,
            "tokens_per_second": emitted / seconds,
        }


def _weights(model: Transformer) -> Iterator[Tensor]:
    yield model.head
    for layer in model.layers:
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            yield projection.weight
            yield from projection.lora or ()


# The whole


def run(
    report: Report,
    device: torch.device,
    config: ModelConfig,
    *,
    timer: Timer,
    backends: dict[str, ModuleType],
    peers: dict[tuple[str, ...], Any],
    copy_bytes: int = 2 << 30,
    wanted: Callable[[ModelConfig, torch.device], Iterator[Case]] = cases,
    contexts: tuple[tuple[int, int], ...] = ((1, 1024), (8, 1024)),
    tokens: int = 64,
) -> None:
    """All parts of the report; smaller arguments than the defaults are for tests."""

    def bandwidth() -> None:
        report.bandwidth = copy_bandwidth(device, timer, copy_bytes)

    def checks() -> None:
        for name, module in backends.items():
            for op in OPS:
                if hasattr(module, op):
                    report.checks.append((name, op, self_check(module, op, device) or "ok"))

    def kernels() -> None:
        for case in wanted(config, device):
            for name, module in backends.items():
                if not hasattr(module, case.op):
                    continue
                figure = functools.partial(measure, case, name, report.bandwidth, timer, peers)
                report.attempt(f"{case.op} {case.shape}", lambda figure=figure: report.figures.append(figure()))

    def decoding(rank: int) -> None:
        name = "without an adapter" if rank == 0 else f"with an adapter of rank {rank}"
        adapter = random_adapter(config, device, rank) if rank else None
        with idlm_kernels.use_backend("triton"):
            generator = Generator(Transformer(RandomCheckpoint(config, device=device), device=device, adapter=adapter))
            random = torch.Generator().manual_seed(1)
            prompts = torch.randint(0, config.vocab_size, (3, 40), generator=random).tolist()
            report.exactness.extend(check_decoding(generator, name, prompts, tokens))
            for batch, context in contexts:
                report.steps.extend(step_figures(generator, name, report.bandwidth, batch, context, 4 * tokens))

    report.part("bandwidth", bandwidth)
    report.part("self-checks", checks)
    report.part("decoding", lambda: decoding(0))
    report.part("decoding with an adapter", lambda: decoding(RANK))
    if report.bandwidth:
        report.part("kernels", kernels)


def page(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# GPU report", ""]
    lines += [f"- {name}: {value}" for name, value in report.machine.items()]
    lines += [f"- bandwidth of a copy, read and written: {report.bandwidth / 1e12:.2f} TB/s", ""]
    lines += ["## Self-checks", "", "| backend | op | verdict |", "|---|---|---|"]
    lines += [f"| {backend} | {op} | {verdict} |" for backend, op, verdict in report.checks]
    lines += ["", "## Strided decoding against AR", "", "| what | verdict |", "|---|---|"]
    lines += [f"| {what} | {verdict} |" for what, verdict in report.exactness]
    lines += ["", "## Steps", "", "| model | plan | batch | context | ms | floor ms | share | tokens/s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for s in report.steps:
        figures = f"{s['step_ms']:.2f} | {s['floor_ms']:.2f} | {s['share']:.0%} | {s['tokens_per_second']:.0f}"
        lines.append(f"| {s['model']} | {s['plan']} | {s['batch']} | {s['context']} | {figures} |")
    lines += ["", "## Kernels", "", "| op | shape | backend | us | floor us | share | right | peer us | of the peer |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for f in report.figures:
        share = f"{f.microseconds:.1f} | {f.floor_us:.1f} | {f.floor_us / f.microseconds:.0%}"
        peer = " | " if f.peer_us is None else f"{f.peer_us:.1f} ({f.peer}) | {f.microseconds / f.peer_us:.2f}"
        lines.append(f"| {f.op} | {f.shape} | {f.backend} | {share} | {f.right} | {peer} |")
    if report.left_out:
        lines += ["", "## Not there", ""] + [f"- {what}" for what in report.left_out]
    return "\n".join(lines) + "\n"


def faults(report: Report) -> int:
    """How much of what was checked is wrong."""
    words = [word for *_, word in (*report.checks, *report.exactness)] + [f.right for f in report.figures]
    return sum(word != "ok" for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="path of the two files, less suffix")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after this many (default 8)")
    parser.add_argument("--peers", type=Path, default=PEERS, help="a file with the columns of the default one")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu-report needs a CUDA device, and torch sees none here; without one see bench.counters")
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(arguments.minutes)
    found = torch.cuda.get_device_properties(device)
    report.machine = {
        "device": f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} SMs",
        "memory": f"{found.total_memory / 2**30:.0f} GiB",
        "versions": f"idlm_kernels {idlm_kernels.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}",
    }
    usable = [b for b in _dispatch.checked_backends(device) if b.unusable(device) is None]
    backends = {b.name: b.load() for b in usable}
    with torch.inference_mode():
        run(report, device, SHAPES["qwen3-8b"], timer=graph_timer, backends=backends, peers=read_peers(arguments.peers))
    arguments.output.with_suffix(".md").write_text(page(report))
    record = {**vars(report), "figures": [dataclasses.asdict(f) for f in report.figures]}
    record = {name: value for name, value in record.items() if not name.startswith("_")}
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(page(report))
    print(f"wrote {arguments.output}.md and .json", file=sys.stderr)
    if (count := faults(report)) or report.left_out:
        raise SystemExit(f"{count} checks failed, {len(report.left_out)} parts are not there")


if __name__ == "__main__":
    main()
