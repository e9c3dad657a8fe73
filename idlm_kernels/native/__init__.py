"""The compiled half: loads the module `_native` at first use and says in one sentence why it cannot.

Build it with `make native` (or `python csrc/build.py`), which needs nvcc 12.4 or newer. Nothing else in the package
needs it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from idlm_kernels._version import __version__

_ROOT = Path(__file__).resolve().parents[2]
_SOURCE_SUFFIXES = (".h", ".cuh", ".cu", ".cpp")


class NativeUnavailable(RuntimeError):
    """The compiled module cannot be used; the message says why and what to do."""


def source_hash() -> str | None:
    """What the module must have been built from; None where the sources are not at hand (an installed package)."""
    found = (p for p in (_ROOT / "csrc").rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    sources = sorted(p for p in found if p.parent.name != "cpu")  # the CPU kernels are a library of their own
    if not sources:
        return None
    lines = [f"{p.relative_to(_ROOT).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in sources]
    return hashlib.sha256("\n".join([__version__, *lines, ""]).encode()).hexdigest()


def _not_built() -> str:
    """Why there is no module: in a checkout what a build lacks, or that it only has to be started."""
    script = _ROOT / "csrc" / "build.py"
    spec = importlib.util.spec_from_file_location("idlm_kernels_build", script)
    if not script.is_file() or spec is None or spec.loader is None:
        return (
            "the native module is not part of this installation; install idlm_kernels from its sources where there is "
            "an nvcc of CUDA 12.4 or newer"
        )
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build  # dataclasses look their module up
    spec.loader.exec_module(build)
    try:
        return f"the native module is not built; `make native` builds it, with {build.find_toolchain()}"
    except build.CannotBuild as reason:
        return f"the native module is not built and cannot be: {reason}"


@functools.cache
def _load() -> ModuleType | str:
    """The module, or the sentence that says why there is none."""
    try:
        module = importlib.import_module("idlm_kernels.native._native")
    except ModuleNotFoundError:
        return _not_built()
    except ImportError as error:
        hint = ""
        if "libcudart" in str(error):
            hint = " (the CUDA runtime it was linked with is not installed; torch's CUDA wheels bring it)"
        return f"the native module does not load: {error}{hint}"
    if __version__ != module.VERSION:
        return f"the native module is of version {module.VERSION}, the package of {__version__}; run `make native`"
    wanted = source_hash()
    if wanted is not None and wanted != module.SOURCE_HASH:
        return "the native module was built from other sources than those in csrc; run `make native`"
    return module


def load() -> ModuleType:
    """The compiled module. Raises NativeUnavailable."""
    found = _load()
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


def status() -> str:
    """One sentence: what is loaded, or what is missing. Touches the CUDA runtime, so not for import time."""
    found = _load()
    if isinstance(found, str):
        return found
    major, minor = found.CUDART_VERSION // 1000, found.CUDART_VERSION % 1000 // 10
    headers = f"CUTLASS headers {found.CUTLASS_VERSION}" if found.CUTLASS_VERSION else "no CUTLASS headers"
    return f"native module {found.VERSION} for sm_90a, built with CUDA {major}.{minor} and {headers}; {found.device()}"


@functools.cache
def emulated() -> bool:
    """Whether the CUDA runtime is an emulator, which computes on CPU tensors."""
    return "softgpu" in load().device()
