"""What "right" means: what passes, what does not, and that a message says where and by how much."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from idlm_kernels import testing
from idlm_kernels.testing import Wrong, bits, check_bits, check_close, check_norm, numerics, same_bits, verdict

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
NAN, INF = math.nan, math.inf


def of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def test_the_example_of_a_bit_difference() -> None:
    found = doctest.testmod(numerics, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0 and found.attempted


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_has_the_bits_of_nan_and_minus_zero_those_of_no_other(dtype: torch.dtype) -> None:
    x = of(1.0, NAN, -0.0, dtype=dtype)
    check_bits(x, x.clone())
    assert same_bits(x, x.clone()) and not same_bits(x, of(1.0, NAN, 0.0, dtype=dtype))
    assert bits(x).shape == x.shape
    with pytest.raises(Wrong, match=r"the result: bits differ in 1 of 3 elements, first in element 2 at \[2\]: -0.0"):
        check_bits(x, of(1.0, NAN, 0.0, dtype=dtype))


@pytest.mark.parametrize(
    "got, wanted, apart",
    [
        (1.0, 1.0 + 2**-7, 1),
        (1.0 - 2**-8, 1.0 + 2**-7, 2),  # across a power of two
        (-(2.0**-133), 2.0**-133, 2),  # the smallest numbers beside zero
        (INF, torch.finfo(torch.bfloat16).max, 1),
    ],
)
def test_distance_in_ulps(got: float, wanted: float, apart: int) -> None:
    with pytest.raises(Wrong, match=f"at most {apart} ulps? apart"):
        check_bits(of(NAN, got, dtype=torch.bfloat16), of(2.0, wanted, dtype=torch.bfloat16), "x")


def test_distance_of_fp64_fits_no_integer_and_nan_is_no_number() -> None:
    with pytest.raises(Wrong, match="at most 18437736874454810624 ulps apart"):
        check_bits(of(-INF, dtype=torch.float64), of(INF, dtype=torch.float64))
    with pytest.raises(Wrong, match=r"at \[1\]: nan \(0x7fc00000\), wanted 2.0 \(0x40000000\); NaN in all of them"):
        check_bits(of(1.0, NAN), of(1.0, 2.0))


def test_bits_of_another_kind() -> None:
    x = torch.zeros(2, 3)
    assert verdict(check_bits, x, x.half(), "y") == "y is torch.float32 [2, 3], wanted torch.float16 [2, 3]"
    assert "wanted torch.float32 [3, 2]" in verdict(check_bits, x, x.T)
    assert verdict(check_bits, x.T, x.T.contiguous()) == "ok"
    ids = torch.arange(6).view(2, 3)
    wanted = "the result: bits differ in 1 of 6 elements, first in element 5 at [1, 2]: 5, wanted 9"
    assert verdict(check_bits, ids, ids + 4 * (ids == 5)) == wanted


def test_twice_the_error_of_the_peer_and_no_more() -> None:
    exact, peer = of(1000.0, 1.0, dtype=torch.float64), of(1000.01, 1.0)
    check_close(of(1000.0, 1.0195), exact, peer)
    with pytest.raises(Wrong, match=r"y is off by 0.0205 .* allowed are 0.02: .* first in element 1 at \[1\]: 1.02"):
        check_close(of(1000.0, 1.0205), exact, peer, "y")


def test_one_rounding_is_granted_where_the_peer_is_exact() -> None:
    exact = of(256.0, 1.0, dtype=torch.float64)
    check_close(of(258.0, 1.0, dtype=torch.bfloat16), exact, of(256.0, 1.0, dtype=torch.bfloat16))
    assert "off by 4" in verdict(check_close, of(260.0, 1.0, dtype=torch.bfloat16), exact, exact.bfloat16())
    assert "off by" in verdict(check_close, of(256.01, 1.0), exact, exact.float())
    check_close(of(256.01, 1.0), exact, exact.float(), granted=1e-4)


def test_inf_and_nan_are_where_the_peer_has_them() -> None:
    exact = of(NAN, INF, -INF, 1.0, dtype=torch.float64)
    check_close(exact.float(), exact, exact.float())
    for place, value in ((0, 0.0), (1, NAN), (2, INF), (3, NAN)):
        got = exact.float()
        got[place] = value
        assert f"other {'nan' if place in (0, 1, 3) else 'posinf'} entries" in verdict(
            check_close, got, exact, exact.float()
        )
    check_close(of(NAN), of(NAN, dtype=torch.float64), of(NAN))


def test_integers_are_equal() -> None:
    x = torch.tensor([[1, 2], [3, 4]])
    check_close(x, x, x)
    assert verdict(check_close, x, x * (x < 4), x) == (
        "the result differs in 1 of 4 elements, first in element 3 at [1, 1]: 4, wanted 0"
    )


def test_norm_of_the_error() -> None:
    wanted = torch.ones(100)
    check_norm(wanted + 0.009, wanted)
    check_norm((wanted, torch.arange(3)), (wanted, torch.arange(3)))
    assert "the result is off by 0.011" in verdict(check_norm, wanted + 0.011, wanted)
    assert "the result[1] differs" in verdict(check_norm, (wanted, torch.arange(3)), (wanted, torch.zeros(3).long()))
    assert "off by nan" in verdict(check_norm, wanted * NAN, wanted)


def test_a_verdict_hides_no_other_error() -> None:
    with pytest.raises(AssertionError, match="mine"):
        verdict(lambda: (_ for _ in ()).throw(AssertionError("mine")))


def test_every_name_is_there() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
