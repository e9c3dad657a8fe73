"""Problems for the linear layers of backend `cuda`, and the checks that the kernel passes and planted faults do not."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import python_ref
from idlm_kernels import _semaphores
from idlm_kernels.native import gemm
from idlm_kernels.testing.numerics import check_close, same_bits

NONE = slice(None)


class Problem:
    """Arguments of the three ops, on the CPU or the device that the tests run on."""

    def __init__(
        self,
        rows: int = 9,
        k: int = 320,
        output_sizes: Sequence[int] = (70, 40, 90),
        rank: int = 40,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        self.output_sizes, self.scale = list(output_sizes), 0.7
        n, num = sum(output_sizes), len(output_sizes)
        self.x, self.weight, self.bias = random(rows, k), random(n, k, scale=k**-0.5), random(n)
        self.a, self.b = random(num * rank, k, scale=k**-0.5), random(n, rank, scale=rank**-0.5)
        self.lora_mask = (torch.arange(rows) % 3 == 1).to(device)

    def linear(self, rows: slice = NONE, **options: Any) -> Tensor:
        return gemm.linear(self.x[rows], self.weight, bias=self.bias, **options)

    def gated(self, rows: slice = NONE, **options: Any) -> Tensor:
        inputs = (self.x[rows], self.weight, self.a, self.b, self.lora_mask[rows], self.scale)
        return gemm.gated_lora_linear(*inputs, bias=self.bias, output_sizes=self.output_sizes, **options)

    def activated(self, rows: slice = NONE, adapter: bool = True, **options: Any) -> Tensor:
        if adapter:
            options |= {"lora_a": self.a, "lora_b": self.b, "lora_mask": self.lora_mask[rows], "scale": self.scale}
            options["output_sizes"] = self.output_sizes
        return gemm.linear_silu_and_mul(self.x[rows], self.weight, bias=self.bias, **options)

    def exact(self) -> Tensor:
        inputs = (t.double().cpu() for t in (self.x, self.weight, self.a, self.b))
        options = {"bias": self.bias.double().cpu(), "output_sizes": self.output_sizes}
        return python_ref.gated_lora_linear(*inputs, self.lora_mask.cpu(), self.scale, **options)

    def exact_linear(self) -> Tensor:
        return python_ref.linear(self.x.double().cpu(), self.weight.double().cpu(), bias=self.bias.double().cpu())

    def peer_linear(self) -> Tensor:
        return python_ref.linear(self.x.cpu(), self.weight.cpu(), bias=self.bias.cpu())

    def peer(self) -> Tensor:
        """What PyTorch computes in this dtype, each product rounded."""
        x, weight, bias, a, b = (t.cpu() for t in (self.x, self.weight, self.bias, self.a, self.b))
        shrunk = (x @ a.T).split(b.shape[1], dim=1)
        update = torch.cat([s @ part.T for s, part in zip(shrunk, b.split(self.output_sizes), strict=True)], 1)
        base = torch.nn.functional.linear(x, weight, bias)
        return torch.where((self.lora_mask.cpu() != 0).unsqueeze(1), base + self.scale * update, base)


def check_linear(problem: Problem) -> None:
    """Values, with and without a bias, twice into the same place: what one launch leaves behind suits the next."""
    p = problem
    exact = p.exact_linear()
    out = p.x.new_empty(p.x.shape[0], p.weight.shape[0] + 3)[:, :-3]
    for launch in range(2):
        out.fill_(torch.nan)
        assert p.linear(out=out) is out
        check_close(out.cpu(), exact, p.peer_linear(), f"launch {launch}")
    plain = python_ref.linear(p.x.cpu(), p.weight.cpu())
    check_close(gemm.linear(p.x, p.weight).cpu(), exact - p.bias.double().cpu(), plain)


def check_adapter(problem: Problem) -> None:
    """Values, and rows without the adapter with the bits of `linear`; twice, for the flags."""
    ungated = problem.lora_mask == 0
    plain = problem.linear()
    for launch in range(2):
        got = problem.gated()
        check_close(got.cpu(), problem.exact(), problem.peer(), f"launch {launch}")
        assert same_bits(got[ungated], plain[ungated])
        check_flags()


def check_activation(problem: Problem) -> None:
    """Every row is silu_and_mul of the linear layer, to the bit, with and without an adapter."""
    features = problem.weight.shape[0] // 2
    out = problem.x.new_full((problem.x.shape[0], features + 3), torch.nan)[:, :-3]
    plain = gemm.silu_and_mul(problem.linear())
    check_close(
        plain.cpu(),
        python_ref.silu_and_mul(problem.linear().double().cpu()),
        python_ref.silu_and_mul(problem.linear().cpu()),
    )
    assert same_bits(problem.activated(adapter=False, out=out), plain)
    got = problem.activated()
    assert same_bits(got, gemm.silu_and_mul(problem.gated()))
    ungated = problem.lora_mask == 0
    assert same_bits(got[ungated], plain[ungated]) and (bool(ungated.all()) or not same_bits(got, plain))


def check_row_bits(problem: Problem) -> None:
    """A row has the same bits in any company, with and without the adapter and the activation."""
    whole = (problem.linear(), problem.gated(), problem.activated())
    for rows in (
        slice(0, 1),
        slice(5, 12),
        slice(64, 80),
        slice(129, 130),
        slice(1, 65),
        slice(60, 128),
        slice(10, 200),
    ):
        parts = (problem.linear(rows), problem.gated(rows), problem.activated(rows))
        for part, all_rows in zip(parts, whole, strict=True):
            assert same_bits(part, all_rows[rows])


def check_isolation(problem: Problem) -> None:
    """What gated rows and the adapter hold never reaches a row without the adapter, -0.0 included."""
    problem.bias[0], problem.weight[0] = -0.0, 0.0
    ungated = problem.lora_mask == 0
    problem.x[~ungated] = torch.nan
    problem.a[3], problem.b[::2] = torch.inf, torch.nan
    plain = problem.linear()
    assert plain[ungated].isfinite().all() and (plain[ungated, 0] == 0).all()
    assert same_bits(problem.gated()[ungated], plain[ungated])
    assert same_bits(problem.activated()[ungated], problem.activated(adapter=False)[ungated])


def check_slices(problem: Problem) -> None:
    """A NaN in one slice's adapter stays in that slice, also inside a tile that two slices share."""
    wanted = problem.gated()
    problem.a[: problem.b.shape[1]] = torch.nan
    got, first = problem.gated(), problem.output_sizes[0]
    assert got[problem.lora_mask != 0][:, :first].isnan().all()
    assert same_bits(got[:, first:], wanted[:, first:])


