"""LoRA folders: what PEFT writes computes what PEFT computes, and everything beyond plain LoRA is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from idlm_kernels.model import adapter as adapter_module
from idlm_kernels.model._patterns import ModulePatterns
from idlm_kernels.model.adapter import MODULES, load_adapter
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.errors import CheckpointError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PREFIX = "base_model.model.model.layers."
Q_A = PREFIX + "0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_hf(LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]})


def peft_model(folder: Path, **settings):
    """A model with a LoRA that PEFT has filled with noise and saved."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(MODULES), **settings}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    peft_model(folder)
    return folder


@pytest.fixture
def plain(saved, tmp_path) -> Path:
    """A plain adapter on all seven linears, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path, dirs_exist_ok=True))


def merged_delta(model, layer: int, module: str) -> torch.Tensor:
    """What PEFT adds to the weight."""
    block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    lora = model.get_submodule(f"base_model.model.model.layers.{layer}.{block}.{module}")
    return lora.get_delta_weight("default") if hasattr(lora, "get_delta_weight") else torch.zeros_like(lora.weight)


@pytest.mark.parametrize(
    "settings, rank, scale",
    [
        ({}, 4, 3.0),
        ({"use_rslora": True}, 4, 12 / math.sqrt(4)),
        ({"target_modules": ["q_proj", "down_proj"]}, 4, 3.0),
        ({"layers_to_transform": [1]}, 4, 3.0),
        ({"rank_pattern": {"^model.layers.[1-9]\\.self.attn.(k|v|)(_proj$)": 3, "k_proj": 2}}, 4, 3.0),
        ({"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}}, 6, 3.0),
        ({"alpha_pattern": {"v_proj": 1, r"model\.layers\.0\.mlp\.(gate|up)_proj": 20}}, 4, 3.0),
        (
            {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 7, "k_proj": 5}, "use_rslora": True},
            4,
            6.0,
        ),
    ],
    ids=["plain", "rslora", "two modules", "one layer", "expressions", "ranks", "alphas", "all"],
)
def test_pairs_compute_what_peft_computes(tmp_path, config, settings, rank, scale):
    model = peft_model(tmp_path / "mine", **settings)
    adapter = load_adapter(tmp_path / "mine", config)
    assert (adapter.name, adapter.rank, adapter.scale) == ("mine", rank, scale)
    assert adapter.mask_embedding is None
    nonzero = 0
    for layer in range(2):
        for module in MODULES:
            wanted, pair = merged_delta(model, layer, module), adapter.pair(layer, module)
            if pair is None:
                assert not wanted.any(), (layer, module)
                continue
            lora_a, lora_b = pair
            own = len(lora_a)
            assert own <= rank and lora_a.shape == (own, wanted.shape[1]) and lora_b.shape == (wanted.shape[0], own)
            torch.testing.assert_close(adapter.scale * (lora_b @ lora_a), wanted, rtol=1e-5, atol=1e-6)
            nonzero += 1
    assert nonzero == {"target_modules": 4, "layers_to_transform": 7}.get(next(iter(settings), ""), 14)


def test_stored_dtype_is_kept(plain, config):
    change_tensors(plain, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    pair = load_adapter(plain, config).pair(1, "o_proj")
    assert pair is not None and pair[0].dtype == pair[1].dtype == torch.bfloat16


def test_mask_embedding(plain, config):
    vector = torch.randn(32)
    save_file({"mask_embedding": vector}, plain / "mask_embedding.safetensors")
    found = load_adapter(plain, config).mask_embedding
    assert found is not None and torch.equal(found, vector)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"mask_embedding": torch.ones(31)}, "shape \\[31\\], wanted \\[32\\]"),
        ({"mask_embedding": torch.ones(1, 32)}, "shape \\[1, 32\\]"),
        ({"embedding": torch.ones(32)}, "holds \\['embedding'\\], wanted the tensor 'mask_embedding' alone"),
        ({"mask_embedding": torch.ones(32), "more": torch.ones(1)}, "alone"),
        ({"mask_embedding": torch.ones(32, dtype=torch.int32)}, "stored as I32"),
        ({"mask_embedding": torch.full((32,), math.inf)}, "32 non-finite values"),
    ],
)
def test_mask_embeddings_that_do_not_fit(plain, config, tensors, message):
    save_file(tensors, plain / "mask_embedding.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(plain, config)


def test_unknown_module_name_is_an_error(plain, config):
    with pytest.raises(ValueError, match="module is 'qkv_proj', wanted one of q_proj"):
        load_adapter(plain, config).pair(0, "qkv_proj")


# --- patterns of a stranger -------------------------------------------------------------------------------

PATHS = [
    f"model.layers.{i}.{block}.{module}"
    for i in (0, 1, 11)
    for block, module in (("self_attn", "q_proj"), ("mlp", "down_proj"))
]
PIECES = [
    "model",
    "layers",
    "1",
    "mlp",
    "self_attn",
    "q_proj",
    ".",
    r"\.",
    "|",
    "(",
    ")",
    "^",
    "$",
    "[01]",
    r"\d",
    "_",
    "",
]


def test_patterns_match_what_re_matches():
    random = Random(11)
    compared = matched = 0
    for _ in range(4000):
        key = "".join(random.choice(PIECES) for _ in range(random.randint(1, 9)))
        try:
            patterns = ModulePatterns({"p": {key: 1}}, "p", lambda value, name: value)
        except CheckpointError:
            continue
        for path in PATHS:
            wanted = re.match(rf"(.*\.)?({key})$", path) is not None
            assert (patterns.get(path, 0) == 1) == wanted, (key, path)
            compared, matched = compared + 1, matched + wanted
    assert compared > 10_000 and matched > 100


def test_the_first_of_several_patterns_counts():
    keys = {"(q|k)_proj": 1, "layers.1.self_attn.q_proj": 2, "q_proj": 3, "k_proj": 4}
    for order, wanted in ((keys, 1), (dict(reversed(keys.items())), 3)):
        assert ModulePatterns({"p": order}, "p", lambda value, name: value).get(PATHS[2], 0) == wanted


def test_a_pattern_cannot_take_exponential_time():
    """As a regular expression it tries 2^40 ways to match and none of them does."""
    key = "(.|.)" * 35 + "x"
    patterns = ModulePatterns({"p": {key: 1}}, "p", lambda value, name: value)
    assert patterns.get("model.layers.0.self_attn.q_proj" + "_proj" * 3, 0) == 0
    assert ModulePatterns({"p": {key[:-1]: 1}}, "p", lambda value, name: value).get("a" * 35, 0) == 1


def test_a_scale_that_makes_a_finite_matrix_infinite_is_refused(plain, config):
    change_settings(plain, lora_alpha=1e-9, alpha_pattern={"q_proj": 1e9})
    change_tensors(plain, lambda t: t[Q_A.replace("lora_A", "lora_B")].fill_(1e25))
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors: .*q_proj.lora_B.weight holds 128 non-finite"
    ):
        load_adapter(plain, config)


def test_one_large_rank_does_not_pad_the_whole_adapter(plain, config):
    """Only linears that are computed as one share a rank, and files have to justify that."""
    big = 1 << 16
    down = PREFIX + "1.mlp.down_proj.lora_"
    change_settings(plain, r=4, rank_pattern={"layers.1.mlp.down_proj": big})
    large = {down + "A.weight": torch.zeros(big, 48).half(), down + "B.weight": torch.zeros(32, big).half()}
    change_tensors(plain, lambda t: t.update(large))
    adapter = load_adapter(plain, config)
    assert adapter.rank == big
    assert sum(half.nbytes for pair in adapter.pairs.values() for half in pair) < 2 << 24
    assert len(adapter.pairs[0, "q_proj"][0]) == 4
    wide = dataclasses.replace(config, num_heads=64)  # q_proj has 512 rows, k_proj 16
    shapes = wide.tensor_shapes()
    with pytest.raises(CheckpointError, match=r"weights: .*k_proj has rank 65536; q_proj, k_proj, v_proj, computed as"):
        adapter_module._check_padding({(0, "k_proj"): big, (0, "q_proj"): 1}, shapes, Path("weights"))
    adapter_module._check_padding({(0, "k_proj"): 32, (0, "q_proj"): 1}, shapes, Path("weights"))


# --- what is refused --------------------------------------------------------------------------------------


def change_settings(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


SETTINGS = [
    ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    ({"peft_type": None}, "peft_type None"),
    ({"use_dora": True}, "use_dora is not supported: DoRA"),
    ({"bias": "all"}, "bias 'all'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"target_parameters": ["x"]}, "target_parameters is not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    (
        {"init_lora_weights": "pissa"},
        "init_lora_weights 'pissa' is not supported: it changes the base weights",
    ),
    ({"a_setting_of_the_future": 1}, "a_setting_of_the_future is not supported"),
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"r": 4.0}, "r is 4.0"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": 1e-320, "alpha_pattern": {"q_proj": 1}}, "lora_alpha is 1e-320"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is -1"),
    ({"rank_pattern": ["q_proj"]}, "wanted a JSON object"),
    ({"alpha_pattern": {"(a+)+b": 4}}, "without repetition"),
    ({"alpha_pattern": {"(q_proj": 4}}, "not a regular expression"),
    ({"alpha_pattern": {"q_proj)": 4}}, "not a regular expression: unbalanced"),
    ({"alpha_pattern": {"[q_proj": 4}}, "not a regular expression: unterminated"),
    ({"alpha_pattern": {r"(q)\1": 4}}, "not a regular expression: .* has no meaning here"),
    ({"alpha_pattern": {f"(q|{i})_proj": 4 for i in range(65)}}, "65 keys are no plain module names"),
    ({"alpha_pattern": {"q" * 300: 4}}, "without repetition"),
    (
        {"r": 3},
        "q_proj.lora_A.weight has shape|lora_A.weight has shape \\[4, .*\\], the model and rank 3 ask for",
    ),
    ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight has shape \\[4, 32\\], the model and rank 2"),
]


@pytest.mark.parametrize("changes, message", SETTINGS, ids=[str(changes)[:40] for changes, _ in SETTINGS])
def test_refused_settings(plain, config, changes, message):
    change_settings(plain, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(plain, config)
    assert str(plain) in str(caught.value)


TENSORS = [
    (lambda t: t.pop(Q_A), "q_proj.lora_B.weight has no counterpart"),
    (lambda t: t.update({Q_A: torch.ones(4, 31)}), "has shape \\[4, 31\\]"),
    (lambda t: t.update({Q_A: torch.ones(128)}), "has shape \\[128\\]"),
    (
        lambda t: t.update({Q_A: torch.full((4, 32), math.nan)}),
        "q_proj.lora_A.weight holds 128 non-finite values",
    ),
    (lambda t: t.update({Q_A: torch.ones(4, 32, dtype=torch.int64)}), "stored as I64"),
    (
        lambda t: t.update({PREFIX + "2.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
        "more than 2 layers",
    ),
    (
        lambda t: t.update({PREFIX + "0.mlp.q_proj.lora_A.weight": torch.ones(4, 32)}),
        "is not a LoRA matrix of",
    ),
    (
        lambda t: t.update({PREFIX + "0.self_attn.q_norm.lora_A.weight": torch.ones(4, 8)}),
        "is not a LoRA matrix of",
    ),
    (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}),
        "is not a LoRA matrix of",
    ),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)}), "is not a LoRA matrix of"),
    (
        lambda t: t.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
        "is not a LoRA",
    ),
    (lambda t: [t.pop(name) for name in list(t)], "holds no LoRA matrices"),
]


@pytest.mark.parametrize("change, message", TENSORS, ids=[message[:30] for _, message in TENSORS])
def test_refused_tensors(plain, config, change, message):
    change_tensors(plain, change)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(plain, config)


def test_adapter_of_a_larger_model(plain, config):
    with pytest.raises(CheckpointError, match="the model and rank 4 ask for"):
        load_adapter(plain, dataclasses.replace(config, hidden_size=64))


def test_settings_that_say_nothing_are_accepted(plain, config):
    harmless = {
        "init_lora_weights": "gaussian",
        "inference_mode": False,
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/name",
        "revision": "main",
        "a_setting_of_the_future": None,
    }
    change_settings(plain, **harmless)
    assert load_adapter(str(plain), config).rank == 4


def test_missing_and_damaged_files(saved, tmp_path, config):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(tmp_path / "absent", config)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        load_adapter(tmp_path, config)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: damaged"):
        load_adapter(tmp_path, config)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        load_adapter(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pickle adapters .* safe_serialization=True"):
        load_adapter(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not valid JSON"):
        load_adapter(tmp_path, config)
