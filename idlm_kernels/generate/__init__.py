"""Text generation by introspective strided decoding: `Generator`, its parameters and its results."""

from idlm_kernels.generate.generator import Generator, Stream
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.params import SamplingParams
from idlm_kernels.generate.plan import StepPlan

__all__ = ["GenerationResult", "Generator", "SamplingParams", "StepPlan", "Stream", "StreamEvent"]
