"""All kernels of this backend: the keys by which Triton's cache knows them, and what the compiler made of them."""

from __future__ import annotations

import sys
from typing import Any


def settle_cache_keys() -> None:
    """Compute the key of every kernel and device function now, in an order that is always the same.

    Triton computes a key when a kernel is first compiled, and it comes out differently by whether the functions that
    the kernel calls have one already (their constants enter it then). So the order in which a process meets its kernels
    would decide what it finds in the cache, and what `idlm warm` compiled would now and then be compiled again. It
    takes some 60 ms of an import of 2.3 s.
    """
    for kernel in _functions():
        kernel.cache_key  # noqa: B018 - a property that keeps what it computes


def spills() -> dict[str, int]:
    """Kernels of this backend that keep registers in memory on a device, with the most words per thread.

    Correct and slow: a budget test holds that no shape of a model does so with the compiler of the tests; another
    compiler may decide otherwise, which only loading the kernel shows.
    """
    found: dict[str, int] = {}
    for kernel, compiled in _loaded():
        words = getattr(compiled, "n_spills", None)  # None until it is loaded
        if words:
            found[kernel] = max(words, found.get(kernel, 0))
    return found


def _functions() -> list[Any]:
    """Kernels and device functions of the package, by module and name; none in Triton's interpreter."""
    package = __name__.rpartition(".")[0]
    modules = [sys.modules[name] for name in sorted(sys.modules) if name.startswith(f"{package}.")]
    named = [vars(module)[name] for module in modules for name in sorted(vars(module))]
    return list({id(x): x for x in named if hasattr(x, "device_caches")}.values())


def _loaded() -> list[tuple[str, Any]]:
    """(name, compiled form) of the kernels that were launched, on any device."""
    return [
        (kernel.fn.__name__, compiled)
        for kernel in _functions()
        for cache, *_ in list(kernel.device_caches.values())
        for compiled in list(cache.values())
    ]
