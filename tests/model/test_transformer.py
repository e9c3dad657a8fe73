"""Logits against transformers' own implementation of the same weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.peers import transformers_llama
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.plan import prefill_rows
from idlm_kernels.model import Transformer, load_adapter, load_checkpoint
from idlm_kernels.model.adapter import Adapter
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.rerank import RerankHead
from tests.tiny import MemoryCheckpoint, oracle_checkpoint, tiny_config, tiny_state

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
CASES = {
    "llama": ("Llama", {"rope_parameters": PLAIN_ROPE}),
    "llama-tied": ("Llama", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True}),
    "llama-mqa-bias": (
        "Llama",
        {"rope_parameters": PLAIN_ROPE, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN_ROPE}),
    "qwen3-tied-mha": (
        "Qwen3",
        {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
}


def reference_model(family: str, changes: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for name, parameter in model.named_parameters():  # the default initialisation leaves logits near zero
        with torch.no_grad():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model


def logits_of(model: Transformer, ids: list[int]) -> torch.Tensor:
    state = tiny_state([ids], 8)
    page_size = -(-len(ids) // 8)
    model.reserve_positions(len(ids))
    return model.forward(prefill_rows(state, [0], [len(ids)], 0, page_size), model.new_cache(8, page_size))[0]


def assert_fp32_equal(found: torch.Tensor, want: torch.Tensor) -> None:
    """Equal within fp32 rounding: a relative error of some hundred ulp of the largest logit, and the same argmax."""
    assert want.std() > 0.1, "the logits must say something"
    assert (found - want).abs().max() < 3e-5 * want.abs().max()
    assert torch.equal(found.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from idlm_kernels import use_backend

    family, changes = CASES[case]
    reference = reference_model(family, changes)
    reference.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(ids).logits[0]
    with use_backend(backend):
        model = Transformer(load_checkpoint(tmp_path))
        assert model.weight_dtype == torch.float32
        assert_fp32_equal(logits_of(model, ids[0].tolist()), want)


def test_sdar_is_qwen3_with_a_mask_token(tmp_path: Path) -> None:
    reference = reference_model("Qwen3", {"rope_parameters": PLAIN_ROPE})
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.update(architectures=["SDARForCausalLM"], model_type="sdar", mask_token_id=96)
    path.write_text(json.dumps(config))
    model = Transformer(load_checkpoint(tmp_path))
    assert model.config.mask_token_id == 96 and model.mask_embedding is None
    ids = list(range(3, 40))
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    assert_fp32_equal(logits_of(model, ids), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """A CPU reads 16-bit weights and computes in fp32: as transformers does in fp32 on the rounded weights."""
    reference_model("Qwen3", {"rope_parameters": PLAIN_ROPE}).to(dtype).save_pretrained(tmp_path)
    reference = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = list(range(5, 60))
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    model = Transformer(load_checkpoint(tmp_path))
    assert (model.weight_dtype, model.dtype) == (dtype, torch.float32)
    assert_fp32_equal(logits_of(model, ids), want)


def test_gguf_default_model_equals_transformers(default_gguf: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF against transformers with the same dequantised weights."""
    checkpoint = load_checkpoint(default_gguf)
    reference = transformers_llama(checkpoint)
    ids = checkpoint.tokenizer.encode("The quick brown fox jumps over the lazy dog. Die Würde des Menschen ist")
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    model = Transformer(checkpoint, dtype="fp32")
    assert_fp32_equal(logits_of(model, ids), want)


