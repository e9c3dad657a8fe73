"""The keys of PEFT's rank_pattern and alpha_pattern: which module a key means.

PEFT matches a key as a regular expression against the end of a module's path. A stranger's expression is not given to
`re`, which tries alternatives one after the other and needs exponential time for (.|.)(.|.)...x even without
repetition. Here a key without repetition is read into a tree and all positions that it can reach are carried at once,
as the bits of one integer, so that a key costs a few operations per character whatever it says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .errors import CheckpointError, short

_MAX_CHARS = 200  # of a key that is an expression
_MAX_EXPRESSIONS = 64  # each is held against each module
_ALPHABET = re.compile(r"[\w.\\^$|()\[\]-]+")
_PLAIN = re.compile(r"(?:(?:(?:(?:model\.)?layers\.)?\d+\.)?(?:self_attn|mlp)\.)?[a-z]+_proj")  # the end of a path

# Where a match can have got to, one bit per position -> where it can have got to after this part of the key.
_Step = Callable[["_Path", int], int]


class ModulePatterns:
    """The values of a pattern setting by module path; of several keys that match, the first one counts."""

    def __init__(self, settings: Mapping[str, Any], name: str, read: Callable[[Any, str], Any]) -> None:
        """`read`: a value as the file has it and the setting's name -> the checked value."""
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{name} is {short(patterns)}, wanted a JSON object")
        self._plain: dict[str, tuple[int, Any]] = {}  # most adapters have these alone, one for each module
        self._expressions: list[tuple[int, _Step, Any]] = []
        for place, (key, value) in enumerate(patterns.items()):
            checked = read(value, name)
            if _PLAIN.fullmatch(key):
                self._plain[key] = place, checked
            else:
                self._expressions.append((place, _parsed(key, name), checked))
        if len(self._expressions) > _MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{name}: {len(self._expressions)} keys are no plain module names, more than {_MAX_EXPRESSIONS}"
            )

    def get(self, module: str, default: Any) -> Any:
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [self._plain[end] for end in ends if end in self._plain]
        path = _Path(module)
        found += [(place, value) for place, step, value in self._expressions if path.is_reached(step)]
        return min(found, key=lambda match: match[0], default=(0, default))[1]


class _Path:
    """A module path: at which positions each character stands, as bits."""

    def __init__(self, text: str) -> None:
        self.end = 1 << len(text)
        self.positions: dict[str, int] = {}
        for i, character in enumerate(text):
            self.positions[character] = self.positions.get(character, 0) | 1 << i

    def is_reached(self, step: _Step) -> bool:
        """Whether the key matches from the start, or from after any dot, to the end."""
        return bool(step(self, 1 | self.positions.get(".", 0) << 1) & self.end)


def _parsed(key: str, name: str) -> _Step:
    if len(key) > _MAX_CHARS or not _ALPHABET.fullmatch(key):
        raise CheckpointError(f"{name}: {short(key)} is not supported; wanted module names without repetition (* + ?)")
    try:
        step, rest = _alternatives(key)
        if rest:
            raise ValueError("unbalanced parenthesis")
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{name}: {short(key)} is not a regular expression: {error}") from None
    return step


def _alternatives(key: str) -> tuple[_Step, str]:
    """What the start of the key, up to a closing parenthesis or the end, does, and the rest."""
    branches: list[list[_Step]] = [[]]
    while key and key[0] != ")":
        if key[0] == "|":
            branches.append([])
            key = key[1:]
            continue
        step, key = _atom(key)
        branches[-1].append(step)

    def run(path: _Path, reached: int) -> int:
        found = 0
        for steps in branches:
            there = reached
            for step in steps:
                there = step(path, there)
                if not there:
                    break
            found |= there
        return found

    return run, key


def _atom(key: str) -> tuple[_Step, str]:
    first = key[0]
    if first == "(":
        step, rest = _alternatives(key[1:])
        if not rest:
            raise ValueError("missing ), unterminated group")
        return step, rest[1:]
    if first == "^":
        return lambda path, reached: reached & 1, key[1:]
    if first == "$":
        return lambda path, reached: reached & path.end, key[1:]
    if first == "[":
        end = key.find("]", 3 if key[1:2] == "^" else 2)
        if end < 0:
            raise ValueError("unterminated character set")
        return _one_of(key[: end + 1]), key[end + 1 :]
    if first == "\\":
        if len(key) < 2 or (key[1].isalnum() and key[1] not in "dDwWsS"):
            raise ValueError(f"{key[:2]!r} has no meaning here")
        return _one_of(key[:2]), key[2:]
    return _one_of("." if first == "." else re.escape(first)), key[1:]


def _one_of(expression: str) -> _Step:
    """One character that an expression of one character matches."""
    matches = re.compile(expression).fullmatch

    def run(path: _Path, reached: int) -> int:
        return (reached & sum(bits for character, bits in path.positions.items() if matches(character))) << 1

    return run
