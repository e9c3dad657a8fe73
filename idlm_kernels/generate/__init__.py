"""Text generation by introspective strided decoding.

`LLM` takes text, `Generator` token ids, `Engine` a stream of requests.
"""

from idlm_kernels.generate.costs import CostTable, LearnedCosts
from idlm_kernels.generate.engine import Engine, Request
from idlm_kernels.generate.generator import Generator, Stream
from idlm_kernels.generate.llm import LLM
from idlm_kernels.generate.options import DecodeOptions, EngineOptions
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.params import SamplingParams
from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.policy import PlanPolicy
from idlm_kernels.generate.score import Score

__all__ = [
    "LLM",
    "CostTable",
    "DecodeOptions",
    "Engine",
    "EngineOptions",
    "GenerationResult",
    "Generator",
    "LearnedCosts",
    "PlanPolicy",
    "Request",
    "SamplingParams",
    "Score",
    "StepPlan",
    "Stream",
    "StreamEvent",
]
