"""LoRA adapters in PEFT's folder layout, plus the learned MASK embedding that may lie beside them.

The adapter of R-ISD is active on MASK rows alone, so it is never merged into the weights; its pairs are
handed out as they are. What a PEFT config can ask for beyond plain LoRA on the seven linears is refused by
name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._files import SafetensorsFile, is_there, naming, read_json_object, require_finite, require_float
from ._patterns import ModulePatterns
from .config import ModelConfig
from .errors import CheckpointError, cut, short
from .mask_input import MaskInput
from .rerank import RerankHead, load_rerank_head

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINING_FILE = "idlm_training.json"  # how the adapter was trained, and the acceptance that it reached
MASK_EMBEDDING_FILE = "mask_embedding.safetensors"
MAX_TRAINED_STRIDE = 32
DEFAULT_ADAPTER = Path(__file__).parents[1] / "adapters" / "smollm2-135m-instruct"  # of the default model
BLOCK_OF = {module: "self_attn" if module in MODULES[:4] else "mlp" for module in MODULES}
_TENSOR = re.compile(
    r"base_model\.model\.(model\.layers\.(0|[1-9]\d{0,5})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight"
)

# What says nothing about the result of a forward pass, or is read below.
_HARMLESS_KEYS = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
        "ensure_weight_tying",
        "eva_config",
    ]
)
# Initialisations that leave the base weights alone. PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA change them.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_REASONS = {
    "use_dora": "DoRA rescales whole rows of the base weights",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "fan_in_fan_out": "the base weights are stored as [out, in]",
    "lora_bias": "only the two matrices are applied",
}
# Linears that are computed as one, where all pairs are padded to the largest rank among them.
_PACKED = {module: group for group in (MODULES[:3], MODULES[4:6]) for module in group}
_MAX_PADDING = 4  # what the padded pairs may take, as a multiple of the stored ones and the weights beside them


@dataclass
class Adapter:
    """LoRA pairs by layer and module: a gated row adds `scale * (x A^T) B^T`.

    `rank` is the largest of all. Where a module's own scale differs from `scale` the ratio is folded into its B (which
    is fp32 then; all else keeps its stored dtype).
    """

    name: str
    rank: int
    scale: float
    mask_embedding: torch.Tensor | None  # [hidden], the input of MASK rows, when it was learned
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    rerank_head: RerankHead | None = field(default=None, repr=False)
    acceptance: list[float] | None = None  # measured after training, by draft index; a hint for choosing plans
    mask_input: MaskInput | None = None  # what its MASK rows embed, where its folder says so

    def pair(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A [r, in], B [out, r]) of one of the seven linears, r at most `rank`, or None when the adapter leaves it
        alone."""
        if module not in MODULES:
            raise ValueError(f"module is {module!r}, wanted one of {', '.join(MODULES)}")
        return self.pairs.get((layer, module))


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Reads adapter_config.json, adapter_model.safetensors and, where present, mask_embedding.safetensors and
    rerank_head.safetensors.

    Raises FileNotFoundError when one of the first two is missing, CheckpointError when the adapter does not
    fit `config`, is damaged, or needs more than plain LoRA.
    """
    path = Path(path).expanduser()
    with naming(path):
        return _load_adapter(path, config)


def _load_adapter(path: Path, config: ModelConfig) -> Adapter:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; wanted one with adapter_config.json in it")
    config_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    settings = read_json_object(config_file, max_bytes=16 << 20)
    if not is_there(weights_file) and (path / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{path / 'adapter_model.bin'}: pickle adapters can run code when they are read and are never "
            "opened; save "
            "it again with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    with naming(config_file):
        _refuse_unsupported(settings)
        scales = _Scales(settings)

    file = SafetensorsFile(weights_file)
    # (layer, module) -> "A" or "B" -> (module path, tensor name)
    found: dict[tuple[int, str], dict[str, tuple[str, str]]] = {}
    for name in sorted(file.names):
        match = _TENSOR.fullmatch(name)
        if match is None or match[3] not in MODULES or f".{BLOCK_OF[match[3]]}." not in name:
            raise CheckpointError(f"{weights_file}: {cut(name)} is not a LoRA matrix of {', '.join(MODULES)}")
        if int(match[2]) >= config.num_layers:
            raise CheckpointError(f"{weights_file}: {name} is for a model of more than {config.num_layers} layers")
        require_float(weights_file, name, file.dtype(name))
        found.setdefault((int(match[2]), match[3]), {})[match[4]] = match[1], name
    if not found:
        raise CheckpointError(f"{weights_file}: holds no LoRA matrices")

    shapes = config.tensor_shapes()
    plans: dict[tuple[int, str], tuple[str, str, int, float]] = {}
    for key, halves in found.items():
        if len(halves) != 2:
            _, name = next(iter(halves.values()))
            raise CheckpointError(f"{weights_file}: {name} has no counterpart (lora_A and lora_B belong together)")
        (module, name_a), (_, name_b) = halves["A"], halves["B"]
        rank, scale = scales.of(module)
        size_out, size_in = shapes[module + ".weight"]
        for name, wanted in ((name_a, (rank, size_in)), (name_b, (size_out, rank))):
            if file.shape(name) != wanted:
                raise CheckpointError(
                    f"{weights_file}: {name} has shape {list(file.shape(name))}, the model and rank "
                    f"{rank} ask for {list(wanted)}"
                )
        plans[key] = name_a, name_b, rank, scale

    _check_padding({key: plan[2] for key, plan in plans.items()}, shapes, weights_file)
    rank = max(plan[2] for plan in plans.values())
    pairs = {}
    for key, (name_a, name_b, _, own_scale) in plans.items():
        lora_a, lora_b = file.tensor(name_a), file.tensor(name_b)
        require_finite(weights_file, name_a, lora_a)
        if own_scale != scales.default:
            lora_b = lora_b.float() * (own_scale / scales.default)
        require_finite(weights_file, name_b, lora_b)
        pairs[key] = lora_a, lora_b
    mask_embedding, rerank_head = _mask_embedding(path, config), load_rerank_head(path, config)
    record = path / TRAINING_FILE
    training = read_json_object(record) if is_there(record) else {}
    with naming(record):
        said = MaskInput.read(training.get("mask_input"), record)
    if said is None and mask_embedding is not None:
        said = MaskInput("vector")
    if (said is not None and said.kind == "vector") != (mask_embedding is not None):
        raise CheckpointError(
            f"{record}: mask_input is {short(said and said.kind)}, which does not go"
            f" {'with' if mask_embedding is not None else 'without'} a {MASK_EMBEDDING_FILE}"
        )
    return Adapter(
        path.resolve().name,
        rank,
        scales.default,
        mask_embedding,
        pairs,
        rerank_head,
        _acceptance(training, record, rerank_head),
        said,
    )


def _check_padding(ranks: dict[tuple[int, str], int], shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Refuses ranks with which the padded pairs of packed linears take memory that the files do not justify. A rank up
    to the width of the linears never does."""
    for layer, module in ranks:
        group = _PACKED.get(module, (module,))
        prefix = f"model.layers.{layer}.{BLOCK_OF[module]}."
        sizes = {name: shapes[f"{prefix}{name}.weight"] for name in group}
        own = {name: ranks.get((layer, name), 0) for name in group}
        rank = max(own.values())
        padded = sum(rank * (size_out + size_in) for size_out, size_in in sizes.values())
        stored = sum(own[name] * sum(size) + math.prod(size) for name, size in sizes.items())
        if padded > _MAX_PADDING * stored:
            largest = max(own, key=lambda name: own[name])
            raise CheckpointError(
                f"{file}: {prefix}{largest} has rank {rank}; {', '.join(group)}, computed as "
                f"one, would take {padded} values for {stored} in the files: wanted lower or equal ranks"
            )


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"peft_type {short(settings.get('peft_type'))} is not supported; only 'LORA' is")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"bias {short(settings['bias'])} is not supported; only 'none' is")
    if settings.get("init_lora_weights") not in _HARMLESS_INITS:
        raise CheckpointError(
            f"init_lora_weights {short(settings['init_lora_weights'])} is not supported: it changes the base "
            "weights; convert "
            "the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in settings.items():
        if value and key not in _HARMLESS_KEYS:
            raise CheckpointError(f"{key[:60]} is not supported: {_REASONS.get(key, 'plain LoRA has no such setting')}")


class _Scales:
    """Rank and scale of each module, after PEFT's rule: the first pattern that matches the end of its
    path."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._rslora = settings.get("use_rslora") or False
        if not isinstance(self._rslora, bool):
            raise CheckpointError(f"use_rslora is {short(self._rslora)}, wanted true or false")
        self._rank = _rank(settings.get("r"), "r")
        self._alpha = _alpha(settings.get("lora_alpha"), "lora_alpha")
        self._ranks = ModulePatterns(settings, "rank_pattern", _rank)
        self._alphas = ModulePatterns(settings, "alpha_pattern", _alpha)
        self.default = self._scale(self._rank, self._alpha)

    def of(self, module: str) -> tuple[int, float]:
        rank = self._ranks.get(module, self._rank)
        return rank, self._scale(rank, self._alphas.get(module, self._alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self._rslora else rank)


def _rank(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**16:
        raise CheckpointError(f"{name} is {short(value)}, wanted a rank from 1 to 65536")
    return value


def _alpha(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-9 <= value <= 1e9:
        raise CheckpointError(f"{name} is {short(value)}, wanted a number from 1e-9 to 1e9")
    return float(value)


def _mask_embedding(path: Path, config: ModelConfig) -> torch.Tensor | None:
    location = path / MASK_EMBEDDING_FILE
    if not is_there(location):
        return None
    file = SafetensorsFile(location)
    if file.names != {"mask_embedding"}:
        raise CheckpointError(
            f"{location}: holds {short(sorted(file.names))}, wanted the tensor 'mask_embedding' alone"
        )
    require_float(location, "mask_embedding", file.dtype("mask_embedding"))
    if file.shape("mask_embedding") != (config.hidden_size,):
        raise CheckpointError(
            f"{location}: mask_embedding has shape {list(file.shape('mask_embedding'))}, wanted [{config.hidden_size}]"
        )
    embedding = file.tensor("mask_embedding")
    require_finite(location, "mask_embedding", embedding)
    return embedding


def _acceptance(training: Mapping[str, Any], location: Path, rerank_head: RerankHead | None) -> list[float] | None:
    shares = training.get("acceptance_reranked" if rerank_head else "acceptance")
    if shares is None:
        return None
    if (
        not isinstance(shares, list)
        or not 1 <= len(shares) < MAX_TRAINED_STRIDE
        or any(isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= 1 for x in shares)
    ):
        raise CheckpointError(f"{location}: wanted the acceptance as a list of shares from 0 to 1, got {short(shares)}")
    return [float(x) for x in shares]
