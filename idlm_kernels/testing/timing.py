"""The time of a call: one function for CPU and GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

SECONDS = 0.25  # per figure, and at least `REPEATS`
REPEATS = 10


def microseconds(
    *calls: Callable[[], object],
    device: torch.device | str = "cpu",
    pick: Callable[[list[float]], float] = statistics.median,
    flush_bytes: int = 0,
    seconds: float = SECONDS,
) -> float:
    """Microseconds of one of the calls: of all of them one after the other, again and again, divided by their number.

    On a CPU it is the host's clock. On a CUDA device the calls are recorded in one CUDA graph and timed by events, so
    that no launch waits for the host.

    Args:
        calls: without arguments. For the time of a GPU's memory give each inputs of its own, together more than the L2
            cache holds, or say `flush_bytes`.
        device: where they run.
        pick: what is taken of the repetitions: their median, or `min`, which is what a quiet machine gives.
        flush_bytes: on a GPU, so much other memory is written before each repetition, to empty the L2 cache.
        seconds: for how long the calls are repeated, at least ten times.
    """
    device = torch.device(device)
    once = _on_cuda(calls, device, flush_bytes) if device.type == "cuda" else _on_host(calls)
    found: list[float] = []
    stop = time.monotonic() + seconds
    while len(found) < REPEATS or time.monotonic() < stop:
        found.append(once())
    return pick(found) / len(calls)


def _on_host(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    for call in calls:
        call()

    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6

    return once


def _on_cuda(calls: Sequence[Callable[[], object]], device: torch.device, flush_bytes: int) -> Callable[[], float]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which made the inputs
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]  # kept, so that no call overwrites the result of another
    graph.replay()
    torch.cuda.synchronize(device)
    flushed = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def once(results: list[object] = results) -> float:
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return once
