"""Row-invariant linear layers on a CPU: a row's bits do not depend on how many rows there are or on which one it is.

Torch's own fp32 matrix product is not invariant (MKL takes another kernel at 1 to 3 rows), and neither is bf16 through
oneDNN. Four products that are, the fastest that applies first:

  fbgemm-fp16   fp16 weights, fp32 activations and sums (FBGEMM). One chain of FMAs over K per element, any row count.
  onednn-fp32   fp32 weights packed for oneDNN, which from 2 rows on computes a row the same way for every row count.
  tiled-fp32    torch's matrix product, always of one shape: 8 rows, the rest padding.
  rows-fp32     one matrix-vector product per row.

None of these properties is documented, so all but the last are checked on random rows when a weight of a new shape is
prepared, and a product that fails is not used. One core of an AMD EPYC (Zen 5), torch 2.13, microseconds, weight
[3072, 576], 1 / 4 / 7 / 16 rows: fbgemm-fp16 66 / 79 / 114 / 251, onednn-fp32 97 / 97 / 160 / 261, tiled-fp32
415 / 425 / 418 / 843, plain torch 98 / 280 / 501 / 728 (`python -m bench.cpu_ops --threads 1`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu.layers import silu_and_mul

FP16_MAX = 65504.0
_PREPARED = "_idlm_prepared"  # attribute of a handle: the product behind it, which lives exactly as long as the handle
_ADAPTER = "_idlm_adapter"  # attribute of a lora_b: the prepared adapter


class Product(Protocol):
    """x [T, K] fp32, T >= 1 -> x W^T [T, N], fp32 and freshly allocated."""

    strategy: ClassVar[str]

    def __init__(self, weight: Tensor) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class FbgemmFp16:
    strategy: ClassVar[str] = "fbgemm-fp16"

    def __init__(self, weight: Tensor) -> None:
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"{self.strategy} takes float16 and bfloat16 weights, got {weight.dtype}")
        weight = weight.float().contiguous()
        # FBGEMM would saturate what fp16 cannot hold; NaN compares false and is refused as well.
        if not bool((weight.abs() <= FP16_MAX).all()):
            raise ValueError(f"{self.strategy} takes weights of magnitude up to {FP16_MAX}, some are larger or NaN")
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)


class OneDnnFp32:
    strategy: ClassVar[str] = "onednn-fp32"

    # Row counts that are run; others are padded up. One row is computed differently from two and more, and every new
    # row count costs oneDNN the compilation of a kernel.
    ROWS: ClassVar[tuple[int, ...]] = (2, 4, 8, 12, 16, 24, 32, 48, 64)

    def __init__(self, weight: Tensor) -> None:
        # The row count is a hint for the packing, nothing more.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), 16)
        self._width = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        most = self.ROWS[-1]
        if x.shape[0] > most:
            y = x.new_empty(x.shape[0], self._width)
            for i in range(0, x.shape[0], most):
                y[i : i + most] = self(x[i : i + most])
            return y
        padded = _pad_rows(x, next(rows for rows in self.ROWS if rows >= x.shape[0]))
        y = torch.ops.mkldnn._linear_pointwise(padded, self._packed, None, "none", [], "")
        return y[: x.shape[0]]


class TiledFp32:
    strategy: ClassVar[str] = "tiled-fp32"

    TILE: ClassVar[int] = (
        8  # rows; for a [3072, 576] weight MKL takes as long for 4 as for 8, and half as long again for 16
    )

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        tiles = -(-x.shape[0] // self.TILE)
        padded = _pad_rows(x, tiles * self.TILE)
        if tiles == 1:
            y = torch.nn.functional.linear(padded, self._weight)
        else:
            y = x.new_empty(padded.shape[0], self._weight.shape[0])
            for tile, result in zip(padded.split(self.TILE), y.split(self.TILE), strict=True):
                torch.mm(tile, self._weight.T, out=result)
        return y[: x.shape[0]]


class RowsFp32:
    strategy: ClassVar[str] = "rows-fp32"

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        # The clone gives every row the same alignment, on which a BLAS may let its order of summation depend.
        return torch.stack([torch.mv(self._weight, row.clone()) for row in x])


# In order of preference; the last one needs no check.
STRATEGIES: tuple[type[Product], ...] = (FbgemmFp16, OneDnnFp32, TiledFp32, RowsFp32)
_PLAIN_STRATEGIES: tuple[type[Product], ...] = (TiledFp32, RowsFp32)  # nothing to pack


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    if rows == x.shape[0]:
        return x.contiguous()
    padded = x.new_zeros(rows, x.shape[1])
    padded[: x.shape[0]] = x
    return padded


_CHECKED_ROWS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 24, 31, 48, 64, 65)
_verdicts: dict[tuple[object, ...], bool] = {}


def is_row_invariant(product: Callable[[Tensor], Tensor], num_columns: int) -> bool:
    """Do rows of a random x [65, K] keep their bits when fewer of them are computed, at other indices?"""
    x = torch.randn(_CHECKED_ROWS[-1], num_columns, generator=torch.Generator().manual_seed(num_columns))
    want = product(x)
    return all(
        torch.equal(product(x[:rows]), want[:rows]) and torch.equal(product(x[-rows:]), want[-rows:])
        for rows in _CHECKED_ROWS
    )


def _make_product(weight: Tensor, strategies: Sequence[type[Product]]) -> Product:
    """The first of the strategies that takes this weight here and is row-invariant."""
    for strategy in strategies[:-1]:
        key = (strategy.strategy, *weight.shape, torch.get_num_threads())
        if _verdicts.get(key) is False:
            continue
        try:
            product = strategy(weight)
            if key not in _verdicts:
                _verdicts[key] = is_row_invariant(product, weight.shape[1])
        except (RuntimeError, AttributeError, ValueError):  # not in this build, not on this machine, not this weight
            continue
        if _verdicts[key]:
            return product
    return strategies[-1](weight)


def prepare_weight(weight: Tensor) -> Tensor:
    """Pack a linear weight [N, K] for the products of this module; once, at load.

    Returns a handle: a tensor of the same shape and dtype that holds one element's memory, reads as NaN everywhere
    and stands for the packed copy in `linear` and `gated_lora_linear`. The packed copy is freed with the handle; the
    caller may free the original. fp64 weights are returned as they are.

    fp16 weights keep their values. bf16 weights are stored in fp16 too unless one exceeds 65504 (then in fp32):
    magnitudes from 2^-14 on are kept exactly, smaller ones are rounded to a multiple of 2^-24 (error at most 2^-25).
    fp16 and bf16 weights that hold Inf or NaN are stored in fp32. The choice is made for the number of threads in use.
    """
    if weight.dtype == torch.float64 or hasattr(weight, _PREPARED) or weight.numel() == 0:
        return weight
    handle = torch.full((), float("nan"), dtype=weight.dtype).expand(weight.shape)
    setattr(handle, _PREPARED, _make_product(weight.detach(), STRATEGIES))
    return handle


def strategy_of(weight: Tensor) -> str:
    """How `linear` computes with this weight: the strategy of a handle, `torch` for fp64, else that of a plain one."""
    if weight.dtype == torch.float64 or weight.numel() == 0:
        return "torch"
    return _product_of(weight).strategy


def _product_of(weight: Tensor) -> Product:
    product: Product | None = getattr(weight, _PREPARED, None)
    return _make_product(weight, _PLAIN_STRATEGIES) if product is None else product


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in fp32 for x fp32 [T, K]."""
    if x.shape[0] == 0 or weight.numel() == 0:
        return python_ref.linear(x, weight, bias=bias)
    y = _product_of(weight)(x)
    return y if bias is None else y.add_(bias)


