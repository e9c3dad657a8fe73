"""Ways to spoil a file: as bytes, as JSON, as text. Each is a function of the generator of random numbers alone."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x22, 0x39, 0x5B, 0x7B)
_NUMBERS = (0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    65536,
    2**31,
    2**63,
    10**400,
    10**4000,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "/dev/zero",
    "../../etc/passwd",
    "\u0000",
    "\ud800",
    "é" * 300,
    "(a|a)*$",
    "[",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"type": "Sequence"},
)


def spoiled_bytes(random: Random, data: bytes, end: int) -> bytes:
    """One to four changes within the first `end` bytes, or a file that is cut off."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(max(1, min(end, len(found))))
        how = random.randrange(8)
        if how < 2 and found:
            found[at] = random.choice((found[at] ^ 1 << random.randrange(8), *_BYTES))
        elif how == 2:
            width = random.choice((1, 2, 4, 8))
            found[at : at + width] = (random.choice(_NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif how == 3:
            del found[at : at + random.choice((1, 4, 8, 40))]
        elif how == 4:
            found[at:at] = found[at : at + random.choice((1, 4, 8, 40))]
        elif how == 5:
            other = random.randrange(max(1, min(end, len(found))))
            found[at : at + 8] = found[other : other + 8]
        elif how == 6:
            found[at:at] = bytes(random.choice(_BYTES) for _ in range(random.randrange(1, 9)))
        elif random.randrange(3) == 0:
            del found[at:]
    return bytes(found)


def spoiled_json(random: Random, data: bytes) -> bytes:
    """Values, keys and structure of a JSON document changed, at any depth; one time in five its bytes."""
    if random.randrange(5) == 0:
        return spoiled_bytes(random, data, len(data))
    try:
        return json.dumps(_spoiled(random, json.loads(data))).encode()
    except RecursionError:
        return b"[" * 100_000


def _spoiled(random: Random, document: Any) -> Any:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(document))
        if not holders:
            return random.choice(_VALUES)
        holder, key = random.choice(holders)
        how = random.randrange(10)
        if how < 4:
            holder[key] = copy.deepcopy(random.choice(_VALUES))
        elif how == 4:
            holder[key] = copy.deepcopy(_at(random.choice(holders)))
        elif how == 5:
            del holder[key]
        elif how == 6:
            holder[key] = [holder[key]] * random.choice((1, 2, 40))
        elif how == 7 and isinstance(holder, dict):
            holder[
                random.choice(("type", "content", "", "x" * 90, *(k for h, k in holders if isinstance(h, dict))))
            ] = copy.deepcopy(holder[key])
        elif how == 8 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * random.choice((-1, 2, 1000)) + random.choice(
                (0, 1, -1, 0.5 if holder[key] < 1e9 else 2)
            )
        elif how == 8 and isinstance(holder[key], str):
            holder[key] = spoiled_text(random, holder[key], list("aé\u0000\ud800(|)*+?.[]^${}\\/ 09"))
        else:
            nested: Any = holder[key]
            for _ in range(random.choice((1, 5, 300))):
                nested = [nested] if random.randrange(2) else {"a": nested}
            holder[key] = nested
    return document


def spoiled_text(random: Random, text: str, pieces: list[str]) -> str:
    """Pieces put in, parts taken out, repeated or moved."""
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        at, size = random.randrange(len(text) + 1), random.choice((1, 2, 5, 20))
        how = random.randrange(5)
        if how < 3:
            text = text[:at] + random.choice(pieces) + text[at:]
        elif how == 3:
            text = text[:at] + text[at + size :]
        else:
            text = text[:at] + text[at : at + size] * random.choice((2, 3, 100)) + text[at + size :]
    return text


def _at(place: tuple[Any, Any]) -> Any:
    return place[0][place[1]]


def _holders(document: Any) -> Any:
    """(list or dict, index or key) of every value below the document."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])
