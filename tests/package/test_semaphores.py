"""Who shares the words by which CTAs find one another, with a CUDA device that is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from idlm_kernels import _semaphores
from idlm_kernels._semaphores import semaphores

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its current stream, whether that is being captured, and as what; tensors of it lie on the CPU."""
    now = SimpleNamespace(stream=1, capturing=False, capture=0)
    zeros = torch.zeros
    monkeypatch.setattr(_semaphores, "_words", {})
    monkeypatch.setattr(_semaphores, "capture_id", lambda stream: now.capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    return now


def test_one_set_per_purpose_and_stream(cuda: SimpleNamespace) -> None:
    device = torch.device("cuda", 0)
    words = semaphores("a", 3, torch.int64, device)
    assert words.dtype == torch.int64 and words.tolist() == [0, 0, 0]
    words[1] = 7
    assert semaphores("a", 3, torch.int64, device) is words
    assert semaphores("b", 3, torch.int64, device) is not words
    cuda.stream = 2
    assert semaphores("a", 3, torch.int64, device) is not words


def test_no_two_graphs_share_words_nor_a_graph_with_its_stream(cuda: SimpleNamespace) -> None:
    device = torch.device("cuda", 0)
    eager = semaphores("a", 3, torch.int32, device)
    sets = [eager]
    cuda.capturing = True
    for cuda.capture in (7, 8):
        sets.append(semaphores("a", 3, torch.int32, device))
        assert semaphores("a", 3, torch.int32, device) is sets[-1]
    cuda.capture = 0  # a driver that does not tell
    sets += [semaphores("a", 3, torch.int32, device) for _ in range(2)]
    assert len({x.data_ptr() for x in sets}) == 5
    cuda.capturing = False
    assert semaphores("a", 3, torch.int32, device) is eager


def test_without_a_driver_no_capture_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_semaphores, "_driver_function", lambda: None)
    assert _semaphores.capture_id(1) == 0
    monkeypatch.setattr(_semaphores, "_driver_function", lambda: lambda *_: 900)  # an error
    assert _semaphores.capture_id(1) == 0

    def active(stream: object, status: object, found: object, *_: object) -> int:
        status._obj.value, found._obj.value = 1, 41  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(_semaphores, "_driver_function", lambda: active)
    assert _semaphores.capture_id(1) == 41
