"""Old names, taken for one release with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def warn_renamed(what: str, old: str, new: str, *, stacklevel: int = 3) -> None:
    warnings.warn(f"{what}{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel)


def dropped(*names: str) -> Callable[[F], F]:
    """Decorator of a function that takes some keywords which have had no effect."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            for name in names:
                if name in keywords:
                    del keywords[name]
                    message = f"{function.__name__}: {name} has no effect; it goes with the next release"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **keywords)

        return cast(F, wrapper)

    return decorate


def renamed(**new_of_old: str) -> Callable[[F], F]:
    """Decorator of a function that takes some keywords by their old names as well."""

    def decorate(function: F) -> F:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            for old, new in new_of_old.items():
                if old in keywords:
                    if new in keywords:
                        raise TypeError(f"{name} was given {new} and {old}, its old name: give {new} alone")
                    warn_renamed(f"{name}: ", old, new)
                    keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return cast(F, wrapper)

    return decorate
