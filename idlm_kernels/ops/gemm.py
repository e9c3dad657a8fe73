"""Linear layers, plain and with a gated LoRA adapter on MASK rows, and the first half of the feed-forward block.

Contract: design sections 5.3 and 5.4. Rows with lora_mask 0 carry the very bits of `linear(x, weight)` of the same
backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idlm_kernels._deprecated import dropped, renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation
from idlm_kernels.ops._register import register, run_op


def prepare_weight(weight: Tensor) -> Tensor:
    """Give a linear weight [N, K] the layout that the backend in use reads fastest; once, at load.

    Returns a tensor with the same shape, dtype and device: the weight itself, or a handle to a packed copy that only
    `linear` and `gated_lora_linear` of the same backend may read (any other reader would find NaN). The original
    may be freed.

    Example:

        >>> weight = torch.eye(4)
        >>> linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), prepare_weight(weight))
        tensor([[1., 2., 3., 4.]])
    """
    device = check.device_of("prepare_weight", "weight", weight)
    check.tensor("prepare_weight", "weight", weight, (None, None), check.FLOATS, device)
    return implementation("prepare_weight", device.type)(weight)


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y = x W^T + b, accumulated in fp32 (fp64 for fp64), rounded once.

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64.
        weight: [N, K], x's dtype or a narrower one; plain or from `prepare_weight`.
        bias: [N], a float dtype.
        out: [T, N], x's dtype; allocated when None.

    Returns:
        [T, N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example:

        >>> x, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 2.0]])
        >>> linear(x, weight, bias=torch.tensor([0.0, 0.0, 10.0]))
        tensor([[ 3., -1., 14.],
                [ 7., -1., 18.]])
    """
    op = "linear"
    check.device_of(op, "x", x)
    _check_base(op, x, weight, bias)
    _check_out(op, out, x, weight.shape[0], weight, bias)
    return run_op(op, (x, weight), {"bias": bias}, out)


@dropped("workspace")
@renamed(gate="lora_mask", slices="output_sizes")
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
    """y = x W^T + b, plus scale * (x A^T) B^T on rows whose lora_mask is not 0.

    A packed layer (qkv, gate_up) has S slices, each with an adapter of its own: `output_sizes` are their widths.
    Rows with lora_mask 0 are bit-identical to `linear(x, weight, bias=bias)`, -0.0 included, whatever other rows and
    the adapter hold (Inf and NaN too).

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64.
        weight: [N, K], x's dtype or a narrower one; plain or from `prepare_weight`.
        lora_a: [S * r, K], the A matrices of the slices one below the other.
        lora_b: [N, r], the B matrices likewise.
        lora_mask: bool, uint8 or int32 [T]; not 0 switches the adapter on.
        scale: factor of the update (alpha / r of the adapter).
        bias: [N], a float dtype.
        output_sizes: positive widths that add up to N; one slice when None.
        out: [T, N], x's dtype; allocated when None.

    Returns:
        [T, N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: Hu et al., "LoRA", arXiv 2106.09685; gating by row: Samragh et al.,
        arXiv 2507.11851; I-DLM, arXiv 2604.11035.

    Example: row 0 is plain, row 1 gains 2 * (x A^T) B^T.

        >>> x, weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.eye(2)
        >>> lora_a, lora_b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [10.0]])
        >>> gated_lora_linear(x, weight, lora_a, lora_b, torch.tensor([False, True]), 2.0)
        tensor([[ 1.,  2.],
                [ 7., 62.]])
    """
    op = "gated_lora_linear"
    check.device_of(op, "x", x)
    _check_base(op, x, weight, bias)
    widths = _check_adapter(op, x, weight, lora_a, lora_b, lora_mask, scale, output_sizes)
    _check_out(op, out, x, weight.shape[0], weight, bias, lora_a, lora_b, lora_mask)
    args = (x, weight, lora_a, lora_b, lora_mask, scale)
    return run_op(op, args, {"bias": bias, "output_sizes": widths}, out)


