"""`idlm doctor`: what it tells, and its exit status."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

import idlm_kernels
from idlm_kernels import native
from idlm_kernels.cli import app
from idlm_kernels.ops import Backend, _dispatch, register_backend
from idlm_kernels.ops.self_check import CHECKS


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDLM_BACKEND", raising=False)
    monkeypatch.delenv("IDLM_SELF_CHECK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    # Not loaded here: the module would bind this process to its CUDA runtime, and other tests bring an emulated one.
    monkeypatch.setattr(native, "status", lambda: "the native module was not looked for")
    for name, value in (("_forced", None), ("_chosen", {}), ("_verdicts", {}), ("_warned", set())):
        monkeypatch.setattr(_dispatch, name, value)
    monkeypatch.setattr(_dispatch, "_backends", dict(_dispatch._backends))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fake(refused op, ...): a checked backend for the CPU with two ops, whose checks call them."""

    def silu_and_mul(x: torch.Tensor | None = None, *, out: torch.Tensor | None = None) -> None:
        pass

    def refuse() -> None:
        raise RuntimeError("unspecified launch failure")

    def register(*refused: str, missing: str | None = None) -> None:
        module = ModuleType("fake_backend")
        for op in ("embed", "silu_and_mul"):
            setattr(module, op, refuse if op in refused else silu_and_mul)
            monkeypatch.setitem(CHECKS, op, lambda case, op=op: getattr(case[0], op)())
        monkeypatch.setitem(sys.modules, "fake_backend", module)
        register_backend(Backend("fake", "fake_backend", ("cpu",), checked=True, missing=lambda device: missing))

    return register


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def cells(op: str, output: str) -> list[list[str]]:
    """The rows of all tables that are about an op, without its name."""
    rows = [[cell.strip() for cell in re.split("[│┃|]", line)] for line in output.splitlines()]
    return [row[2:-1] for row in rows if len(row) > 2 and row[1] == op]


def test_names_versions_and_the_backend_of_each_op() -> None:
    done = doctor()
    assert done.exit_code == 0, done.output
    assert idlm_kernels.__version__ in done.stdout
    for op, backend in idlm_kernels.backends("cpu").items():
        assert cells(op, done.stdout)[0][0] == backend


def test_says_what_a_backend_does_not_take(fake: Callable[..., None]) -> None:
    fake()
    sys.modules["fake_backend"].LIMITS = {"embed": "fp16"}  # type: ignore[attr-defined]
    assert "embed of fake takes fp16; the next backend in line computes the rest." in doctor().stdout


def test_help_says_what_it_does() -> None:
    text = " ".join(doctor("--help").stdout.split())
    assert "every kernel for it is first compared with the references" in text
    assert "Exit status 1: a kernel that `auto` would have used is wrong here." in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "verdict", lambda *args: pytest.fail("a check was run"))
    done = doctor()
    assert done.exit_code == 0, done.output
    assert "Self-check: there is no GPU kernel to check here." in done.stdout


def test_shows_what_passed(fake: Callable[..., None]) -> None:
    fake()
    done = doctor()
    assert done.exit_code == 0, done.output
    assert cells("embed", done.stdout) == [["fake"], ["ok"]]
    assert "fake, cpu" in done.stdout


def test_shows_what_is_wrong_and_fails(fake: Callable[..., None], recwarn: pytest.WarningsRecorder) -> None:
    fake("embed")
    done = doctor()
    assert done.exit_code == 1, done.output
    backend, verdict = cells("embed", done.stdout)
    assert backend != ["fake"] and verdict == ["wrong"]
    assert cells("silu_and_mul", done.stdout) == [["fake"], ["ok"]]
    assert "embed of fake on cpu: it raised RuntimeError: unspecified launch failure." in done.stdout
    assert not recwarn.list, "the table says it"


def test_an_op_without_a_check_is_no_failure(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake()
    monkeypatch.delitem(CHECKS, "embed")
    done = doctor()
    assert done.exit_code == 0, done.output
    backend, verdict = cells("embed", done.stdout)
    assert backend != ["fake"] and verdict == ["not checked"]


def test_says_why_a_backend_is_not_usable(fake: Callable[..., None]) -> None:
    fake(missing="it was never built")
    done = doctor()
    assert done.exit_code == 0, done.output
    assert "Backend fake is not usable on cpu: it was never built." in done.stdout


def test_checks_even_where_auto_does_not(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("embed")
    monkeypatch.setenv("IDLM_SELF_CHECK", "0")
    done = doctor()
    assert done.exit_code == 1, done.output
    assert cells("embed", done.stdout) == [["fake"], ["wrong"]]