def _round(y: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return y.to(dtype) if out is None else out.copy_(y)


def _needs_reference(x: Tensor, *weights: Tensor) -> bool:
    """fp64 is for judging the other dtypes: the reference computes it."""
    if x.dtype != torch.float64:
        return False
    if any(hasattr(weight, _PREPARED) for weight in weights):
        raise ValueError(
            "x is float64 and a weight is a handle of prepare_weight, of float32 or less: give the weight itself"
        )
    return True


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y = x W^T + b. x [T, K], weight [N, K] from `prepare_weight` or plain (slower) -> [T, N] in x's dtype."""
    if _needs_reference(x, weight):
        return python_ref.linear(x, weight, bias=bias, out=out)
    return _round(_base(x.float(), weight, bias), x.dtype, out)


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_mask: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    output_sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`linear`, plus scale * (x A_s^T) B_s^T in the columns of slice s on rows whose lora_mask is not 0.

    The update is computed for the gated rows alone and added in place, so the other rows are those of `linear`.
    """
    if _needs_reference(x, weight, lora_a, lora_b):
        return python_ref.gated_lora_linear(
            x, weight, lora_a, lora_b, lora_mask, scale, bias=bias, output_sizes=output_sizes, out=out
        )
    x32 = x.float()
    rows = _gated_rows(lora_mask.numpy().tobytes(), lora_mask.element_size())
    if rows is None or weight.shape[0] == 0:
        return _round(_base(x32, weight, bias), x.dtype, out)
    update_of = _prepared_adapter(
        lora_a, lora_b, scale, [weight.shape[0]] if output_sizes is None else list(output_sizes)
    )
    y = _base(x32, weight, bias)
    if isinstance(rows, slice):
        # Up to three neighbours are computed along, which is cheaper than to pad.
        count = rows.stop - rows.start
        window = min(-(-count // UPDATE_ROWS) * UPDATE_ROWS, x.shape[0])
        first = max(rows.stop - window, 0)
        update = update_of(x32.narrow(0, first, window))
        y.narrow(0, rows.start, count).add_(update.narrow(0, rows.start - first, count))
    else:
        y.index_add_(0, rows, update_of(x32[rows]))
    return _round(y, x.dtype, out)


def linear_silu_and_mul(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_mask: Tensor | None = None,
    scale: float = 1.0,
    output_sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """silu(y[:, :F]) * y[:, F:] of y [T, 2F] = `linear`, or `gated_lora_linear` with an adapter: in two steps."""
    if lora_a is None or lora_b is None or lora_mask is None:
        return silu_and_mul(linear(x, weight, bias=bias), out=out)
    return silu_and_mul(
        gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, scale, bias=bias, output_sizes=output_sizes), out=out
    )


@functools.lru_cache(maxsize=64)
def _gated_rows(lora_mask: bytes, element_size: int) -> slice | Tensor | None:
    """The rows whose lora_mask is not 0: a slice where they are neighbours, None where there are none.

    The cache serves the layers of a forward, which share their lora_mask.
    """
    values = np.frombuffer(lora_mask, dtype=np.dtype(f"u{element_size}"))
    rows = np.flatnonzero(values)
    if rows.size == 0:
        return None
    if rows[-1] - rows[0] + 1 == rows.size:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


UPDATE_ROWS = 4  # the update of an adapter is computed for a multiple of so many rows


class LowRank(Protocol):
    """x [T, K] fp32, T >= 1 -> scale * (x A_s^T) B_s^T in the columns of each slice s, fp32 [T, N]."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, widths: list[int]) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class SplitLowRank:
    """One product with all A and one with the B of each slice, which fit what BLAS does best on matrices this small.

    Multiples of four rows were found to be computed alike. Cold from memory, as in a decode, 4 rows of gate_up of the
    default model take 29 us; with one block-diagonal B, 55 us.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, widths: list[int]) -> None:
        self._rank = lora_b.shape[1]
        self._a = lora_a.detach().float().T.contiguous()
        self._b = [b.T.contiguous() for b in (lora_b.detach().float() * scale).split(widths)]

    def __call__(self, x: Tensor) -> Tensor:
        padded = _pad_rows(x, -(-x.shape[0] // UPDATE_ROWS) * UPDATE_ROWS)
        shrunk = torch.mm(padded, self._a)
        if len(self._b) == 1:
            update = torch.mm(shrunk, self._b[0])
        else:
            update = x.new_empty(padded.shape[0], sum(b.shape[1] for b in self._b))
            start = 0
            for s, b in enumerate(self._b):
                torch.mm(shrunk.narrow(1, s * self._rank, self._rank), b, out=update.narrow(1, start, b.shape[1]))
                start += b.shape[1]
        return update if padded is x else update.narrow(0, 0, x.shape[0])


class RowsLowRank:
    """A matrix-vector product per row and matrix, where the other is not row-invariant."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, widths: list[int]) -> None:
        self._a, self._rank = RowsFp32(lora_a.detach()), lora_b.shape[1]
        self._b = [RowsFp32(b) for b in (lora_b.detach().float() * scale).split(widths)]

    def __call__(self, x: Tensor) -> Tensor:
        shrunk = self._a(x).split(self._rank, dim=1)
        return torch.cat([b(part) for part, b in zip(shrunk, self._b, strict=True)], dim=1)


@dataclass(frozen=True)
class _Adapter:
    """The update of an adapter, and what it was made of."""

    low_rank: LowRank
    lora_a: weakref.ref[Tensor]
    made_of: tuple[object, ...]


def _prepared_adapter(lora_a: Tensor, lora_b: Tensor, scale: float, widths: list[int]) -> LowRank:
    """The adapter's matrices, prepared like other weights; kept with lora_b until one of them is written."""
    made_of = (_version(lora_a), _version(lora_b), scale, widths)
    kept: _Adapter | None = getattr(lora_b, _ADAPTER, None)
    if kept is not None and kept.made_of == made_of and kept.lora_a() is lora_a:
        return kept.low_rank
    key = ("low-rank", *lora_a.shape, *widths, torch.get_num_threads())
    if key not in _verdicts:
        # Of random matrices: those of an adapter may be such that a difference does not show.
        a, b = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (lora_a, lora_b))
        _verdicts[key] = is_row_invariant(SplitLowRank(a, b, 1.0, widths), a.shape[1])
    low_rank = (SplitLowRank if _verdicts[key] else RowsLowRank)(lora_a, lora_b, scale, widths)
    setattr(lora_b, _ADAPTER, _Adapter(low_rank, weakref.ref(lora_a), made_of))
    return low_rank


def _version(x: Tensor) -> object:
    """A mark that changes when x is written; inference tensors have none, so theirs equals no other."""
    return object() if x.is_inference() else x._version
