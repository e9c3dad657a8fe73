"""vLLM: its paged cache and metadata under this library's ops, and drafts from MASK rows. See docs/hosting.md.

The functions are plain torch and tested on a CPU. `register` needs vLLM; it is a plugin's entry point:

    [project.entry-points."vllm.general_plugins"]
    idlm = "vllm_backend:register"

    vllm serve MODEL --attention-backend CUSTOM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import idlm_kernels


@dataclass
class StridedMetadata:
    """What attention needs of a batch; tree_mask for quadratic plans, set by whoever makes the rows."""

    query_start_loc: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B], the rows of this step included
    page_table: Tensor  # int32 [B, max_pages]
    slot_mapping: Tensor  # int64 [T]
    max_query_len: int
    tree_mask: Tensor | None = None  # int64 [T]


def metadata_of(common: Any) -> StridedMetadata:
    """vLLM's CommonAttentionMetadata, whose tensors pass unchanged: both count a step's own tokens in seq_lens."""
    return StridedMetadata(
        common.query_start_loc,
        common.seq_lens,
        common.block_table_tensor,
        common.slot_mapping,
        common.max_query_len,
    )


def kv_views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [num_blocks, block_size, Hkv, D] of a cache [num_blocks, 2, block_size, Hkv, D]: views, no copies."""
    k_cache, v_cache = kv_cache.unbind(1)
    return k_cache, v_cache


