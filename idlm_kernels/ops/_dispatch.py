"""Which backend computes an op.

A backend is a module that holds functions with the names and signatures of the references in `python_ref`; what it
lacks, the next one in line computes. `auto` walks the line of a device type in order of preference and keeps its
first choice for the life of the process, so that the bits of a result cannot change with rows, batch or length.
To add a backend, call `register_backend` once, at import of `idlm_kernels.ops`; nothing else here changes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """name; module: import path, imported at first use; device_types: where it runs; automatic: may `auto` take it?"""

    name: str
    module: str
    device_types: tuple[str, ...]
    automatic: bool = True

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[str, str], Callable[..., Any]] = {}
_forced: str | None = None


def register_backend(backend: Backend) -> None:
    """Add a backend in front of those registered before it."""
    if backend.name in _backends or backend.name == "auto":
        raise ValueError(f"backend {backend.name!r} is registered already")
    _backends[backend.name] = backend
    _chosen.clear()


register_backend(Backend("torch", "python_ref", ("cpu", "cuda", "meta")))
register_backend(Backend("cpu", "idlm_kernels.cpu", ("cpu",)))
register_backend(Backend("cuda", "idlm_kernels.native.backend", ("cuda",), automatic=False))
register_backend(Backend("triton", "idlm_kernels.triton", ("cuda",), automatic=False))


def set_backend(name: str) -> None:
    """Force one backend for every op that it has, or `auto`. Takes precedence over IDLM_BACKEND."""
    global _forced
    if name != "auto" and name not in _backends:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(['auto', *_backends])}")
    _forced = name
    _chosen.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    global _forced
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = previous
        _chosen.clear()


def _environment() -> str:
    name = os.environ.get("IDLM_BACKEND", "auto") or "auto"
    if name != "auto" and name not in _backends:
        raise ValueError(f"IDLM_BACKEND={name!r} is unknown: choose one of {', '.join(['auto', *_backends])}")
    return name


def current_backend() -> str:
    """The forced backend's name, or `auto`."""
    return _forced or _environment()


def _choose(op: str, device_type: str) -> tuple[str, Callable[..., Any]]:
    forced = current_backend()
    if forced != "auto" and device_type not in _backends[forced].device_types:
        where = " or ".join(_backends[forced].device_types)
        raise ValueError(f"backend {forced!r} runs on {where}, but {op} was given tensors on {device_type}")
    line = [b for b in reversed(_backends.values()) if b.automatic and device_type in b.device_types]
    if forced != "auto":
        line = [_backends[forced], _backends["torch"]]
    for backend in line:
        function = getattr(backend.load(), op, None)
        if function is not None:
            return backend.name, function
    raise ValueError(f"no backend computes {op} on {device_type}")


def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op` on tensors of this device type."""
    key = (op, device_type)
    function = _chosen.get(key)
    if function is None:
        function = _chosen[key] = _choose(op, device_type)[1]
    return function


def backends(device_type: str = "cpu") -> dict[str, str]:
    """The backend that each public op would use on this device type."""
    from idlm_kernels.ops import OPS

    return {op: _choose(op, device_type)[0] for op in OPS}


def traced(x: Tensor) -> bool:
    """True where tools look on (torch.compile, fake tensors, dispatch modes): there the registered op is called, so
    that they see one op. Elsewhere the backend is called directly, which saves tens of microseconds."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack() > 0


_PLAIN = (Tensor, torch.nn.Parameter)
