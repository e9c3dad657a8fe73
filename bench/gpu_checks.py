"""What only hardware can show, in pieces that fail apart: each family in a process of its own, under a time limit.

    python -m bench.gpu_checks facts | selfcheck | rows | tiny     # all of it, processes side by side
    python -m bench.gpu_checks one selfcheck triton linear         # one piece, in this process

A CUDA error stays with its process, and a kernel that waits for ever takes its process with it: so no piece shares a
process with another. Last line of each: VERDICT: ok, or what is wrong. Exit status 0, 1 (wrong), 124 (too late).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import faulthandler
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.testing import check_bits, check_norm, microseconds, same_bits, verdict
from idlm_kernels.testing.problems import paged, quadratic_masks

REPEAT = 4  # launches of the same thing: what differs from one to the next is a race

# (name, K, widths of the slices) of the linear layers of Qwen3-8B
LAYERS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("o", 4096, (4096,)),
    ("qkv", 4096, (4096, 1024, 1024)),
    ("gate_up", 4096, (12288, 12288)),
    ("down", 12288, (4096,)),
    ("lm_head", 4096, (151936,)),
)
COUNTS = (1, 2, 7, 8, 16, 56, 63, 64, 65, 128, 130)  # rows of a call, compared with the same rows among 512
CONTEXTS = (1, 37, 255, 256, 257, 1023, 4096, 20000)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, VOCAB = 4096, 151_936


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).bfloat16()


Found = Iterator[tuple[str, str]]  # what was looked at, and "ok" or what is wrong


def judged(what: str, *bits: tuple[Tensor, Tensor]) -> tuple[str, str]:
    wrong = [word for a, b in bits if (word := verdict(check_bits, a, b)) != "ok"]
    return what, f"bits differ in {len(wrong)} of {len(bits)} comparisons; {wrong[0]}" if wrong else "ok"


def close(what: str, got: Tensor, wanted: Tensor) -> tuple[str, str]:
    return what, verdict(check_norm, got, wanted)


def layer_rows(device: torch.device, name: str) -> Found:
    """One linear layer: rows alone and among 512, any number of them, without and with the adapter."""
    import idlm_kernels

    k, output_sizes = next((k, output_sizes) for n, k, output_sizes in LAYERS if n == name)
    n = sum(output_sizes)
    x, weight = normal(device, 512, k), normal(device, n, k, scale=k**-0.5)
    a, b = normal(device, 128 * len(output_sizes), k, scale=k**-0.5), normal(device, n, 128, scale=0.3)
    lora_mask = torch.arange(512, device=device) % 3 != 0
    fused = name == "gate_up"

    def run(rows: slice, adapter: bool, nan: bool = False) -> Tensor:
        op = (
            idlm_kernels.linear_silu_and_mul
            if fused
            else idlm_kernels.gated_lora_linear
            if adapter
            else idlm_kernels.linear
        )
        if not adapter:
            return op(x[rows], weight)
        factors = (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan)) if nan else (a, b)
        options = dict(zip(("lora_a", "lora_b", "lora_mask", "scale"), (*factors, lora_mask[rows], 0.5), strict=True))
        return op(x[rows], weight, **options, output_sizes=output_sizes)

    whole = run(slice(0, 512), False)
    exact = x[:64].float() @ weight.float().T
    if fused:
        exact = torch.nn.functional.silu(exact[:, : n // 2].bfloat16().float()) * exact[:, n // 2 :].bfloat16().float()
    yield close(f"{name}: values", whole[:64], exact)
    del exact
    for adapter in (False, True) if name != "lm_head" else (False,):
        among = run(slice(0, 512), adapter) if adapter else whole
        if adapter:
            yield judged(f"{name}: clean rows beside an adapter", (among[~lora_mask], whole[~lora_mask]))
            yield judged(
                f"{name}: clean rows beside NaN", (run(slice(0, 512), True, True)[~lora_mask], whole[~lora_mask])
            )
            yield (
                f"{name}: the adapter acts",
                "ok" if not same_bits(among[lora_mask], whole[lora_mask]) else "it changes nothing",
            )
        for count in COUNTS:
            pairs = []
            for first in dict.fromkeys((0, 5, 512 - count)):
                rows = slice(first, first + count)
                pairs += [(run(rows, adapter), among[rows]) for _ in range(REPEAT if first == 0 else 1)]
            yield judged(f"{name}: {count} rows{' with the adapter' if adapter else ''}", *pairs)


def attention_rows(device: torch.device) -> Found:
    """Rows as AR, a chain, a quadratic step and a prefill see them: the same bits, alone and in a batch."""
    import idlm_kernels
    import python_ref

    heads, kv_heads, dim = HEADS, KV_HEADS, HEAD_DIM
    for context in CONTEXTS:
        slots = context + 512
        q = normal(device, 512, heads, dim)
        k, v = (normal(device, slots, kv_heads, dim) for _ in range(2))

        def pages_of(page_size: int, copies: int = 1) -> tuple[Tensor, ...]:
            each = [x.expand(copies, *x.shape) for x in (k, v)]
            return tuple(paged(*each, [slots] * copies, page_size).values())

        def run(
            rows: Tensor, cache: tuple[Tensor, ...], lengths: list[int], counts: list[int], **options: Any
        ) -> Tensor:
            start = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
            seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
            most = options.pop("most", max(counts))
            return idlm_kernels.strided_attention(rows, *cache, seq_lens, start, max_query_len=most, **options)

        cache = pages_of(64)
        prefill = run(q, cache, [slots], [512])
        if context <= 1023:
            start = torch.tensor([0, 16], dtype=torch.int32, device=device)
            lengths = torch.tensor([context + 16], dtype=torch.int32, device=device)
            wide = (x.float() for x in cache[:2])
            exact = python_ref.strided_attention(q[:16].float(), *wide, cache[2], lengths, start, max_query_len=16)
            yield close(f"context {context}: values", prefill[:16], exact)
        for count in (1, 4, 7, 16, 64, 130):
            pairs = [(run(q[:count], cache, [context + count], [count]), prefill[:count]) for _ in range(REPEAT)]
            yield judged(f"context {context}: {count} rows and a prefill of 512", *pairs)
        last = run(q[511:], cache, [slots], [1])
        yield judged(f"context {context}: the last row of a prefill alone", (last, prefill[511:]))
        for stride in (4, 8):
            count, tail = stride * stride, torch.tensor(quadratic_masks(stride), device=device)
            pairs = []
            for _ in range(REPEAT):
                got = run(q[:count], cache, [context + count], [count], tree_mask=tail)
                pairs.append((got[:stride], prefill[:stride]))
            yield judged(f"context {context}: clean rows of a quadratic step of {count}", *pairs)
        odd = pages_of(24)
        yield judged(f"context {context}: pages of 24", (run(q[:7], odd, [context + 7], [7]), prefill[:7]))
        if context <= 4096:
            many = pages_of(64, 33)
            batch = q[:7].repeat(33, 1, 1)
            pairs = []
            for _ in range(REPEAT):
                got = run(batch, many, [context + 7] * 33, [7] * 33)
                pairs += [(got[i * 7 : i * 7 + 7], prefill[:7]) for i in (0, 16, 32)]
            yield judged(f"context {context}: 7 rows in a batch of 33", *pairs)


def other_rows(device: torch.device) -> Found:
    """Norms, rotary, activation and sampling: a row alone and among others."""
    import idlm_kernels

    x, weight, residual = normal(device, 512, HIDDEN), normal(device, HIDDEN), normal(device, 512, HIDDEN)
    whole, summed = idlm_kernels.rms_norm(x, weight, 1e-6), residual.clone()
    added = idlm_kernels.rms_norm(x, weight, 1e-6, residual=summed)
    for rows in (slice(0, 1), slice(3, 10), slice(100, 116), slice(448, 512)):
        own = residual[rows].clone()
        pairs = [(idlm_kernels.rms_norm(x[rows], weight, 1e-6), whole[rows])]
        pairs += [(idlm_kernels.rms_norm(x[rows], weight, 1e-6, residual=own), added[rows]), (own, summed[rows])]
        yield judged(f"rms_norm: rows {rows.start} to {rows.stop}", *pairs)
    heads, kv_heads, dim = HEADS, KV_HEADS, HEAD_DIM
    qkv, table = normal(device, 64, (heads + 2 * kv_heads) * dim), torch.randn(4096, dim, device=device)
    weights = {"q_weight": normal(device, dim), "k_weight": normal(device, dim)}
    where = torch.arange(64, device=device)

    def rope(rows: slice) -> tuple[Tensor, ...]:
        k, v = (torch.zeros(2, 64, kv_heads, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        y = idlm_kernels.qk_norm_rope_append(qkv[rows], where[rows] + 9, table, where[rows], k, v, **weights)
        return y, k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]

    among = rope(slice(0, 64))
    for rows in (slice(0, 1), slice(3, 10), slice(16, 32)):
        yield judged(
            f"qk_norm_rope_append: rows {rows.start} to {rows.stop}",
            *zip(rope(rows), (t[rows] for t in among), strict=True),
        )
    logits = normal(device, 64, VOCAB, scale=3.0)
    i = torch.arange(64, device=device)
    each = ((i % 4) * 0.4, (i % 3).to(torch.int32) * 20, 1.0 - 0.1 * (i % 2), 0.02 * (i % 5 == 0), i * 977)
    each = tuple(t.float() if t.is_floating_point() else t for t in each)
    ids = idlm_kernels.sample_rows(logits, i + 100, *each, VOCAB, -1)
    for rows in (slice(0, 1), slice(7, 14), slice(48, 64)):
        alone = idlm_kernels.sample_rows(logits[rows], i[rows] + 100, *(t[rows] for t in each), VOCAB, -1)
        yield f"sample_rows: rows {rows.start} to {rows.stop}", "ok" if torch.equal(alone, ids[rows]) else "ids differ"


FAMILIES = (*(name for name, *_ in LAYERS), "attention", "other")


def family_rows(device: torch.device, family: str) -> Found:
    if family == "attention":
        yield from attention_rows(device)
    elif family == "other":
        yield from other_rows(device)
    else:
        yield from layer_rows(device, family)


def backend_rows(device: torch.device, backend: str, *families: str) -> Found:
    import idlm_kernels

    with idlm_kernels.use_backend(backend), torch.inference_mode():
        for family in families or FAMILIES:
            yield from family_rows(device, family)


# Whole decodes of tiny models


def _tiny_configs() -> list[tuple[Any, int]]:
    from idlm_kernels.model.random_weights import SHAPES

    qwen = dataclasses.replace(
        SHAPES["qwen3-8b"],
        vocab_size=5003,
        hidden_size=512,
        intermediate_size=1024,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
    )
    llama = dataclasses.replace(
        qwen,
        architecture="llama",
        qk_norm=False,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return [(qwen, 0), (qwen, 16), (llama, 16)]


class _LazyTiny:
    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter(_tiny_configs())


TINY = _LazyTiny()
TINY_TOKENS, TINY_LENGTHS, TINY_PAGE_SIZE = 96, (40, 5, 300), 16
TINY_PLANS = (("ar", 2), ("chain", 4), ("quadratic", 4), ("quadratic", 8), ("chain", 8))


def tiny_decodes(device: torch.device, backend: str) -> Found:
    """AR against chain and quadratic, greedy and sampled; recorded and eager; `auto` and `triton`; `rejection` runs."""
    import idlm_kernels
    from bench.gpu_parts import EagerRecorder, random_adapter
    from idlm_kernels.generate import Generator, SamplingParams, engine
    from idlm_kernels.generate.graphs import CudaRecorder
    from idlm_kernels.model import Transformer
    from idlm_kernels.model.random_weights import RandomCheckpoint

    prompts = [[(7 * i * j + i) % 5003 for j in range(n)] for i, n in enumerate(TINY_LENGTHS, 1)]
    with idlm_kernels.use_backend(backend), torch.inference_mode():
        for config, rank in TINY:
            adapter = random_adapter(config, device, rank) if rank else None
            generator = Generator(
                Transformer(RandomCheckpoint(config, device=device), device=device, adapter=adapter),
                page_size=TINY_PAGE_SIZE,
            )
            name = f"{config.architecture} rank={rank}"
            for temperature, top_p in ((0.0, 1.0), (0.9, 1.0), (1.2, 0.8)):
                params = SamplingParams(
                    max_tokens=TINY_TOKENS, temperature=temperature, top_p=top_p, seed=1, ignore_eos=True
                )
                texts = {}
                for how, recorder in (("recorded", CudaRecorder), ("eager", EagerRecorder)):
                    engine.CudaRecorder = recorder  # type: ignore[misc,assignment]
                    for plan, stride in TINY_PLANS:
                        if how == "eager" and (plan, stride) not in (("ar", 2), ("quadratic", 4)):
                            continue
                        found = generator.generate(prompts, params, plan=plan, stride=stride)  # type: ignore[arg-type]
                        if errors := [r.error for r in found if r.error or r.finish_reason != "length"]:
                            yield f"{name} T={temperature} {plan} {stride} {how}", f"ended early: {errors}"
                        texts[plan, stride, how] = [r.token_ids for r in found]
                wanted = texts["ar", 2, "recorded"]
                for key, text in texts.items():
                    wrong = sum(a != b for a, b in zip(text, wanted, strict=True))
                    verdict = "ok" if wrong == 0 else f"{wrong} of {len(prompts)} texts differ from AR"
                    yield f"{name} T={temperature} top_p={top_p} {key[0]} N={key[1]} {key[2]}", verdict
            engine.CudaRecorder = CudaRecorder  # type: ignore[misc]
            params = SamplingParams(max_tokens=TINY_TOKENS, temperature=1.0, seed=1, ignore_eos=True)
            found = generator.generate(prompts, params, plan="quadratic", stride=4, rule="rejection")
            bad = [r.error or r.finish_reason for r in found if r.finish_reason != "length"]
            yield f"{name} rejection runs", "ok" if not bad else str(bad)


# Pieces and processes


def facts(device: torch.device, output: str = "") -> Found:
    """output: a file of JSON that is to say on what all else was found."""
    from triton.runtime.cache import triton_key

    import idlm_kernels.native
    from idlm_kernels.ops._dispatch import versions

    p = torch.cuda.get_device_properties(device)
    environment = {
        **versions(device),
        "compute capability": f"{p.major}.{p.minor}",
        "SMs": str(p.multi_processor_count),
        "memory": f"{p.total_memory / 2**30:.1f} GiB",
        "L2": f"{p.L2_cache_size >> 20} MiB",
        "python": platform.python_version(),
        "idlm_kernels": idlm_kernels.__version__,
        "native": idlm_kernels.native.status(),
        "triton key": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, fact in environment.items():
        print(f"{name}: {fact}")
    if output:
        Path(output).write_text(json.dumps(environment, indent=1) + "\n")
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    times = [2 * (2 << 30) / microseconds(copy, device=device, pick=pick) / 1e6 for pick in (statistics.median, min)]
    print(f"copy of 2 GiB: {times[0]:.2f} TB/s median, {times[1]:.2f} best")
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    flops = 2 * 8192**3 / microseconds(lambda: a @ b, device=device) / 1e6
    print(f"8192^3 bf16 product: {flops:.0f} TFLOP/s")
    yield "device", "ok" if (p.major, p.minor) == (9, 0) else f"sm_{p.major}{p.minor} is no H100"


def selfcheck(device: torch.device, backend: str, op: str) -> Found:
    from idlm_kernels.ops import _dispatch
    from idlm_kernels.ops.self_check import self_check

    found = _dispatch._backends[backend]
    if (reason := found.unusable(device)) is not None:
        yield f"{backend} {op}", f"not usable: {reason}"
        return
    start = time.monotonic()
    yield f"{backend} {op}", self_check(found.load(), op, device) or "ok"
    print(f"{backend} {op}: {time.monotonic() - start:.1f} s")


_compilations = [0, 0, 0.0]  # from the cache, made here, seconds of the latter


def count_compilations() -> None:
    from triton import knobs

    def listener(*, times: Any, cache_hit: bool, **_: Any) -> None:
        _compilations[0 if cache_hit else 1] += 1
        if not cache_hit:
            _compilations[2] += times.total / 1e6

    knobs.compilation.listener = listener


def tell_compilations() -> None:
    hits, made, seconds = _compilations
    print(f"Triton: {hits} kernels from the cache, {made} compiled in {seconds:.1f} s", flush=True)


def one(what: str, *rest: str) -> int:
    """A piece on the GPU, in this process."""
    if not torch.cuda.is_available():
        print("VERDICT: torch sees no CUDA device here")
        return 3
    count_compilations()
    code = told(found_by(what, torch.device("cuda", 0), *rest), torch.cuda.synchronize)
    tell_compilations()
    return code


def found_by(what: str, device: torch.device, *rest: str) -> Found:
    """What a piece finds, and at its end whether the kernels that it loaded spill."""
    run = {"facts": facts, "selfcheck": selfcheck, "tiny": tiny_decodes, "rows": backend_rows}[what]
    yield from run(device, *rest)  # type: ignore[operator]
    if what != "facts":
        from idlm_kernels.triton import spills

        words = spills()
        yield "registers", "ok" if not words else f"kernels spill, in words per thread: {words}"


def told(findings: Found, synchronize: Any) -> int:
    """Print what is wrong and a verdict; the exit status."""
    good = 0
    bad: list[str] = []
    try:
        for name, verdict in findings:
            synchronize()
            if verdict == "ok":
                good += 1
            else:
                bad.append(f"{name}: {verdict}")
                print(f"WRONG {name}: {verdict}", flush=True)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        bad.append(f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    print(
        f"VERDICT: ok, {good} checks"
        if not bad
        else f"VERDICT: {len(bad)} of {good + len(bad)} wrong: {'; '.join(bad)[:600]}"
    )
    return int(bool(bad))


def pieces(what: str, output: str = "") -> list[tuple[str, ...]]:
    if what == "selfcheck":
        import idlm_kernels.native.backend as native
        import idlm_kernels.triton as triton
        from idlm_kernels.ops.self_check import CHECKS

        return [
            (what, name, op)
            for name, module in (("triton", triton), ("cuda", native))
            for op in CHECKS
            if hasattr(module, op)
        ]
    if what == "rows":
        return [(what, "triton", family) for family in FAMILIES]
    if what == "tiny":
        return [(what, "triton"), (what, "auto")]
    return [(what, output) if output else (what,)]


def side_by_side(what: str, seconds: float, jobs: int, output: str = "") -> int:
    """Each piece in a process of its own; those that do not answer in time are killed."""
    stop = time.monotonic() + seconds

    def run(piece: tuple[str, ...]) -> tuple[tuple[str, ...], int, str]:
        left = stop - time.monotonic()
        if left < 2:
            return piece, 124, "VERDICT: not begun, no time left"
        command = [sys.executable, "-X", "faulthandler", "-m", "bench.gpu_checks", "one", *piece]
        command += ["--limit", str(max(left - 2, 1))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            text = process.communicate(timeout=left)[0]
            return piece, process.returncode, text
        except subprocess.TimeoutExpired:
            process.kill()
            return piece, 124, process.communicate()[0] + "\nVERDICT: no answer in time (a kernel that waits for ever?)"

    worst = good = 0
    lines = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for piece, code, text in pool.map(run, pieces(what, output)):
            last = next(
                (line for line in text.splitlines()[::-1] if line.startswith("VERDICT")), f"VERDICT: ended with {code}"
            )
            print(f"===== {' '.join(piece)} (status {code})\n{text[-6000:]}", flush=True)
            lines.append(f"{' '.join(piece[1:]) or what}: {last.removeprefix('VERDICT: ')}")
            worst = max(worst, code if code >= 0 else 128 - code)
            good += code == 0
    print("=====")
    for line in lines:
        print(line)
    wrong = [line for line in lines if ": ok" not in line]
    print(f"VERDICT: {good} of {len(lines)} pieces ok" + (f"; {' | '.join(wrong)[:900]}" if wrong else ""))
    return min(worst, 125)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("facts", "selfcheck", "rows", "tiny", "one"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--limit", type=float, default=0)
    parser.add_argument("--output", default="", help="of facts: a file of JSON")
    args = parser.parse_args()
    if (
        given := os.environ.get("PHASE_SECONDS")
    ) and args.what != "one":  # of gpu_day.sh: end in time to say what was found
        args.seconds = min(args.seconds, float(given) - 4)
    if args.limit:
        faulthandler.dump_traceback_later(args.limit, exit=False)
    if args.what == "one":
        return one(*args.rest)
    return side_by_side(args.what, args.seconds, args.jobs, args.output)


if __name__ == "__main__":
    sys.exit(main())
