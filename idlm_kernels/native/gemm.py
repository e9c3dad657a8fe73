"""linear, gated_lora_linear, linear_silu_and_mul and silu_and_mul of backend `cuda`. The kernel: csrc/gemm/kernel.cuh.

It takes bf16 and fp16 where rows of K values are whole vectors of 16 bytes (`refusal`). Every other problem goes to the
next backend in line. The rule looks at dtype and K alone, so the rows of a layer never change between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idlm_kernels._semaphores import semaphores
from idlm_kernels.native import emulated, load

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VECTOR = 8  # values of 16 bits that TMA wants rows to be a multiple of
_MIN_FLAGS = 4096  # 2 per 64 rows

_Matrix = tuple[int, int]  # address, row stride


def refusal(dtype: torch.dtype, k: int) -> str | None:
    """Why the CUDA kernel does not compute layers of K columns in a dtype; None if it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if k == 0 or k % _VECTOR:
        return f"it takes K in multiples of {_VECTOR}, not {k}"
    return None


# What `idlm doctor` says of them.
_LIMIT = f"bf16 and fp16, K in multiples of {_VECTOR}"
LIMITS = dict.fromkeys(("linear", "gated_lora_linear", "linear_silu_and_mul"), _LIMIT)


def stream_of(op: str, device: torch.device) -> int:
    """The current stream. Raises ValueError on a device without one."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "cpu" and emulated():
        return 0
    raise ValueError(f"{op}: backend 'cuda' needs CUDA tensors, got tensors on {device}")


def prepare_weight(weight: Tensor) -> Tensor:
    """The weight with contiguous rows at multiples of 16 bytes. The kernel may read it before earlier work has ended,
    so it must not be written any more."""
    prepared = _for_tma(weight)
    prepared._idlm_constant = True  # type: ignore[attr-defined]
    return prepared


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """As `idlm_kernels.linear`."""
    if refusal(x.dtype, x.shape[1]):
        return _next("linear", x)(x, weight, bias=bias, out=out)
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    _run("linear", x, weight, bias, y, False, None)
    return y


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
    """As `idlm_kernels.gated_lora_linear`; up to 16 slices."""
    if refusal(x.dtype, x.shape[1]):
        options = {"bias": bias, "output_sizes": output_sizes, "out": out}
        return _next("gated_lora_linear", x)(x, weight, lora_a, lora_b, lora_mask, scale, **options)
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    adapter = (lora_a, lora_b, lora_mask, scale, [weight.shape[0]] if output_sizes is None else output_sizes)
    _run("gated_lora_linear", x, weight, bias, y, False, adapter)
    return y


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
    """As `idlm_kernels.linear_silu_and_mul`; up to 16 slices."""
    adapter = None
    if lora_a is not None and lora_b is not None and lora_mask is not None:
        adapter = (lora_a, lora_b, lora_mask, scale, [weight.shape[0]] if output_sizes is None else output_sizes)
    if refusal(x.dtype, x.shape[1]):
        # The activation is this backend's: whoever calls it apart gets the same bits.
        if adapter is None:
            return silu_and_mul(linear(x, weight, bias=bias), out=out)
        return silu_and_mul(gated_lora_linear(x, weight, *adapter[:4], bias=bias, output_sizes=adapter[4]), out=out)
    y = x.new_empty(x.shape[0], weight.shape[0] // 2) if out is None else out
    _run("linear_silu_and_mul", x, weight, bias, y, True, adapter)
    return y


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `idlm_kernels.silu_and_mul`."""
    if x.dtype not in _DTYPES:
        return _next("silu_and_mul", x)(x, out=out)
    y = x.new_empty(x.shape[0], x.shape[1] // 2) if out is None else out
    stream = stream_of("silu_and_mul", x.device)
    module, (rows, width) = load(), y.shape
    params = module.SiluAndMulParams(dtype=_DTYPES[x.dtype], num_rows=rows, width=width)
    params.x, params.x_stride = _matrix(x)
    params.out, params.out_stride = _matrix(y)
    module.silu_and_mul(params, stream, True)
    return y


_Adapter = tuple[Tensor, Tensor, Tensor, float, Sequence[int]]  # A, B, lora_mask, scale, output_sizes


def _run(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, activation: bool, adapter: _Adapter | None
) -> None:
    stream = stream_of(op, x.device)
    if y.numel() == 0:
        return
    x, weight = _for_tma(x), _for_tma(weight)
    if bias is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    module = load()
    params = module.LinearParams(
        dtype=_DTYPES[x.dtype],
        weight_is_constant=getattr(weight, "_idlm_constant", False),
        num_rows=x.shape[0],
        n=weight.shape[0],
        k=weight.shape[1],
        silu_and_mul=activation,
    )
    params.x, params.x_stride = _matrix(x)
    params.weight, params.weight_stride = _matrix(weight)
    params.out, params.out_stride = _matrix(y)
    if bias is not None:
        params.bias, params.bias_dtype = bias.data_ptr(), _DTYPES[bias.dtype]
    lora, kept = (None, ()) if adapter is None else _adapter_params(op, x, *adapter)
    module.linear(params, lora, stream, True)
    del kept


def _adapter_params(
    op: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, lora_mask: Tensor, scale: float, output_sizes: Sequence[int]
) -> tuple[object, tuple[Tensor, ...]]:
    """An AdapterParams, and the tensors that have to live until the launch."""
    module = load()
    if len(output_sizes) > module.MAX_SLICES:
        raise ValueError(
            f"{op}: {len(output_sizes)} output_sizes, backend 'cuda' takes {module.MAX_SLICES}; use backend 'triton'"
        )
    rank = lora_b.shape[1]
    lora_a, lora_b, lora_mask = _for_tma(lora_a.to(x.dtype)), _for_tma(lora_b.to(x.dtype)), lora_mask.contiguous()
    h = torch.empty(module.h_bytes(x.shape[0], len(output_sizes), rank), dtype=torch.uint8, device=x.device)
    flags = _flags(module.flag_words(x.shape[0]), x.device)
    params = module.AdapterParams(
        lora_mask=lora_mask.data_ptr(),
        lora_mask_is_int32=lora_mask.dtype == torch.int32,
        scale=float(scale),
        rank=rank,
        num_slices=len(output_sizes),
        slice_ends=[sum(output_sizes[: i + 1]) for i in range(len(output_sizes))],
        h=h.data_ptr(),
        flags=flags.data_ptr(),
    )
    params.lora_a, params.lora_a_stride = _matrix(lora_a)
    params.lora_b, params.lora_b_stride = _matrix(lora_b)
    return params, (lora_a, lora_b, lora_mask, h, flags)


def _flags(count: int, device: torch.device) -> Tensor:
    """`count` words that are 0 between launches, and a few more: one set serves most launches."""
    return semaphores("adapter", max(_MIN_FLAGS, 1 << (count - 1).bit_length()), torch.int32, device)


def _matrix(x: Tensor) -> _Matrix:
    return x.data_ptr(), x.stride(0) if x.shape[0] > 1 else -(-x.shape[1] // _VECTOR) * _VECTOR


def _for_tma(x: Tensor) -> Tensor:
    """x [rows, columns], or a copy, whose rows are contiguous and start at multiples of 16 bytes."""
    rows, columns = x.shape
    stride = x.stride(0) if rows > 1 else _VECTOR
    fits = x.data_ptr() % 16 == 0 and stride % _VECTOR == 0 and (rows <= 1 or stride >= columns)
    if fits and (columns <= 1 or x.stride(1) == 1):
        return x
    copy = x.new_empty(rows, -(-columns // _VECTOR) * _VECTOR)[:, :columns]
    return copy.copy_(x)


def _next(op: str, x: Tensor):  # type: ignore[no-untyped-def]
    from idlm_kernels.ops._dispatch import next_implementation

    return next_implementation("cuda", op, x.device.type)
