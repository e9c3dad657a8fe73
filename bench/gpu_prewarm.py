"""Fill Triton's cache for sm_90 without touching a GPU: every kernel variant that the GPU day launches.

    python -m bench.gpu_prewarm [--parts selfcheck,report,decode,tiny,rows] [--claims DIR] [--launchers] [--list]

Runs the very calls of the self-checks, of bench.gpu_report and of the decodes on CPU tensors that hold no data (their
memory is never touched), with a launch that compiles and does not run. Several of these side by side share the work:
each variant is claimed by whoever meets it first (files in --claims). Needs TRITON_CACHE_DIR to be the same absolute
path as where the cache is used: Triton writes absolute paths into its index files.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # this process compiles; it shall not open a context on the card

import torch
from triton import knobs

from idlm_kernels.generate import warm
from idlm_kernels.generate.warm import gpu_target, use_dry_launches

ARGS: argparse.Namespace
COUNT = {"compiled": 0, "hits": 0, "skipped": 0, "launchers": 0, "launcher_seconds": 0.0}
SEEN: dict[str, str] = {}
SLOW: list[tuple[float, str]] = []


def claimed(**kwargs: Any) -> bool:
    """Triton's hook before a compilation: True skips it."""
    text = f"{kwargs['repr']}|{kwargs['compile']['key']}"
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    SEEN[key] = kwargs["fn"].name
    if ARGS.list:
        return True
    if ARGS.claims is None or warm.claimed(ARGS.claims, key):
        return False
    COUNT["skipped"] += 1
    return True


