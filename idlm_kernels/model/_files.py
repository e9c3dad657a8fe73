"""Reading JSON and safetensors files that may be damaged or hostile: bounded, and with errors that name the
file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

MAX_JSON_BYTES = 256 << 20  # tokenizer.json files of the largest vocabularies stay under 40 MB

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. FileNotFoundError when it is absent, CheckpointError when it is anything
    else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device never ends
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, max_bytes))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes >> 20} MiB, which no real file of its kind is")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a JSON {type(value).__name__}, wanted an object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what the safetensors library raises into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error


class SafetensorsFile:
    """One memory-mapped safetensors file. The library checks header size, offsets and length when it
    opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with naming(path):
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self.names = frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        with naming(self.path):
            return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as the file spells it: F32, BF16, ..."""
        with naming(self.path):
            return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, backed by the mapped file, so it costs memory only as it is
        read."""
        with naming(self.path):
            return self._file.get_tensor(name)


def require_float(path: Path, name: str, dtype: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: {name} is stored as {dtype}; supported are {', '.join(FLOAT_DTYPES)} (quantised weights: GGUF)"
        )


def require_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """CheckpointError with the count when `tensor` holds NaN or Inf. The usual case is one pass without a
    copy."""
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    count = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(1 << 22))
    raise CheckpointError(f"{path}: {name} holds {count} non-finite values of {tensor.numel()}; the file is damaged")
