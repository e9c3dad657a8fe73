"""Reading JSON and safetensors files that may be damaged or hostile: bounded, and with errors that name the
file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import CheckpointError

MAX_JSON_BYTES = 128 << 20  # tokenizer.json files of the largest vocabularies stay under 40 MB
MAX_SETTINGS_BYTES = 64 << 20  # all other JSON files; as Python objects they may take 20 times the space

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_there(path: Path) -> bool:
    """Whether `path` is a regular file. CheckpointError where it is something else: a pipe would be waited for, a
    device never ends, and neither may pass for a file that is absent."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return True


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. FileNotFoundError when it is absent, CheckpointError when it is too large."""
    if not is_there(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, max_bytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > max_bytes:
        unit = f"{max_bytes >> 20} MiB" if max_bytes >= 1 << 20 else f"{max_bytes} bytes"
        raise CheckpointError(f"{path}: larger than {unit}, which no real file of its kind is")
    return raw


def read_json_object(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. FileNotFoundError when it is absent, CheckpointError when it is anything
    else."""
    raw = read_bytes(path, max_bytes)
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
def naming(path: Path | str, fault: str = "damaged") -> Iterator[None]:
    """The boundary of a reader: whatever a file makes it raise is a CheckpointError that names the file, a panic of a
    Rust library included. Faults of the machine and of the user (no memory, Ctrl-C) stay what they are."""
    prefix = f"{path}: " if str(path) else ""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except (CheckpointError, FileNotFoundError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{prefix}{error}") from error
    except BaseException as error:
        if "can't allocate memory" in str(error):  # torch's MemoryError is a RuntimeError
            raise
        raise CheckpointError(f"{prefix}{fault}: {str(error) or type(error).__name__}") from error


class SafetensorsFile:
    """One memory-mapped safetensors file. The library checks header size, offsets and length when it
    opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_there(path):
            raise FileNotFoundError(f"{path}: no such file")
        with self._naming():
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self.names = frozenset(self._file.keys())

    def _naming(self) -> AbstractContextManager[None]:
        return naming(self.path, "damaged or not a safetensors file")

    def shape(self, name: str) -> tuple[int, ...]:
        with self._naming():
            return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as the file spells it: F32, BF16, ..."""
        with self._naming():
            return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, backed by the mapped file, so it costs memory only as it is
        read."""
        with self._naming():
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
