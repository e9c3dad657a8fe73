"""The CUDA toolchain of the tests."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Toolkit:
    """csrc/build.py as a module, and the toolchain that it found."""

    build: ModuleType
    toolchain: Any

    def tool(self, name: str) -> str:
        """A tool of the CUDA toolkit; Triton brings those that a minimal toolkit lacks."""
        triton = importlib.util.find_spec("triton")
        folders = [self.toolchain.nvcc.resolve().parent]
        if triton is not None and triton.origin is not None:
            folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
        for folder in folders:
            if (folder / name).is_file():
                return str(folder / name)
        pytest.skip(f"{name} is neither in {' nor in '.join(map(str, folders))}")

    def nvcc(self, *args: str) -> None:
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        command = [str(self.toolchain.nvcc), "-std=c++17", *includes, *args]
        subprocess.run(command, check=True, capture_output=True, text=True)
