"""Linear layers, plain and with a gated LoRA adapter (the R-ISD layer of the I-DLM paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from python_ref.layers import silu_and_mul


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def prepare_weight(weight: Tensor) -> Tensor:
    """The layout in which `linear` reads a weight [N, K]; here the plain one."""
    return weight


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y = x W^T + b. x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype, accumulated in fp32."""
    acc = _accumulator(x.dtype)
    y = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        y = y + bias.to(acc)
    y = y.to(x.dtype)
    return y if out is None else out.copy_(y)


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
    """y = x W^T + b, plus scale * (x A_s^T) B_s^T in the columns of slice s on rows whose lora_mask is not 0.

    x [T, K], weight [N, K], lora_mask [T]; `output_sizes` are the widths of the packed outputs (qkv, gate_up), summing
    to N; lora_a [S * r, K] and lora_b [N, r] hold the adapters of the S slices one after the other. The update is added
    to the fp32 accumulator before the one rounding to x's dtype. Rows with lora_mask 0 are *selected* from the plain
    product, so that they keep its very bits, -0.0 included, whatever the adapter holds.
    """
    acc = _accumulator(x.dtype)
    widths = [weight.shape[0]] if output_sizes is None else list(output_sizes)
    rank = lora_b.shape[1]
    shrunk = (x.to(acc) @ lora_a.to(acc).T).split(rank, dim=1)
    update = torch.cat([s @ b.T for s, b in zip(shrunk, lora_b.to(acc).split(widths), strict=True)], dim=1)
    base = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        base = base + bias.to(acc)
    y = torch.where((lora_mask != 0).unsqueeze(1), (base + scale * update).to(x.dtype), base.to(x.dtype))
    return y if out is None else out.copy_(y)


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
    """silu(y[:, :F]) * y[:, F:] of y = x W^T + b [T, 2F], with the adapter's update on gated rows if there is one."""
    if lora_a is None or lora_b is None or lora_mask is None:
        return silu_and_mul(linear(x, weight, bias=bias), out=out)
    return silu_and_mul(
        gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, scale, bias=bias, output_sizes=output_sizes), out=out
    )
