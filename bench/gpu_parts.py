"""What bench.gpu_report measures, piece by piece. A piece has a name and, when it is run, yields findings: dicts with a
`kind`, which bench.gpu_report collects. It runs in a process of its own (bench.gpu_report says why); the clock and the
sizes are arguments of `Setting`, so that all else can be tested without a GPU.
"""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import idlm_kernels
from bench.gpu_cases import PAGE_SIZE, RANK, Case, cases
from idlm_kernels import testing
from idlm_kernels.generate import Engine, EngineOptions, GenerationResult, Generator, SamplingParams, StepPlan, engine
from idlm_kernels.model import ModelConfig, Transformer
from idlm_kernels.model.adapter import MODULES, Adapter
from idlm_kernels.model.random_weights import SHAPES, RandomCheckpoint
from idlm_kernels.ops import OPS, self_check
from idlm_kernels.testing import microseconds

L2_BYTES = 50 << 20  # of an H100; inputs that it holds are not read from memory when a call is timed again
ACCEPTANCE = 0.8  # at which tokens/s are computed from the time of a step

Call = Callable[[], Any]
Timer = Callable[[list[Call]], float]  # median microseconds of one of the calls; every call has inputs of its own
Finding = dict[str, Any]
Piece = tuple[str, Callable[[], Iterator[Finding]]]
Peers = dict[tuple[str, ...], tuple[str, float]]


# Time


def graph_timer(calls: list[Call]) -> float:
    """By replays of a CUDA graph that makes each call once."""
    return microseconds(*calls, device="cuda")


