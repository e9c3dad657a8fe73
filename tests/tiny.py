"""Small models for the tests: real configs and weights, only tiny and random, held in memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from idlm_kernels.cpu.native import Blocks
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
            weight = torch.randn(*shape, generator=generator, device="cpu") * scale
            self.tensors[name] = weight + 1.0 if "norm" in name else weight

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def blocks(self, name: str) -> Blocks | None:
        return None

    def forget(self, name: str) -> None:
        pass


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
        state.insert(b, prompt, SamplingParams(), 0, len(prompt) + 8, [])
    state.page_table.copy_(torch.arange(batch * max_pages).view(batch, max_pages))
    state.finish_reason.fill_(RUNNING)
    return state


def save_tiny_model(folder: Path, **changes: object) -> Path:
    """A folder with a random Llama over bytes, with no end token and room for long texts; changes: to its config."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 100_000,
        "tie_word_embeddings": False,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(5)
    shapes = ModelConfig.from_hf(config).tensor_shapes()
    weights = {name: torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_tiny_bundle(folder: Path, **changes: object) -> Path:
    """A model as `save_tiny_model` writes it with, in Uno's layout, a LoRA of PEFT's in the folder `adapter` inside."""
    save_tiny_model(folder, **changes)
    save_tiny_adapter(folder / "adapter", ModelConfig.from_hf(json.loads((folder / "config.json").read_text())))
    return folder


def save_tiny_adapter(folder: Path, config: ModelConfig, seed: int = 9) -> Path:
    """A LoRA of PEFT's layout on all linears, of random numbers."""
    random, rank, tensors = torch.Generator().manual_seed(seed), 4, {}
    for name, shape in config.tensor_shapes().items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, shape[1], generator=random) / 8
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], rank, generator=random) / 32
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 16 * rank, "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
