"""Launches of a step overlap (programmatic dependent launch): no kernel touches what the launch before it may still
write. The whole step runs again under softgpu's pdl=early, in which the next launch gets as far as it can while the
last one stands where it let it go. That meets every pair of neighbours."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import idlm_kernels
from idlm_kernels.generate import Engine, EngineOptions, SamplingParams
from idlm_kernels.generate.step import decode_step
from idlm_kernels.triton import layers
from tests.triton.support import mutant
from tests.triton.test_end_to_end import tiny_generator

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]


class Tape:
    """Launches in their order, and the memory that they touch as it was before the first of them that knows it."""

    def __init__(self) -> None:
        self.launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
        self.ptx: list[str] = []
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.launches.append((kernel, args, kwargs))
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._memory:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                self._memory[x.untyped_storage().data_ptr()] = whole, whole.clone()

    def contents(self) -> list[Tensor]:
        return [now.clone() for now, _ in self._memory.values()]

    def replay(self, softgpu: ModuleType) -> list[Tensor]:
        """What the memory holds after all launches, from the start, with nothing between them."""
        for now, before in self._memory.values():
            with torch.inference_mode():
                now.copy_(before)
        for kernel, args, kwargs in self.launches:
            kernel.run(*args, **kwargs)
        softgpu.synchronize()
        return self.contents()


@contextmanager
def taped() -> Iterator[Tape]:
    tape, run = Tape(), JITFunction.run

    def recorded(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        tape.add(self, args, kwargs)
        kernel = run(self, *args, **kwargs)
        ptx = kernel.asm["ptx"]
        tape.ptx.append(ptx if isinstance(ptx, str) else ptx.decode())
        return kernel

    JITFunction.run = recorded
    try:
        yield tape
    finally:
        JITFunction.run = run


def step_of(plan: str, stride: int, rule: str = "match", **sampling: Any) -> tuple[Tape, list[Tensor]]:
    """The last decode step of a few, of two requests, and what it leaves in memory."""
    tapes: list[tuple[Tape, list[Tensor]]] = []

    def step(*args: Any) -> Tensor:
        with taped() as tape:
            outcome = decode_step(*args)
        tapes.append((tape, tape.contents()))
        return outcome

    with idlm_kernels.use_backend("triton"):
        generator = tiny_generator(torch.bfloat16, with_adapter=plan != "ar", max_position_embeddings=512)
        options = EngineOptions(max_num_seqs=2, max_model_len=512, page_size=16, rule=rule)
        engine = Engine(generator.model, None, generator.policy(plan, stride), options=options, step=step)
        for prompt in ([7] * 290, [3, 14, 15]):  # more than one chunk of KV, and one
            engine.submit(prompt, SamplingParams(max_tokens=6, **sampling), 5)
        for request, _ in engine.events():
            assert request.output.error is None
    return tapes[-1]


STEPS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "AR, greedy": ("ar", 2, "match", {}),
    "chain": ("chain", 3, "match", {"temperature": 0.9}),
    "quadratic": ("quadratic", 2, "match", {"temperature": 0.9, "top_p": 0.9, "top_k": 20}),
    "rejection": ("quadratic", 2, "rejection", {"temperature": 0.9}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_right_when_launches_start_early(name: str, softgpu: ModuleType) -> None:
    plan, stride, rule, sampling = STEPS[name]
    tape, wanted = step_of(plan, stride, rule, **sampling)
    assert len(tape.launches) > 20
    for schedule in ({}, {"sched": "random", "seed": 1}):
        with softgpu.configured(pdl="early", **schedule):
            assert all(map(torch.equal, tape.replay(softgpu), wanted))
    assert all(starts_with_wait(ptx) for ptx in tape.ptx)


def starts_with_wait(ptx: str) -> bool:
    """From the entry straight to the wait: no jump, and no access to global memory before."""
    before, wait, after = ptx[ptx.index(".entry") :].partition("griddepcontrol.wait;")
    touched = re.search(r"\b(bra|ret|exit|call|(ld|st|red|atom|prefetch|cp)\S*\.global\S*|cp\.async\S*)\b", before)
    return bool(wait) and touched is None and "griddepcontrol.launch_dependents;" in after


def test_every_kernel_waits_first() -> None:
    """By its source: those that no step above launches, too."""
    kernels = 0
    for source in Path(str(layers.__file__)).parent.glob("*.py"):
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels += 1
                first = node.body[1 if ast.get_docstring(node) else 0]
                assert ast.unparse(first) == "follow_previous_launch()", node.name
    assert kernels >= 20


WAIT = "    follow_previous_launch()\n"
LOAD = """\
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    inside = column < H
    x = tl.load(tl.multiple_of(gX + row * stride_x + column, ALIGNMENT), mask=inside, other=0.0)
"""
MUTANTS: dict[str, tuple[str, str]] = {
    "no wait": ("        gdc_wait()\n", ""),
    "a read before the wait": (f"{WAIT}{LOAD}", f"{LOAD}{WAIT}"),
}


def pair(module: Any, softgpu: ModuleType) -> bool:
    """Two launches of which the second reads what the first writes."""
    x, weight = torch.randn(7, 256).bfloat16(), torch.randn(256).bfloat16()
    middle, out = torch.full((2, 7, 256), float("nan")).bfloat16()
    with softgpu.configured(pdl="early"):
        module.rms_norm(x, weight, 1e-6, out=middle)
        module.rms_norm(middle, weight, 1e-6, out=out)
        softgpu.synchronize()
    wanted = module.rms_norm(module.rms_norm(x, weight, 1e-6), weight, 1e-6)
    return torch.equal(out, wanted)


@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_a_kernel_that_does_not_wait_is_seen(name: str, tmp_path: Path, softgpu: ModuleType) -> None:
    assert pair(layers, softgpu)
    assert not pair(mutant(layers, *MUTANTS[name], tmp_path), softgpu)
