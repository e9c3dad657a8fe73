"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from idlm_kernels.generate import Generator
from idlm_kernels.model import Transformer
from tests.suites import pytest_runtest_logreport, pytest_sessionfinish, pytest_terminal_summary
from tests.tiny import MemoryCheckpoint, tiny_config

__all__ = ["make_generator", "pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary"]


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    """make_generator(checkpoint=None, dtype=..., max_len=..., page_size=..., **config changes) -> Generator."""

    def make(
        checkpoint: MemoryCheckpoint | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        max_len: int | None = None,
        page_size: int = 16,
        **changes: object,
    ) -> Generator:
        checkpoint = checkpoint or MemoryCheckpoint(tiny_config(**changes))
        model = Transformer(checkpoint, dtype=dtype)  # type: ignore[arg-type]
        return Generator(model, max_len=max_len, page_size=page_size)

    return make