def compiled(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
    COUNT["hits" if cache_hit else "compiled"] += 1
    if not cache_hit:
        seconds = times.total / 1e6 if hasattr(times, "total") else 0.0
        SLOW.append((seconds, src.name))
        if ARGS.verbose:
            print(f"{time.process_time():7.1f} s cpu, {seconds:5.1f} s: {src.name}", file=sys.stderr, flush=True)
    if ARGS.launchers:
        start = time.perf_counter()
        COUNT["launchers"] += warm.build_launcher(src, metadata)
        COUNT["launcher_seconds"] += time.perf_counter() - start


def prepare() -> None:
    knobs.runtime.jit_cache_hook = claimed
    knobs.compilation.listener = compiled
    use_dry_launches(gpu_target("cuda:90"))


CPU = torch.device("cpu")


def nothing(*shape: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def selfcheck() -> None:
    """Each op of the Triton backend as its self-check calls it; the references are left out."""
    import idlm_kernels.triton as backend
    from idlm_kernels.ops import self_check as module
    from idlm_kernels.testing import calls

    module.check = lambda call, function, device: call.run(function, device)  # type: ignore[assignment]
    module.check_bits = module.check_close = calls.check_bits = lambda *a, **k: None  # type: ignore[assignment]
    for op, check in module.CHECKS.items():
        attempt(f"self-check {op}", lambda: check((backend, CPU)))


def report() -> None:
    """The kernels of bench.gpu_report at their shapes."""
    import idlm_kernels
    from bench import gpu_cases
    from idlm_kernels.model.random_weights import SHAPES
    from idlm_kernels.testing import calls, problems

    def no_pages(k: Any, v: Any, lengths: Any, page_size: int, **_: Any) -> dict[str, Any]:
        pages = -(-k.shape[1] // page_size) + 1
        caches = {f"{x}_cache": nothing(len(k) * pages, page_size, *k.shape[2:]) for x in "kv"}
        return {**caches, "page_table": torch.zeros(len(k), pages, dtype=torch.int32)}

    problems.paged = no_pages
    calls.Draw.normal = lambda self, *shape, scale=1.0, dtype=torch.bfloat16: nothing(*shape, dtype=dtype)  # type: ignore[method-assign]
    calls.Call.run = lambda self, function, device=None: calls.Ran(function(**self.arguments), self.arguments)  # type: ignore[assignment,method-assign]
    calls.check_bits = gpu_cases.check_bits = lambda *a, **k: None
    with idlm_kernels.use_backend("triton"):
        for case in gpu_cases.cases(SHAPES["qwen3-8b"], CPU):

            def run(case: Any = case) -> None:
                call, function = case.make(), getattr(idlm_kernels, case.op)
                got = call.run(function)
                if case.alone is not None:
                    case.alone(call, function, got)

            attempt(f"{case.op} {case.shape}", run)


class Recorder:
    """As CudaRecorder calls a step: once before, once to record; a replay runs it again."""

    def __call__(self, step: Any) -> Any:
        step()
        return step, step()


def fake_ops() -> None:
    """Launches compute nothing here, so what decides how a decode goes on is computed, or made up."""
    import idlm_kernels.triton as backend
    import python_ref
    from idlm_kernels.generate import engine, generator
    from idlm_kernels.ops import _dispatch

    def verify(real: Any) -> Any:
        def verify_accept(
            logits: Any, query_start_loc: Any, num_drafts: Any, drafts: Any, *rest: Any, **options: Any
        ) -> Any:
            a, tokens, next_drafts, count = real(logits, query_start_loc, num_drafts, drafts, *rest, **options)
            tokens.fill_(-1)[:, 0] = 5
            present = (query_start_loc[1:] > query_start_loc[:-1]).to(torch.int32)
            tokens[present == 0] = -1
            return a.zero_(), tokens, next_drafts.fill_(7), count.copy_(present * drafts.shape[1])

        return verify_accept

    def computed(real: Any, reference: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            real(*args, **options)
            return reference(*args, **options)

        return call

    backend.verify_accept = verify(backend.verify_accept)
    for op in ("plan_rows", "commit_step"):
        setattr(backend, op, computed(getattr(backend, op), getattr(python_ref, op)))
    _dispatch._chosen.clear()
    original = engine.Engine

    class RecordedEngine(original):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{"recorder": Recorder(), **options})

    generator.Engine = RecordedEngine
    global ENGINE
    ENGINE = RecordedEngine


ENGINE: Any = None


def empty_model(config: Any, rank: int, layers: int = 1, head: bool = False) -> Any:
    """A model whose weights nobody has written. One layer: all have the same shapes."""
    import dataclasses

    from idlm_kernels.model import Transformer
    from idlm_kernels.model.adapter import MODULES, Adapter

    config = dataclasses.replace(config, num_layers=layers)

    class Empty:
        name, path = "empty", Path("empty")
        shapes = config.tensor_shapes()

        def tensor(self, name: str) -> torch.Tensor:
            return nothing(*self.shapes[name])

    Empty.config = config
    adapter = None
    if rank:
        pairs = {}
        for name, shape in config.tensor_shapes().items():
            parts = name.split(".")
            if len(parts) > 4 and parts[4] in MODULES and name.endswith("weight"):
                pairs[int(parts[2]), parts[4]] = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
        adapter = Adapter("empty", rank, 0.5, torch.zeros(config.hidden_size), pairs)
        if head:
            from bench.gpu_cases import HEAD_WIDTH
            from idlm_kernels.model.adapter import RerankHead  # type: ignore[attr-defined]

            h, w = config.hidden_size, HEAD_WIDTH
            adapter.rerank_head = RerankHead(*(torch.zeros(s) for s in ((w, h), (w, h), (w, w), (h, w))))
    mean = torch.Tensor.mean
    torch.Tensor.mean = lambda self, *a, **k: nothing(self.shape[-1], dtype=torch.float32)  # of all embeddings
    try:
        model = Transformer(Empty(), dtype=torch.bfloat16, adapter=adapter)  # type: ignore[arg-type]
    finally:
        torch.Tensor.mean = mean
    model.dtype = torch.bfloat16
    model.norm = model.norm.bfloat16()
    for layer in model.layers:
        for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm"):
            if (x := getattr(layer, name)) is not None:
                setattr(layer, name, x.bfloat16())
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            if projection.lora is not None:
                projection.lora = projection.lora[0].bfloat16(), projection.lora[1].bfloat16()
    if model.mask_embedding is not None:
        model.mask_embedding = model.mask_embedding.bfloat16()
    return model


def decode() -> None:
    """Whole decodes as bench.gpu_report makes them, with random weights of Qwen3-8B, plain and with an adapter."""
    from bench import gpu_parts
    from idlm_kernels.model.random_weights import SHAPES

    decodes(SHAPES["qwen3-8b"], (0, 128), (40, 40, 40), gpu_parts.Setting.tokens, gpu_parts.PLANS)
    steps(((1, 1024), (8, 1024)))


def tiny() -> None:
    """The tiny models of gpu_checks.py."""
    from bench import gpu_checks as g

    for config, rank in g.TINY:
        how = {"page_size": g.TINY_PAGE_SIZE, "rules": ("match", "rejection")}
        decodes(config, (rank,), g.TINY_LENGTHS, g.TINY_TOKENS, g.TINY_PLANS, **how)


def decodes(
    config: Any, ranks: Any, lengths: Any, tokens: int, plans: Any, page_size: int = 64, rules: Any = ("match",)
) -> None:
    """Texts of `tokens` after prompts of these lengths; tables are as wide as they ask for."""
    import idlm_kernels
    from idlm_kernels.generate import Generator, SamplingParams

    fake_ops()
    prompts = [[(i * j) % config.vocab_size for j in range(n)] for i, n in enumerate(lengths, 1)]
    params = SamplingParams(max_tokens=tokens, temperature=0.9, seed=1, ignore_eos=True)
    with idlm_kernels.use_backend("triton"), torch.inference_mode():
        for rank in ranks:
            generator = Generator(empty_model(config, rank), page_size=page_size)
            for verify, (plan, stride) in itertools.product(rules, plans):
                if verify == "rejection" and (plan, stride) != ("quadratic", 4):
                    continue
                run = functools.partial(generator.generate, prompts, params, plan=plan, stride=stride, verify=verify)
                attempt(f"decode rank={rank} {plan}", lambda run=run: results(run()))


def steps(contexts: Any) -> None:
    """Steps of whole batches, as bench.gpu_report times them."""
    import idlm_kernels
    from bench import gpu_parts
    from bench.gpu_cases import PAGE_SIZE
    from idlm_kernels.generate import EngineOptions, Generator, SamplingParams
    from idlm_kernels.model.random_weights import SHAPES

    with idlm_kernels.use_backend("triton"), torch.inference_mode():
        for rank in (0, 128):
            generator = Generator(empty_model(SHAPES["qwen3-8b"], rank))
            for batch, context in contexts:
                options = EngineOptions(
                    max_num_seqs=batch, max_model_len=context + 2 * gpu_parts.Setting.tokens, page_size=PAGE_SIZE
                )
                for plan, stride in gpu_parts.PLANS:

                    def run(plan: Any = plan, stride: int = stride, options: Any = options, batch: int = batch) -> None:
                        engine = ENGINE(generator.model, None, generator.policy(plan, stride), "match", options)
                        params = SamplingParams(max_tokens=9, ignore_eos=True)
                        requests = [engine.submit([1] * context, params, seed) for seed in range(batch)]
                        for _ in engine.events():
                            pass
                        for request in requests:
                            if request.output.error:
                                raise RuntimeError(request.output.error)

                    attempt(f"steps rank={rank} {plan} batch={batch}", run)


def results(found: Any) -> None:
    for result in found:
        if result.error:
            raise RuntimeError(result.error)


def rows() -> None:
    """The row-invariance checks of gpu_checks.py."""
    from bench import gpu_checks

    gpu_checks.normal = lambda device, *shape, scale=1.0: nothing(*shape)
    gpu_checks.same = lambda *a: True
    attempt("rows", lambda: [None for _ in gpu_checks.backend_rows(CPU, "triton")])


FAILED: list[str] = []


def attempt(name: str, run: Any) -> None:
    try:
        run()
    except Exception as error:
        FAILED.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        if ARGS.verbose:
            traceback.print_exc()


def main() -> int:
    global ARGS
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="rows,selfcheck,decode,tiny,report")
    parser.add_argument("--claims", type=Path)
    parser.add_argument("--launchers", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--turn", type=int, default=0, help="begin with another part than the workers beside it")
    ARGS = parser.parse_args()
    if ARGS.claims:
        ARGS.claims.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare()
    start = time.perf_counter()
    # The order of decode before report matters: decode replaces ops that report does not mind.
    with torch.inference_mode():
        parts = ARGS.parts.split(",")
        turn = ARGS.turn % len(parts)
        for part in parts[turn:] + parts[:turn]:
            begun = time.perf_counter()
            attempt(part, globals()[part])
            print(f"{part}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    SLOW.sort(reverse=True)
    record = {
        **COUNT,
        "variants": len(SEEN),
        "wall": time.perf_counter() - start,
        "failed": FAILED,
        "slowest": SLOW[:8],
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
