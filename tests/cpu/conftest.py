"""Fixtures of the tests of the CPU backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from idlm_kernels.cpu import native


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs once with each number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ISAS = native._sets(native.library()) if native.library() is not None else []  # type: ignore[arg-type]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library = native.library()
    assert library is not None
    assert library.idlm_cpu_use_isa(request.param.encode()) == 0
    yield request.param
    library.idlm_cpu_use_isa(ISAS[0].encode())
