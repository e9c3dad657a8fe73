"""Steps as CUDA graphs: one for each (batch bucket, plan), recorded once and replayed. Not yet run on hardware."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch

from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import Decoder, StepOutcome, decode_step

logger = logging.getLogger(__name__)

StepFunction = Callable[[Decoder, DecodeState], StepOutcome]


def bucket_of(batch: int, max_batch: int, device: torch.device) -> int:
    """The number of places that a step runs for `batch` requests: powers of two on a GPU, so that few graphs do."""
    if device.type != "cuda":
        return batch
    return min(max_batch, 1 << (batch - 1).bit_length())


class GraphedSteps:
    """Runs decode_step, replaying a recorded graph on a CUDA device and eagerly elsewhere.

    The first use of a (bucket, plan) records it into the pool that all graphs share. If memory does not suffice to
    record one, this and all later ones run eagerly: slower, with the same results.
    """

    def __init__(self, step: StepFunction = decode_step):
        self._step = step
        self._graphs: dict[tuple[int, StepPlan], tuple[torch.cuda.CUDAGraph, StepOutcome]] = {}
        self._pool: Any = None  # torch's handle of the memory that the graphs share
        self._gave_up = False

    def run(self, decoder: Decoder, state: DecodeState) -> StepOutcome:
        if state.text.device.type != "cuda" or self._gave_up:
            return self._step(decoder, state)
        key = (state.batch, decoder.plan)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(decoder, state)
            except torch.cuda.OutOfMemoryError as error:
                logger.warning("no memory to record a step of %d requests (%s); steps run eagerly", state.batch, error)
                self._gave_up = True
                torch.cuda.empty_cache()
                return self._step(decoder, state)
        graph, outcome = self._graphs[key]
        graph.replay()
        # The next replay overwrites the recorded outcome, which the host may read one step late.
        values = ((f.name, getattr(outcome, f.name)) for f in dataclasses.fields(outcome))
        return dataclasses.replace(outcome, **{name: x.clone() for name, x in values if x is not None})

    def _record(self, decoder: Decoder, state: DecodeState) -> tuple[torch.cuda.CUDAGraph, StepOutcome]:
        """Record a step on idle places, so that neither the warm-up nor the recording moves a request."""
        finish = state.finish.clone()
        state.finish.fill_(1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(decoder, state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outcome = self._step(decoder, state)
        finally:
            state.finish.copy_(finish)
        self._pool = graph.pool()
        return graph, outcome
