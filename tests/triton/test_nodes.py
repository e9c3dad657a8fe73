"""How many nodes a recorded step has: the launches of its kernels, and the kernels of torch that it calls between.

Qwen3-8B has 36 layers that are alike, so a step of it is what one layer adds 36 times, and what is around the layers
once; neither depends on the sizes. Counted on an eager step of a small model of the same architecture. The first factor
of an adapter is a launch of its own in Triton; in CUDA it is part of the layer's (docs/gemm.md).
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from triton.runtime.jit import JITFunction

import idlm_kernels
from bench import roofline
from idlm_kernels.generate import Engine, EngineOptions, SamplingParams
from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.step import decode_step
from tests.triton.test_end_to_end import QWEN, tiny_generator

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]

LAYERS = 36
# What a GPU does nothing for: memory from the allocator, and another look at the same memory.
WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "view", "_unsafe_view", "reshape",
    "as_strided", "slice", "select", "narrow", "split", "unbind", "unsqueeze", "squeeze", "expand", "permute",
    "transpose", "t", "alias", "detach", "lift_fresh", "to", "contiguous", "flatten", "unflatten", "chunk",
}  # fmt: skip


class Nodes(NamedTuple):
    launches: int
    adapter: int  # of them: first factors of an adapter
    torch: Counter[str]  # kernels of torch, by name


def has_kernel(event: FunctionEvent) -> bool:
    name = event.name.removeprefix("aten::")
    return name != event.name and name not in WITHOUT_KERNEL and not any(map(has_kernel, event.cpu_children))


def nodes_of_step(plan: str, with_adapter: bool, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    found: list[Nodes] = []

    def step(*args: Any) -> Tensor:
        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outcome = decode_step(*args)
        kernels = Counter(e.name for e in profile.events() if has_kernel(e))
        first = [shape for shape in launches if getattr(shape, "GATED_ONLY", False)]
        found.append(Nodes(len(launches), len(first), kernels))
        return outcome

    launches: list[Any] = []  # what the compiler knew of each
    run = JITFunction.run

    def counted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        launches.append(kwargs.get("shape"))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # what tests alone ask for

    with idlm_kernels.use_backend("triton"):
        generator = tiny_generator(torch.bfloat16, with_adapter, num_layers=num_layers, **QWEN)
        policy = generator.policy(plan, 4)
        engine = Engine(generator.model, None, policy, options=EngineOptions(max_num_seqs=2), step=step)
        engine.submit([3, 14, 15], SamplingParams(max_tokens=6, temperature=0.9), 5)
        for request, _ in engine.events():
            assert request.output.error is None
    return found[-1]


@pytest.mark.parametrize(
    "plan, with_adapter, per_layer, most", [("ar", False, 8, 300), ("ar", True, 8, 300), ("quadratic", True, 8, 320)]
)
def test_nodes_of_a_step_of_qwen3_8b(
    plan: str, with_adapter: bool, per_layer: int, most: int, softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = []
    for num_layers in (1, 2):
        with monkeypatch.context() as patch:
            nodes.append(nodes_of_step(plan, with_adapter, num_layers, patch))
    one, two = nodes
    assert two.torch == one.torch, "a layer calls torch"
    first_factors = two.adapter - one.adapter
    assert first_factors == (4 if with_adapter and plan != "ar" else 0)
    assert two.launches - one.launches == per_layer + first_factors
    around = one.launches - one.adapter - per_layer + one.torch.total()
    assert around >= 8  # the step before and behind the layers was counted
    assert around + LAYERS * per_layer <= most, one.torch
    step = roofline.Step(roofline.MODELS["qwen3-8b"], StepPlan(plan, 4 if plan != "ar" else 1), 2, 1024, with_adapter)
    assert step.launches() == around + LAYERS * per_layer, one
