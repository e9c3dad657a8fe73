"""Random weights in real shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import CheckpointError, Transformer
from idlm_kernels.model.random_weights import SHAPES, RandomCheckpoint
from tests.tiny import tiny_config


def test_equal_seeds_give_equal_weights() -> None:
    config = tiny_config(architecture="qwen3", qk_norm=True)
    one, same, other = (RandomCheckpoint(config, seed=seed) for seed in (1, 1, 2))
    for name in one.names():
        assert one.tensor(name).shape == config.tensor_shapes()[name] and one.tensor(name).dtype == torch.bfloat16
        assert torch.equal(one.tensor(name), same.tensor(name))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one.tensor(name), other.tensor(name))
    results = Generator(Transformer(one)).generate([[1, 2]], SamplingParams(max_tokens=5))
    assert results[0].tokens == 5 and results[0].error_flags == 0


def test_shapes_by_name_and_by_config(tmp_path: Path) -> None:
    assert RandomCheckpoint.of("Qwen3-8B").config == SHAPES["qwen3-8b"]
    count = sum(torch.Size(shape).numel() for shape in SHAPES["qwen3-8b"].tensor_shapes().values())
    assert 8.1e9 < count < 8.3e9, "the published size of Qwen3-8B is 8.2 B"
    count = sum(torch.Size(shape).numel() for shape in SHAPES["qwen3-32b"].tensor_shapes().values())
    assert 32.5e9 < count < 33.0e9, "the published size of Qwen3-32B is 32.8 B"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert RandomCheckpoint.of(tmp_path).config.hidden_size == 32
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        RandomCheckpoint.of(tmp_path)
