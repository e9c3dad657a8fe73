"""How tokens are drafted and verified, and how large an engine is: for LLM, Generator and Engine, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from idlm_kernels._deprecated import renamed
from idlm_kernels.generate.params import shown
from idlm_kernels.generate.plan import MAX_STRIDE, PlanKind, plan_kind
from idlm_kernels.ops.sampling import RULES

Plan = PlanKind | Literal["auto"]
Stride = int | Literal["auto"]


@dataclass(frozen=True)
class DecodeOptions:
    """How a request is decoded. With the rule `match` none of it changes the tokens that come out.

    plan: which rows a step has, "ar", "chain" or "quadratic"; "auto" measures this device and takes the plan of most
    tokens per second, with `stride` as the upper bound. stride: the most tokens that a step may commit; "auto" goes as
    far as the adapter was trained for. rule: how drafts are verified, "match" (the tokens of ordinary sampling) or
    "rejection" (their distribution). row_budget: the most rows of a request in a step; plan and stride are then upper
    bounds. rerank: let the adapter's re-ranking head choose the drafts, where it has one. suffix_drafts: draft from
    repetitions in the text as well (`match` only). history_tokens: draft from finished outputs of the same engine too,
    of which it keeps so many tokens (`match` only); 0 keeps none. logprobs: report those of the tokens.
    synthetic_acceptance: instead of verifying, accept each draft with this probability, to measure speed; the text is
    noise.

    Raises: TypeError, ValueError naming the field, what was given and what is wanted.
    """

    plan: Plan = "auto"
    stride: Stride = "auto"
    rule: str = "match"
    row_budget: int | None = None
    rerank: bool = True
    suffix_drafts: bool = False
    history_tokens: int = 0
    logprobs: bool = False
    synthetic_acceptance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", plan_kind(self.plan))
        if self.plan not in (*MAX_STRIDE, "auto"):
            raise ValueError(f"plan is {self.plan!r}, wanted one of {', '.join(MAX_STRIDE)}, auto")
        if self.stride != "auto" and (isinstance(self.stride, bool) or not isinstance(self.stride, int)):
            raise TypeError(f"stride must be an int or 'auto', got {self.stride!r}")
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}, wanted one of {', '.join(RULES)}")
        if self.row_budget is not None:
            if isinstance(self.row_budget, bool) or not isinstance(self.row_budget, int):
                raise TypeError(f"row_budget must be an int, got {type(self.row_budget).__name__}")
            if self.row_budget < 1:
                raise ValueError(f"row_budget is {self.row_budget}, wanted at least 1 row per request")
        if self.suffix_drafts and self.rule != "match":
            raise ValueError("suffix drafts have no distribution to divide by: use rule='match'")
        if isinstance(self.history_tokens, bool) or not isinstance(self.history_tokens, int):
            raise TypeError(f"history_tokens must be an int, got {type(self.history_tokens).__name__}")
        if self.history_tokens < 0:
            raise ValueError(f"history_tokens is {shown(self.history_tokens)}, wanted at least 0 (which keeps none)")
        if self.history_tokens and self.rule != "match":
            raise ValueError("drafts from finished outputs have no distribution to divide by: use rule='match'")
        for name in ("rerank", "suffix_drafts", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {type(getattr(self, name)).__name__}")
        share = self.synthetic_acceptance
        if share is not None:
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise TypeError(f"synthetic_acceptance must be a number, got {type(share).__name__}")
            if not 0 <= share <= 1:
                raise ValueError(f"synthetic_acceptance is {shown(share)}, wanted 0 to 1")

    @renamed(verify="rule")
    def changed(self, **changes: Any) -> DecodeOptions:
        """These options with some fields changed."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)


_LEAST = {
    "max_num_seqs": 1,
    "max_model_len": 2,
    "page_size": 1,
    "num_pages": 1,
    "max_num_batched_tokens": 1,
    "window_steps": 1,
    "lag": 0,
}


@dataclass(frozen=True)
class EngineOptions(DecodeOptions):
    """How an engine decodes (DecodeOptions), and how large it is.

    max_num_seqs: requests decoded together. max_model_len: the most tokens of a request, prompt included. num_pages:
    pages of the KV cache; enough for max_num_seqs full requests when None. max_num_batched_tokens: the budget of prompt
    tokens of a window, and of one forward. window_steps: the most steps of a window. lag: steps after which the host
    reads a result; when None, 1 on a GPU and 0 elsewhere.
    """

    max_num_seqs: int = 8
    max_model_len: int = 2048
    page_size: int = 64
    num_pages: int | None = None
    max_num_batched_tokens: int = 512
    window_steps: int = 16
    lag: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("num_pages", "lag"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} is {shown(value)}, wanted at least {least}")

    @classmethod
    def of(cls, options: DecodeOptions, **sizes: Any) -> EngineOptions:
        """The options of a decode, with sizes of an engine."""
        return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(DecodeOptions)}, **sizes)


_OLD_SIZES = {
    "max_batch": "max_num_seqs",
    "max_len": "max_model_len",
    "prefill_tokens": "max_num_batched_tokens",
    "epoch_steps": "window_steps",
}
DecodeOptions.__init__ = renamed(verify="rule")(DecodeOptions.__init__)  # type: ignore[method-assign]
EngineOptions.__init__ = renamed(verify="rule", **_OLD_SIZES)(EngineOptions.__init__)  # type: ignore[method-assign]
