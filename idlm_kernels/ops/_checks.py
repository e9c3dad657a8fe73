"""Contract checks. They read metadata only (never a value), and say what was given and what is wanted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
GATES = (torch.bool, torch.uint8, torch.int32)
FP8 = (torch.float8_e4m3fn,)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    inner: bool = True,
) -> None:
    """Check one tensor argument: rank, sizes (None = any), dtype, device; `inner`: the last stride must be 1."""
    # A layer makes some 30 of these checks: first everything at once, then what exactly is wrong.
    if isinstance(x, Tensor):
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} requires a gradient, and this op is for inference and has none: call it under "
                "torch.no_grad() or torch.inference_mode()"
            )
        given = x.shape
        if len(given) == len(shape) and x.dtype in dtypes and x.device == device:
            for wanted, size in zip(shape, given):  # noqa: B905 - equal lengths, and strict costs time
                if wanted is not None and wanted != size:
                    break
            else:
                if not inner or not given or given[-1] <= 1 or x.stride(-1) == 1:
                    return
    _refuse(op, name, x, shape, dtypes, device)


def like_k_cache(op: str, v_cache: Tensor, k_cache: Tensor, device: torch.device) -> None:
    """Check the cache of V against that of K; which of the two is at fault nobody can tell, so both are named."""
    if isinstance(v_cache, Tensor) and v_cache.dim() == 4 and v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{op}: k_cache has shape {list(k_cache.shape)} and v_cache {list(v_cache.shape)}, wanted the same"
        )
    tensor(op, "v_cache", v_cache, tuple(k_cache.shape), (k_cache.dtype,), device)


def _refuse(
    op: str, name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    given = x.shape
    if len(given) != len(shape) or any(w is not None and w != g for w, g in zip(shape, given, strict=True)):
        want = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{op}: {name} has shape {list(given)}, wanted [{want}]")
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {_names([x.dtype])}, wanted {_names(dtypes)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, wanted {device} as the other arguments")
    raise ValueError(f"{op}: {name} has stride {x.stride(-1)} in its last dimension, wanted 1 (use .contiguous())")


def device_of(op: str, name: str, x: Tensor) -> torch.device:
    """The device of the argument that the others are compared with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    return x.device


def writable(op: str, name: str, x: Tensor, *inputs: Tensor | None) -> None:
    """Check a tensor that is written: no two of its elements share memory, and it is none of the inputs."""
    strides = x.stride()
    if 0 in strides and any(size > 1 and stride == 0 for size, stride in zip(x.shape, strides, strict=True)):
        raise ValueError(f"{op}: {name} is an expanded tensor (stride 0), it cannot be written")
    if not inputs or torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor):
        return  # such tensors have no memory that could be shared
    for other in inputs:
        if other is not None and _share_memory(x, other):
            raise ValueError(f"{op}: {name} shares its memory with another argument, wanted separate memory")


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have a byte in common. Views that are woven into each other are told apart; where that would
    take long, the answer is True."""
    if not (x.numel() and y.numel()):
        return False
    apart = y.data_ptr() - x.data_ptr()
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return apart == 0
    x_size, y_size = x.element_size(), y.element_size()
    if apart >= _reach(x) * x_size or -apart >= _reach(y) * y_size:
        return False
    # A byte is common where -y_size < apart + sum of stride * difference < x_size, each difference within its bounds.
    bounds: dict[int, tuple[int, int]] = {}
    for tensor, size, sign in ((x, x_size, -1), (y, y_size, 1)):
        for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
            low, high = bounds.get(stride * size, (0, 0))
            most = sign * (count - 1)
            bounds[stride * size] = (low + min(most, 0), high + max(most, 0))
    dims = sorted(((stride, *bound) for stride, bound in bounds.items() if stride), reverse=True)
    tries = 256

    def meet(at: int, apart: int) -> bool:
        nonlocal tries
        tries -= 1
        if at == len(dims) or tries <= 0:
            return tries <= 0 or -y_size < apart < x_size
        stride, low, high = dims[at]
        least = sum(s * lo for s, lo, _ in dims[at + 1 :])
        most = sum(s * hi for s, _, hi in dims[at + 1 :])
        first = max(low, -((apart + most + y_size - 1) // stride))
        last = min(high, (x_size - 1 - apart - least) // stride)
        return any(meet(at + 1, apart + stride * difference) for difference in range(first, last + 1))

    return meet(0, apart)


def span(x: Tensor) -> tuple[int, int]:
    """The bytes that a tensor lies within, from the first to one past the last; nothing where it is empty."""
    start, count = x.data_ptr(), x.numel()
    if count and not x.is_contiguous():
        count = _reach(x)
    return start, start + count * x.element_size()


def apart(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether no two spans overlap; perhaps False, too, where an empty one lies within another."""
    in_order = sorted(spans)
    return all(end <= first for (_, end), (first, _) in itertools.pairwise(in_order))


def _reach(x: Tensor) -> int:
    """Elements from the first to the last of a tensor in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def all_writable(op: str, written: Sequence[tuple[str, Tensor | None]], *inputs: Tensor | None) -> None:
    """`writable` for every tensor that is written, against the inputs and against each other."""
    own = [(name, x) for name, x in written if x is not None]
    for name, x in own:
        writable(op, name, x)
    others = [x for x in inputs if x is not None]
    if torch.compiler.is_compiling() or any(x.device.type == "meta" or isinstance(x, FakeTensor) for _, x in own):
        return
    # A step asks this of some fifty pairs, and nearly always no two of its tensors overlap.
    spans = [span(x) for _, x in own] + [span(x) for x in others]
    if apart(spans):
        return
    everything = [x for _, x in own] + others
    for i, (name, x) in enumerate(own):
        first, end = spans[i]
        for other, (from_, to) in zip(everything[i + 1 :], spans[i + 1 :], strict=True):
            if first < to and from_ < end and _share_memory(x, other):
                raise ValueError(f"{op}: {name} shares its memory with another argument, wanted separate memory")


def positive(op: str, name: str, value: int, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} is {value}, wanted at least {minimum}")


def number(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def kv_scale(op: str, name: str, x: Tensor | None, num_kv_heads: int, device: torch.device) -> None:
    """A KV scale: one fp32 number, or one for each KV head."""
    if x is None:
        return
    if isinstance(x, Tensor) and x.dim() > 0 and x.shape != (num_kv_heads,):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, wanted [] or [{num_kv_heads}]")
    tensor(op, name, x, (None,) * x.dim() if isinstance(x, Tensor) else (), (torch.float32,), device)
