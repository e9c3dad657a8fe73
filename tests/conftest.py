"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from idlm_kernels.generate import Generator
from idlm_kernels.model import Transformer
from tests.suites import pytest_runtest_logreport, pytest_sessionfinish, pytest_terminal_summary
from tests.tiny import MemoryCheckpoint, tiny_config

__all__ = ["make_generator", "pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary"]


os.environ["IDLM_COSTS"] = "0"  # what one test's steps cost is nothing that another one, or the user, should know


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for the default model's file is marked so without a word of its own."""
    for item in items:
        if "default_gguf" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.default_model)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    """make_generator(checkpoint=None, dtype=..., max_model_len=..., page_size=..., **config changes) -> Generator."""

    def make(
        checkpoint: MemoryCheckpoint | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        max_model_len: int | None = None,
        page_size: int = 16,
        **changes: object,
    ) -> Generator:
        checkpoint = checkpoint or MemoryCheckpoint(tiny_config(**changes))
        model = Transformer(checkpoint, dtype=dtype)  # type: ignore[arg-type]
        return Generator(model, max_model_len=max_model_len, page_size=page_size)

    return make
