"""A card that is not there: tells tensors on it from those on the CPU, so that the tests show without a GPU whether
they put everything where a GPU would want it. IDLM_PRETEND_CARD=1 turns it on (test_pretended.py does).

The card is the device cpu:0, which torch takes for the CPU, but which is not equal to `cpu`. Every tensor remembers
where it was made. An operation on tensors of both places is an error, as on a GPU; so is a launch with one of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

CARD = torch.device("cpu", 0)
MIXED = {"__getitem__", "__setitem__", "copy_", "index", "to"}  # take tensors of both places
TO_CPU = {"cpu", "tolist", "item"}
DEVICE_OF = torch.Tensor.device.__get__  # type: ignore[attr-defined]


def on_card(x: Tensor) -> bool:
    return getattr(x, "_on_card", False)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class PretendedCard(TorchFunctionMode):
    """While it is on, the card is the default device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        if function == DEVICE_OF:
            return CARD if on_card(args[0]) else torch.device("cpu")
        name = getattr(function, "__name__", "")
        if function in _device_constructors():
            place = kwargs.get("device")
            if place is None and not name.endswith("_like"):
                kwargs["device"] = place = CARD
            there = on_card(args[0]) if place is None else _is_card(place)
            generator = kwargs.get("generator")
            if generator is not None and there != (generator in _generators):
                raise RuntimeError(f"{name}: the generator is not on the device of the tensor")
            return _marked(function(*args, **kwargs), there)
        if name in ("numpy", "__array__") and on_card(args[0]):
            raise RuntimeError(f"{name}: a tensor on the card, not on the CPU")
        if name not in MIXED:
            there_too = [on_card(x) for x in given if x.dim() > 0]
            if any(there_too) and not all(there_too):
                raise RuntimeError(f"{name}: tensors on the card and on the CPU")
        elif name in ("__getitem__", "__setitem__") and not on_card(args[0]) and any(map(on_card, _tensors(args[1]))):
            raise RuntimeError(f"{name}: a tensor on the CPU with an index on the card")
        there = any(map(on_card, given)) and name not in TO_CPU
        if name == "to":
            places = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
            there = _is_card(places[0]) if places else on_card(args[1]) if given[1:] else on_card(args[0])
        elif name in MIXED:
            there = on_card(args[0])
        result = function(*args, **kwargs)
        if name in ("cpu", "to") and result is args[0] and there != on_card(result):
            result = result.detach().clone()  # it would be another one
        return _marked(result, there)


_generators: set[torch.Generator] = set()


class Generator(torch.Generator):
    """torch.Generator, which remembers whether it is the card's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        if _is_card(device):
            _generators.add(made)
        return made


def _is_card(place: Any) -> bool:
    return torch.device(place) == CARD


def _marked(result: Any, there: bool) -> Any:
    for x in _tensors(result):
        x._on_card = there  # type: ignore[attr-defined]
    return result


def watched(launch: Any) -> Any:
    """A launch of a Triton kernel that takes tensors of the card alone."""

    def launching(kernel: Any, grid: Any, like: Tensor, *args: Any, **meta: Any) -> None:
        if wrong := [i for i, x in enumerate(args) if not all(map(on_card, _tensors(x)))]:
            raise RuntimeError(f"{kernel.fn.__name__}: arguments {wrong} are on the CPU")
        launch(kernel, grid, like, *args, **meta)

    return launching


@contextmanager
def pretend(monkeypatch: Any, modules: Any) -> Iterator[None]:
    """For the length of a test: the card is the default device, and kernels take nothing else."""
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "get_default_device", lambda: CARD)
    for module in modules:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", watched(module.launch))
    with PretendedCard():
        yield
