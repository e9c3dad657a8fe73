"""Text generation by introspective strided decoding: `Generator` for prompts, `Engine` for a stream of requests."""

from idlm_kernels.generate.engine import Engine, EngineOptions, Request
from idlm_kernels.generate.generator import Generator, Stream
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.params import SamplingParams
from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.policy import CostTable, PlanPolicy

__all__ = [
    "CostTable",
    "Engine",
    "EngineOptions",
    "GenerationResult",
    "Generator",
    "PlanPolicy",
    "Request",
    "SamplingParams",
    "StepPlan",
    "Stream",
    "StreamEvent",
]
