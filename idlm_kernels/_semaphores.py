"""The words by which the CTAs of a launch find one another, for every backend that launches kernels.

Launches of one stream follow each other, so a stream has one set per purpose. A captured graph has a set of its own,
which it sets to 0 at the start of every replay: neither another graph that was captured on the same stream nor a replay
that broke off can leave anything in it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_words: dict[tuple[str, torch.device, int, int, torch.dtype, int], Tensor] = {}


def semaphores(purpose: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`count` words of the current stream or capture, zeros at first, then what the last launch for `purpose` left."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    capture = 0
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        capture = capture_id(stream)
        if capture == 0:  # the driver does not tell graphs apart: the launch zeroes words of its own
            return torch.zeros(count, dtype=dtype, device=device)
    key = (purpose, device, stream, capture, dtype, count)
    words = _words.get(key)
    if words is None:
        words = _words[key] = torch.zeros(count, dtype=dtype, device=device)
    return words


def capture_id(stream: int) -> int:
    """Of the capture that a CUDA stream is in; 0 where there is none, or a driver that does not tell."""
    function = _driver_function()
    if function is None:
        return 0
    status, found = ctypes.c_int(0), ctypes.c_uint64(0)
    failed = function(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found), None, None, None)
    return 0 if failed or status.value != _ACTIVE else found.value


@functools.cache
def _driver_function() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
