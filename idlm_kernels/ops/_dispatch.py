"""Which backend computes an op.

A backend is a module that holds functions with the names and signatures of the references in `python_ref`; what it
lacks, the next one in line computes. `auto` walks the line of a device type in order of preference and keeps its
first choice for the life of the process, so that the bits of a result cannot change with rows, batch or length. From a
backend that is `checked` it takes an op only where that op passes its self-check (self_check.py) on the device at hand.
To add a backend, call `register_backend` once, at import of `idlm_kernels.ops`; nothing else here changes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.ops import self_check

logger = logging.getLogger(__name__)


def _nothing_missing(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """name; module: import path, imported at first use; device_types: where it runs; automatic: may `auto` take it?

    checked: `auto` takes only ops that pass their self-check on the device. missing: says what a device or this
    installation lacks for it, None if nothing; then `auto` passes over a checked backend without a word.
    """

    name: str
    module: str
    device_types: tuple[str, ...]
    automatic: bool = True
    checked: bool = False
    missing: Callable[[torch.device], str | None] = _nothing_missing

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def unusable(self, device: torch.device) -> str | None:
        """Why nothing of it can run on a device, None if something may."""
        reason = self.missing(device)
        if reason is None:
            try:
                self.load()
            except Exception as error:  # whatever a compiler that it builds on raises at import
                reason = f"its module does not load: {error}"
        return reason


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[str | None, str, str], Callable[..., Any]] = {}  # by forced backend, op and device type
_forced: str | None = None  # by set_backend, for the process
_forced_here: ContextVar[str | None] = ContextVar("forced_here", default=None)  # by use_backend
_verdicts: dict[tuple[str, str, str], str | None] = {}  # (backend, op, device model): why not, or None
_warned: set[tuple[str, str, str]] = set()
_checking = threading.Lock()


def register_backend(backend: Backend) -> None:
    """Add a backend in front of those registered before it."""
    if backend.name in _backends or backend.name == "auto":
        raise ValueError(f"backend {backend.name!r} is registered already")
    _backends[backend.name] = backend
    _chosen.clear()


def _triton_missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _native_missing(device: torch.device) -> str | None:
    from idlm_kernels import native

    try:
        native.load()
    except native.NativeUnavailable as reason:
        return str(reason)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return "the native module is compiled for sm_90a alone"
    return None


register_backend(Backend("torch", "python_ref", ("cpu", "cuda", "meta")))
register_backend(Backend("cpu", "idlm_kernels.cpu", ("cpu",)))
register_backend(Backend("triton", "idlm_kernels.triton", ("cuda",), checked=True, missing=_triton_missing))
# In front of Triton where it is built: its sampling reads a row of logits once, in one launch or two; Triton's takes
# three or four and reads a truncated row up to seven times.
register_backend(Backend("cuda", "idlm_kernels.native.backend", ("cuda",), checked=True, missing=_native_missing))


def set_backend(name: str) -> None:
    """Force one backend for every op that it has, or `auto`. Takes precedence over IDLM_BACKEND."""
    global _forced
    if name != "auto" and name not in _backends:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(['auto', *_backends])}")
    _forced = name
    _chosen.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a with block, in this thread (and task) alone."""
    if name != "auto" and name not in _backends:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(['auto', *_backends])}")
    token = _forced_here.set(name)
    try:
        yield
    finally:
        _forced_here.reset(token)


def _environment() -> str:
    name = os.environ.get("IDLM_BACKEND", "auto") or "auto"
    if name != "auto" and name not in _backends:
        raise ValueError(f"IDLM_BACKEND={name!r} is unknown: choose one of {', '.join(['auto', *_backends])}")
    return name


def current_backend() -> str:
    """The forced backend's name, or `auto`."""
    return _forced_here.get() or _forced or _environment()


def models(device_type: str) -> dict[str, torch.device]:
    """One device of each model that this process sees, by the model's name. Initialises CUDA when asked for it."""
    if device_type != "cuda":
        return {device_type: torch.device(device_type)}
    found: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(index), torch.device("cuda", index))
    return found


def checked_backends(device: torch.device) -> list[Backend]:
    """The backends from which `auto` takes only what passes its self-check on this device, the first in line first."""
    return [b for b in reversed(_backends.values()) if b.automatic and b.checked and device.type in b.device_types]


_DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def versions(device: torch.device) -> dict[str, str]:
    """What the bits of a result on this device depend on besides the source: card, driver and compilers. Equal bits are
    promised within one set of them alone."""
    found = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none", "triton": "none"}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    if device.type != "cuda":
        return found
    try:
        driver = _DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ")
    except (OSError, IndexError):
        driver = "unknown"
    return {"card": torch.cuda.get_device_name(device), "driver": " ".join(driver.split()), **found}


def verdict(backend: Backend, op: str, model: str, device: torch.device) -> str | None:
    """Why `op` of a backend fails its self-check on a model of device, None if it passes. Computed once per process."""
    key = (backend.name, op, model)
    with _checking:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{op}: backend {backend.name!r} is checked at its first use, which cannot be while a CUDA "
                    "graph is being captured; run the step once before, or call idlm_kernels.backends('cuda')"
                )
            where = ", ".join(f"{name} {version}" for name, version in versions(device).items())
            _verdicts[key] = reason = self_check.self_check(backend.load(), op, device)
            logger.info("self-check of %s of backend %s: %s (%s)", op, backend.name, reason or "ok", where)
            # A kernel that this compiler made spill is right, and slow.
            for kernel, words in getattr(backend.load(), "spills", dict)().items():
                logger.warning("%s of %s spills %d registers per thread (%s)", kernel, backend.name, words, where)
        return _verdicts[key]


def _trusted(backend: Backend, op: str, device_type: str) -> bool:
    """Whether `auto` may take `op` from a checked backend that has it: the ops that go together with it pass, too."""
    there = models(device_type)
    if not there or any(backend.unusable(device) for device in there.values()):
        return False
    if os.environ.get("IDLM_SELF_CHECK") == "0":
        return True
    together = next((group for group in self_check.TOGETHER if op in group), (op,))
    module = backend.load()
    for model, device in there.items():
        for member in together:
            reason = verdict(backend, member, model, device) if hasattr(module, member) else None
            if reason is not None:
                _warn(backend, member, model, reason, together)
                return False
    return True


def _warn(backend: Backend, op: str, model: str, reason: str, together: tuple[str, ...]) -> None:
    """Say once what is not used, and why."""
    key = (backend.name, op, model)
    if key in _warned:
        return
    _warned.add(key)
    others = ", ".join(other for other in together if other != op)
    warnings.warn(
        f"{op} of backend {backend.name!r} is not used on {model}: {reason}. The next backend in line computes it"
        + (f", and with it {others}" if others else "")
        + ". `idlm doctor` shows all self-checks.",
        RuntimeWarning,
        stacklevel=2,
    )


def _choose(op: str, device_type: str, after: str | None = None) -> tuple[str, Callable[..., Any]]:
    """The first backend in line that computes `op`, or the first one behind `after`."""
    forced = current_backend()
    if forced != "auto" and device_type not in _backends[forced].device_types:
        where = " or ".join(_backends[forced].device_types)
        raise ValueError(f"backend {forced!r} runs on {where}, but {op} was given tensors on {device_type}")
    line = [b for b in reversed(_backends.values()) if b.automatic and device_type in b.device_types]
    if forced != "auto":
        line = [_backends[forced], _backends["torch"]]
    names = [b.name for b in line]
    for backend in line[names.index(after) + 1 if after in names else 0 :]:
        if forced == "auto" and backend.checked and not _trusted(backend, op, device_type):
            continue
        function = getattr(backend.load(), op, None)
        if function is not None:
            return backend.name, function
    raise ValueError(f"no backend computes {op} on {device_type}")


def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op` on tensors of this device type."""
    key = (_forced_here.get() or _forced, op, device_type)
    function = _chosen.get(key)
    if function is None:
        function = _chosen[key] = _choose(op, device_type)[1]
    return function


def next_implementation(after: str, op: str, device_type: str) -> Callable[..., Any]:
    """For a backend that does not compute every problem of an op: the function of the next one in line."""
    key = (_forced_here.get() or _forced, f"{op} after {after}", device_type)
    function = _chosen.get(key)
    if function is None:
        function = _chosen[key] = _choose(op, device_type, after)[1]
    return function


def backends(device_type: str = "cpu") -> dict[str, str]:
    """The backend that each public op would use on this device type. On a GPU `auto` checks all of them for that."""
    from idlm_kernels.ops import OPS

    return {op: _choose(op, device_type)[0] for op in OPS}


def traced(x: Tensor) -> bool:
    """True where tools look on (torch.compile, fake tensors, dispatch modes): there the registered op is called, so
    that they see one op. Elsewhere the backend is called directly, which saves tens of microseconds."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack() > 0


_PLAIN = (Tensor, torch.nn.Parameter)
