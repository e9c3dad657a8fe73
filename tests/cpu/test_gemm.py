"""Linear layers of the CPU backend: accuracy, row invariance to the bit, the choice of strategy, gated LoRA."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import gemm
from idlm_kernels.cpu.gemm import gated_lora_linear, linear, linear_silu_and_mul, prepare_weight, strategy_of
from idlm_kernels.cpu.layers import silu_and_mul
from idlm_kernels.testing import check_bits

STRATEGIES = [pytest.param(s, id=s.strategy) for s in gemm.STRATEGIES]
SHAPES = [(96, 64), (960, 576), (576, 1536), (33, 37), (1, 8)]  # oneDNN: at K = 1536 one row has bits of its own


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(strategy: type[gemm.Product], weight: Tensor) -> gemm.Product:
    try:
        return strategy(weight)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"{strategy.strategy} is not in this torch build: {error}")


# Products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_error_is_that_of_fp32_sums(strategy: type[gemm.Product], shape: tuple[int, int]) -> None:
    weight, x = randn(*shape).half(), randn(70, shape[1], seed=1)
    want = x.double() @ weight.double().T
    error = (make(strategy, weight)(x) - want).square().mean().sqrt()
    # The longest way to sum is one chain: partial sums of size sqrt(k), each rounded to 24 bits, k = 1 .. K.
    assert error <= 1.5 * shape[1] / math.sqrt(6) * 2**-24  # 1.5: the smallest shape has 70 elements only


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bits_of_a_row_do_not_depend_on_the_others(
    strategy: type[gemm.Product], shape: tuple[int, int], num_threads: int
) -> None:
    product, x = make(strategy, randn(*shape).half()), randn(150, shape[1], seed=1)
    want = product(x)
    for rows in [*range(1, 65), 65, 100, 150]:
        assert torch.equal(product(x[:rows]), want[:rows]), f"{rows} rows"
        assert torch.equal(product(x[-rows:]), want[-rows:]), f"last {rows} rows"
    broken = x.clone()
    broken[::2] = math.nan
    assert torch.equal(product(broken)[1::2], want[1::2])


# Not tiled-fp32: how a BLAS shares its sums among threads is up to it. A choice is made for one number of threads.
@pytest.mark.parametrize("strategy", [gemm.FbgemmFp16, gemm.OneDnnFp32, gemm.RowsFp32])
def test_bits_do_not_depend_on_threads(strategy: type[gemm.Product]) -> None:
    weight, x = randn(960, 576).half(), randn(7, 576, seed=1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(make(strategy, weight)(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Choice


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_verdicts", {})


class Depends(gemm.RowsFp32):
    """A product whose rows know how many they are."""

    strategy = "depends"

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * (1 + x.shape[0] * 2**-20)


class DependsOnPlace(gemm.RowsFp32):
    strategy = "depends-on-place"

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        y[3:4] *= 1 + 2**-20
        return y


@pytest.mark.parametrize("product", [Depends, DependsOnPlace])
def test_a_product_that_is_not_invariant_is_not_used(product: type[gemm.Product], no_verdicts: None) -> None:
    weight = randn(24, 16)
    assert not gemm.is_row_invariant(product(weight), 16)
    for _ in range(2):  # the second time from memory
        assert gemm._make_product(weight, (product, gemm.RowsFp32)).strategy == "rows-fp32"


@pytest.mark.parametrize("missing", range(4))
def test_the_next_strategy_is_used_where_one_is_missing(
    missing: int, no_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, weight: Tensor) -> None:
        raise RuntimeError("not in this build")

    weight, x = randn(40, 32).half(), randn(5, 32, seed=1)
    for strategy in gemm.STRATEGIES[:missing]:
        monkeypatch.setattr(strategy, "__init__", refuse)
    handle = prepare_weight(weight)
    assert strategy_of(handle) in [s.strategy for s in gemm.STRATEGIES[missing:]]
    torch.testing.assert_close(linear(x, handle), x @ weight.float().T)


def test_fp16_weights_take_fbgemm_where_it_is() -> None:
    weight = randn(40, 32).half()
    make(gemm.FbgemmFp16, weight)
    assert strategy_of(prepare_weight(weight)) == "fbgemm-fp16"
    assert strategy_of(prepare_weight(weight.bfloat16())) == "fbgemm-fp16"
    assert strategy_of(prepare_weight(weight.float())) != "fbgemm-fp16"
    assert strategy_of(weight) in ("tiled-fp32", "rows-fp32")
    assert strategy_of(weight.double()) == "torch"


@pytest.mark.parametrize("value", [65536.0, -1e30, math.inf, math.nan])
def test_weights_that_fp16_cannot_hold_stay_fp32(value: float) -> None:
    weight = randn(40, 32).bfloat16()
    weight[3, 4] = value
    handle = prepare_weight(weight)
    assert strategy_of(handle) != "fbgemm-fp16"
    x = randn(3, 32, seed=1)
    torch.testing.assert_close(linear(x, handle), x @ weight.float().T, equal_nan=True)


def test_bf16_below_the_range_of_fp16() -> None:
    exponents = torch.arange(-40, 16).float()
    weight = (2.0**exponents * 1.2578125).bfloat16().unsqueeze(0)
    stored = linear(torch.eye(weight.shape[1]), prepare_weight(weight)).T
    normal = weight.float().abs() >= 2.0**-14
    assert torch.equal(stored[normal], weight.float()[normal])
    assert ((stored - weight.float()).abs() <= 2.0**-25).all()
    assert torch.equal(stored * 2**24, (stored * 2**24).round())


# Handles


def test_a_handle_holds_no_memory_and_frees_the_packed_weight() -> None:
    weight = randn(40, 32).half()
    handle = prepare_weight(weight)
    assert (handle.shape, handle.dtype) == (weight.shape, weight.dtype)
    assert handle.untyped_storage().nbytes() == weight.element_size()
    assert handle.isnan().all()
    assert prepare_weight(handle) is handle
    product = weakref.ref(gemm._product_of(handle))
    del handle
    gc.collect()
    assert product() is None


def test_the_original_weight_may_change_or_go() -> None:
    for dtype in (torch.float16, torch.float32):
        weight, x = randn(40, 32).to(dtype), randn(3, 32, seed=1)
        handle = prepare_weight(weight)
        want = linear(x, handle)
        weight.fill_(math.nan)
        assert torch.equal(linear(x, handle), want)


# linear


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_against_the_reference(dtype: torch.dtype, prepared: bool) -> None:
    weight, bias, x = randn(40, 32).half(), randn(40, seed=2), randn(9, 32, seed=1).to(dtype)
    out = torch.empty(9, 40, dtype=dtype)
    given = prepare_weight(weight) if prepared else weight
    y = linear(x, given, bias=bias, out=out)
    assert y is out
    torch.testing.assert_close(y, python_ref.linear(x, weight, bias=bias))
    assert torch.equal(linear(x, given, bias=bias), y)
    assert linear(x[:0], given).shape == (0, 40)


def test_rows_of_any_stride() -> None:
    handle, x = prepare_weight(randn(40, 32).half()), randn(9, 64, seed=1)
    assert torch.equal(linear(x[:, 32:], handle), linear(x[:, 32:].clone(), handle))
    assert torch.equal(linear(x[:1, 32:], handle), linear(x[:, 32:], handle)[:1])


def test_fp64_is_computed_in_fp64() -> None:
    weight, x = randn(40, 32).double(), randn(3, 32, seed=1).double()
    assert prepare_weight(weight) is weight
    assert torch.equal(linear(x, weight), python_ref.linear(x, weight))
    with pytest.raises(ValueError, match="float64"):
        linear(x, prepare_weight(weight.half()))


# gated_lora_linear

GATES = {
    "none": [0] * 9,
    "all": [1] * 9,
    "end": [0, 0, 0, 0, 0, 0, 1, 1, 1],
    "middle": [0, 0, 1, 1, 1, 1, 0, 0, 0],
    "scattered": [1, 0, 0, 1, 0, 1, 1, 0, 0],
}
WIDTHS = [24, 8, 8]


def adapter(rank: int = 4) -> tuple[Tensor, Tensor]:
    return randn(len(WIDTHS) * rank, 32, seed=3), randn(sum(WIDTHS), rank, seed=4)


@pytest.mark.parametrize("output_sizes", [WIDTHS, None], ids=["output_sizes", "one"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES.keys())
def test_gated_lora(gates: list[int], dtype: torch.dtype, output_sizes: list[int] | None) -> None:
    weight, bias, x = randn(40, 32).half(), randn(40, seed=2), randn(9, 32, seed=1)
    a, b = adapter()
    a = a if output_sizes else a[:4]
    lora_mask, handle = (5 * torch.tensor(gates)).to(dtype), prepare_weight(weight)
    y = gated_lora_linear(x, handle, a, b, lora_mask, 0.7, bias=bias, output_sizes=output_sizes)
    fp32 = (a, b, lora_mask, 0.7)
    want = python_ref.gated_lora_linear(x.double(), weight.double(), *fp32, bias=bias, output_sizes=output_sizes)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    off = lora_mask == 0
    check_bits(y[off], linear(x, handle, bias=bias)[off])
    out = torch.empty_like(y)
    assert gated_lora_linear(x, handle, a, b, lora_mask, 0.7, bias=bias, output_sizes=output_sizes, out=out) is out
    assert torch.equal(out, y)
    # A MASK row alone has the bits that it has among others.
    for row in range(9):
        alone = gated_lora_linear(
            x[row : row + 1], handle, a, b, lora_mask[row : row + 1], 0.7, bias=bias, output_sizes=output_sizes
        )
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ungated_rows_see_nothing_of_the_adapter(value: float) -> None:
    handle, x, (a, b) = prepare_weight(randn(40, 32).half()), randn(9, 32, seed=1), adapter()
    lora_mask = torch.tensor(GATES["scattered"], dtype=torch.bool)
    want = linear(x, handle)
    x[lora_mask], a[2], b[5] = value, value, value
    y = gated_lora_linear(x, handle, a, b, lora_mask, 0.7, output_sizes=WIDTHS)
    check_bits(y[~lora_mask], want[~lora_mask])
    assert not y[lora_mask].isfinite().all()


def test_no_work_for_the_adapter_without_gated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_prepared_adapter", lambda *args: pytest.fail("the adapter was read"))
    handle, x, (a, b) = prepare_weight(randn(40, 32).half()), randn(9, 32, seed=1), adapter()
    y = gated_lora_linear(x, handle, a, b, torch.zeros(9, dtype=torch.bool), 0.7, output_sizes=WIDTHS)
    assert torch.equal(y, linear(x, handle))


@pytest.mark.parametrize("update", [gemm.SplitLowRank, gemm.RowsLowRank])
@pytest.mark.parametrize(("widths", "inner"), [([576, 192, 192], 576), ([576], 1536), ([24, 16, 8], 32)], ids=str)
def test_update_of_an_adapter(update: type[gemm.LowRank], widths: list[int], inner: int, num_threads: int) -> None:
    rank = 16
    a, b, x = randn(rank * len(widths), inner), randn(sum(widths), rank, seed=1), randn(65, inner, seed=2)
    low_rank = update(a, b, 0.5, widths)
    found = low_rank(x)
    parts = zip(a.double().split(rank), b.double().split(widths), strict=True)
    want = torch.cat([0.5 * x.double() @ p.T @ q.T for p, q in parts], dim=1)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-3)
    if update is gemm.SplitLowRank and not gemm.is_row_invariant(low_rank, inner):
        pytest.skip("with this BLAS its rows depend on each other: it is not used then, as the next test shows")
    for rows in range(1, 65):
        assert torch.equal(low_rank(x[:rows]), found[:rows]) and torch.equal(low_rank(x[-rows:]), found[-rows:])


@pytest.mark.parametrize("variant", ["invariant", "not invariant"])
def test_an_update_whose_rows_depend_on_each_other_is_not_used(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dependent(gemm.SplitLowRank):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + (0 if variant == "invariant" else x.shape[0])

    monkeypatch.setattr(gemm, "_verdicts", {})
    monkeypatch.setattr(gemm, "SplitLowRank", Dependent)
    a, b = adapter()
    chosen = gemm._prepared_adapter(a, b, 1.0, list(WIDTHS))
    assert type(chosen) is (Dependent if variant == "invariant" else gemm.RowsLowRank)


@pytest.mark.parametrize("inference", [False, True])
def test_a_prepared_adapter_follows_what_it_was_made_of(inference: bool) -> None:
    with torch.inference_mode(inference):
        handle, x, (a, b) = prepare_weight(randn(40, 32).half()), randn(9, 32, seed=1), adapter()
        lora_mask = torch.ones(9, dtype=torch.bool)

        def run(a: Tensor, b: Tensor, scale: float = 0.7) -> Tensor:
            return gated_lora_linear(x, handle, a, b, lora_mask, scale, output_sizes=WIDTHS)

        assert torch.equal(run(a, b), run(a, b))
        b.mul_(3)
        assert torch.equal(run(a, b), run(a.clone(), b.clone()))
        a.add_(1)
        assert torch.equal(run(a, b), run(a.clone(), b.clone()))
        other = adapter()[0]
        assert torch.equal(run(other, b), run(other, b.clone()))
        assert torch.equal(run(a, b, 2.0), run(a, b.clone(), 2.0))
        merged = gated_lora_linear(x, handle, a[:4], b, lora_mask, 0.7)
        assert torch.equal(merged, gated_lora_linear(x, handle, a[:4], b.clone(), lora_mask, 0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    weight, x, (a, b) = randn(40, 32).half(), randn(9, 32, seed=1).to(dtype), adapter()
    lora_mask = torch.tensor(GATES["end"])
    y = gated_lora_linear(x, prepare_weight(weight), a, b, lora_mask.int(), 0.7, output_sizes=WIDTHS)
    want = python_ref.gated_lora_linear(x.double(), weight.double(), a, b, lora_mask, 0.7, output_sizes=WIDTHS)
    error, once = (y.double() - want).abs(), (want.to(dtype).double() - want).abs()
    assert (error <= once + 1e-4 * torch.finfo(dtype).eps * want.abs() + 1e-5).all()


def test_linear_silu_and_mul_is_the_one_after_the_other() -> None:
    x, weight = torch.randn(5, 48), prepare_weight(torch.randn(64, 48))
    a, b, lora_mask = torch.randn(8, 48), torch.randn(64, 4), torch.tensor([0, 1, 0, 1, 0], dtype=torch.int32)
    plain = silu_and_mul(linear(x, weight))
    assert torch.equal(linear_silu_and_mul(x, weight), plain)
    adapter = {"lora_a": a, "lora_b": b, "lora_mask": lora_mask, "scale": 0.5, "output_sizes": [32, 32]}
    out = torch.empty_like(plain)
    assert linear_silu_and_mul(x, weight, **adapter, out=out) is out
    assert torch.equal(out, silu_and_mul(gated_lora_linear(x, weight, a, b, lora_mask, 0.5, output_sizes=[32, 32])))
    assert torch.equal(out[lora_mask == 0], plain[lora_mask == 0])
