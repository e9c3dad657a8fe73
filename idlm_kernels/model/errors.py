"""The two errors of loading: a file that cannot be used, and a file that cannot be had."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, tokenizer or adapter that is damaged, contradicts itself or needs what is not
    supported."""


class DownloadError(FileNotFoundError):
    """The default model is not in the cache and could not be put there."""
