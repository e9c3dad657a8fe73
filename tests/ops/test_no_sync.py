"""No op reads a device value on the host, and none makes a shape or a path from data.

Three nets: a dispatch mode that forbids the ops that sync; fake tensors, which hold no values to read; and the list of
all ops with their shapes, which must be the same for other data in tensors of the same shapes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import python_ref
from tests.ops.cases import STEP_OPS, arguments, mapped, new_out, reference, tensors, variants

FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "nonzero_static",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
    "is_nonzero",
    "equal",
    "allclose",
)


class NoSync(TorchDispatchMode):
    """Raises on ops that bring a value to the host; lists the others with the shapes of all tensors in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in FORBIDDEN:
            raise AssertionError(f"{name} brings a value to the host")
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), f"{name} by a mask"
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(x.shape) for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        self.trace.append((name, shapes))
        return result


def trace(op: str, args: dict[str, Any]) -> list[tuple[str, tuple]]:
    with NoSync() as mode:
        reference(op)(**args)
    return mode.trace


def other_functions() -> dict[str, tuple[Any, tuple]]:
    seeds = torch.arange(3)
    return {
        "gumbel": (python_ref.gumbel, (seeds, seeds, 9)),
        "uniform": (python_ref.uniform, (seeds, seeds)),
        "rotary_table": (python_ref.rotary_table, (torch.tensor([1.0, 0.1]), 7)),
        "philox4x32": (python_ref.philox4x32, ((seeds, seeds, seeds, seeds), (seeds, seeds))),
    }


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize(("op", "variant"), variants())
def test_references_do_not_sync(op, variant, with_out):
    args = arguments(op, variant)
    if with_out:
        args["out"] = new_out(op, args)
    assert trace(op, args)


@pytest.mark.parametrize("name", other_functions())
def test_noise_and_tables_do_not_sync(name):
    function, args = other_functions()[name]
    with NoSync() as mode:
        function(*args)
    assert mode.trace


def test_every_reference_function_is_covered():
    covered = {*STEP_OPS, *other_functions(), "prepare_weight"}
    functions = {name for name in python_ref.__all__ if callable(getattr(python_ref, name))}
    assert functions - {"DraftDistributions", "Penalties", "StepState"} == covered


@pytest.mark.parametrize(("op", "variant"), variants())
def test_references_run_without_values(op, variant):
    """Fake tensors have shapes only: also .tolist() and .numpy(), which no dispatch mode sees, would fail."""
    args = arguments(op, variant)
    with FakeTensorMode() as mode:
        reference(op)(**{name: mapped(mode.from_tensor, value) for name, value in args.items()})


STATEFUL = ("advance", "plan_rows", "commit_step")
OF_LOGITS = ("sample_rows", "apply_penalties", "verify_accept", "top_logprobs", "rerank_drafts")
OPS_WITH_DATA = ("strided_attention", *OF_LOGITS, *STATEFUL)


@pytest.mark.parametrize("op", [*OPS_WITH_DATA, "gated_lora_linear", "embed", "qk_norm_rope_append"])
def test_path_and_shapes_do_not_depend_on_data(op):
    plain, other = arguments(op, "plain"), arguments(op, "other")
    pairs = [(x, y) for (_, x), (_, y) in zip(tensors(plain), tensors(other), strict=True)]
    differs = [x for x, y in pairs if not torch.equal(x, y) and (not x.is_floating_point() or op == "sample_rows")]
    assert differs, "the second case must differ in its data"
    assert trace(op, copy.deepcopy(plain)) == trace(op, copy.deepcopy(other))


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.zeros(int(x[0])),
        lambda x: x.int().bincount(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_mode_sees_a_sync(sync):
    with pytest.raises(AssertionError, match="host|mask"), NoSync():
        sync(torch.ones(3))


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: x.numpy().sum(), lambda x: float(x[0])])
def test_fake_tensors_have_nothing_to_read(read):
    with FakeTensorMode() as mode, pytest.raises(Exception):  # noqa: B017 - of several private types
        assert read(mode.from_tensor(torch.ones(3))) is None
