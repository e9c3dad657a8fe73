"""The two errors of loading: a file that cannot be used, and a file that cannot be had."""

from __future__ import annotations

import reprlib
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint, tokenizer or adapter that is damaged, contradicts itself or needs what is not
    supported."""


class DownloadError(FileNotFoundError):
    """The default model is not in the cache and could not be put there."""


_MAX_NAME_CHARS = 120
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlong = 4300  # digits, beyond which Python has no repr


def cut(name: str) -> str:
    """A name out of a file, for a message."""
    return name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."


def short(value: Any) -> str:
    """repr for a message, cut and of little depth: a file may hold a number of a thousand digits, or a list in a list
    in a list."""
    text = _repr.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
