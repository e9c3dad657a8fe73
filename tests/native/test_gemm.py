"""linear, gated_lora_linear, linear_silu_and_mul and silu_and_mul on backend `cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

import python_ref
from bench.native_gemm import tile
from idlm_kernels.native import gemm
from idlm_kernels.testing.numerics import check_close, same_bits
from tests.native.gemm_support import (
    Problem,
    check_activation,
    check_adapter,
    check_chain,
    check_flags,
    check_isolation,
    check_linear,
    check_row_bits,
    check_slices,
)
from tests.softgpu_support import SCHEDULES

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "rows, n, k",
    [
        (1, 1, 8),
        (7, 100, 584),
        (16, 64, 64),
        (64, 200, 1024),
        (65, 130, 576),
        (130, 66, 72),
        (112, 960, 576),
        (7, 64, 8192),
    ],
)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    check_linear(Problem(rows, k, (n,), 8, dtype, device))


def test_linear_takes_any_layout(device: torch.device) -> None:
    p = Problem(5, 96, (70,), 8, device=device)
    wanted = gemm.linear(p.x, p.weight)
    odd = torch.zeros(5, 97, dtype=BF16, device=device)[:, 1:]
    odd.copy_(p.x)
    assert same_bits(gemm.linear(odd, p.weight), wanted)
    assert same_bits(gemm.linear(p.x, p.weight.T.contiguous().T), wanted)
    assert same_bits(gemm.linear(p.x, torch.cat([p.weight, p.weight], 1)[:, :96]), wanted)
    assert same_bits(gemm.linear(p.x[:1].expand(5, -1), p.weight), wanted[:1].expand(5, -1))
    assert same_bits(gemm.linear(p.x[:1], gemm.prepare_weight(p.weight)), wanted[:1])


def test_nothing(device: torch.device) -> None:
    p = Problem(3, 16, (8,), 8, device=device)
    assert gemm.linear(p.x[:0], p.weight).shape == (0, 8)
    assert gemm.linear(p.x, p.weight[:0]).shape == (3, 0)
    assert gemm.linear_silu_and_mul(p.x, p.weight[:0]).shape == (3, 0)


def test_bias_of_another_dtype(device: torch.device) -> None:
    p = Problem(5, 96, (70,), 8, device=device)
    wanted = p.linear()
    for dtype in (torch.float32, torch.float64):
        assert same_bits(gemm.linear(p.x, p.weight, bias=p.bias.to(dtype)), wanted)


@pytest.mark.parametrize("n, k", [(128, 1024), (70, 584)])
def test_row_bits_depend_on_the_row_alone(n: int, k: int, device: torch.device) -> None:
    check_row_bits(Problem(300, k, (n - 30, 30), 72, device=device))


ADAPTERS = [
    (9, 320, (70, 40, 90), 40),
    (1, 64, (64,), 1),
    (7, 96, (64, 64), 128),
    (70, 1024, (1, 131), 16),
    (65, 512, (130, 66), 256),
    (3, 72, (6,), 5),
    (64, 2048, (96, 32), 200),
    (9, 8192, (30, 34), 72),
    (300, 576, (130, 50), 72),
    (224, 2048, (20, 44), 24),
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rows, k, output_sizes, rank", ADAPTERS)
def test_adapter(
    rows: int, k: int, output_sizes: Sequence[int], rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    problem = Problem(rows, k, output_sizes, rank, dtype, device)
    check_adapter(problem)
    if rows == 1:
        problem.lora_mask[:] = True
        check_adapter(problem)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rows, k, output_sizes, rank", ADAPTERS)
def test_activation(
    rows: int, k: int, output_sizes: Sequence[int], rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_activation(Problem(rows, k, output_sizes, rank, dtype, device))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_gate_is_whatever_is_not_zero(dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem(device=device)
    wanted = problem.gated()
    problem.lora_mask = problem.lora_mask.to(dtype) * (200 if dtype == torch.uint8 else 1 << 20)
    assert same_bits(problem.gated(), wanted)


def test_ungated_rows_are_untouched(device: torch.device) -> None:
    check_isolation(Problem(device=device))
    check_isolation(Problem(70, 1024, (100, 50), 130, device=device))


def test_slices_do_not_touch_each_other(device: torch.device) -> None:
    check_slices(Problem(device=device))


def test_too_many_slices_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"17 output_sizes, backend 'cuda' takes 16"):
        Problem(output_sizes=[2] * 17, device=device).gated()


def test_what_the_kernel_does_not_take_the_next_backend_computes(device: torch.device) -> None:
    assert gemm.refusal(BF16, 4096) is None and gemm.refusal(FP16, 8) is None
    assert gemm.refusal(torch.float32, 64) == "it takes bf16 and fp16, not float32"
    assert gemm.refusal(BF16, 77) == "it takes K in multiples of 8, not 77"
    assert gemm.refusal(BF16, 0) is not None
    for dtype, k in ((torch.float32, 64), (BF16, 77), (torch.float64, 16), (BF16, 0)):
        problem = Problem(5, k, (20, 12), 8, dtype, device) if k else Problem(5, 8, (20, 12), 8, dtype, device)
        if k == 0:
            problem.x, problem.weight, problem.a = problem.x[:, :0], problem.weight[:, :0], problem.a[:, :0]
        assert torch.allclose(problem.gated().double(), problem.exact().to(device), atol=0.1, rtol=0.02)
        assert same_bits(problem.activated(), gemm.silu_and_mul(problem.gated()))


# The parts of K of a tile are 1, 2, 4, and beside them there is room in a cluster for a second tile, which shares x.
SHARING = [(512, (8500,)), (1024, (2100, 2200)), (2048, (2200,))]


@pytest.mark.parametrize("k, output_sizes", SHARING, ids=["1 part", "2 parts", "4 parts"])
def test_tiles_that_share_tokens(k: int, output_sizes: Sequence[int], softgpu: ModuleType, module: ModuleType) -> None:
    """Above 32 rows; the last tile may have no neighbour. Updates of the rank fill the ring more than once."""
    splits, h_splits = module.gemm_shape(sum(output_sizes), k)
    assert h_splits == 2 * splits
    for rows, rank in ((66, 264), (130, 72)):
        problem = Problem(rows, k, output_sizes, rank)
        plain, got, activated = problem.linear(), problem.gated(), problem.activated()
        check_close(plain, problem.exact_linear(), problem.peer_linear())
        check_close(got, problem.exact(), problem.peer())
        assert same_bits(got[~problem.lora_mask], plain[~problem.lora_mask])
        assert same_bits(activated, gemm.silu_and_mul(got))
        for few in (slice(3, 4), slice(2, 66)):
            assert same_bits(problem.linear(few), plain[few]) and same_bits(problem.gated(few), got[few])
        check_flags()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_tiles_that_share_tokens(schedule: str, softgpu: ModuleType, module: ModuleType) -> None:
    problem = Problem(66, *SHARING[2], 136)
    wanted = problem.gated()
    with softgpu.configured(**SCHEDULES[schedule]):
        for rows in (slice(66), slice(1, 41)):
            assert same_bits(problem.gated(rows), wanted[rows])
        assert same_bits(problem.linear()[~problem.lora_mask], wanted[~problem.lora_mask])
    check_flags()


@pytest.mark.parametrize("rows", [7, 70, 200])
def test_no_adapter_work_without_a_gated_row(rows: int, softgpu: ModuleType, module: ModuleType) -> None:
    k, output_sizes = 1024, (64, 192)
    problem = Problem(rows, k, output_sizes, 128)
    problem.lora_mask[:] = False
    problem.linear()
    plain = softgpu.counters()
    got = problem.gated()
    gated = softgpu.counters()
    assert gated["wgmma_flops"] == plain["wgmma_flops"]
    tiles = [sum(output_sizes) // (64 * tile(rows, adapter)[0]) for adapter in (False, True)]  # each reads x
    more = (tiles[1] - tiles[0]) * rows * k * 2
    assert gated["tma_load_bytes"] == plain["tma_load_bytes"] + more
    assert same_bits(got, problem.linear())
    check_flags()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType, module: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_linear(Problem(7, 584, (100,), 8))
        check_adapter(Problem(9, 1024, (70, 90), 136))
        check_activation(Problem(66, 1024, (51, 61), 72))
        check_linear(Problem(7, 8192, (60,), 8))  # every stage is filled twice
        check_activation(Problem(150, 512, (30, 140), 72))


def test_stays_inside_its_tensors(softgpu: ModuleType, module: ModuleType) -> None:
    problem = Problem(9, 584, (70, 40, 90), 40)
    out = torch.zeros(9, 200, dtype=BF16)
    keep = [problem.x, problem.weight, problem.bias, problem.a, problem.b, problem.lora_mask, out]
    arguments = gemm._adapter_params

    def registered(*args: object) -> object:
        found = arguments(*args)  # type: ignore[arg-type]
        for tensor in found[1][3:]:
            softgpu.register(tensor)
            keep.append(tensor)
        return found

    for tensor in keep:
        softgpu.register(tensor)
    gemm._adapter_params = registered  # type: ignore[assignment]
    try:
        with softgpu.configured(strict=1):
            problem.linear(out=out)
            problem.gated(out=out)
    finally:
        gemm._adapter_params = arguments
        for tensor in keep:
            softgpu.unregister(tensor)
    assert same_bits(out, problem.gated())


def test_layers_in_a_row_under_early_dependent_launch(softgpu: ModuleType, module: ModuleType) -> None:
    """Each layer reads what the one before wrote, and starts as early as it may. A weight is constant or was written by
    the launch before."""
    check_chain(softgpu)


def test_one_set_of_flags_serves_most_launches() -> None:
    cpu = torch.device("cpu")
    assert gemm._flags(4096, cpu) is gemm._flags(2, cpu) and not gemm._flags(2, cpu).any()
    assert len(gemm._flags(5000, cpu)) == 8192


def test_shapes(module: ModuleType) -> None:
    """The worked example of csrc/gemm/heuristics.h."""
    shapes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
    assert {name: module.gemm_shape(*shape) for name, shape in shapes.items()} == {
        "qkv": (2, 4),
        "o": (4, 8),
        "gate_up": (1, 2),
        "down": (4, 8),
    }
    for n in (1, 64, 576, 1536, 4096, 5120, 25600, 151936):
        for k in (8, 64, 256, 576, 4096, 25600):
            splits, h_splits = module.gemm_shape(n, k)
            blocks = -(-k // 64)
            assert splits in (1, 2, 4, 8) and h_splits in (splits, 2 * splits) and h_splits <= 8
            assert h_splits == 1 or blocks >= 4 * h_splits
            assert splits == 1 or splits * -(-n // 64) <= 264


def test_tiles(module: ModuleType) -> None:
    for rows in (1, 64, 65, 128, 129, 256, 2048):
        for adapter in (False, True):
            assert module.gemm_tile(rows, adapter) == tile(rows, adapter)


def test_stages(module: ModuleType) -> None:
    """Launches of Qwen3-8B at up to 64 rows: (clusters, cluster size) and stages; then 128 rows, and more than fit."""
    assert module.gemm_stages(96, 2, 1, False) == 7  # qkv
    assert module.gemm_stages(48 + 6, 4, 1, True) == 7  # with an adapter of rank 128 in three slices
    assert module.gemm_stages(64, 4, 1, False) == 7 and module.gemm_stages(32 + 2, 8, 1, True) == 4  # o
    assert module.gemm_stages(384, 1, 1, False) == 4 and module.gemm_stages(192 + 4, 2, 1, True) == 4  # gate_up
    assert module.gemm_stages(16, 8, 2, False) == 7 and module.gemm_stages(96, 2, 2, False) == 3  # 128 rows
    assert module.gemm_stages(32 + 2, 8, 2, True) == 3 and module.gemm_stages(192 + 4, 2, 2, True) == 3
    assert module.gemm_stages(16, 8, 4, True) == 4  # 256 rows
    assert module.gemm_stages(10**6, 1, 1, False) == 4
    assert module.gemm_stages(1, 1, 1, False) == 8


@pytest.mark.parametrize(
    "rows, k, output_sizes, rank",
    [
        (7, 576, (576, 192, 192), 16),
        (7, 1536, (576,), 64),
        (7, 4096, (4096,), 128),
        (5, 5120, (1024, 128, 128), 256),
        # The whole width of Qwen3-32B, or as many tiles as a wave has, and enough of K for its parts.
        (7, 1024, (5120,), 128),
        (7, 512, (8192, 1024, 1024), 128),
        (300, 576, (200,), 16),
        (448, 520, (70, 130), 24),
        (2048, 264, (130, 70), 40),
        pytest.param(7, 8192, (5120,), 128, marks=pytest.mark.slow),
        pytest.param(112, 5120, (8192, 1024, 1024), 128, marks=pytest.mark.slow),
        pytest.param(1024, 512, (8500,), 72, marks=pytest.mark.slow),
    ],
    ids=[
        "qkv of SmolLM2",
        "down of SmolLM2",
        "o of Qwen3-8B",
        "a part of qkv of Qwen3-32B",
        "o of Qwen3-32B, cut down",
        "qkv of Qwen3-32B, cut down",
        "300 rows",
        "448 rows",
        "2048 rows",
        "o of Qwen3-32B",
        "qkv of Qwen3-32B",
        "1024 rows of tiles that share tokens",
    ],
)
def test_model_shapes(rows: int, k: int, output_sizes: Sequence[int], rank: int, device: torch.device) -> None:
    check_adapter(Problem(rows, k, output_sizes, rank, device=device))


def test_silu_and_mul(device: torch.device) -> None:
    x = torch.randn(5, 600, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, BF16, FP16):
        rows = x.to(dtype)
        got = gemm.silu_and_mul(rows.to(device)).cpu()
        assert torch.allclose(
            got.double(), python_ref.silu_and_mul(rows.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-7
        )
