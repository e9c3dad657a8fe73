"""Judgements that the Triton tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that NaN equals NaN and -0.0 is not 0.0."""
    return x.contiguous().view(_INTEGER[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def judge(got: Tensor, exact: Tensor, peer: Tensor, what: str = "result") -> None:
    """Hold `got` to the contract: its error against fp64 is at most twice that of PyTorch in the same dtype (`peer`),
    and Inf and NaN are where they are in `peer`."""
    assert got.dtype == peer.dtype and got.shape == peer.shape, what
    got64, peer64 = got.double(), peer.double()
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(got64), pattern(peer64)), f"{what}: {pattern.__name__} differs"
    finite = torch.isfinite(peer64)
    if not finite.any():
        return
    error = (got64 - exact)[finite].abs().max()
    allowed = 2 * (peer64 - exact)[finite].abs().max()
    # One rounding of the largest value is granted where the peer happens to be exact.
    allowed = allowed.clamp(min=torch.finfo(got.dtype).eps * float(exact[finite].abs().max()))
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with one piece of its source replaced: a kernel with a planted fault."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"the piece to replace occurs {source.count(old)} times: {old!r}"
    path = folder / f"mutant_{Path(str(module.__file__)).name}"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def caught(check: Callable[[ModuleType], None], module: ModuleType) -> bool:
    """Does the check refuse this module? A wrong result and an emulator's report both count."""
    try:
        check(module)
    except (AssertionError, RuntimeError):
        return True
    return False
