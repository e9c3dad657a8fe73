"""The problems: every op has one, every backend passes it, and what is wrong is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import idlm_kernels
import python_ref
from idlm_kernels.ops import OPS
from idlm_kernels.testing import (
    PROBLEMS,
    Call,
    GatedLoraLinear,
    Linear,
    QkNormRopeAppend,
    RmsNorm,
    StridedAttention,
    Wrong,
    check,
    check_bits,
    check_rows,
    microseconds,
    same_bits,
)
from idlm_kernels.testing.problems import paged, quadratic_masks, repaged, request_rows


def test_every_op_has_a_problem() -> None:
    assert {*PROBLEMS, "prepare_weight"} == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", PROBLEMS)
def test_every_backend_here_passes(op: str, dtype: torch.dtype) -> None:
    call = PROBLEMS[op](dtype=dtype).call("cpu")
    check(call, getattr(python_ref, op))
    with idlm_kernels.use_backend("cpu"):
        function = getattr(idlm_kernels, op)
        whole = check(call, function)
        if call.per_row:
            check_rows(call, function, slice(1), slice(1, 4), among=whole)


def test_a_seed_gives_the_same_call_and_another_one_another() -> None:
    one, same, other = (RmsNorm().call("cpu", seed)["x"] for seed in (1, 1, 2))
    assert same_bits(one, same) and not same_bits(one, other)


def test_a_problem_has_a_name() -> None:
    assert Linear().name == "linear" and Linear(rows=3, bias=False).name == "linear rows=3 bias=False"


def wrong(op: str, change: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda **arguments: change(getattr(python_ref, op)(**arguments), arguments)


def no_residual(y: Tensor, arguments: dict[str, Any]) -> Tensor:
    arguments["residual"].sub_(arguments["x"])
    return y


def spoilt_input(y: Tensor, arguments: dict[str, Any]) -> Tensor:
    arguments["weight"][0] = -arguments["weight"][0]
    return y


def test_what_a_call_writes_is_checked_and_what_it_does_not_write_keeps_its_bits() -> None:
    check(RmsNorm(), python_ref.rms_norm)
    with pytest.raises(Wrong, match="residual is off by"):
        check(RmsNorm(), wrong("rms_norm", no_residual))
    with pytest.raises(Wrong, match=r"weight: bits differ in 1 of 1000 elements, first in element 0 at \[0\]"):
        check(RmsNorm(), wrong("rms_norm", spoilt_input))


@dataclasses.dataclass
class Pair:
    written: Tensor
    kept: Tensor


def test_the_tensors_of_a_struct_are_checked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(pair: Pair, also: str = "written") -> Tensor:
        getattr(pair, also).add_(1)
        return pair.written.mul_(2)

    monkeypatch.setattr(python_ref, "double", lambda pair: pair.written.mul_(2), raising=False)
    call = Call("double", {"pair": Pair(torch.ones(3), torch.ones(3))})
    check(call, lambda pair: pair.written.mul_(2))
    with pytest.raises(Wrong, match="^pair.kept: bits differ in 3 of 3"):
        check(call, partial(double, also="kept"))
    call["pair"].written = call["pair"].written.long()
    with pytest.raises(Wrong, match="^the result differs in 3 of 3 elements"):
        check(call, double)


def test_a_call_leaves_its_arguments_alone() -> None:
    call, again = RmsNorm().call("cpu"), RmsNorm().call("cpu")
    ran = check(call, python_ref.rms_norm)
    assert same_bits(call["residual"], again["residual"]) and not same_bits(ran.left["residual"], again["residual"])


def test_rows_that_know_how_many_they_are() -> None:
    def nudged(y: Tensor, arguments: dict[str, Any]) -> Tensor:
        return y * (1 + 2**-7 * (len(y) == 2))

    call = Linear(dtype=torch.float64).call("cpu")
    with pytest.raises(Wrong, match="^2 rows alone and among 7: bits differ"):
        check_rows(call, wrong("linear", nudged), slice(3, 5))
    residual = RmsNorm(dtype=torch.float64).call("cpu")
    check_rows(residual.changed(residual=None), python_ref.rms_norm, slice(1, 3))
    with pytest.raises(Wrong, match="^residual, 1 row alone and among 5: bits differ"):
        check_rows(residual, wrong("rms_norm", lambda y, a: (a["residual"].add_(len(y)), y)[1]), slice(1))


def test_a_call_of_another_op() -> None:
    call = GatedLoraLinear(rank=4).call("cpu")
    plain = call.of("linear", "x", "weight", "bias").run().result
    check_bits(call.run().result[~call["lora_mask"]], plain[~call["lora_mask"]])
    assert "lora_a" not in GatedLoraLinear(rank=0).call("cpu").arguments


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_hold_what_they_should_and_nan(page_size: int, head_major: bool) -> None:
    k, v = torch.randn(2, 7, 2, 4), torch.randn(2, 7, 2, 4)
    caches = paged(k, v, (7, 5), page_size, head_major=head_major)
    for name, content in (("k_cache", k), ("v_cache", v)):
        slots = caches[name][caches["page_table"].long()].flatten(1, 2)
        assert same_bits(slots[0, :7], content[0]) and same_bits(slots[1, :5], content[1, :5])
        assert slots[0, 7:].isnan().all() and slots[1, 5:].isnan().all()
        assert caches[name].isfinite().sum() == 12 * 8
        assert (caches[name].stride(0) < caches[name].stride(2)) == head_major


def test_rows_of_a_request_see_what_they_saw() -> None:
    call = StridedAttention(lengths=(50, 20, 0), dtype=torch.float64).call("cpu")
    whole = call.run()
    for b, rows, first in ((0, slice(0, 1), 0), (0, slice(2, 7), 2), (1, slice(3, 4), 10)):
        alone = repaged(request_rows(call, b, rows), 5).run()
        own = slice(first, first + rows.stop - rows.start)
        torch.testing.assert_close(alone.result, whole.result[own], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.left["lse"], whole.left["lse"][own])


def test_masks_of_a_quadratic_step() -> None:
    """Two clean rows, then the branch of each: it sees the clean rows up to its own, and itself."""
    assert quadratic_masks(2) == [0b1, 0b11, 0b101, 0b1011]
    assert quadratic_masks(3, num_drafts=0) == [0b1, 0b11, 0b111]
    assert min(quadratic_masks(8)) == -(2**63) + (1 << 8) - 1 + sum(1 << i for i in range(57, 63))


def test_a_skipped_slot_is_not_written() -> None:
    call = QkNormRopeAppend().call("cpu")
    with pytest.raises(Wrong, match="k_cache has other nan entries: 256 of"):
        check(call, lambda **a: python_ref.qk_norm_rope_append(**a | {"slot_mapping": a["slot_mapping"].abs()}))


def test_every_call_is_timed() -> None:
    made: list[str] = []
    time = microseconds(lambda: made.append("a"), lambda: made.append("b"), seconds=0.0, pick=min)
    assert made == ["a", "b"] * 11 and 0 < time < 1e6
