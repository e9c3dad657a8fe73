"""The self-check of device backends: what it refuses, and what `auto` makes of its verdicts."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import idlm_kernels
import python_ref
from idlm_kernels import StepState, backends, set_backend, use_backend
from idlm_kernels.ops import OPS, Backend, _dispatch, implementation, register_backend
from idlm_kernels.ops.self_check import CHECKS, TOGETHER, self_check
from idlm_kernels.testing import Call

CPU = torch.device("cpu")
LINEAR = TOGETHER[0]


def precise(op: str) -> Callable[..., Tensor]:
    """The reference in fp64, rounded once: unlike those of BLAS, its rows have the same bits among any others."""

    def run(**arguments: Any) -> Tensor:
        result, left = Call(op, arguments).widened().run()
        if arguments.get("lse") is not None:
            arguments["lse"].copy_(left["lse"])
        return result.to(next(iter(arguments.values())).dtype)

    return run


def backend_module(**functions: Callable[..., Any]) -> ModuleType:
    """A right backend but for the functions given."""
    module = ModuleType("fake_backend")
    for op in CHECKS:
        setattr(module, op, getattr(python_ref, op))
    for op in ("linear", "gated_lora_linear", "strided_attention"):
        setattr(module, op, precise(op))
    module.linear_silu_and_mul = activated(module)
    for op, function in functions.items():
        setattr(module, op, function)
    return module


def activated(module: ModuleType) -> Callable[..., Tensor]:
    def linear_silu_and_mul(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        layer = module.gated_lora_linear if "lora_a" in options else module.linear
        return module.silu_and_mul(x=layer(x=x, weight=weight, **options))

    return linear_silu_and_mul


# The checks


@pytest.mark.parametrize("op", CHECKS)
def test_a_right_backend_passes(op: str) -> None:
    assert self_check(backend_module(), op, CPU) is None


def changed(op: str, **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """The op with some arguments changed."""
    right = getattr(backend_module(), op)

    def run(**arguments: Any) -> Any:
        return right(**{name: changes.get(name, lambda x: x)(x) for name, x in arguments.items()})

    return run


def after(op: str, change: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """The op with a changed result."""
    right = getattr(backend_module(), op)
    return lambda **arguments: change(right(**arguments), arguments)


def nudged(result: Tensor, rows: int) -> Tensor:
    """Other last bits of small values in calls with so many rows: well within every tolerance."""
    return torch.where(result.abs() < 0.1, result * (1 + 2**-8), result) if result.shape[0] == rows else result


def forgetful_prepare(weight: Tensor) -> Tensor:
    return weight.roll(1, 0)


def first_cut(result: Any, arguments: dict[str, Any]) -> Any:
    if arguments["draft_dists"] is not None:
        arguments["draft_dists"].cut.fill_(-torch.inf)
    return result


def with_part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[StepState], StepState]:
    return lambda state: dataclasses.replace(state, **{name: change(getattr(state, name))})


def in_base_2(outcome: Tensor, arguments: dict[str, Any]) -> Tensor:
    if "logits" in arguments:
        outcome[:, 10:].view(torch.float64).mul_(1.4427)
    return outcome


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a bias is forgotten": ("linear", changed("linear", bias=lambda x: None), r"the result is off by .* allowed are"),
    "fp16 where bf16 is wanted": ("linear", after("linear", lambda y, _: y.half()), "is torch.float16 .*wanted"),
    "bits of few rows": (
        "linear",
        after("linear", lambda y, _: nudged(y, 7)),
        "7 rows alone and among 130: bits differ",
    ),
    "bits of one row": ("linear", after("linear", lambda y, _: nudged(y, 1)), "1 row alone and among 130: bits differ"),
    "bits of a batch": (
        "linear",
        after("linear", lambda y, _: nudged(y, 65)),
        "65 rows alone and among 130: bits differ",
    ),
    "bits of a batch with an adapter": (
        "gated_lora_linear",
        after("gated_lora_linear", lambda y, _: nudged(y, 65)),
        "65 rows alone and among 130: bits differ",
    ),
    "bits of a batch with the activation": (
        "linear_silu_and_mul",
        after("linear_silu_and_mul", lambda y, _: nudged(y, 65)),
        "65 rows alone and among 130: bits differ",
    ),
    "a weight in another order": ("prepare_weight", forgetful_prepare, "the result is off"),
    "a weight in another dtype": ("prepare_weight", lambda weight: weight.float(), "another shape, dtype or device"),
    "the adapter on every row": (
        "gated_lora_linear",
        changed("gated_lora_linear", lora_mask=torch.ones_like),
        "off by",
    ),
    "clean rows touched by the adapter": (
        "gated_lora_linear",
        after("gated_lora_linear", lambda y, a: y + 0 * a["lora_a"].sum()),
        "beside an adapter of NaN",
    ),
    "clean rows with bits of their own": (
        "gated_lora_linear",
        after("gated_lora_linear", lambda y, _: nudged(y, 7)),
        "the same row of linear",
    ),
    "an activation that is not rounded before": (
        "linear_silu_and_mul",
        after("linear_silu_and_mul", lambda y, _: nudged(y, 7)),
        "linear_silu_and_mul and silu_and_mul of linear",
    ),
    "gate and up exchanged": ("silu_and_mul", changed("silu_and_mul", x=lambda x: x.roll(x.shape[1] // 2, 1)), "off"),
    "activation by row count": ("silu_and_mul", after("silu_and_mul", lambda y, _: nudged(y, 1)), "bits differ"),
    "eps is forgotten": ("rms_norm", changed("rms_norm", eps=lambda _: 0.0), "the result is off"),
    "the residual is not updated": ("rms_norm", changed("rms_norm", residual=Tensor.clone), "residual is off"),
    "a norm by row count": ("rms_norm", after("rms_norm", lambda y, _: nudged(y, 1)), "bits differ"),
    "MASK rows are ordinary": ("embed", changed("embed", is_mask=torch.zeros_like), "off"),
    "rotation by slot": (
        "qk_norm_rope_append",
        lambda **a: python_ref.qk_norm_rope_append(**a | {"positions": a["slot_mapping"].clamp(min=0)}),
        "off",
    ),
    "slot -1 is written": (
        "qk_norm_rope_append",
        changed("qk_norm_rope_append", slot_mapping=lambda x: x.abs()),
        "k_cache has other nan entries",
    ),
    "rows see one slot less": (
        "strided_attention",
        changed("strided_attention", seq_lens=lambda x: (x - 1).clamp(min=0)),
        "off",
    ),
    "the tree mask is ignored": ("strided_attention", changed("strided_attention", tree_mask=lambda x: None), "off"),
    "attention by row count": (
        "strided_attention",
        after("strided_attention", lambda y, _: nudged(y, 1)),
        "on pages of 24 slots",
    ),
    "lse in base 2": (
        "strided_attention",
        after("strided_attention", lambda y, a: ("lse" in a and a["lse"].mul_(1.4427), y)[1]),
        "lse is off",
    ),
    "MASK is sampled": ("sample_rows", changed("sample_rows", mask_id=lambda _: -1), "differs in .*: 7, wanted"),
    "top-k takes one more": ("verify_accept", changed("verify_accept", top_k=lambda x: x + 1), "the result.* differs"),
    "noise by row": (
        "sample_rows",
        lambda **a: python_ref.sample_rows(**a | {"seed": a["seed"] + torch.arange(len(a["seed"]))}),
        "the result differs in",
    ),
    "NaN is no fault": (
        "sample_rows",
        after("sample_rows", lambda y, a: (a["error_flags"].bitwise_and_(6), y)[1]),
        "error_flags",
    ),
    "another branch": ("verify_accept", changed("verify_accept", quadratic=lambda x: not x), "the result.* differs"),
    "a distribution of more ids": (
        "verify_accept",
        after("verify_accept", first_cut),
        "a distribution of a next draft is off by",
    ),
    "the highest of ties": (
        "top_logprobs",
        after("top_logprobs", lambda y, _: (y[0].sort(-1, descending=True).values, y[1])),
        r"the result\[0\] differs",
    ),
    "the prompt is output": (
        "apply_penalties",
        changed("apply_penalties", penalties=lambda p: dataclasses.replace(p, prompt_lengths=p.prompt_lengths * 0)),
        "the result is off",
    ),
    "the state is not carried on": (
        "rerank_drafts",
        changed("rerank_drafts", from_state=torch.zeros_like),
        "the result",
    ),
    "a distribution with another normaliser": (
        "rerank_drafts",
        after("rerank_drafts", lambda y, a: ("draft_dists" in a and a["draft_dists"].log_norm.add_(0.01), y)[1]),
        "a distribution of a next draft is off by",
    ),
    "stops are ignored": ("advance", changed("advance", stop_ids=lambda x: x.fill_(-1)), "the result.* differs"),
    "ended requests go on": ("advance", changed("advance", finish_reason=torch.zeros_like), "the result.* differs"),
    "padding has slots": ("plan_rows", after("plan_rows", lambda y, _: (*y[:3], y[3].abs(), *y[4:])), "differs in"),
    "NaN is committed": (
        "commit_step",
        changed("commit_step", state=with_part("error_flags", lambda x: x * 0)),
        "differ",
    ),
    "drafts are forgotten": (
        "commit_step",
        changed("commit_step", state=with_part("drafts", Tensor.clone)),
        "state.drafts differs",
    ),
    "logprobs in base 2": ("commit_step", after("commit_step", in_base_2), "logprobs is off"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_does_not(name: str) -> None:
    op, wrong, reason = WRONG[name]
    with pytest.raises(AssertionError, match=reason):
        found = self_check(backend_module(**{op: wrong}), op, CPU)
        raise AssertionError(found)


def test_every_check_can_fail() -> None:
    assert {op for op, _, _ in WRONG.values()} == set(CHECKS)


@pytest.mark.parametrize("op", CHECKS)
def test_an_exception_is_a_reason(op: str) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image\nis available " + "x" * 1000)

    reason = self_check(backend_module(**{op: broken}), op, CPU)
    assert reason is not None and reason.startswith("it raised RuntimeError: no kernel image is available x")
    assert "\n" not in reason and len(reason) <= 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device works")
def test_an_error_that_stays_is_told() -> None:
    """As after an illegal access: nothing works on the device any more."""
    reason = self_check(backend_module(), "embed", torch.device("cuda"))
    assert reason is not None and reason.startswith("it raised ") and "start it again with IDLM_BACKEND=torch" in reason


@pytest.mark.parametrize("op", ["sample_rows", "verify_accept", "rerank_drafts"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_sampled_id_is_a_near_tie(sign: int, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, uniforms, cuts and re-ranked scores that are off by some times what is allowed give the same ids."""
    random = torch.Generator().manual_seed(sign + 1)

    def noisy(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def off(*args: Any) -> Tensor:
            g = noise(*args)
            return g + 1e-5 * (2 * torch.rand(g.shape, generator=random) - 1)

        return off

    def near(**arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            for module in (python_ref.sampling, python_ref.verify):
                patch.setattr(module, "gumbel", noisy(python_ref.gumbel))
            patch.setattr(python_ref.rerank, "gumbel_at", noisy(python_ref.noise.gumbel_at))
            patch.setattr(python_ref.verify, "uniform", lambda *args: python_ref.uniform(*args) + sign * 1e-5)
            top_p = arguments["top_p"]
            arguments["top_p"] = torch.where(top_p < 1, top_p + sign * 1e-5, top_p)
            for name in {"min_p", "to_query"} & set(arguments):
                arguments[name] = arguments[name].double() * (1 + sign * 1e-5)
            return getattr(python_ref, op)(**arguments)

    assert self_check(backend_module(**{op: near}), op, CPU) is None


def test_the_callers_modes_do_not_reach_the_check() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.inference_mode(), torch.device("meta"), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            assert self_check(backend_module(), "gated_lora_linear", CPU) is None
            assert self_check(backend_module(), "sample_rows", CPU) is None
    finally:
        torch.set_default_dtype(default)


def test_an_op_without_a_check_is_not_trusted() -> None:
    assert self_check(backend_module(), "brew_coffee", CPU) == "not checked: there is no self-check for it yet"


# What auto makes of it


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with no forced backend and no verdict, and leaves no trace."""
    monkeypatch.delenv("IDLM_BACKEND", raising=False)
    monkeypatch.delenv("IDLM_SELF_CHECK", raising=False)
    monkeypatch.setattr(_dispatch, "_forced", None)
    for name, value in (("_chosen", {}), ("_verdicts", {}), ("_warned", set())):
        monkeypatch.setattr(_dispatch, name, value)
    monkeypatch.setattr(_dispatch, "_backends", dict(_dispatch._backends))


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were checked so far. A check passes where the backend's function is none of `refused`."""
    seen: list[str] = []

    def look(op: str) -> Callable[[Any], None]:
        def check(case: Any) -> None:
            seen.append(op)
            getattr(case[0], op)()

        return check

    for op in CHECKS:
        monkeypatch.setitem(CHECKS, op, look(op))
    return seen


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> Iterator[Callable[..., ModuleType]]:
    """fake(refused op, ...): a checked backend for the CPU with every op, in front of all others."""

    def register(*refused: str, missing: str | None = None, ops: tuple[str, ...] = tuple(CHECKS)) -> ModuleType:
        module = ModuleType("fake_backend")
        for op in ops:
            setattr(module, op, _refuse if op in refused else _pass)
        monkeypatch.setitem(sys.modules, "fake_backend", module)
        register_backend(Backend("fake", "fake_backend", ("cpu",), checked=True, missing=lambda device: missing))
        return module

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a test says which warnings it expects
        yield register


def _pass(*args: Any, **options: Any) -> str:
    return "fake"


def _refuse(*args: Any, **options: Any) -> None:
    raise RuntimeError("illegal instruction")


def test_auto_takes_what_passes(fake: Callable[..., ModuleType], checks: list[str]) -> None:
    module = fake()
    assert implementation("rms_norm", "cpu") is module.rms_norm
    assert checks == ["rms_norm"], "nothing is checked before it is needed"
    assert {op: name for op, name in backends().items() if op in CHECKS} == dict.fromkeys(CHECKS, "fake")
    assert sorted(checks) == sorted(CHECKS), "each once"


def test_a_verdict_is_computed_once(fake: Callable[..., ModuleType], checks: list[str]) -> None:
    fake("embed")
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            assert implementation("embed", "cpu") is not _refuse
            assert backends()["embed"] != "fake"
            set_backend("torch")  # forgets what was chosen
            set_backend("auto")
    assert checks.count("embed") == 1
    assert len(told) == 1


def test_what_fails_is_told_in_words(fake: Callable[..., ModuleType]) -> None:
    fake("embed")
    with pytest.warns(RuntimeWarning) as told:
        backends()
    assert [str(w.message) for w in told] == [
        "embed of backend 'fake' is not used on cpu: it raised RuntimeError: illegal instruction. The next backend in "
        "line computes it. `idlm doctor` shows all self-checks."
    ]


def test_what_the_bits_depend_on_is_logged(fake: Callable[..., ModuleType], caplog: pytest.LogCaptureFixture) -> None:
    module = fake()
    module.spills = lambda: {"_a_kernel": 12}  # type: ignore[attr-defined]
    with caplog.at_level("INFO", "idlm_kernels"):
        implementation("embed", "cpu")
    check, spill = (record.getMessage() for record in caplog.records)
    assert check.startswith("self-check of embed of backend fake: ok (torch ") and "triton " in check
    assert spill.startswith("_a_kernel of fake spills 12 registers per thread (torch ")


def test_versions_of_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(_dispatch, "_DRIVER", tmp_path / "version")
    _dispatch.versions.cache_clear()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX  550.54.15  Tue\nGCC version: 12\n")
    found = _dispatch.versions(torch.device("cuda", 0))
    assert found["card"] == "a card" and found["driver"] == "NVIDIA UNIX 550.54.15 Tue"
    (tmp_path / "version").unlink()
    assert _dispatch.versions(torch.device("cuda", 1))["driver"] == "unknown"
    _dispatch.versions.cache_clear()


@pytest.mark.parametrize("refused", LINEAR)
def test_ops_that_belong_together_switch_together(refused: str, fake: Callable[..., ModuleType]) -> None:
    fake(refused)
    with pytest.warns(RuntimeWarning, match=f"{refused} of backend 'fake' .*and with it .*linear") as told:
        chosen = backends()
    assert len(told) == 1
    assert {op for op in CHECKS if chosen[op] != "fake"} == set(LINEAR)


def test_a_backend_may_have_some_of_them(fake: Callable[..., ModuleType]) -> None:
    fake(ops=("sample_rows", "linear"))
    chosen = backends()
    assert {op for op, name in chosen.items() if name == "fake"} == {"sample_rows", "linear"}


def test_the_next_checked_backend_is_asked(fake: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    second = ModuleType("second_backend")
    second.embed = _pass
    monkeypatch.setitem(sys.modules, "second_backend", second)
    register_backend(Backend("second", "second_backend", ("cpu",), checked=True))
    fake("embed", "rms_norm")
    with pytest.warns(RuntimeWarning):
        chosen = backends()
    assert chosen["embed"] == "second"
    assert chosen["rms_norm"] not in ("fake", "second")


def test_forced_backends_are_not_checked(
    fake: Callable[..., ModuleType], checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("embed")
    with use_backend("fake"):
        assert implementation("embed", "cpu") is _refuse
        assert backends()["embed"] == "fake"
    monkeypatch.setenv("IDLM_BACKEND", "fake")
    assert implementation("embed", "cpu") is _refuse
    assert not checks


def test_the_check_can_be_turned_off(
    fake: Callable[..., ModuleType], checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("embed")
    monkeypatch.setenv("IDLM_SELF_CHECK", "0")
    assert implementation("embed", "cpu") is _refuse
    assert not checks


def test_a_backend_that_is_missing_is_passed_over(fake: Callable[..., ModuleType], checks: list[str]) -> None:
    fake(missing="it was never built")
    assert "fake" not in backends().values()
    assert not checks


def test_a_module_that_does_not_load_is_passed_over() -> None:
    register_backend(Backend("broken", "no_such_module_of_a_backend", ("cpu",), checked=True))
    assert "broken" not in backends().values()
    broken = _dispatch._backends["broken"]
    assert broken.unusable(CPU) == "its module does not load: No module named 'no_such_module_of_a_backend'"


def test_an_op_without_a_check_is_not_taken(
    fake: Callable[..., ModuleType], checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.delitem(CHECKS, "advance")
    with pytest.warns(RuntimeWarning, match="advance of backend 'fake' is not used on cpu: not checked"):
        assert backends()["advance"] != "fake"


def test_every_model_of_device_must_pass(fake: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    fake()
    monkeypatch.setattr(_dispatch, "models", lambda kind: {"Good 100": CPU, "Old 10": torch.device("cpu", 0)})
    monkeypatch.setitem(CHECKS, "embed", lambda case: _refuse() if case[1].index == 0 else None)
    with pytest.warns(RuntimeWarning, match="embed of backend 'fake' is not used on Old 10: "):
        assert backends()["embed"] != "fake"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked(checks: list[str]) -> None:
    assert backends("cuda") == dict.fromkeys(OPS, "torch")
    assert not checks


def test_models_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100", "NVIDIA H100", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert _dispatch.models("cuda") == {"NVIDIA H100": torch.device("cuda", 0), "NVIDIA L4": torch.device("cuda", 2)}


def test_no_check_while_a_graph_is_captured(fake: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("later", "fake_backend", ("cuda",), checked=True)
    fake()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"embed: backend 'later' is checked at its first .*run the step once before"
    ):
        _dispatch.verdict(backend, "embed", "NVIDIA H100", torch.device("cuda", 0))
    assert not _dispatch._verdicts, "it is checked when the capture is over"


def test_the_first_use_may_be_in_a_compiled_function(fake: Callable[..., ModuleType], checks: list[str]) -> None:
    module = fake(ops=("silu_and_mul",))
    module.silu_and_mul = lambda x=None, out=None: None if x is None else torch.full((1, 2), 42.0)
    run = torch.compile(idlm_kernels.silu_and_mul, fullgraph=True, backend="eager")
    assert (run(torch.ones(1, 4)) == 42).all()
    assert checks == ["silu_and_mul"]


def test_device_backends_that_ship_are_checked() -> None:
    """Whatever `auto` may take on a GPU, but for the references, is checked there first."""
    for backend in _dispatch._backends.values():
        if "cuda" in backend.device_types and backend.name != "torch":
            assert backend.checked and backend.automatic
    assert [b.name for b in _dispatch.checked_backends(torch.device("cuda"))] == ["cuda", "triton"]
    assert _dispatch.checked_backends(CPU) == []
