"""What a request asks for, checked once."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TypeVar

_T = TypeVar("_T")

_SEEDS = 1 << 64
_UNSUPPORTED = {
    "n": 1,
    "min_tokens": 0,
    "skip_special_tokens": True,
}
MAX_TOP_LOGPROBS = 20  # listed for each token
MAX_LOGIT_BIAS = 300  # tokens of a request, as OpenAI has it
_LARGEST_INT32 = 2**31 - 1
LARGEST_FP32 = (2 - 2**-23) * 2.0**127  # what the state of a decode holds of a number
_ZERO_IN_FP32 = 2.0**-150  # this and less are rounded to 0 there


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request. Off values: top_k 0 (or -1), top_p 1, min_p 0; temperature 0 is greedy.

    The defaults are greedy decoding of at most 256 tokens (vLLM: temperature 1, 16 tokens). seed: 0 .. 2^64 - 1, or
    None to have one drawn (the result tells which). max_tokens: the most new tokens, None for as many as the context
    holds. stop: strings that end the text before them; stop_token_ids: ids that end it, beside the tokenizer's
    end-of-text ids (which `ignore_eos` turns off). logprobs: 0 has those of the tokens reported, k > 0 those
    of the k likeliest at each place too; of the model itself, before penalties and temperature.

    presence_penalty, frequency_penalty: taken off the logit of a token that is in the output, once, and for each time;
    -2 .. 2, 0 is off. repetition_penalty: divides the logit of a token that is in prompt or output (multiplies one
    below 0); above 0, 1 is off. logit_bias: of up to 300 token ids what is added to their logits, -100 .. 100; ids may
    be spelled, as JSON has them. The order is vLLM's: bias, repetition, frequency, presence, temperature. With these
    too strided decoding gives the tokens of ordinary decoding.

    n, min_tokens, skip_special_tokens: taken at the value that asks for nothing, so that a program that spells them out
    runs.

    Raises: TypeError, ValueError naming the field, what was given and what is wanted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    n: InitVar[int] = 1
    min_tokens: InitVar[int] = 0
    skip_special_tokens: InitVar[bool] = True

    def __post_init__(self, *unsupported: object) -> None:
        for (name, only), value in zip(_UNSUPPORTED.items(), unsupported, strict=True):
            if value != only:
                raise ValueError(f"{name} is {value!r}, wanted {only!r}: a decode has no other")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", _LARGEST_INT32)
        if self.logprobs is not None:
            _int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS, f"None, or 0 to {MAX_TOP_LOGPROBS} of the likeliest")
        for name, low, high, wanted in (
            ("temperature", 0.0, LARGEST_FP32, "a number >= 0 that fits fp32"),
            ("top_p", 0.0, 1.0, "a number above 0, in fp32 too, and at most 1 (1 is off)"),
            ("min_p", 0.0, 1.0, "a number from 0 (off) to 1"),
            ("presence_penalty", -2.0, 2.0, "a number from -2 to 2 (0 is off)"),
            ("frequency_penalty", -2.0, 2.0, "a number from -2 to 2 (0 is off)"),
            ("repetition_penalty", 0.0, LARGEST_FP32, "a number above 0 that fits fp32 (1 is off)"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not (low <= value <= high) or (name in ("top_p", "repetition_penalty") and value <= _ZERO_IN_FP32):
                raise ValueError(f"{name} is {shown(value)}, wanted {wanted}")
        _int("top_k", self.top_k, 0, _LARGEST_INT32, "0 (off) or a positive number")
        _int("max_tokens", self.max_tokens, 1, _LARGEST_INT32, "at least 1")
        if self.seed is not None:
            checked_seed(self.seed)
        stop = self.stop if self.stop is not None else ()
        stop = (stop,) if isinstance(stop, str) else _items("stop", stop, "a string or several")
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {list(stop)}, wanted strings that are not empty")
        object.__setattr__(self, "stop", stop)
        ids = self.stop_token_ids if self.stop_token_ids is not None else ()
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", ids, "a list of ids"))
        for token in self.stop_token_ids:
            _int("stop_token_ids", token, 0, _LARGEST_INT32, "token ids")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {type(self.ignore_eos).__name__}")


    @property
    def penalises(self) -> bool:
        """Whether logits are changed before the sampling transform."""
        asked = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return asked != (0, 0, 1) or bool(self.logit_bias)


def _biases(given: Mapping[int, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {type(given).__name__}")
    if len(given) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias holds {len(given)} tokens, wanted at most {MAX_LOGIT_BIAS}")
    biases: dict[int, float] = {}
    for name, value in given.items():
        token = int(name) if isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 11 else name
        if isinstance(token, str):
            raise ValueError(f"logit_bias holds the token {token[:40]!a}, wanted token ids")
        _int("logit_bias", token, 0, _LARGEST_INT32, "token ids")
        if token in biases:
            raise ValueError(f"logit_bias holds token {token} twice")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"logit_bias must be numbers, got {type(value).__name__} for token {token}")
        if not -100 <= value <= 100:
            raise ValueError(f"logit_bias is {shown(value)} for token {token}, wanted -100 to 100")
        biases[token] = float(value)
    return biases


def _int(name: str, value: int, low: int, high: int, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, wanted {wanted}")


def _items(name: str, value: Iterable[_T], wanted: str) -> tuple[_T, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}") from None


def shown(value: object) -> str:
    """A number for an error message; Python refuses to spell the largest ones."""
    try:
        return str(value)
    except ValueError:
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def checked_seed(seed: int) -> int:
    """The seed itself. TypeError, ValueError unless it is an int of 64 bits."""
    _int("seed", seed, 0, _SEEDS - 1, "0 to 2^64 - 1")
    return seed


def draw_seed() -> int:
    return secrets.randbits(64)


def mixed_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a batch that was given one seed, so that no two requests share their noise.

    Prompt 0 keeps the seed; the others take steps of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection.
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) % _SEEDS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _SEEDS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _SEEDS
    return z ^ (z >> 31)


def signed_seed(seed: int) -> int:
    """The int64 with the bits of a 64-bit seed."""
    return seed - _SEEDS if seed >= _SEEDS // 2 else seed
