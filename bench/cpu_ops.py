"""The ops of the CPU backend at the shapes of SmolLM2-135M, beside plain torch: microseconds by number of rows.

    python -m bench.cpu_ops [--threads 2]

Times are the least of many repetitions in a quarter of a second per figure: what a quiet machine gives. Plain torch
(F.linear, scaled_dot_product_attention, ...) is what a decode would use if its bits could depend on the row count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm_kernels import cpu, testing
from idlm_kernels.cpu import gemm, noise

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 9, 3, 64, 49_152
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCAB, HIDDEN),
}
ROWS = (1, 4, 7, 16, 64)
PAGE_SIZE = 16

microseconds = partial(testing.microseconds, pick=min)  # what a quiet machine gives


def row(name: str, cells: list[float]) -> None:
    print(f"{name:<34}" + "".join(f"{cell:>10,.0f}" for cell in cells), flush=True)


def linears() -> None:
    for name, shape in LINEARS.items():
        weight = torch.randn(shape).half()
        fp32 = weight.float()
        products: dict[str, Callable[[Tensor], Tensor]] = {}
        for strategy in gemm.STRATEGIES[: 1 if name == "head" else 3]:
            try:
                products[strategy.strategy] = strategy(weight)
            except (RuntimeError, AttributeError) as error:
                print(f"{name} {strategy.strategy}: not in this torch build ({error})")
        products["plain torch, fp32"] = lambda x, fp32=fp32: F.linear(x, fp32)
        if name != "head":
            half = fp32.bfloat16()
            products["plain torch, bf16"] = lambda x, half=half: F.linear(x.bfloat16(), half)
        for strategy, product in products.items():
            inputs = [torch.randn(rows, shape[1]) for rows in ROWS]
            row(f"linear {name} {strategy}", [microseconds(lambda x=x, p=product: p(x)) for x in inputs])
    weight = cpu.prepare_weight(torch.randn(LINEARS["qkv"]).half())
    widths, rank = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], 16
    a, b = torch.randn(3 * rank, HIDDEN), torch.randn(sum(widths), rank)
    cells = []
    for rows in ROWS:
        x, lora_mask = torch.randn(rows, HIDDEN), torch.arange(rows) >= (rows + 1) // 2
        cells.append(
            microseconds(
                lambda x=x, lora_mask=lora_mask: cpu.gated_lora_linear(
                    x, weight, a, b, lora_mask, 2.0, output_sizes=widths
                )
            )
        )
    row("gated_lora_linear qkv, rank 16", cells)


def attention_arguments(context: int, rows: int) -> tuple[Tensor, ...]:
    pages = -(-context // PAGE_SIZE)
    k, v = (torch.randn(KV_HEADS, pages, PAGE_SIZE, HEAD_DIM).permute(1, 2, 0, 3) for _ in "kv")
    return (
        torch.randn(rows, HEADS, HEAD_DIM),
        k,
        v,
        torch.arange(pages, dtype=torch.int32).unsqueeze(0),
        torch.tensor([context], dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32),
    )


def attention() -> None:
    def ours(context: int, rows: int) -> float:
        args = attention_arguments(context, rows)
        return microseconds(lambda: cpu.strided_attention(*args, max_query_len=rows))

    def plain(context: int, rows: int) -> float:
        q = torch.randn(1, HEADS, rows, HEAD_DIM)
        k, v = (torch.randn(1, KV_HEADS, context, HEAD_DIM) for _ in "kv")
        mask = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
        return microseconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))

    for context in (64, 512, 2048):
        row(f"attention, {context} slots", [ours(context, rows) for rows in ROWS])
        row("  plain torch, K and V in place", [plain(context, rows) for rows in ROWS])
    row("attention, prefill of 512 rows", [ours(512, 512)])
    row("  plain torch", [plain(512, 512)])


def layers() -> None:
    weight, rotary = torch.randn(HIDDEN), torch.randn(1024, HEAD_DIM)
    caches = [torch.zeros(KV_HEADS, 64, PAGE_SIZE, HEAD_DIM).permute(1, 2, 0, 3) for _ in "kv"]
    cells: dict[str, list[float]] = {"rms_norm": [], "silu_and_mul": [], "qk_norm_rope_append": []}
    for rows in ROWS:
        x, wide, qkv = (torch.randn(rows, width) for width in (HIDDEN, 2 * INTERMEDIATE, LINEARS["qkv"][0]))
        at = torch.arange(rows)
        cells["rms_norm"].append(microseconds(lambda x=x: cpu.rms_norm(x, weight, 1e-5)))
        cells["silu_and_mul"].append(microseconds(lambda wide=wide: cpu.silu_and_mul(wide)))
        cells["qk_norm_rope_append"].append(
            microseconds(lambda qkv=qkv, at=at: cpu.qk_norm_rope_append(qkv, at, rotary, at, *caches))
        )
    for name, values in cells.items():
        row(name, values)


def sampling() -> None:
    kinds = {
        "greedy": (0.0, 0, 1.0),
        "T": (0.8, 0, 1.0),
        "T, top-k, top-p": (0.8, 50, 0.95),
        "T, top-p": (0.8, 0, 0.95),
    }
    for kind, (temperature, top_k, top_p) in kinds.items():
        for kept in (False, True) if kind == "T" else (False,):
            cells = []
            for rows in ROWS:
                args = (
                    torch.randn(rows, VOCAB) * 3,
                    torch.arange(rows),
                    torch.full((rows,), temperature),
                    torch.full((rows,), top_k, dtype=torch.int32),
                    torch.full((rows,), top_p),
                    torch.zeros(rows),
                    torch.arange(rows),
                    VOCAB,
                    -1,
                )

                def run(args: tuple = args, kept: bool = kept) -> None:
                    if not kept:
                        noise._kept.clear()
                    cpu.sample_rows(*args)

                cells.append(microseconds(run))
            row(f"sample_rows, {kind}{', noise kept' if kept else ''}", cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads; us")
    print(f"{'rows':<34}" + "".join(f"{rows:>10}" for rows in ROWS))
    with torch.inference_mode():
        for part in (linears, attention, layers, sampling):
            part()


if __name__ == "__main__":
    main()