def write_adapter(
    path: Path,
    config: Any,
    *,
    seed: int = 0,
    size: float = 0.3,
    mask_embedding: bool = True,
    ranks: dict[str, int] | None = None,
) -> Path:
    """A random adapter on all seven linears, in PEFT layout; `ranks`: those of modules with one of their own."""
    generator = torch.Generator().manual_seed(seed)
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes = {
        "self_attn.q_proj": (h, q),
        "self_attn.k_proj": (h, kv),
        "self_attn.v_proj": (h, kv),
        "self_attn.o_proj": (q, h),
        "mlp.gate_proj": (h, f),
        "mlp.up_proj": (h, f),
        "mlp.down_proj": (f, h),
    }
    rank, tensors = 4, {}
    for i in range(config.num_layers):
        for module, (inner, outer) in shapes.items():
            prefix = f"base_model.model.model.layers.{i}.{module}"
            own = (ranks or {}).get(module.split(".")[1], rank)
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(own, inner, generator=generator) * size
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outer, own, generator=generator) * size
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    names = sorted(s.split(".")[1] for s in shapes)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": names, "bias": "none"}
    settings["rank_pattern"] = ranks or {}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    if mask_embedding:
        save_file({"mask_embedding": torch.randn(h, generator=generator)}, path / "mask_embedding.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_adapter_moves_mask_rows_only(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(tiny_config())
    adapter = load_adapter(write_adapter(tmp_path / "a", checkpoint.config), checkpoint.config)
    base = Transformer(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    adapted = Transformer(checkpoint, dtype=dtype, adapter=adapter)  # type: ignore[arg-type]
    assert adapted.mask_embedding is not None and not torch.equal(adapted.mask_embedding, base.mask_embedding)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=24)
    want = [r.token_ids for r in Generator(base).generate(prompts, params, plan="ar")]
    drafted = []
    for model in (base, adapted):
        for plan in ("ar", "chain", "quadratic"):
            found = Generator(model).generate(prompts, params, plan=plan, stride=4)  # type: ignore[arg-type]
            assert [r.token_ids for r in found] == want
            drafted.append([r.acceptance for r in found])
    assert drafted[1:3] != drafted[4:6], "the adapter must change what MASK rows draft"


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_rows_without_masks_leave_the_adapter_out(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would change no bit, and costs launches."""
    from idlm_kernels import ops, use_backend

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("no row takes the adapter")

    checkpoint = MemoryCheckpoint(tiny_config())
    monkeypatch.setattr(Transformer, "_cpu_stack", lambda *_: None)
    adapter = load_adapter(write_adapter(tmp_path / "a", checkpoint.config), checkpoint.config)
    rows = prefill_rows(tiny_state([[3, 1, 4, 1, 5]], 8), [0], [5], 0, 8)
    assert not rows.has_masks
    with use_backend(backend):
        model = Transformer(checkpoint, dtype=torch.float32, adapter=adapter)  # type: ignore[arg-type]
        want, _ = model.forward(dataclasses.replace(rows, has_masks=True), model.new_cache(8, 8))
        monkeypatch.setattr(ops, "gated_lora_linear", refused)
        got, _ = model.forward(rows, model.new_cache(8, 8))
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


MIXED = {"k_proj": 7, "q_proj": 1, "up_proj": 2, "down_proj": 5}


@pytest.mark.parametrize("ranks", [None, MIXED], ids=["one", "mixed"])
def test_adapter_rows_equal_a_merged_model(tmp_path: Path, ranks: dict[str, int] | None) -> None:
    """Rows under the adapter compute what a model with W + scale B A computes."""
    checkpoint = MemoryCheckpoint(tiny_config(), scale=0.2)
    adapter = load_adapter(write_adapter(tmp_path / "a", checkpoint.config, ranks=ranks), checkpoint.config)
    merged = MemoryCheckpoint(tiny_config(), scale=0.2)
    modules = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    for i in range(checkpoint.config.num_layers):
        for block, names in modules.items():
            for name in names:
                a, b = adapter.pair(i, name)  # type: ignore[misc]
                merged.tensors[f"model.layers.{i}.{block}.{name}.weight"] += adapter.scale * b @ a
    adapted = Transformer(checkpoint, dtype="fp32", adapter=adapter)  # type: ignore[arg-type]
    state = tiny_state([[7, 8, 9]], 1)
    rows = prefill_rows(state, [0], [3], 0, 8)
    gated = dataclasses.replace(rows, is_mask=torch.ones(3, dtype=torch.bool), has_masks=True)
    adapted.mask_embedding = None  # embed the ids, so that both models read the same input
    found, _ = adapted.forward(gated, adapted.new_cache(1, 8))
    plain = Transformer(merged, dtype="fp32")  # type: ignore[arg-type]
    want, _ = plain.forward(rows, plain.new_cache(1, 8))
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spoiled", ["lora_A", "lora_B", "mask", "rerank"])
def test_an_adapter_that_the_dtype_makes_infinite_is_named(spoiled: str) -> None:
    """Where activations have 16 bits, as on a GPU; nothing of a model on `meta` runs."""
    config, large = tiny_config(), torch.full((3, 32), 1e5)
    pair = (large if spoiled == "lora_A" else large * 0, large.T * (1.0 if spoiled == "lora_B" else 0.0))
    head = RerankHead(*(torch.full(shape, 7e4) for shape in ((4, 32), (4, 32), (4, 4), (32, 4))))
    mask = large[0] if spoiled == "mask" else None
    adapter = Adapter("mine", 3, 1.0, mask, {(1, "q_proj"): pair}, head if spoiled == "rerank" else None)
    what = {"mask": "the MASK embedding", "rerank": "the re-ranking head"}.get(
        spoiled, f"{spoiled} of model.layers.1.self_attn.q_proj"
    )
    message = rf"mine: {what} holds numbers up to (1e\+05|100000|70000), which torch.float16 does not"
    shapes: Any = MemoryCheckpoint(config)
    with pytest.raises(CheckpointError, match=message):
        Transformer(shapes, device="meta", dtype="fp16", adapter=adapter)
    Transformer(shapes, device="meta", dtype="bf16", adapter=adapter)


def test_positions_grow_without_changing(make_generator: Callable[..., Generator]) -> None:
    model = make_generator(oracle_checkpoint()).model
    before = model.rotary.clone()
    model.reserve_positions(5000)
    assert model.rotary.shape[0] == 5000 and torch.equal(model.rotary[: len(before)], before)