def copy_bandwidth(device: torch.device, timer: Timer, num_bytes: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer([lambda: target.copy_(source)] * 4) * 1e6


@dataclass
class Setting:
    """What the pieces work with; smaller values than the defaults are for tests. bandwidth: measured, bytes/s."""

    device: torch.device
    timer: Timer = graph_timer
    config: ModelConfig = field(default_factory=lambda: SHAPES["qwen3-8b"])
    bandwidth: float = 0.0
    peers: Peers = field(default_factory=dict)
    backends: dict[str, ModuleType] = field(default_factory=dict)
    decoders: tuple[str, ...] = ("triton", "auto")
    copy_bytes: int = 2 << 30
    l2_bytes: int = L2_BYTES
    cases: Callable[[ModelConfig, torch.device], Iterator[Case]] = cases
    contexts: tuple[tuple[int, int], ...] = ((1, 1024), (8, 1024))
    tokens: int = 64


# The kernels


def judge(case: Case, call: testing.Call, function: Callable[..., Any]) -> None:
    """Raise Wrong unless a result is near the reference's in higher precision, and rows alone have the same bits."""
    got = call.run(function)
    testing.check_norm(got.result, call.widened(case.wide).run().result)
    if case.alone is not None:
        case.alone(call, function, got)


def measure(case: Case, backend: str, setting: Setting) -> Finding:
    """One figure. right: what is wrong with the result, or ok. in_l2: whether the L2 may hold what all timed calls read
    together, so that the time is not that of the memory."""
    with idlm_kernels.use_backend(backend):
        call, function = case.make(), getattr(idlm_kernels, case.op)
        right = testing.verdict(judge, case, call, function)
        copies = min(max(256_000_000 // case.bytes, 8), 64)
        shared = {name: call[name] for name in case.shared}
        rest = call.of(case.op, *(name for name in call.arguments if name not in shared))
        calls = [partial(function, **rest.mapped(Tensor.clone).arguments, **shared) for _ in range(copies)]
        time_of_one = setting.timer(calls)
    found: Finding = {
        "kind": "figure",
        "op": case.op,
        "backend": backend,
        "shape": case.shape,
        "microseconds": time_of_one,
        "floor_us": case.bytes / setting.bandwidth * 1e6,
        "right": right,
        "in_l2": copies * case.bytes <= setting.l2_bytes,
    }
    if case.peer and (peer := setting.peers.get(case.peer)):
        found |= {"peer": peer[0] + case.peer_note, "peer_us": peer[1] * case.peer_scale}
    return found


def read_peers(path: Path) -> Peers:
    """The fastest engine at each shape: (op, rows or batch, N or heads, K or KV heads, context)."""
    columns = ("op", "m_or_batch", "n_or_q_heads", "k_or_kv_heads", "kv_len")
    best: Peers = {}
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


class EagerRecorder:
    """Replays by running the step again, so that nothing but the recording differs."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        outcome = step()

        def replay() -> None:
            outcome.copy_(step())

        return replay, outcome


@contextmanager
def eager_steps() -> Iterator[None]:
    """Engines that are made meanwhile record nothing."""
    recorder = engine.CudaRecorder
    engine.CudaRecorder = EagerRecorder  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        engine.CudaRecorder = recorder  # type: ignore[misc]


PLANS: tuple[tuple[Any, int], ...] = (("ar", 2), ("chain", 4), ("quadratic", 4))


def plan_name(plan: str, stride: int) -> str:
    return plan if plan == "ar" else f"{plan} N={stride}"


def whole_text(result: GenerationResult) -> list[int]:
    if result.finish_reason != "length":
        raise RuntimeError(f"a text ended early: {result.error or result.finish_reason}")
    return result.token_ids


def check_decoding(generator: Generator, name: str, prompts: list[list[int]], tokens: int) -> Iterator[Finding]:
    """Strided decoding against AR, and eager steps against recorded ones."""
    for temperature in (0.0, 0.9):
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)

        def texts(plan: Any, stride: int, params: SamplingParams = params) -> list[list[int]]:
            return [whole_text(r) for r in generator.generate(prompts, params, plan=plan, stride=stride)]

        ar = texts("ar", 2)
        found = {plan_name(plan, stride): texts(plan, stride) for plan, stride in PLANS[1:]}
        with eager_steps():
            found["ar, eager"] = texts("ar", 2)
            found["quadratic N=4, eager"] = texts("quadratic", 4)
        for what, others in found.items():
            wrong = sum(a != b for a, b in zip(ar, others, strict=True))
            word = f"{wrong} of {len(prompts)} texts differ from AR" if wrong else "ok"
            yield {"kind": "exactness", "what": f"{name}, {what}, T={temperature}, {tokens} tokens", "verdict": word}


def step_figure(
    generator: Generator, setting: Setting, names: Finding, batch: int, context: int, plan: Any, stride: int
) -> Finding:
    """Milliseconds of a step on the host's clock, while all requests run.

    The weights are random, so hardly a draft is accepted; that changes no shape, and a step of a quadratic plan
    verifies drafts each time. A chain has them in every other step (`drafted` is the share of steps that had). Nothing
    is pretended: what EngineOptions.synthetic_acceptance adds to a step are some 200 small kernels that no real step
    has.
    """
    model, config, tokens = generator.model, generator.config, 2 * setting.tokens
    prompts = torch.randint(0, config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()
    weights = sum(x.numel() * x.element_size() for x in _weights(model))
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    floor = (weights + batch * (context + tokens / 2) * kv) / setting.bandwidth
    options = EngineOptions(max_num_seqs=batch, max_model_len=context + tokens, page_size=PAGE_SIZE)
    engine = Engine(model, None, generator.policy(plan, stride), "match", options)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [engine.submit(prompt, params, seed) for seed, prompt in enumerate(prompts)]
    running: set[int] = set()
    begin = end = 0.0
    steps = drafted = before = 0
    for request, _ in engine.events():
        now = time.perf_counter()
        if any(r.ended for r in requests):
            break
        if len(running) < batch:
            running.add(request.arrival)
            begin, before = now, _drafted(requests)
        elif request is requests[-1]:
            steps, end, drafted = steps + 1, now, _drafted(requests) - before
    for request in requests:
        if request.output.error:
            raise RuntimeError(request.output.error)
    if steps == 0:
        raise RuntimeError("a text ended before all had begun; more tokens are needed")
    seconds = end - begin
    return {
        "kind": "step",
        **names,
        "plan": plan_name(plan, stride),
        "batch": batch,
        "context": context,
        "drafted": drafted / (steps * batch),
        "step_ms": seconds / steps * 1e3,
        "floor_ms": floor * 1e3,
        "share": floor * steps / seconds,
        "tokens_per_second": batch * StepPlan(plan, stride).expected_tpf(ACCEPTANCE) * steps / seconds,
    }


def _drafted(requests: list[Any]) -> int:
    return sum(sum(request.output._verified[:1]) for request in requests)


def _weights(model: Transformer) -> Iterator[Tensor]:
    yield model.head
    for layer in model.layers:
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            yield projection.weight
            yield from projection.lora or ()


# The parts


def bandwidth_pieces(setting: Setting) -> Iterator[Piece]:
    def run() -> Iterator[Finding]:
        found = copy_bandwidth(setting.device, setting.timer, setting.copy_bytes)
        yield {"kind": "bandwidth", "bytes_per_second": found}

    yield "bandwidth", run


def check_pieces(setting: Setting) -> Iterator[Piece]:
    for name, module in setting.backends.items():
        for op in OPS:
            if hasattr(module, op):

                def run(name: str = name, module: ModuleType = module, op: str = op) -> Iterator[Finding]:
                    verdict = self_check.self_check(module, op, setting.device) or "ok"
                    yield {"kind": "check", "backend": name, "op": op, "verdict": verdict}

                yield f"self-check of {name} {op}", run


def kernel_pieces(setting: Setting) -> Iterator[Piece]:
    for case in setting.cases(setting.config, setting.device):
        for name, module in setting.backends.items():
            if hasattr(module, case.op):

                def run(case: Case = case, name: str = name) -> Iterator[Finding]:
                    yield measure(case, name, setting)

                yield f"{case.op} {case.shape} {name}", run


def decoding_pieces(setting: Setting, rank: int = 0) -> Iterator[Piece]:
    config, device = setting.config, setting.device
    adapted = "without an adapter" if rank == 0 else f"with an adapter of rank {rank}"

    @functools.cache
    def generator() -> Generator:  # at the first piece that needs it: some 16 GB
        adapter = random_adapter(config, device, rank) if rank else None
        return Generator(Transformer(RandomCheckpoint(config, device=device), device=device, adapter=adapter))

    def check(backend: str) -> Iterator[Finding]:
        random = torch.Generator().manual_seed(1)
        prompts = torch.randint(0, config.vocab_size, (3, 40), generator=random).tolist()
        with idlm_kernels.use_backend(backend):
            yield from check_decoding(generator(), f"{backend}, {adapted}", prompts, setting.tokens)

    def step(backend: str, eager: bool, *which: Any) -> Iterator[Finding]:
        names = {"model": adapted, "backend": backend, "how": "eager" if eager else "recorded"}
        with idlm_kernels.use_backend(backend):
            if eager:
                with eager_steps():
                    yield step_figure(generator(), setting, names, *which)
            else:
                yield step_figure(generator(), setting, names, *which)

    for backend in setting.decoders:
        yield f"decoding {adapted}, {backend}", functools.partial(check, backend)
    for batch, context in setting.contexts:
        for backend in reversed(setting.decoders):  # `auto`, which users get, first
            for plan, stride in PLANS:
                for eager in (False, True) if plan != "chain" and batch == 1 and backend == "auto" else (False,):
                    how = ", eager" if eager else ""
                    name = f"steps {adapted}, {backend}, {plan_name(plan, stride)}, batch {batch}{how}"
                    yield name, functools.partial(step, backend, eager, batch, context, plan, stride)


PARTS: dict[str, Callable[[Setting], Iterator[Piece]]] = {
    "bandwidth": bandwidth_pieces,
    "checks": check_pieces,
    "decoding": decoding_pieces,
    "adapter": functools.partial(decoding_pieces, rank=RANK),
    "kernels": kernel_pieces,
}
