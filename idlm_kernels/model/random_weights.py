"""Models of real shapes with random weights, to measure speed without downloading them. Their text is noise."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import torch

from idlm_kernels.model._files import naming, read_json_object
from idlm_kernels.model.checkpoint import Checkpoint, load_checkpoint
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.tokenizer import Tokenizer

_QWEN3_8B = ModelConfig(
    architecture="qwen3",
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    rope_freq_factors=None,
    max_position_embeddings=40_960,
    tie_word_embeddings=False,
    qk_norm=True,
    attention_bias=False,
    mlp_bias=False,
    mask_token_id=None,
    eos_token_ids=(),
    bos_token_id=None,
)
SHAPES = {
    "qwen3-8b": _QWEN3_8B,
    "qwen3-32b": dataclasses.replace(
        _QWEN3_8B, hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64
    ),
}


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are made up as they are asked for; equal names, seeds and devices give equal tensors.

    On a GPU its own generator makes them, which saves minutes. The tokenizer is that of the default model: throughput
    does not depend on what the ids mean.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        self.config, self.seed, self.dtype, self.device = config, seed, dtype, torch.device(device)
        self.name, self.path = f"random {config.architecture}", Path("random")

    @classmethod
    def of(cls, source: str | Path) -> RandomCheckpoint:
        """The shape of a name in SHAPES, or that of a checkpoint or folder with a config.json."""
        if isinstance(source, str) and source.lower() in SHAPES:
            return cls(SHAPES[source.lower()])
        if (folder := Path(source)).is_dir():
            settings = read_json_object(folder / "config.json")
            with naming(folder / "config.json"):
                return cls(ModelConfig.from_hf(settings))
        return cls(load_checkpoint(source).config)

    def _read(self, name: str) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        shape = self._shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        weight = torch.randn(shape, generator=generator, device=self.device)
        return weight.mul_(shape[-1] ** -0.5).to(self.dtype)

    def _read_tokenizer(self) -> Tokenizer:
        return load_checkpoint("default").tokenizer
