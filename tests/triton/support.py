"""Where the Triton tests run, and planted faults."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.ptx import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available()
PRETENDED = not ON_GPU and os.environ.get("IDLM_PRETEND_CARD") == "1"  # see pretended.py
# Where the tensors of a test live: on the GPU, or on the CPU, where the emulator or the interpreter takes them. It is
# the default device in every test here, so that only what names a device needs this.
DEVICE = torch.device("cuda") if ON_GPU else torch.device("cpu", 0) if PRETENDED else torch.device("cpu")


def assert_ieee(launches: Sequence[Launch]) -> None:
    """No kernel flushes subnormals to zero, or divides or takes logarithms approximately."""
    from bench.ptx import opcodes  # which needs Triton; conftest.py reads this file where there is none

    for launch in launches:
        found = opcodes(launch.ptx, "")
        assert not [o for o in found if ".ftz" in o or o.startswith(("div.approx", "div.full", "lg2"))]


_numbers = itertools.count()


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module in a copy of its package with one piece of a source replaced, its own or else another one's: a kernel
    with a planted fault."""
    package, own = Path(str(module.__file__)).parent, Path(str(module.__file__)).name
    sources = {path.name: path.read_text() for path in package.glob("*.py")}
    counts = {file: source.count(old) for file, source in sources.items() if old in source}
    file = own if own in counts else next(iter(counts), own)
    assert counts.get(file) == 1 and (file == own or len(counts) == 1), f"{old!r} occurs in {counts}, wanted once"
    sources[file] = sources[file].replace(old, new)
    name = f"mutant_{next(_numbers)}"
    (folder / name).mkdir()
    for file, source in sources.items():
        (folder / name / file).write_text(source.replace("idlm_kernels.triton", name))
    path = folder / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{Path(own).stem}")


def caught(check: Callable[[ModuleType], None], module: ModuleType) -> bool:
    """Does the check refuse this module? A wrong result and an emulator's report both count."""
    try:
        check(module)
    except (AssertionError, RuntimeError):
        return True
    return False