def attend(
    query: Tensor, kv_cache: Tensor, metadata: StridedMetadata, out: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of [T, Hq, D], padding rows included, over a cache that holds the step's K and V already.

    window: vLLM's sliding_window, the tokens that a row sees, its own among them.
    """
    k_cache, v_cache = kv_views(kv_cache)
    idlm_kernels.strided_attention(
        query,
        k_cache,
        v_cache,
        metadata.page_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        tree_mask=metadata.tree_mask,
        max_query_len=metadata.max_query_len,
        sm_scale=scale,
        window=-1 if window is None else window - 1,
        out=out.view(query.shape),
    )
    return out


# Drafts: a request's step is pending, its n drafts (K or none), and MASK tokens up to 1 + 2 K rows. For vLLM drafts and
# MASK tokens are one list of 2 K speculative tokens. The model's compute_logits gives MASK -inf, so that it is never
# sampled, and vLLM's sampler rejects all of them by itself.


def mask_rows(query_start_loc: Tensor, num_drafts: Tensor, num_spec_tokens: int) -> Tensor:
    """Rows int64 [B, K] of the MASK tokens that follow the n drafts of each request."""
    first = query_start_loc[:-1].long() + 1 + num_drafts
    return first.unsqueeze(1) + torch.arange(num_spec_tokens, device=first.device)


def speculative_tokens(
    drafts: Tensor, query_start_loc: Tensor, num_drafts: Tensor, num_rejected: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """The next speculative tokens int64 [B, 2 K], and how many of them are drafts, int32 [B].

    drafts: int64 [B, K], what the MASK rows predict. num_rejected: int32 [B] of the 2 K tokens of this step. Drafts
    build on the last draft of this step: where that was rejected they are of no use, and the next step has none.
    """
    num_spec_tokens = drafts.shape[1]
    rows = query_start_loc[1:] - query_start_loc[:-1]
    all_stand = rows - 1 - num_rejected == num_drafts
    masks = torch.full_like(drafts, mask_id)
    tokens = torch.cat([torch.where(all_stand.unsqueeze(1), drafts, masks), masks], dim=1)
    return tokens, torch.where(all_stand, num_spec_tokens, 0).to(torch.int32)


def register() -> None:
    """Make the attention backend CUSTOM, and the speculator that `init_speculator` can be pointed to (see the page)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.StridedBackend")


def __getattr__(name: str) -> type:
    """The classes that derive from vLLM's, made when they are asked for."""
    if name in ("StridedBackend", "StridedBuilder", "StridedImpl"):
        globals().update(_attention_classes())
    elif name == "MaskSpeculator":
        globals()[name] = _speculator_class()
    else:
        raise AttributeError(f"module {__name__} has no {name}")
    return globals()[name]


def _attention_classes() -> dict[str, type]:
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    class StridedBuilder(AttentionMetadataBuilder):
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StridedMetadata:
            return metadata_of(common_attn_metadata)

    class StridedImpl(AttentionImpl):
        def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, **rest: Any):
            self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
            self.num_kv_heads = num_kv_heads or num_heads
            self.window, self.kv_cache_dtype = rest.get("sliding_window"), rest.get("kv_cache_dtype", "auto")
            if rest.get("alibi_slopes") is not None or rest.get("logits_soft_cap") or rest.get("sinks") is not None:
                raise NotImplementedError("strided attention has no ALiBi, soft cap or sinks")

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: StridedMetadata | None,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
        ) -> Tensor:
            if attn_metadata is None:  # a run that measures memory
                return output.fill_(0)
            slots = attn_metadata.slot_mapping
            # vLLM's own kernel, which knows its padding (-1) and quantised caches.
            triton_reshape_and_cache_flash(
                key, value, *kv_views(kv_cache), slots, self.kv_cache_dtype, layer._k_scale, layer._v_scale
            )
            return attend(query, kv_cache, attn_metadata, output, self.scale, self.window)

    class StridedBackend(AttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> type:
            return StridedImpl

        @staticmethod
        def get_builder_cls() -> type:
            return StridedBuilder

        @staticmethod
        def get_kv_cache_shape(
            num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
        ) -> tuple[int, ...]:
            return (num_blocks, 2, block_size, num_kv_heads, head_size)

        @classmethod
        def get_supported_head_sizes(cls) -> list[int]:
            return [64, 128, 256]

        @classmethod
        def supports_batch_invariance(cls) -> bool:
            return True

    return {"StridedBackend": StridedBackend, "StridedBuilder": StridedBuilder, "StridedImpl": StridedImpl}


def _speculator_class() -> type:
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

    class MaskSpeculator(BaseSpeculator):
        """Drafts for chain plans, from the MASK rows that the target model's own forward has computed."""

        def __init__(self, vllm_config: Any, device: torch.device):
            self.num_spec_tokens = vllm_config.speculative_config.num_speculative_tokens // 2
            self.mask_id = vllm_config.model_config.hf_config.mask_token_id
            self.num_drafts = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device)

        def load_model(self, target_model: Any) -> None:
            self.model = target_model

        def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
            """Nothing to capture: there is no draft model."""

        def capture(self) -> None:
            """Nothing to capture."""

        def propose(
            self,
            input_batch: Any,
            attn_metadata: dict[str, Any],
            slot_mappings: dict[str, Tensor],
            last_hidden_states: Tensor,
            aux_hidden_states: list[Tensor] | None,
            num_sampled: Tensor,
            num_rejected: Tensor,
            *rest: Any,
            **more: Any,
        ) -> Tensor:
            where, starts = input_batch.idx_mapping, input_batch.query_start_loc[: input_batch.num_reqs + 1]
            # A prompt's last chunk has no MASK rows yet: as if its drafts had been rejected.
            decodes = starts[1:] - starts[:-1] == 1 + 2 * self.num_spec_tokens
            num_drafts = torch.where(decodes, self.num_drafts[where], -1)
            rows = mask_rows(starts, num_drafts.clamp(min=0), self.num_spec_tokens).clamp(
                max=last_hidden_states.shape[0] - 1
            )
            drafts = self.model.compute_logits(last_hidden_states[rows.flatten()]).argmax(-1).view(rows.shape)
            tokens, self.num_drafts[where] = speculative_tokens(drafts, starts, num_drafts, num_rejected, self.mask_id)
            return tokens

    return MaskSpeculator
