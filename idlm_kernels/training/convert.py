"""The full conversion of I-DLM (arXiv 2604.11035): all weights are trained, and MASK becomes a token of the model.

A batch runs as [x_t | x_0]: blocks of K = N - 1 MASK rows that tile each answer (x_t) beside the clean text (x_0), with
the visibility of a decoding step, so a MASK row sees nothing of its own block but MASK rows. The tiling starts at a
random offset below K: no position is masked twice, and every alignment is trained. Both halves predict the next token
of the text. The clean rows keep the model autoregressive; their K and V carry the gradient of the MASK rows too. The
stride grows in a curriculum, 2 then 3 then 4: drafts near the text are learned before far ones.

How the halves are weighed is the recipe. "paper", as its authors train: the clean loss counts 0.2 in all stages but the
last, where it is scaled by the ratio masked / clean, taken as a constant, so that the two weigh the same. "balanced",
the default: scaled by that ratio in all stages, up to a bound. The bound is ours: clean rows are learned first, the
ratio then grows without end, and what little they have left to learn drowns the masked half. On the model of the tests
(300 steps, seeds 0 and 1) 100 unseen texts then take 3.57 and 3.42 tokens per forward of a quadratic plan with N = 4
by "balanced", 2.90 and 2.94 by "paper", 2.47 and 2.12 by "balanced" without a bound.

`idlm convert` is the command. Tested on a tiny model that is trained from nothing; not run at scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from idlm_kernels.model.config import ModelConfig
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.train import Batch, Order, load_run, make_batch, rate_at, save_run

_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "sdar": "SDARForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class ConvertSettings:
    """strides: the curriculum, each for `steps` steps. recipe: how the losses of the halves are weighed (this module).
    clean_weight: of the clean loss, in the paper's first stages. max_balance: bound of its factor, in "balanced".
    weight_decay: of Adam; matrices and vectors alike."""

    strides: tuple[int, ...] = (2, 3, 4)
    steps: int = 1000
    batch: int = 12
    learning_rate: float = 2e-5
    warmup: int = 50
    recipe: Literal["balanced", "paper"] = "balanced"
    clean_weight: float = 0.2
    max_balance: float = 4.0
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"strides is {self.strides}, wanted one or more of at least 2")
        for name, low in (("steps", 1), ("batch", 1), ("warmup", 0), ("clean_weight", 0), ("max_balance", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least {low}")
        if self.recipe not in ("balanced", "paper"):
            raise ValueError(f"recipe is {self.recipe!r}, wanted 'balanced' or 'paper'")

    def total(self, loss: ConvertLoss, stage: int) -> Tensor:
        """What a step of a stage (an index of `strides`) minimises."""
        if self.recipe == "balanced":
            return loss.total(self.max_balance)
        return loss.total(math.inf) if stage == len(self.strides) - 1 else loss.masked + self.clean_weight * loss.clean


@dataclass(frozen=True)
class ConvertLoss:
    """Mean cross-entropies of the two halves of a batch."""

    masked: Tensor
    clean: Tensor

    def total(self, max_balance: float) -> Tensor:
        """The sum of both, the clean half scaled to weigh as much as the masked one, up to a factor max_balance."""
        balance = (self.masked / self.clean.clamp(min=1e-6)).detach().clamp(max=max_balance)
        return self.masked + balance * self.clean


def convert(
    model: DenseModel,
    samples: Sequence[Sample],
    settings: ConvertSettings,
    checkpoint: Path | None = None,
    *,
    save_every: int = 25,
    report: Callable[[DenseModel, int, int, ConvertLoss], None] = lambda trained, step, stride, loss: None,
) -> DenseModel:
    """A copy of `model`, trained on the answers of the samples; deterministic with the seed.

    checkpoint: a file that the run is written to, and goes on from where it exists; an interruption leaves no trace.
    report(what is trained, steps taken, stride, loss) is called after each step. Raises ValueError for a model without
    mask_token_id, or whose weights are not fp32 (16 bits would lose the small steps of training), CheckpointError for a
    checkpoint of other settings.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"the weights are {model.dtype}, wanted torch.float32 to train them")
    if model.config.mask_token_id is None:
        raise ValueError("the config has no mask_token_id, wanted the id of a token that no text uses")
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.weights.items()}
    trained = DenseModel(model.config, weights)
    parameters = list(weights.values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    order = Order(samples, settings.batch, settings.seed)
    identity = {**asdict(settings), "strides": list(settings.strides), "samples": len(samples)}
    steps = settings.steps * len(settings.strides)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = load_run(checkpoint, identity, parameters, optimizer)
    for step in range(first, steps):
        stage = step // settings.steps
        stride = settings.strides[stage]
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = [samples[i] for i in order.batch(step)]
        loss = loss_of(trained, make_batch(chosen, stride - 1, stride - 1, generator, model.device))
        optimizer.zero_grad()
        settings.total(loss, stage).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, settings.warmup, settings.learning_rate)
        optimizer.step()
        if checkpoint is not None and (step + 1 == steps or (step + 1) % save_every == 0):
            save_run(checkpoint, step + 1, identity, parameters, optimizer)
        report(trained, step + 1, stride, ConvertLoss(loss.masked.detach(), loss.clean.detach()))
    for weight in parameters:
        weight.requires_grad_(False)
    return trained


def loss_of(model: DenseModel, batch: Batch) -> ConvertLoss:
    """Both halves of a batch whose blocks tile the answers (make_batch with spacing = K)."""
    clean = model.clean(batch.ids)
    masked = model.masked(clean, batch.anchors, batch.labels.shape[2], model.own_mask, None)
    return ConvertLoss(_mean(model, masked, batch.labels), _mean(model, clean.hidden, batch.next_ids))


def save_checkpoint(folder: Path, model: DenseModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors, for `load_checkpoint`; a tokenizer's files may be laid beside them."""
    config = _hf_config(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.part"
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in model.weights.items()}
    save_file(tensors, part, {"format": "pt"})
    part.replace(folder / "model.safetensors")
    part = folder / "config.part"
    part.write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    part.replace(folder / "config.json")


def _mean(model: DenseModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the rows with a label; 0 without any."""
    rows = labels >= 0
    logits = F.linear(hidden[rows], model.head).float()
    return F.cross_entropy(logits, labels[rows], reduction="sum") / max(1, len(logits))


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """What ModelConfig.from_hf reads back as `config`."""
    if config.rope_freq_factors is not None:
        raise ValueError("rope_freq_factors of a GGUF have no place in a config.json")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return {
        "architectures": [_ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "mask_token_id": config.mask_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "bos_token_id": config.bos_token_id,
    }
