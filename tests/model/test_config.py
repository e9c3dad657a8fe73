"""ModelConfig: both spellings, transformers' frequencies, and a refusal for each thing that is not
implemented."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from idlm_kernels.model.config import ModelConfig, RopeScaling
from idlm_kernels.model.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_every_field_is_read(tiny_hf):
    config = ModelConfig.from_hf(
        tiny_hf("SDARForCausalLM", eos_token_id=[7, 8, 7], bos_token_id=3, attention_bias=True, rope_theta=1e6)
    )
    assert dataclasses.asdict(config) == {
        "architecture": "sdar", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": None, "rope_freq_factors": None, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "qk_norm": True, "attention_bias": True, "mlp_bias": False,
        "mask_token_id": 299, "eos_token_ids": (7, 8), "bos_token_id": 3,
    }  # fmt: skip


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_reads_what_transformers_writes(config_class, tmp_path):
    theirs = config_class(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={**LLAMA3, "rope_theta": 5e5}, eos_token_id=5,
    )  # fmt: skip
    theirs.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert config.tie_word_embeddings and config.head_dim == 8 and config.eos_token_ids == (5,)
    assert config.qk_norm == (config_class is Qwen3Config)


def test_reads_a_published_sdar_config():
    """The keys and numbers of SDAR-1.7B-Chat: Qwen3's, with the MASK id and switches of its own code beside
    them."""
    published = {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "attn_implementation": "flex_attention", "block_size": 4, "bos_token_id": 151643,
        "debug": False, "eos_token_id": 151643, "ep_size": 1,
        "fuse_cross_entropy": True, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "mask_token_id": 151669, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    config = ModelConfig.from_hf(published)
    assert (config.mask_token_id, config.eos_token_ids, config.qk_norm) == (151669, (151643,), True)
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


def test_both_spellings_give_the_same(tiny_hf):
    old = tiny_hf(rope_theta=5e5, rope_scaling=LLAMA3)
    new = tiny_hf(rope_theta=None, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    oldest = tiny_hf(rope_theta=5e5, rope_scaling={**LLAMA3, "rope_type": None, "type": "llama3"})
    del oldest["rope_scaling"]["rope_type"]
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == ModelConfig.from_hf(oldest)
    assert ModelConfig.from_hf(old).rope_scaling is not None


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("scaling", [None, LLAMA3, {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0}])
@pytest.mark.parametrize(
    "config_class, rotary", [(LlamaConfig, LlamaRotaryEmbedding), (Qwen3Config, Qwen3RotaryEmbedding)]
)
def test_inv_freq_has_the_bits_of_transformers(tiny_hf, theta, scaling, config_class, rotary):
    rope = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    theirs = config_class(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    ours = ModelConfig.from_hf(
        tiny_hf(
            "Qwen3ForCausalLM",
            head_dim=128,
            max_position_embeddings=512,
            rope_theta=theta,
            rope_scaling=scaling,
        )
    )
    assert ours.inv_freq().dtype == torch.float32
    assert torch.equal(ours.inv_freq(), rotary(theirs).inv_freq)


def test_llama3_scaling_without_its_context_uses_the_models_own(tiny_hf):
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = ModelConfig.from_hf(tiny_hf(rope_scaling=rope, max_position_embeddings=512))
    assert config.rope_scaling is not None and config.rope_scaling.original_max_position_embeddings == 512


def test_rope_freq_factors_divide_the_frequencies(tiny_hf):
    plain = ModelConfig.from_hf(tiny_hf())
    factored = dataclasses.replace(plain, rope_freq_factors=(1.0, 2.0, 4.0, 8.0))
    assert torch.equal(factored.inv_freq(), plain.inv_freq() / torch.tensor([1.0, 2.0, 4.0, 8.0]))
    with pytest.raises(CheckpointError, match="3 values, wanted 4"):
        dataclasses.replace(plain, rope_freq_factors=(1.0, 2.0, 4.0))


def test_tensor_shapes_are_those_of_transformers(tiny_hf):
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    cases = [
        ("LlamaForCausalLM", LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3ForCausalLM", Qwen3ForCausalLM, Qwen3Config, {"attention_bias": True}),
        ("Qwen3ForCausalLM", Qwen3ForCausalLM, Qwen3Config, {}),
    ]
    for architecture, model_class, config_class, changes in cases:
        config = tiny_hf(architecture, **changes)
        arguments = {key: config[key] for key in config if key not in ("architectures", "model_type", "rope_theta")}
        state = model_class(config_class(**arguments)).state_dict()
        assert ModelConfig.from_hf(config).tensor_shapes() == {
            name: tuple(tensor.shape) for name, tensor in state.items()
        }


def test_tied_head_is_no_tensor(tiny_hf):
    assert "lm_head.weight" not in ModelConfig.from_hf(tiny_hf(tie_word_embeddings=True)).tensor_shapes()


def test_defaults_are_those_of_transformers(tiny_hf):
    llama = ModelConfig.from_hf(
        tiny_hf(
            num_key_value_heads=None,
            head_dim=None,
            rope_theta=None,
            rms_norm_eps=None,
            max_position_embeddings=None,
        )
    )
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta) == (4, 8, 10000.0)
    assert (llama.rms_norm_eps, llama.max_position_embeddings) == (1e-6, 2048)
    qwen = ModelConfig.from_hf(tiny_hf("Qwen3ForCausalLM", head_dim=None))
    assert qwen.head_dim == Qwen3Config().head_dim == 128


def test_architecture_from_model_type_alone(tiny_hf):
    assert ModelConfig.from_hf(tiny_hf("Qwen3ForCausalLM", architectures=None)).architecture == "qwen3"


REFUSALS = [
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*not supported"),
    ({"architectures": []}, "wanted a list of one"),
    ({"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}, "wanted a list of one"),
    ({"model_type": "qwen3_moe"}, "contradicts"),
    ({"architectures": None, "model_type": []}, "model_type \\[\\] is not supported"),
    ({"model_type": ["x" * 10**6]}, "model_type \\['xxx.{0,60} contradicts"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"compression_config": {"format": "int8"}}, "compression_config"),
    ({"pretraining_tp": 2}, "pretraining_tp 2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"factor": 2.0}}, "factor not supported with rope type 'default'"),
    ({"rope_scaling": {**LLAMA3, "mscale": 1.0}}, "mscale not supported"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 must be larger"),
    ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor is missing"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "64.5, wanted an integer"),
    ({"rope_scaling": "llama3"}, "wanted a JSON object"),
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "contradict each other"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 10000.0 contradicts"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"sliding_window": 64}, "sliding window of 64"),
    ({"use_sliding_window": True, "sliding_window": 64}, "sliding window of 64"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"vocab_size": 10**8}, "vocab_size is 100000000"),
    ({"vocab_size": 300.0}, "vocab_size is 300.0, wanted an integer"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": "300"}, "vocab_size is '300'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": 10**400}, "hidden_size is 1000.*\\.\\.\\., wanted an integer"),
    ({"num_hidden_layers": 0}, "num_layers is 0"),
    ({"num_hidden_layers": 10**6}, "num_layers is 1000000"),
    ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
    ({"num_attention_heads": 0, "head_dim": None}, "not a multiple"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "32 is not a multiple of"),
    ({"head_dim": 10**7, "num_attention_heads": 10**7, "num_key_value_heads": 1}, "larger than"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ({"rope_theta": math.inf}, "rope_theta is inf"),
    ({"rope_theta": 10**400}, "too large"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
    ({"tie_word_embeddings": "yes"}, "wanted true or false"),
    ({"eos_token_id": 300}, "eos_token_ids\\[0\\] is 300"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ({"bos_token_id": -1}, "bos_token_id is -1"),
    ({"mask_token_id": 300}, "mask_token_id is 300"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[str(changes)[:50] for changes, _ in REFUSALS])
def test_refused(tiny_hf, changes, message):
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(tiny_hf(**changes))


def test_refused_for_qwen3(tiny_hf):
    with pytest.raises(CheckpointError, match="mlp_bias"):
        ModelConfig.from_hf(tiny_hf("Qwen3ForCausalLM", mlp_bias=True))
    with pytest.raises(CheckpointError, match="num_key_value_heads is missing"):
        ModelConfig.from_hf(tiny_hf("Qwen3ForCausalLM", num_key_value_heads=None))
    with pytest.raises(CheckpointError, match="sliding window"):
        ModelConfig.from_hf(tiny_hf("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=64))
    with pytest.raises(CheckpointError, match="wanted a JSON object"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64, "use_sliding_window": False},
        {"sliding_window": 128},  # as long as the context: never in use
        {"layer_types": ["full_attention", "full_attention"]},
        {"pretraining_tp": 1},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"rope_type": "default"}},
        {"torch_dtype": "bfloat16", "initializer_range": 0.02, "use_cache": True},
    ],
)
def test_accepted(tiny_hf, changes):
    assert ModelConfig.from_hf(tiny_hf(**changes)) == ModelConfig.from_hf(tiny_hf())
