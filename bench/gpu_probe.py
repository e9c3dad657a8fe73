"""Which matrix instructions of this card give an output the same bits? What no emulator can say.

    python3 -m bench.gpu_probe            # a minute; last line: VERDICT: ...

One product [M, K] x [K, N] of bf16 with fp32 sums, cut into tiles of different shapes, K always in the same order. Per
tile shape the instruction that Triton chose is read off the PTX: wgmma m64nNk16 of several widths N (from shared
memory), the same with fp16, and mma.sync m16n8k16 for tiles below 64 rows. The bits of every output are compared with
those of the 64 x 64 tile. Equal bits mean that a row may be computed by either; a difference anywhere, that it may not.
Inputs: normal; normal times powers of two from 2^-20 to 2^20 (order and truncation of sums show); with Inf and NaN.
On the emulator all shapes are equal by construction: only a card can answer.
Also: is a product with operands swapped (D^T = B^T A^T) the same bits; are launches repeatable.
"""

from __future__ import annotations

import re
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def _product(gA, gB, gC, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(gA + m[:, None] * K + k[None, :])
        b = tl.load(gB + n[:, None] * K + k[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(gC + m[:, None] * N + n[None, :], acc)


def product(a, b, bm, bn, bk, warps):
    c = torch.full((a.shape[0], b.shape[0]), float("nan"), dtype=torch.float32, device=a.device)
    grid = (a.shape[0] // bm, b.shape[0] // bn)
    compiled = _product[grid](a, b, c, b.shape[0], K=a.shape[1], BM=bm, BN=bn, BK=bk, num_warps=warps)
    ptx = compiled.asm["ptx"]
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    found = sorted(set(re.findall(r"(?:wgmma\.mma_async\.sync\.aligned|mma\.sync\.aligned)\.(m\d+n\d+k\d+)", ptx)))
    return c, ("wgmma " if "wgmma" in ptx else "mma.sync ") + ",".join(found)


def inputs(kind, m, n, k, dtype, device):
    g = torch.Generator().manual_seed(7)
    a, b = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g)
    if kind == "wide":
        a = a * torch.exp2(
            torch.randint(-20, 21, (m, k), generator=g).float()
            if dtype == torch.bfloat16
            else torch.randint(-6, 7, (m, k), generator=g).float()
        )
    if kind == "special":
        a[3, 5], a[9, 60], b[11, 7] = float("inf"), float("nan"), float("-inf")
    return a.to(dtype).to(device), b.to(dtype).to(device)


SIZE, DEPTHS = 256, (4096,)
DTYPES = (torch.bfloat16, torch.float16)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    m = n = SIZE
    differ = []
    for dtype in DTYPES:
        for k in DEPTHS:
            for kind in ("normal", "wide", "special"):
                a, b = inputs(kind, m, n, k, dtype, device)
                base, name = product(a, b, 64, 64, 64, 4)
                again, _ = product(a, b, 64, 64, 64, 4)
                exact = a.double() @ b.double().T
                error = float(((base.double() - exact).abs() / exact.abs().clamp(min=1e-30)).nan_to_num(0, 0, 0).max())
                name = f"{name}, largest relative error {error:.3g}"
                print(f"{dtype} K={k} {kind}: 64x64 is {name}, repeatable {bits(base, again)}")
                for bm, bn, bk, warps in (
                    (64, 16, 64, 4), (64, 32, 64, 4), (64, 128, 64, 4), (64, 256, 64, 4), (128, 64, 64, 4),
                    (128, 128, 64, 8), (64, 64, 32, 4), (64, 64, 128, 4), (16, 64, 64, 4), (32, 32, 64, 4),
                    (16, 16, 64, 1),
                ):  # fmt: skip
                    if k % bk or m % bm or n % bn:
                        continue
                    try:
                        c, name = product(a, b, bm, bn, bk, warps)
                    except Exception as fault:  # a shape that does not compile is no answer
                        print(f"    {bm}x{bn}x{bk}: {type(fault).__name__}: {str(fault)[:90]}")
                        continue
                    same = bits(c, base)
                    print(f"    {bm}x{bn}x{bk}, {warps} warps, {name}: {'equal' if same == 'equal' else same}")
                    if same != "equal":
                        differ.append(f"{name} ({bm}x{bn}x{bk}, {dtype}, K={k}, {kind})".replace("torch.", ""))
                swapped, name = product(b, a, 64, 64, 64, 4)
                same = bits(swapped.T, base)
                print(f"    swapped operands, {name}: {same}")
                if same != "equal":
                    differ.append(f"swapped ({dtype}, K={k}, {kind})".replace("torch.", ""))
    print(
        "VERDICT: "
        + (
            "every instruction shape gives the same bits"
            if not differ
            else f"{len(differ)} differ: " + "; ".join(differ)[:1200]
        )
    )
    return 0


def bits(x, y):
    x, y = x.contiguous(), y.contiguous()
    both_nan = torch.isnan(x) & torch.isnan(y)
    wrong = (x.view(torch.int32) != y.view(torch.int32)) & ~both_nan
    return "equal" if not bool(wrong.any()) else f"{int(wrong.sum())} of {x.numel()} differ"


if __name__ == "__main__":
    sys.exit(main())
