"""What a transformer is made of: read from a Hugging Face config.json, checked, and never guessed at.

Everything that would change the numbers and is not implemented is refused here by name; nothing is ignored. A
config comes from a stranger's file, so each number is checked for type and range before anything is allocated
from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError, short

# Far above every published model and far below what would overflow or exhaust memory by itself.
MAX_DIMENSION = 10**7
MAX_LAYERS = 10**4

_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "SDARForCausalLM": "sdar", "LlamaForCausalLM": "llama"}
_QK_NORM = {"qwen3": True, "sdar": True, "llama": False}

_ROPE_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class RopeScaling:
    """The Llama 3 frequency scaling: long wavelengths divided by `factor`, short ones kept, a ramp
    between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _require_real("rope scaling factor", self.factor, low=1.0, high=1e6)
        _require_real("rope scaling low_freq_factor", self.low_freq_factor, low=1e-6, high=1e6)
        _require_real("rope scaling high_freq_factor", self.high_freq_factor, low=1e-6, high=1e6)
        context = self.original_max_position_embeddings
        _require_int("rope scaling original_max_position_embeddings", context, 1, MAX_DIMENSION)
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} must be larger than "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a Qwen3, SDAR or Llama decoder. Construction checks ranges; raises
    CheckpointError."""

    architecture: str  # "qwen3" | "sdar" | "llama"
    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_freq_factors: tuple[float, ...] | None  # divisors of the frequencies, [head_dim/2], from a GGUF
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    attention_bias: bool
    mlp_bias: bool
    mask_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        if self.architecture not in _QK_NORM:
            raise CheckpointError(
                f"architecture {self.architecture!r} is not supported; supported: {', '.join(sorted(_QK_NORM))}"
            )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            _require_int(name, getattr(self, name), 1, MAX_DIMENSION)
        _require_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _require_int(name, getattr(self, name), 1, MAX_DIMENSION)
        if self.num_heads * self.head_dim > MAX_DIMENSION:
            raise CheckpointError(
                f"num_heads {self.num_heads} x head_dim {self.head_dim} is larger than {MAX_DIMENSION}"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        _require_real("rms_norm_eps", self.rms_norm_eps, low=1e-20, high=1.0)
        _require_real("rope_theta", self.rope_theta, low=1.0, high=1e12)
        if self.rope_freq_factors is not None:
            if self.rope_scaling is not None:
                raise CheckpointError("rope_scaling and rope_freq_factors exclude each other")
            if len(self.rope_freq_factors) != self.head_dim // 2:
                raise CheckpointError(
                    f"rope_freq_factors has {len(self.rope_freq_factors)} values, wanted "
                    f"{self.head_dim // 2} "
                    f"(head_dim {self.head_dim} / 2)"
                )
            for value in self.rope_freq_factors:
                _require_real("rope_freq_factors", value, low=1e-6, high=1e6)
        ids = {"mask_token_id": self.mask_token_id, "bos_token_id": self.bos_token_id}
        ids.update({f"eos_token_ids[{i}]": token for i, token in enumerate(self.eos_token_ids)})
        for name, token in ids.items():
            if token is not None:
                _require_int(name, token, 0, self.vocab_size - 1)

    def inv_freq(self) -> torch.Tensor:
        """Rotary frequencies in radians per position, fp32 [head_dim / 2] on the CPU.

        The same operations in the same order as transformers, Llama 3 scaling included, so the bits are the
        same.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        if self.rope_freq_factors is not None:
            return inv_freq / torch.tensor(self.rope_freq_factors, dtype=torch.float32, device="cpu")
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        context = scaling.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
        ramp = (context / wavelength - low) / (high - low)
        smoothed = (1 - ramp) * scaled / scaling.factor + ramp * scaled
        between = ~(wavelength < context / high) & ~(wavelength > context / low)
        return torch.where(between, smoothed, scaled)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this config holds, by its canonical Hugging Face name."""
        hidden = self.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q_size, hidden, self.attention_bias),
            "self_attn.k_proj": (kv_size, hidden, self.attention_bias),
            "self_attn.v_proj": (kv_size, hidden, self.attention_bias),
            "self_attn.o_proj": (hidden, q_size, self.attention_bias),
            "mlp.gate_proj": (self.intermediate_size, hidden, self.mlp_bias),
            "mlp.up_proj": (self.intermediate_size, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, self.intermediate_size, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[prefix + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[prefix + "self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a config.json, as transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`) writes it.

        Raises CheckpointError for whatever is missing, absurd, or not implemented: other architectures, rope
        types other than default and llama3, sliding windows in use, activations other than silu, quantised
        weights, partial rotary, pretraining_tp.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"config: found a {type(config).__name__}, wanted a JSON object")
        architecture = _architecture(config)
        _refuse_unsupported(config, architecture)

        hidden_size = _int(config, "hidden_size")
        num_heads = _int(config, "num_attention_heads")
        # transformers' own defaults where a key is absent: Llama derives these two, Qwen3 has to state the
        # first.
        num_kv_heads = _optional_int(config, "num_key_value_heads")
        if num_kv_heads is None:
            if architecture != "llama" and "num_key_value_heads" not in config:
                raise CheckpointError("config: num_key_value_heads is missing")
            num_kv_heads = num_heads
        head_dim = _optional_int(config, "head_dim")
        if head_dim is None and architecture != "llama" and "head_dim" not in config:
            head_dim = 128
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                raise CheckpointError(
                    f"config: hidden_size {hidden_size} is not a multiple of num_attention_heads "
                    f"{num_heads}, "
                    "and head_dim is not given"
                )
            head_dim = hidden_size // num_heads
        max_positions = _int(config, "max_position_embeddings", 2048 if architecture == "llama" else 32768)
        theta, scaling = _rope(config, max_positions)
        return cls(
            architecture=architecture,
            vocab_size=_int(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_int(config, "intermediate_size"),
            num_layers=_int(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_real(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_freq_factors=None,
            max_position_embeddings=max_positions,
            tie_word_embeddings=_bool(config, "tie_word_embeddings", False),
            qk_norm=_QK_NORM[architecture],
            attention_bias=_bool(config, "attention_bias", False),
            mlp_bias=_bool(config, "mlp_bias", False),
            mask_token_id=_optional_int(config, "mask_token_id"),
            eos_token_ids=token_ids(config, "eos_token_id"),
            bos_token_id=_optional_int(config, "bos_token_id"),
        )


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The ids under `key`: absent or null, one int, or a list of ints, without repeats."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"config: {key} is {short(value)}, wanted a token id or a list of token ids")
    return tuple(dict.fromkeys(values))


def _architecture(config: Mapping[str, Any]) -> str:
    names, model_type = config.get("architectures"), config.get("model_type")
    wanted = ", ".join(_ARCHITECTURES)
    if names is None:
        if not isinstance(model_type, str) or model_type not in _QK_NORM:
            raise CheckpointError(f"config: model_type {short(model_type)} is not supported; supported: {wanted}")
        return str(model_type)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config: architectures is {short(names)}, wanted a list of one of {wanted}")
    architecture = _ARCHITECTURES.get(names[0])
    if architecture is None:
        raise CheckpointError(f"config: architecture {short(names[0])} is not supported; supported: {wanted}")
    if model_type is not None and model_type != architecture:
        raise CheckpointError(f"config: model_type {short(model_type)} contradicts architecture {short(names[0])}")
    return architecture


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config: hidden_act {short(activation)} is not supported; only 'silu' is")
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise CheckpointError(
                f"config: {key} is set: quantised safetensors are not supported; use the bf16, fp16 or "
                "fp32 checkpoint "
                "or a GGUF file"
            )
    if config.get("pretraining_tp") not in (None, 1):
        raise CheckpointError(f"config: pretraining_tp {short(config['pretraining_tp'])} is not supported; only 1 is")
    if architecture != "llama" and _bool(config, "mlp_bias", False):
        raise CheckpointError(f"config: mlp_bias is not part of the {architecture} architecture")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise CheckpointError("config: layer_types other than 'full_attention' are not supported")
    window = _optional_int(config, "sliding_window")
    # Qwen3 states a window and switches it off by `use_sliding_window`, whose default is off.
    window_on = _bool(config, "use_sliding_window", architecture == "llama")
    if window is not None and window_on and window < _int(config, "max_position_embeddings", 2048):
        raise CheckpointError(
            f"config: a sliding window of {window} tokens is in use; only full attention is supported"
        )


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from either spelling; both spellings at once have to agree."""
    found = [
        _rope_from(key, config[key], config, max_positions)
        for key in ("rope_parameters", "rope_scaling")
        if config.get(key) is not None
    ]
    if not found:
        found = [_rope_from("rope_scaling", {}, config, max_positions)]
    if any(other != found[0] for other in found[1:]):
        raise CheckpointError("config: rope_parameters and rope_scaling contradict each other")
    return found[0]


