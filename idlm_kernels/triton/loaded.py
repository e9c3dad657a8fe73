"""What the compiler made of the kernels that this process has loaded."""

from __future__ import annotations

import sys
from typing import Any


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


def _loaded() -> list[tuple[str, Any]]:
    """(name, compiled form) of the kernels that were launched, on any device."""
    package = __name__.rpartition(".")[0]
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    kernels = {id(x): x for module in modules for x in vars(module).values() if hasattr(x, "device_caches")}
    return [
        (kernel.fn.__name__, compiled)
        for kernel in kernels.values()
        for cache, *_ in list(kernel.device_caches.values())
        for compiled in list(cache.values())
    ]
