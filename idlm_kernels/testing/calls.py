"""Calls of an op, and what every backend has to keep: `check` against the reference, `check_rows` to the bit.

A `Problem` is the shapes of a call. `problem.call(device, seed)` draws the arguments: a `Call`, which any function with
the op's signature can run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import python_ref
from idlm_kernels.testing.numerics import GRANTED, check_bits, check_close, check_distributions, same_bits
from python_ref import DraftDistributions

Arguments = dict[str, Any]
Function = Callable[..., Any]


class Ran(NamedTuple):
    """What a call gives: its result, and its arguments as it leaves them."""

    result: Any
    left: Arguments


@dataclass
class Call:
    """An op and arguments for it. per_row: the names of those that have a row for each row of the result."""

    op: str
    arguments: Arguments
    per_row: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def changed(self, **changes: Any) -> Call:
        """The call with other or further arguments."""
        return Call(self.op, self.arguments | changes, self.per_row)

    def of(self, op: str, *names: str) -> Call:
        """A call of another op with those of the arguments that are named."""
        kept = {name: self.arguments[name] for name in names if name in self.arguments}
        return Call(op, kept, tuple(name for name in self.per_row if name in kept))

    def rows(self, which: slice) -> Call:
        """Some of the rows alone."""
        return self.changed(
            **{name: self[name][which] for name in self.per_row if self.arguments.get(name) is not None}
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with all tensors changed."""
        return Call(self.op, {name: map_tensors(change, x) for name, x in self.arguments.items()}, self.per_row)

    def widened(self, dtype: torch.dtype = torch.float64) -> Call:
        """The call with floating-point arguments in a wider dtype, in which the reference is exact."""
        return self.mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def run(self, function: Function | None = None, device: torch.device | None = None) -> Ran:
        """What `function`, else the reference, makes of copies of the arguments, on `device` if one is given."""
        moved = self.mapped(lambda x: x.to(x.device if device is None else device, copy=True)).arguments
        result = (function or getattr(python_ref, self.op))(**moved)
        if device is None:
            return Ran(result, moved)
        home = next((x.device for x in self.arguments.values() if isinstance(x, Tensor)), device)
        back = [map_tensors(lambda x: x.to(home), x) for x in (result, *moved.values())]
        return Ran(back[0], dict(zip(moved, back[1:], strict=True)))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with all tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: map_tensors(change, getattr(value, f.name)) for f in dataclasses.fields(value)})
    return tuple(map_tensors(change, x) for x in value) if isinstance(value, tuple) else value


# Judgement


def check(call: Call | Problem, function: Function, device: torch.device | None = None) -> Ran:
    """Raise Wrong unless `function` gives what the reference does: results, and every argument that the op writes.

    Floats are held to `check_close` against the reference in fp64, ids, counts and flags have to be equal, and what the
    op does not write keeps its bits.

    Args:
        call: a call, or a problem of which one is drawn on the default device.
        function: takes the op's arguments by name.
        device: where it runs, if not where the arguments are.

    Returns:
        What the function gave.
    """
    call = call.call() if isinstance(call, Problem) else call
    got, peer, exact = call.run(function, device), call.run(), call.widened().run()
    results = [x.result if isinstance(x.result, tuple) else (x.result,) for x in (got, peer, exact)]
    for i, (x, y, z) in enumerate(zip(*results, strict=True)):
        name = "the result" if len(results[0]) == 1 else f"the result[{i}]"
        check_close(x, z, y, name, GRANTED.get((call.op, name), 0.0))
    left, peer_left, exact_left = (dict(_named(x.left)) for x in (got, peer, exact))
    for name, before in _named(call.arguments):
        if same_bits(peer_left[name], before):
            check_bits(left[name], before, name)
        else:
            granted = GRANTED.get((call.op, name), 0.0)
            check_close(left[name], exact_left[name], peer_left[name], name, granted)
    if call.arguments.get("draft_dists") is not None:
        num_drafts = got.result[3] if call.op == "verify_accept" else got.left["num_drafts"]
        check_distributions(got.left, exact.left, num_drafts > 0)
    return got


def _named(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name, those of a struct as `state.lengths`, but for what `check_distributions` judges."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif dataclasses.is_dataclass(value) and not isinstance(value, DraftDistributions):
            yield from ((f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))


def check_rows(
    call: Call, function: Function, *rows: slice, device: torch.device | None = None, among: Ran | None = None
) -> Ran:
    """Raise Wrong unless rows that are computed alone have the bits that they have among the others.

    That holds for the result and for the arguments in `call.per_row`. `among`: what the whole call gave, if it was run.
    """
    whole = call.run(function, device) if among is None else among
    for which in rows:
        alone = call.rows(which).run(function, device)
        count = f"{len(alone.result)} row{'s' if len(alone.result) > 1 else ''} alone and among {len(whole.result)}"
        check_bits(alone.result, whole.result[which], count)
        for name in call.per_row:
            if alone.left[name] is not None:
                check_bits(alone.left[name], whole.left[name][which], f"{name}, {count}")
    return whole


# Shapes


class Draw:
    """Random tensors on a device, the same ones for the same seed and kind of device."""

    def __init__(self, device: torch.device | str | None = None, seed: int = 0):
        self.device = torch.get_default_device() if device is None else torch.device(device)
        self._random = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(shape, generator=self._random, device=self.device, dtype=torch.float32)
        return (x * scale).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._random, device=self.device, dtype=dtype)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._random, device=self.device)

    def tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The shapes of a call. Subclasses name the op and draw its arguments by name."""

    op: ClassVar[str]
    per_row: ClassVar[tuple[str, ...]] = ()
    dtype: torch.dtype = torch.bfloat16

    def arguments(self, draw: Draw) -> Arguments:
        raise NotImplementedError

    def call(self, device: torch.device | str | None = None, seed: int = 0) -> Call:
        """A call with arguments on `device`, by default torch's default device."""
        arguments = self.arguments(Draw(device, seed))
        return Call(self.op, arguments, tuple(name for name in self.per_row if name in arguments))

    @property
    def name(self) -> str:
        """The op, and the shapes that are not the default ones."""
        fields = [
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return " ".join((self.op, *(f"{name}={value}" for name, value in fields)))
