"""Other people's implementations, set up on our weights, to compare with."""

from __future__ import annotations

from typing import Any

from idlm_kernels.model import Checkpoint


def transformers_llama(checkpoint: Checkpoint) -> Any:
    """transformers' LlamaForCausalLM in fp32 with the (dequantised) weights of a Llama checkpoint."""
    import transformers

    config = checkpoint.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
    return model
