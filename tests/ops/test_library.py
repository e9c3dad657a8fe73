"""The registered ops: complete, correct to torch.library's own checks, and traceable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from idlm_kernels import use_backend
from tests.ops.cases import STEP_OPS, arguments, mapped, new_out, public, tensors, variants


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def registered() -> set[str]:
    return {name.removeprefix("idlm::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("idlm::")}


class Recorder(TorchDispatchMode):
    """Keeps the calls of idlm ops, with their arguments as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "idlm":
            self.calls.append((func, copy.deepcopy(args), copy.deepcopy(kwargs or {})))
        return func(*args, **(kwargs or {}))


def recorded(op: str, variant: str, with_out: bool) -> tuple[Any, tuple, dict]:
    """The one registered op that a call of the public function reaches, and its arguments."""
    args = arguments(op, variant)
    if with_out:
        args["out"] = new_out(op, args)
    with Recorder() as recorder:
        public(op)(**args)
    assert len(recorder.calls) == 1, f"{op} called {[str(call[0]) for call in recorder.calls]}"
    return recorder.calls[0]


CASES = [(op, variant, with_out) for op, variant in variants() for with_out in (False, True)]


def case_id(case: tuple[str, str, bool]) -> str:
    return "-".join([case[0], case[1], "out" if case[2] else "functional"])


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)


@pytest.mark.parametrize("op", STEP_OPS)
def test_every_op_is_registered_functional_and_out(op):
    assert {op, f"{op}_out"} <= registered()


@pytest.mark.parametrize("name", sorted(registered()))
def test_schemas(name):
    """A functional op returns new tensors; an _out op returns nothing and says that it writes `out`."""
    schema = getattr(torch.ops.idlm, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if name.endswith("_out"):
        assert schema.returns == []
        assert written & {"out", "tokens", "ids"}
    else:
        assert schema.returns and all(r.alias_info is None for r in schema.returns)
        assert "out" not in {a.name for a in schema.arguments}


def test_the_cases_reach_every_registered_op():
    reached = {recorded(*case)[0]._schema.name.removeprefix("idlm::") for case in CASES}
    assert reached == registered()


@every_case
def test_opcheck(case):
    """Schema, autograd registration, fake implementation, and tracing with dynamic shapes."""
    func, args, kwargs = recorded(*case)
    torch.library.opcheck(func, args, kwargs)


def results(x: Any) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@every_case
def test_fake_tensors(case):
    """Under FakeTensorMode a public op gives the shapes, dtypes, strides and devices of the real results."""
    op, variant, with_out = case
    args = arguments(op, variant)
    if with_out:
        args["out"] = new_out(op, args)
    with FakeTensorMode() as mode:
        got = public(op)(**{name: mapped(mode.from_tensor, value) for name, value in args.items()})
    want = public(op)(**args)
    for a, b in zip(results(want), results(got), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@every_case
def test_meta_tensors(case):
    op, variant, with_out = case
    args = arguments(op, variant)
    if with_out:
        args["out"] = new_out(op, args)
    want = public(op)(**copy.deepcopy(args))
    got = public(op)(**{name: mapped(lambda x: x.to("meta"), value) for name, value in args.items()})
    for a, b in zip(results(want), results(got), strict=True):
        assert b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


@every_case
def test_compile_fullgraph(case):
    """The compiler sees one op and no break, and the compiled function does what the op does."""
    op, variant, with_out = case
    function, graphs = public(op), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph

    def call(args: dict[str, Any]) -> Any:
        return function(**args)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    want_args, got_args = arguments(op, variant), arguments(op, variant)
    if with_out:
        want_args["out"], got_args["out"] = new_out(op, want_args), new_out(op, got_args)
    want, got = call(want_args), compiled(got_args)
    for a, b in zip(results(want), results(got), strict=True):
        assert torch.equal(a, b)
    for (name, a), (_, b) in zip(tensors(want_args), tensors(got_args), strict=True):
        assert torch.equal(a, b), name
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("idlm" in target for target in targets) == 1, targets
    assert not any("aten" in target for target in targets), targets


def test_no_argument_is_named_as_one_of_torch():
    """An op with an argument `mode` could be called but not traced: torch passes its own by that name."""
    for name in registered():
        names = {a.name for a in getattr(torch.ops.idlm, name).default._schema.arguments}
        assert not names & {"mode", "self", "func", "op", "args", "kwargs"}, name


def test_only_tools_that_look_on_see_the_registered_op(monkeypatch):
    """Plain eager calls go to the backend directly, which saves the time of the dispatcher."""
    args = arguments("silu_and_mul")
    with Recorder() as recorder:
        public("silu_and_mul")(**args)
    assert [str(func) for func, _, _ in recorder.calls] == ["idlm.silu_and_mul.default"]

    def unreachable(*args: Any) -> None:
        raise AssertionError("an eager call went through the dispatcher")

    monkeypatch.setattr(torch.ops.idlm, "silu_and_mul", unreachable)
    public("silu_and_mul")(**args)
    with pytest.raises(AssertionError, match="dispatcher"), Recorder():
        public("silu_and_mul")(**args)
