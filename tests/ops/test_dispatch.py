"""Which backend computes: names, the environment, fallbacks, and adding one from outside."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

import idlm_kernels
import python_ref
from idlm_kernels import backends, set_backend, silu_and_mul, use_backend
from idlm_kernels.ops import OPS, Backend, _dispatch, current_backend, implementation, register_backend


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch):
    """Each test starts with no forced backend and leaves no trace."""
    monkeypatch.delenv("IDLM_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.setattr(_dispatch, "_chosen", {})
    monkeypatch.setattr(_dispatch, "_backends", dict(_dispatch._backends))


@pytest.fixture
def toy(monkeypatch):
    """A backend with one op, whose results are recognisable. It is registered by the tests that want it."""
    module = ModuleType("toy_backend")
    module.silu_and_mul = lambda x, *, out=None: torch.full_like(x[:, : x.shape[1] // 2], 42.0)
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    return Backend("toy", "toy_backend", ("cpu",))


X = torch.ones(1, 4)


def test_torch_backend_is_the_references():
    set_backend("torch")
    assert current_backend() == "torch"
    assert backends() == dict.fromkeys(OPS, "torch")
    for op in OPS:
        assert implementation(op, "cpu") is getattr(python_ref, op)


def test_auto_is_the_default():
    assert current_backend() == "auto"
    assert set(backends()) == set(OPS)


def test_environment(monkeypatch):
    monkeypatch.setenv("IDLM_BACKEND", "torch")
    assert current_backend() == "torch"
    assert backends() == dict.fromkeys(OPS, "torch")
    monkeypatch.setenv("IDLM_BACKEND", "")
    assert current_backend() == "auto"


def test_set_backend_goes_before_the_environment(monkeypatch, toy):
    register_backend(toy)
    monkeypatch.setenv("IDLM_BACKEND", "torch")
    set_backend("toy")
    assert current_backend() == "toy"
    set_backend("auto")
    assert current_backend() == "auto"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'.*auto, torch"):
        set_backend("tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"), use_backend("tpu"):
        pass
    assert current_backend() == "auto"
    monkeypatch.setenv("IDLM_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"IDLM_BACKEND='tpu'.*auto, torch"):
        current_backend()
    with pytest.raises(ValueError, match="IDLM_BACKEND='tpu'"):
        silu_and_mul(X)
    set_backend("torch")  # a forced name does not look at the environment
    silu_and_mul(X)


def test_use_backend_restores_what_was(toy, monkeypatch):
    register_backend(toy)
    with use_backend("torch"):
        with use_backend("toy"):
            assert current_backend() == "toy"
        assert current_backend() == "torch"
        with pytest.raises(RuntimeError, match="inside"), use_backend("toy"):
            raise RuntimeError("inside")
        assert current_backend() == "torch"
    assert current_backend() == "auto"
    monkeypatch.setenv("IDLM_BACKEND", "torch")
    assert current_backend() == "torch", "after use_backend the environment counts again"


def test_a_backend_from_outside(toy):
    """One call adds it, in front; what it lacks, the others compute."""
    register_backend(toy)
    assert backends()["silu_and_mul"] == "toy"
    assert (silu_and_mul(X) == 42).all()
    others = {op: name for op, name in backends().items() if op != "silu_and_mul"}
    assert "toy" not in others.values() and set(others) == set(OPS) - {"silu_and_mul"}
    with use_backend("torch"):
        assert (silu_and_mul(X) != 42).all()
    with use_backend("toy"):  # forced, it falls back on the references alone
        assert backends() == {op: "toy" if op == "silu_and_mul" else "torch" for op in OPS}


def test_the_registered_op_uses_it_too(toy):
    register_backend(toy)
    assert (torch.ops.idlm.silu_and_mul(X) == 42).all()


def test_a_backend_that_is_not_automatic_must_be_asked_for(toy):
    register_backend(Backend("toy", "toy_backend", ("cpu",), automatic=False))
    assert "toy" not in backends().values()
    with use_backend("toy"):
        assert (silu_and_mul(X) == 42).all()


def test_a_backend_of_another_device(toy):
    register_backend(Backend("toy", "toy_backend", ("cuda",)))
    assert "toy" not in backends("cpu").values()
    with use_backend("toy"), pytest.raises(ValueError, match=r"'toy' runs on cuda.*silu_and_mul.*cpu"):
        silu_and_mul(X)


def test_no_backend_for_a_device():
    with pytest.raises(ValueError, match="no backend computes linear on xpu"):
        implementation("linear", "xpu")


def test_names_are_registered_once(toy):
    register_backend(toy)
    for name in ("toy", "torch", "auto"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register_backend(Backend(name, "toy_backend", ("cpu",)))


def test_modules_are_imported_at_first_use(toy, monkeypatch):
    register_backend(Backend("late", "no_such_module_of_a_backend", ("cuda",)))
    assert backends("cpu")  # not its device: never imported
    register_backend(Backend("broken", "no_such_module_of_a_backend", ("cpu",)))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_a_backend"):
        backends("cpu")


def test_a_choice_is_kept(monkeypatch, toy):
    """Neither the environment nor sizes change it: the bits of a result may not depend on either."""
    register_backend(toy)
    first = implementation("silu_and_mul", "cpu")
    monkeypatch.setenv("IDLM_BACKEND", "torch")
    monkeypatch.setattr(sys.modules["toy_backend"], "silu_and_mul", lambda x, *, out=None: x)
    for rows in (1, 2, 64, 1000):
        assert (silu_and_mul(torch.ones(rows, 4)) == 42).all()
    assert implementation("silu_and_mul", "cpu") is first


def test_import_touches_no_device_and_no_backend():
    """In a fresh interpreter: no CUDA context, no Triton, no backend module."""
    code = (
        "import sys, torch; before = set(sys.modules); import idlm_kernels;"
        "new = set(sys.modules) - before;"
        "assert not torch.cuda.is_initialized();"
        "bad = [m for m in new if m.startswith(('triton', 'idlm_kernels.cpu', 'idlm_kernels.triton',"
        " 'idlm_kernels.native', 'idlm_kernels.model', 'idlm_kernels.generate'))];"
        "assert not bad, bad"
    )
    root = str(next(iter(idlm_kernels.__path__))).removesuffix("idlm_kernels")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


def test_use_backend_in_one_thread_leaves_the_others_alone():
    inside, seen = threading.Event(), threading.Event()

    def other():
        with use_backend("torch"):
            inside.set()
            assert seen.wait(60)
            assert implementation("silu_and_mul", "cpu") is python_ref.silu_and_mul

    before = implementation("silu_and_mul", "cpu")
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        assert inside.wait(60)
        assert current_backend() == "auto" and implementation("silu_and_mul", "cpu") is before
        seen.set()
        result.result()
