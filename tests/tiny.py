"""Small models for the tests: real configs and weights, only tiny and random, held in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from idlm_kernels.generate import SamplingParams
from idlm_kernels.generate.state import RUNNING, DecodeState
from idlm_kernels.model import ModelConfig

TINY = ModelConfig(
    architecture="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    rope_freq_factors=None,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    qk_norm=False,
    attention_bias=False,
    mlp_bias=False,
    mask_token_id=None,
    eos_token_ids=(),
    bos_token_id=None,
)


class MemoryCheckpoint:
    """A checkpoint of random weights; stands in for idlm_kernels.model.Checkpoint."""

    def __init__(self, config: ModelConfig, seed: int = 0, scale: float = 0.4):
        self.config, self.name, self.path = config, "tiny", Path("tiny")
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {}
        for name, shape in config.tensor_shapes().items():
            weight = torch.randn(*shape, generator=generator) * scale
            self.tensors[name] = weight + 1.0 if "norm" in name else weight

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def tiny_config(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def oracle_checkpoint(config: ModelConfig = TINY) -> MemoryCheckpoint:
    """A model whose MASK rows draft perfectly: every token has one embedding, so all rows of a position agree."""
    checkpoint = MemoryCheckpoint(config, seed=5)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    table.copy_(table[:1].expand_as(table))
    return checkpoint


def tiny_state(prompts: list[list[int]], max_pages: int, num_drafts: int = 0, vocab_size: int = 61) -> DecodeState:
    """Running greedy requests whose text is their prompt, with the pages 0, 1, 2, .. in turn."""
    batch = len(prompts)
    state = DecodeState.empty(
        batch,
        max(map(len, prompts)) + 8,
        max_pages,
        num_drafts,
        1,
        mask_token_id=None,
        id_limit=vocab_size,
        device=torch.device("cpu"),
    )
    for b, prompt in enumerate(prompts):
        state.place(b, prompt, SamplingParams(), 0, len(prompt) + 8, [])
    state.page_table.copy_(torch.arange(batch * max_pages).view(batch, max_pages))
    state.finish.fill_(RUNNING)
    return state
