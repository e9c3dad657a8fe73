"""What a request may say, in OpenAI's words, and what is refused by name.

A field that this library cannot honour is taken at the values that ask for nothing, so that a program that spells them
out runs; anything else is refused, and so are fields that nobody knows. Nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from idlm_kernels.generate.params import LARGEST_FP32, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

_T = TypeVar("_T")
MAX_DEPTH = 32  # of lists and objects in a body
MAX_CHOICES = 128  # OpenAI's bound
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")

# Fields of OpenAI's API, and of servers like it, that ask for what is not there; with the values that do not ask.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),  # of no tools
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "grammar": _NOTHING,
    "modalities": (None, ["text"]),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "store": _NOTHING,
    "metadata": _NOTHING,
    "service_tier": (None, "auto", "default"),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "use_beam_search": _NOTHING,
    "best_of": (None, 1),
    "suffix": _NOTHING,
    "echo": _NOTHING,
    "continue_final_message": _NOTHING,
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": _NOTHING,
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
}
_Integer = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True)]
_Flag = Annotated[bool, Field(strict=True)]


def _within(least: float, most: float | None = None) -> Any:
    """The range of a number, for the description alone: SamplingParams checks it, and says better what is wrong."""
    return Field(json_schema_extra={"minimum": least, **({} if most is None else {"maximum": most})})


_Text = Annotated[str, Field(json_schema_extra={"minLength": 1})]
_Some = Annotated[_T, Field(json_schema_extra={"minItems": 1})]
_Limit = Annotated[_Integer | None, _within(1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="The served one when left out.")

    @model_validator(mode="before")
    @classmethod
    def _what_is_supported(cls, body: Any) -> Any:
        _check_depth(body)
        if not isinstance(body, Mapping):
            raise ValueError("the body must be a JSON object, with Content-Type: application/json")
        for name, value in body.items():
            if name in NOT_SUPPORTED and not _among(value, NOT_SUPPORTED[name]):
                raise ValueError(f"{name} is not supported by this server")
        return {name: value for name, value in body.items() if name not in NOT_SUPPORTED}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: _Flag = False
    include_forwards: Annotated[
        bool, Field(strict=True, description="A chunk for each forward, with its tokens and drafts.")
    ] = False
    include_obfuscation: Literal[False] = False


class _Generation(_Body):
    temperature: Annotated[_Number | None, _within(0, LARGEST_FP32)] = None
    top_p: Annotated[_Number | None, _within(1e-6, 1)] = None
    top_k: Annotated[_Integer | None, _within(-1, 2**31 - 1)] = Field(None, description="0 or -1 is off.")
    min_p: Annotated[_Number | None, _within(0, 1)] = None
    presence_penalty: Annotated[_Number | None, _within(-2, 2)] = None
    frequency_penalty: Annotated[_Number | None, _within(-2, 2)] = None
    repetition_penalty: Annotated[_Number | None, _within(1e-6, LARGEST_FP32)] = Field(
        None, description="Of tokens in prompt and answer; 1 is off."
    )
    logit_bias: Annotated[
        dict[str, Annotated[_Number, _within(-100, 100)]] | None,
        Field(json_schema_extra={"maxProperties": MAX_LOGIT_BIAS, "propertyNames": {"pattern": "^[0-9]{1,5}$"}}),
    ] = None
    seed: Annotated[_Integer | None, _within(0, 2**64 - 1)] = Field(
        None, description="Drawn and reported where not given."
    )
    stop: str | list[_Text] | None = None
    stop_token_ids: list[Annotated[_Integer, _within(0)]] | None = None
    ignore_eos: _Flag = False
    plan: Literal["auto", "ar"] = Field("auto", description="ar: without drafts, a token per forward.")
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    stream: _Flag | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Of no effect here, as the two below.")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true alone")
        return self

    @property
    def listed(self) -> int | None:
        """How many of the likeliest tokens are listed with logprobs; None without logprobs, as here."""
        return None

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """The parameters, with OpenAI's defaults. ValueError, TypeError naming the field."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.logit_bias,  # type: ignore[arg-type]  # ids as JSON spells them are taken
            seed=self.seed,
            max_tokens=max_tokens,  # type: ignore[arg-type]  # None is taken
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            logprobs=self.listed,
        )


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: _Text | _Some[list[_Text]] | _Some[list[_Integer]] | _Some[list[_Some[list[_Integer]]]]
    max_tokens: _Limit = 16
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="0 reports those of the tokens, k those of the k likeliest too."
    )
    add_special_tokens: _Flag = True

    @property
    def listed(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        if message.get("role") in ("tool", "function") or any(
            message.get(name) for name in ("tool_calls", "function_call", "tool_call_id")
        ):
            raise ValueError("tools are not supported by this server")
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] != "text":
                # As ASCII: pydantic fails on messages with half of a surrogate pair.
                raise ValueError(f"a part of type {part['type'][:40]!a} is not supported by this server, only text")
        empty = ("tool_calls", "function_call", "tool_call_id", "refusal", "audio", "annotations")
        return {k: v for k, v in message.items() if not (k in empty and v in _NOTHING)}

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: to them a developer is the system."""
        message = self.model_dump(exclude_unset=True)
        if self.role == "developer":
            message["role"] = "system"
        return message


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Limit = None
    max_tokens: _Limit = Field(None, description="The older name of max_completion_tokens.")
    logprobs: _Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: _Flag = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def listed(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _lists_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true alone")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens is the older name of max_completion_tokens: give one of them")
        return self


class TokenizeRequest(_Body):
    """POST /tokenize"""

    prompt: str | None = None
    messages: _Some[list[Message]] | None = None
    add_special_tokens: _Flag = True
    add_generation_prompt: _Flag = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("wanted either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize"""

    tokens: list[_Integer]


class AdapterRequest(_Body):
    """POST /v1/adapters"""

    adapter: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error says."""

    error: ErrorDetail


BODIES = (
    CompletionRequest,
    ChatRequest,
    TokenizeRequest,
    DetokenizeRequest,
    AdapterRequest,
    Message,
    TextPart,
    StreamOptions,
)


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """`in`, but for 0 and False, and 1 and True, which are the same to that."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, (list, Mapping))
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise ValueError(f"the body is nested deeper than {MAX_DEPTH} lists and objects")