def _rope_from(key: str, rope: Any, config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"config: {key} is {short(rope)}, wanted a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"config: {key}: rope type {short(kind)} is not supported; 'default' and 'llama3' are")
    allowed = _ROPE_COMMON_KEYS + (_ROPE_LLAMA3_KEYS if kind == "llama3" else ())
    unknown = sorted(str(name) for name, value in rope.items() if name not in allowed and value is not None)
    if unknown:
        raise CheckpointError(f"config: {key}: {', '.join(unknown[:5])} not supported with rope type {kind!r}")

    top_level = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    for name, value in top_level.items():
        if rope.get(name) not in (None, value):
            raise CheckpointError(f"config: {name} {short(value)} contradicts {key}.{name} {short(rope[name])}")
    merged = {**rope, **top_level}
    partial = _real(merged, "partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise CheckpointError(f"config: partial_rotary_factor {partial} is not supported; only 1 is")
    theta = _real(merged, "rope_theta", 10000.0)
    if kind == "default":
        return theta, None
    # transformers lets the key beside the rope block win, and falls back to the context length.
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return theta, RopeScaling(
        factor=_real(rope, "factor"),
        low_freq_factor=_real(rope, "low_freq_factor"),
        high_freq_factor=_real(rope, "high_freq_factor"),
        original_max_position_embeddings=max_positions if original is None else original,
    )


_REQUIRED: Any = object()


def _int(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"config: {key} is missing")
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config: {key} is {short(value)}, wanted an integer")
    return value


def _optional_int(config: Mapping[str, Any], key: str) -> int | None:
    return None if config.get(key) is None else _int(config, key)


def _real(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"config: {key} is missing")
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"config: {key} is {short(value)}, wanted a number")
    try:
        return float(value)
    except OverflowError:
        raise CheckpointError(f"config: {key} is {short(value)}, too large for a number") from None


def _bool(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config: {key} is {short(value)}, wanted true or false")
    return value


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{name} is {short(value)}, wanted an integer from {low} to {high}")


def _require_real(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise CheckpointError(f"{name} is {short(value)}, wanted a number from {low:g} to {high:g}")