def check_flags() -> None:
    """Between launches all flags are 0."""
    for words in _semaphores._words.values():
        assert not words.any(), "flags are left behind"


def check_chain(softgpu: ModuleType) -> None:
    """Layers in a row that start as early as they may have the bits of layers one after the other."""
    first, second = Problem(9, 512, (256, 256), 72, seed=1), Problem(9, 256, (512,), 40, seed=2)
    rows = torch.cat([first.x, first.x[:7]])
    keep: list[object] = []  # launches are held back, so what they read has to live on
    arguments = gemm._adapter_params

    def remembered(*args: object) -> object:
        keep.append(arguments(*args))  # type: ignore[arg-type]
        return keep[-1]

    def run() -> list[torch.Tensor]:
        outputs = [
            torch.full(s, torch.nan, dtype=torch.bfloat16) for s in ((9, 256), (9, 512), (9, 256), (16, 512), (9, 16))
        ]
        second.x = outputs[0]
        constant = gemm.prepare_weight(second.weight)
        first.activated(out=outputs[0])
        gemm.gated_lora_linear(outputs[0], constant, second.a, second.b, second.lora_mask, 0.7, out=outputs[1])
        first.x, before = outputs[1], first.x
        first.activated(out=outputs[2])
        first.x = before
        gemm.linear(rows, first.weight, out=outputs[3])
        gemm.linear(first.x, outputs[3], out=outputs[4])  # a weight that the launch before writes
        return outputs

    gemm._adapter_params = remembered  # type: ignore[assignment]
    try:
        wanted = run()
        for options in ({}, {"sched": "random", "seed": 3}, {"async_": "late"}):
            with softgpu.configured(pdl="early", **options):
                got = run()
                softgpu.synchronize()
            for a, b in zip(got, wanted, strict=True):
                assert b.isfinite().all() and same_bits(a, b)
    finally:
        gemm._adapter_params = arguments
    check_flags()
