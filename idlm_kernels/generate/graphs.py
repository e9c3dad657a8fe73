"""Steps recorded once per bucket, plan and what is asked for, and replayed: CUDA graphs. Not yet run on hardware."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.state import LENGTH, DecodeState
from idlm_kernels.generate.step import Decoder, decode_step

logger = logging.getLogger(__name__)

StepFunction = Callable[[Decoder, DecodeState], Tensor]
# Records a call without running it for good; returns what replays it, and the outcome that every replay overwrites.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool, on one stream."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle of that memory
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()  # loads kernels and creates what they keep, which a recording must not do
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outcome = step()
        self._pool = graph.pool()
        return graph.replay, outcome


def _key(decoder: Decoder, state: DecodeState) -> tuple[int, StepPlan, bool, int]:
    return state.batch, decoder.plan, decoder.penalties, decoder.top_logprobs


class RecordedSteps:
    """Runs decode_step, from a recording where there is a recorder and memory for it, else eagerly: the same results.

    A recording refers to the memory of the state and of the cache, which therefore live as long as this object.
    """

    def __init__(self, step: StepFunction = decode_step, recorder: Recorder | None = None):
        self._step, self._recorder = step, recorder
        self._recordings: dict[tuple[int, StepPlan, bool, int], tuple[Callable[[], None], Tensor]] = {}

    def run(self, decoder: Decoder, state: DecodeState) -> Tensor:
        """The outcome of the step; the next one of this bucket and plan may overwrite it."""
        if not self.record(decoder, state):
            return self._step(decoder, state)
        replay, outcome = self._recordings[_key(decoder, state)]
        replay()
        return outcome

    def record(self, decoder: Decoder, state: DecodeState) -> bool:
        """Make sure of a recording for this bucket, plan and what is asked; False where there is none."""
        if self._recorder is None:
            return False
        key = _key(decoder, state)
        if key not in self._recordings:
            # On idle requests, so that neither warming up nor recording moves a request.
            finish_reason = state.finish_reason.clone()
            state.finish_reason.fill_(LENGTH)
            try:
                self._recordings[key] = self._recorder(lambda: self._step(decoder, state))
            except torch.cuda.OutOfMemoryError as error:
                logger.warning("no memory to record steps of %d requests, which run eagerly: %s", state.batch, error)
                self._recorder = None
                self._recordings.clear()
                return False
            finally:
                state.finish_reason.copy_(finish_reason)
        return True
