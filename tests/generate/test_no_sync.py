"""A step never waits for the device: no host read of a value, no shape made from data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idlm_kernels.cpu import native
from idlm_kernels.generate import Engine, EngineOptions, Generator, PlanPolicy, Request, SamplingParams, StepPlan
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import Decoder, decode_step
from idlm_kernels.ops import _dispatch, _register, attention, rerank, sampling
from idlm_kernels.ops import step as step_ops
from tests.generate.test_rerank import with_head

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


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled CPU kernels read what they like."""
    monkeypatch.setattr(native, "library", lambda: None)


class NoSync(TorchDispatchMode):
    """Refuses ops that read values on the host, and records the shapes that every other op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[str, Any]] = []
        self.kernels: list[str] = []  # the calls that are no views

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FORBIDDEN:
            raise AssertionError(f"{func} needs a value on the host")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index makes a shape from data"
        out = func(*args, **(kwargs or {}))
        leaves = out if isinstance(out, (tuple, list)) else [out]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view or leaves[0].untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
            self.kernels.append(str(func))
        self.trace.append((str(func), [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]))
        return out


def engine_of(generator: Generator, plan: str, rule: str, step: Any, **options: Any) -> Engine:
    policy = PlanPolicy.fixed(StepPlan(plan, 4))  # type: ignore[arg-type]
    return Engine(
        generator.model, None, policy, EngineOptions(rule=rule, max_num_seqs=2, max_model_len=60, **options), step=step
    )


PARAMS = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=1, max_tokens=40)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"suffix_drafts": True},
    {"logprobs": True},
    {"synthetic_acceptance": 0.5},
    {"rerank": True},
]


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("rejection", {}),
        ("rejection", {"rerank": True}),
        *(("match", o) for o in [*OPTIONS, {"history_tokens": 99}]),
    ],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("plan", ["ar", "chain", "quadratic"])
@pytest.mark.parametrize("inside_ops", [True, False], ids=["references", "step"])
def test_a_step_reads_nothing_on_the_host(
    inside_ops: bool,
    plan: str,
    rule: str,
    options: dict[str, Any],
    make_generator: MakeGenerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`references`: the mode looks inside the reference ops too. `step`: ops are opaque, in the default backend."""
    if inside_ops:
        monkeypatch.setenv("IDLM_BACKEND", "torch")
        for module in (_register, attention, rerank, sampling, step_ops):
            monkeypatch.setattr(module, "traced", lambda x: False)
    monkeypatch.setattr(_dispatch, "_chosen", {})
    generator = make_generator()
    if "rerank" in options:
        with_head(generator)
    traces: list[Any] = []

    def guarded(decoder: Decoder, state: DecodeState) -> Tensor:
        with NoSync() as mode:
            outcome = decode_step(decoder, state)
        if state.batch == 2:
            traces.append(mode.trace)
        return outcome

    # Too few pages for two at a time: requests come, end, are preempted and come back while steps are watched.
    engine = engine_of(generator, plan, rule, guarded, page_size=4, num_pages=18, window_steps=4, **options)
    requests = [engine.submit(list(range(n)), PARAMS, n) for n in (3, 8, 5)]
    requests[0].limit = 20
    preempted: list[Request] = []
    preempt = engine._preempt
    monkeypatch.setattr(engine, "_preempt", lambda request: (preempted.append(request), preempt(request)))
    for _ in engine.events():
        pass
    assert [request.output.error for request in requests] == [None] * 3
    assert preempted, "a request was preempted, and came back"
    assert len(traces) > 2 and len(traces[0]) > (50 if inside_ops else 15)
    assert all(trace == traces[0] for trace in traces), "the ops and shapes of a step do not depend on data"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("plan", ["ar", "chain", "quadratic"])
def test_a_step_makes_few_torch_calls_beside_the_ops(
    plan: str, options: dict[str, Any], make_generator: MakeGenerator
) -> None:
    """Each is a kernel of a recorded step. One is positions; an adapter has two, where finite weights may overflow;
    re-ranking has what it is asked about: previous token (2), position and first MASK row (2, and one by branch)."""
    calls: list[list[str]] = []

    def counted(decoder: Decoder, state: DecodeState) -> Tensor:
        with NoSync() as mode:
            outcome = decode_step(decoder, state)
        calls.append([name for name in mode.kernels if not name.startswith("idlm.")])
        return outcome

    generator = make_generator()
    if "rerank" in options:
        with_head(generator)
    engine = engine_of(generator, plan, "match", counted, **options)
    engine.submit([1, 2, 3], PARAMS, 5)
    list(engine.window())
    rerank = {"ar": 0, "chain": 5, "quadratic": 6}[plan] if "rerank" in options else 0
    assert calls and all(len(names) == 1 + 2 * generator.model.has_adapter + rerank for names in calls), calls[-1]


def test_the_guard_can_fail() -> None:
    x = torch.arange(3)
    for sync in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0])):
        with NoSync(), pytest.raises(AssertionError):
            sync()


@pytest.mark.parametrize("plan", ["ar", "chain", "quadratic"])
def test_a_step_can_be_traced_without_values(plan: str, make_generator: MakeGenerator) -> None:
    """torch.compile sees one whole graph: nothing in a step needs a value."""
    tokens = []
    for step in (torch.compile(decode_step, fullgraph=True, backend="eager"), decode_step):
        engine = engine_of(make_generator(), plan, "match", step)
        requests = [engine.submit(prompt, PARAMS, 5) for prompt in ([1, 2, 3], [4])]
        for _ in engine.events():
            pass
        assert [request.output.error for request in requests] == [None, None]
        tokens.append([request.output.token_ids for request in requests])
    assert tokens[0] == tokens[1]