@dropped("workspace")
@renamed(gate="lora_mask", slices="output_sizes")
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
    """silu(y[:, :F]) * y[:, F:] of y = `linear`, or of y = `gated_lora_linear` when there is an adapter.

    Every row has the bits of `silu_and_mul` of that y of the same backend: y is rounded to x's dtype, whether or not
    it ever reaches memory. So rows with lora_mask 0 do not depend on the adapter.

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64.
        weight: [2F, K], gate rows and then up rows, x's dtype or a narrower one; plain or from `prepare_weight`.
        bias: [2F], a float dtype.
        lora_a: [S * r, K], as in `gated_lora_linear`; with lora_b and lora_mask, or none of the three.
        lora_b: [2F, r].
        lora_mask: bool, uint8 or int32 [T]; not 0 switches the adapter on.
        scale: factor of the update.
        output_sizes: positive widths of the S slices that add up to 2F; one slice when None.
        out: [T, F], x's dtype; allocated when None.

    Returns:
        [T, F] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; the adapter as in `gated_lora_linear`.

    Example: F = 1, so that y has a gate and an up column; silu(0) = 0.

        >>> x = torch.tensor([[0.0, 3.0], [2.0, 3.0]])
        >>> linear_silu_and_mul(x, torch.eye(2))
        tensor([[0.0000],
                [5.2848]])
    """
    op = "linear_silu_and_mul"
    check.device_of(op, "x", x)
    _check_base(op, x, weight, bias)
    if weight.shape[0] % 2:
        raise ValueError(f"{op}: weight has {weight.shape[0]} rows, wanted an even number (gate and up)")
    widths = None
    if lora_a is not None and lora_b is not None and lora_mask is not None:
        widths = _check_adapter(op, x, weight, lora_a, lora_b, lora_mask, scale, output_sizes)
    elif not (lora_a is None and lora_b is None and lora_mask is None):
        raise ValueError(f"{op}: give lora_a, lora_b and lora_mask all or none")
    elif output_sizes is not None:
        raise ValueError(f"{op}: output_sizes are an adapter's, wanted None without lora_a, lora_b and lora_mask")
    _check_out(op, out, x, weight.shape[0] // 2, weight, bias, lora_a, lora_b, lora_mask)
    adapter = {"lora_a": lora_a, "lora_b": lora_b, "lora_mask": lora_mask, "scale": scale, "output_sizes": widths}
    return run_op(op, (x, weight), {"bias": bias, **adapter}, out)


def _check_base(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    device = x.device
    check.tensor(op, "x", x, (None, None), check.FLOATS, device)
    # A handle of prepare_weight is an expanded tensor: its strides say nothing.
    check.tensor(op, "weight", weight, (None, x.shape[1]), check.FLOATS, device, inner=False)
    if weight.dtype != x.dtype and torch.promote_types(weight.dtype, x.dtype) != x.dtype:
        raise TypeError(f"{op}: weight is {weight.dtype} and x is {x.dtype}; weight must not be the wider one")
    if bias is not None:
        check.tensor(op, "bias", bias, (weight.shape[0],), check.FLOATS, device)


def _check_out(op: str, out: Tensor | None, x: Tensor, width: int, *inputs: Tensor | None) -> None:
    if out is not None:
        check.tensor(op, "out", out, (x.shape[0], width), (x.dtype,), x.device)
        check.writable(op, "out", out, x, *inputs)


def _check_adapter(
    op: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_mask: Tensor,
    scale: float,
    output_sizes: Sequence[int] | None,
) -> list[int]:
    """The widths of the slices."""
    check.number(op, "scale", scale)
    widths = [weight.shape[0]] if output_sizes is None else list(output_sizes)
    if any(w <= 0 for w in widths) or sum(widths) != weight.shape[0]:
        raise ValueError(
            f"{op}: output_sizes are {widths}, wanted positive widths that add up to N = {weight.shape[0]}"
        )
    check.tensor(op, "lora_b", lora_b, (weight.shape[0], None), check.FLOATS, x.device)
    rank = lora_b.shape[1]
    if rank == 0:
        raise ValueError(f"{op}: lora_b has rank 0, wanted at least 1 (leave the adapter away)")
    check.tensor(op, "lora_a", lora_a, (len(widths) * rank, x.shape[1]), (lora_b.dtype,), x.device)
    check.tensor(op, "lora_mask", lora_mask, (x.shape[0],), check.GATES, x.device)
    return widths


register(
    "linear",
    "Tensor x, Tensor weight, *, Tensor? bias",
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
register(
    "gated_lora_linear",
    "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor lora_mask, float scale, *, Tensor? bias, "
    "SymInt[] output_sizes",
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
register(
    "linear_silu_and_mul",
    "Tensor x, Tensor weight, *, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? lora_mask, float scale, "
    "SymInt[]? output_sizes",
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0] // 2),
)
