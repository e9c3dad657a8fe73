"""Registration with torch.library: of one line of arguments, a functional op and one that writes into `out`.

`run_op` is how a public function calls its op once the arguments are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from idlm_kernels.ops._dispatch import implementation, traced

_keywords: dict[str, list[str]] = {}  # of each op, what backends take by keyword, in the order of the registered op


def run_op(op: str, args: tuple[Any, ...], keywords: dict[str, Any], out: Any = None) -> Any:
    """The result of an op: from the backend, or from the registered op where tools look on (see `traced`).

    args, keywords: all that `register` was told, in any order of the keywords. out: a tensor to write into, which is
    returned.
    """
    if not traced(args[0]):
        return implementation(op, args[0].device.type)(*args, **keywords, out=out)
    in_order = (keywords[name] for name in _keywords[op])
    if out is None:
        return getattr(torch.ops.idlm, op)(*args, *in_order)
    getattr(torch.ops.idlm, f"{op}_out")(*args, *in_order, out)
    return out


def register(
    name: str,
    arguments: str,
    fake: Callable[..., Any],
    *,
    out: str = "Tensor! out",
    returns: str = "Tensor",
    run: Callable[..., Any] | None = None,
) -> None:
    """Register idlm::name, which returns its result, and idlm::name_out, which takes `out` as well and returns nothing.

    arguments: as in a torch schema, with `Tensor!` for a tensor that is written (`Tensor!?` where it may be None), and
    a `*` before those that backends take by keyword; in the registered ops all are positional. out: likewise, what the
    second op takes besides. fake: gives the shape of the result from the arguments of the first one. run: called with
    all arguments by name, for an op that is more than a call of the backend.
    """
    positional, _, by_keyword = arguments.partition("*,")
    names = _names(positional)
    num_positional = len(names)
    _keywords[name] = _names(by_keyword)
    names += _keywords[name]
    everything = ", ".join(part.strip().rstrip(",") for part in (positional, by_keyword) if part.strip())

    def call(names: list[str], args: tuple[Any, ...]) -> Any:
        if run is not None:
            return run(**dict(zip(names, args, strict=True)))
        function = implementation(name, args[0].device.type)
        return function(*args[:num_positional], **dict(zip(names[num_positional:], args[num_positional:], strict=True)))

    def functional(*args: Any) -> Any:
        return call(names, args)

    all_names = names + _names(out)

    def writing(*args: Any) -> None:
        call(all_names, args)

    for op, function, taken, result in (
        (name, functional, everything, returns),
        (f"{name}_out", writing, f"{everything}, {out}", "()"),
    ):
        schema = f"({_with_aliases(taken)}) -> {result}"
        registered = torch.library.custom_op(f"idlm::{op}", function, mutates_args=_written(taken), schema=schema)
        registered.register_fake(fake if op == name else lambda *args: None)


def _names(arguments: str) -> list[str]:
    return [argument.split()[-1] for argument in arguments.split(",") if argument.strip()]


def _written(arguments: str) -> tuple[str, ...]:
    return tuple(name for argument in arguments.split(",") if "!" in argument for name in _names(argument))


def _with_aliases(arguments: str) -> str:
    """`Tensor! x` as torch writes it: `Tensor(a0!) x`, each with a letter of its own."""
    numbers = iter(range(arguments.count("!")))
    return re.sub("Tensor!", lambda match: f"Tensor(a{next(numbers)}!)", arguments)
