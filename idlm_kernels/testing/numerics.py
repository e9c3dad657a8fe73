"""What "right" means, once for the self-check, the tests and bench: the same bits, or as near to fp64 as PyTorch gets.

Each function raises `Wrong`, an AssertionError whose message says where and by how much. `verdict` makes a word of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from python_ref.contract import GREEDY_BELOW, DraftDistributions
from python_ref.sampling import distribution, sanitise, scale_by_temperature

# What some results may be off, as a share of their largest value: lse and logprobs are fp32 and go through the
# approximate exponentials and logarithms of a GPU. (op, argument), see `granted` of `check_close`.
GRANTED = {
    ("strided_attention", "lse"): 2.0**-16,
    ("commit_step", "logprobs"): 2.0**-16,
    ("top_logprobs", "the result[1]"): 2.0**-16,
}
NORM_TOLERANCE = 1e-2  # of `check_norm`: a few roundings of bf16, 2^-9 each
DISTRIBUTION_TOLERANCE = 1e-4  # of a probability, in `check_distributions`

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Wrong(AssertionError):
    """A result that is not the contract's; the message says which and where."""


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor as integers of its shape: NaN equals NaN, and -0.0 is not 0.0."""
    return x.contiguous().view(_INTEGER[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def check_bits(got: Tensor, wanted: Tensor, what: str = "the result") -> None:
    """Raise Wrong unless two tensors have the same dtype, shape and bits.

    The message names the first element that differs, its coordinate, both values and bit patterns, how many differ, and
    the largest distance in ulps: steps from one number of the dtype to the next, NaN left out.

    >>> print(verdict(check_bits, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22])))
    the result: bits differ in 1 of 2 elements, first in element 1 at [1]: 2.0 (0x40000000), wanted 2.000000238418579
    (0x40000001); at most 1 ulp apart
    """
    _check_kind(got, wanted, what)
    differs = bits(got) != bits(wanted)
    if differs.any():
        raise Wrong(f"{what}: bits differ in {_first(got, wanted, differs)}{_distance(got, wanted, differs)}")


def check_close(got: Tensor, exact: Tensor, peer: Tensor, what: str = "the result", granted: float = 0.0) -> None:
    """Raise Wrong unless `got` is right: of the dtype and shape of `peer`, with Inf and NaN where `peer` has them.

    Its largest error against `exact` is at most twice that of `peer`. Integers have to be equal.

    Args:
        got: the result in question.
        exact: the same by the reference in fp64.
        peer: the same by PyTorch in got's dtype.
        what: its name in the message.
        granted: the error that is allowed anyway, as a share of the largest value; at least one rounding of the dtype,
            and eight of fp32, where the error is one of sums: how small PyTorch's own is depends on the machine.
    """
    _check_kind(got, peer, what)
    if not got.is_floating_point():
        if (differs := got != exact).any():
            raise Wrong(f"{what} differs in {_first(got, exact, differs)}")
        return
    granted = max(granted, torch.finfo(got.dtype).eps * (8 if got.dtype == torch.float32 else 1))
    given, got, exact, peer = got, got.double(), exact.double(), peer.double()
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        if (differs := pattern(got) != pattern(peer)).any():
            raise Wrong(
                f"{what} has other {pattern.__name__[2:]} entries: {_first(given, peer.to(given.dtype), differs)}"
            )
    finite = torch.isfinite(exact) & torch.isfinite(peer)
    if not finite.any():
        return
    error, of_peer, size = (torch.where(finite, x, 0.0).abs() for x in (got - exact, peer - exact, exact))
    allowed = torch.maximum(2 * of_peer.max(), granted * size.max())
    if not error.max() <= allowed:
        worst = f"{float(error.max()):.3g} from the fp64 result, allowed are {float(allowed):.3g}"
        raise Wrong(f"{what} is off by {worst}: wrong in {_first(given, exact.to(given.dtype), error > allowed)}")


def check_norm(got: Any, wanted: Any, what: str = "the result", tolerance: float = NORM_TOLERANCE) -> None:
    """Raise Wrong unless the error's norm is at most `tolerance` of the norm of `wanted`. Integers have to be equal.

    For shapes at which fp64 is too slow: `wanted` is then the reference in fp32. Both may be tuples of tensors.
    """
    if isinstance(got, tuple):
        for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
            check_norm(x, y, f"{what}[{i}]", tolerance)
    elif not got.is_floating_point():
        check_close(got, wanted, wanted, what)
    else:
        error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        if not error <= tolerance:  # NaN is no number below it
            raise Wrong(f"{what} is off by {error:.2g}, allowed are {tolerance:.2g}")


def check_distributions(got: dict[str, Any], exact: dict[str, Any], has_next: Tensor) -> None:
    """Raise Wrong unless the distributions of `rejection` have the right probabilities, however ruled out ids are kept.

    Args:
        got, exact: arguments of verify_accept or rerank_drafts as a call, and one in fp64, left them.
        has_next: bool [B], the requests that were proposed drafts.
    """
    distributions = []
    for arguments in (got, exact):
        q: DraftDistributions = arguments["draft_dists"]
        temperature = arguments["temperature"].double()
        z = sanitise(q.logits.double(), arguments["id_limit"], arguments["mask_id"])[0]
        z = scale_by_temperature(z, temperature.unsqueeze(1))
        # A cut is rounded to fp32: what it is to keep lies at least that near.
        cut = q.cut.double() - 1e-6 * (1 + q.cut.double().abs())
        distributions.append(distribution(z, cut, q.log_norm.double(), (temperature < GREEDY_BELOW).unsqueeze(1)))
    difference = (distributions[0] - distributions[1])[has_next].abs().max()
    if not difference < DISTRIBUTION_TOLERANCE:
        raise Wrong(f"a distribution of a next draft is off by a probability of {float(difference):.3g}")


def verdict(check: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """`ok`, or what `check(*arguments, **options)` found wrong."""
    try:
        check(*arguments, **options)
    except Wrong as wrong:
        return str(wrong)
    return "ok"


def _check_kind(got: Tensor, wanted: Tensor, what: str) -> None:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        raise Wrong(f"{what} is {got.dtype} {list(got.shape)}, wanted {wanted.dtype} {list(wanted.shape)}")


def _first(got: Tensor, wanted: Tensor, where: Tensor) -> str:
    """How many elements, and the first of them."""
    number, at = int(where.flatten().nonzero()[0]), where.nonzero()[0].tolist()
    count = f"{int(where.sum())} of {where.numel()} elements, first in element {number} at {at}"
    return f"{count}: {_shown(got[tuple(at)])}, wanted {_shown(wanted[tuple(at)])}"


def _shown(x: Tensor) -> str:
    if not x.is_floating_point():
        return str(x.item())
    size = x.element_size()
    return f"{x.item()} (0x{int(bits(x)) & (1 << 8 * size) - 1:0{2 * size}x})"


def _distance(got: Tensor, wanted: Tensor, differs: Tensor) -> str:
    """The largest distance of two numbers in ulps, in words."""
    if not got.is_floating_point():
        return ""
    a, b = got[differs], wanted[differs]
    is_number = ~(a.double().isnan() | b.double().isnan())  # fp8 has no isnan
    if not is_number.any():
        return "; NaN in all of them"
    # Counted from zero: the bits of a float without its sign are its number among those of that sign.
    steps = [bits(x[is_number]).long() & (1 << 8 * x.element_size() - 1) - 1 for x in (a, b)]
    signs = [bits(x[is_number]) < 0 for x in (a, b)]
    beyond_zero = steps[0].double() + steps[1].double()  # which int64 may not hold
    apart = torch.where(signs[0] == signs[1], (steps[0] - steps[1]).abs().double(), beyond_zero)
    most = int(apart.max())
    return f"; at most {most} ulp{'' if most == 1 else 's'} apart"
