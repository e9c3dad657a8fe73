"""A step never waits for the device: no host read of a value, no shape made from data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idlm_kernels.generate import Generator, SamplingParams, StepPlan
from idlm_kernels.generate.generator import Batch
from idlm_kernels.generate.step import decode_step, prefill
from idlm_kernels.ops import attention, gemm, layers, sampling, state

MakeGenerator = Callable[..., Generator]
FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.bincount.default,
}


class NoSync(TorchDispatchMode):
    """Refuses ops that read values on the host, and records the shapes that every other op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FORBIDDEN:
            raise AssertionError(f"{func} needs a value on the host")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index makes a shape from data"
        out = func(*args, **(kwargs or {}))
        leaves = out if isinstance(out, (tuple, list)) else [out]
        self.trace.append((str(func), [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]))
        return out


def running_batch(generator: Generator, plan: str, verify: str, prompts: list[list[int]]) -> Batch:
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=1, max_tokens=40)
    batch = Batch(generator, prompts, params, StepPlan(plan, 4), verify)  # type: ignore[arg-type]
    prefill(batch._decoder, batch._state, 0, [len(prompt) for prompt in prompts], 512)
    return batch


@pytest.mark.parametrize("verify", ["match", "rejection"])
@pytest.mark.parametrize("plan", ["ar", "chain", "branched"])
@pytest.mark.parametrize("inside_ops", [True, False], ids=["references", "step"])
def test_a_step_reads_nothing_on_the_host(
    inside_ops: bool, plan: str, verify: str, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`references`: the mode looks inside the reference ops too. `step`: ops are opaque, in the default backend."""
    if inside_ops:
        monkeypatch.setenv("IDLM_BACKEND", "torch")
        for module in (attention, gemm, layers, sampling, state):
            monkeypatch.setattr(module, "traced", lambda x: False)
    from idlm_kernels.ops import _dispatch

    monkeypatch.setattr(_dispatch, "_chosen", {})
    generator = make_generator()
    traces = []
    for lengths in ([3, 8], [8, 1]):
        batch = running_batch(generator, plan, verify, [list(range(n)) for n in lengths])
        batch._state.finish[0] = int(lengths[0] == 8)  # a finished request must not change the trace
        with NoSync() as mode:
            for _ in range(3):
                decode_step(batch._decoder, batch._state)
        traces.append(mode.trace)
    assert len(traces[0]) > 100 and traces[0] == traces[1], "the ops and shapes of a step do not depend on data"


def test_the_guard_can_fail() -> None:
    x = torch.arange(3)
    for sync in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0])):
        with NoSync(), pytest.raises(AssertionError):
            sync()


def test_a_step_can_be_traced_without_values(make_generator: MakeGenerator) -> None:
    """torch.compile sees one whole graph: nothing in a step needs a value."""
    generator = make_generator()
    batch = running_batch(generator, "branched", "match", [[1, 2, 3], [4]])
    other = running_batch(generator, "branched", "match", [[1, 2, 3], [4]])
    compiled = torch.compile(decode_step, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(batch._decoder, batch._state)
        decode_step(other._decoder, other._state)
    assert torch.equal(batch._state.text, other._state.text)
