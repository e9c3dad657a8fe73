"""SGLang: its token pool and tree masks under this library's ops. See docs/hosting.md.

The functions are plain torch and tested on a CPU. `register` needs SGLang; it is called from a plugin's entry point
(group sglang.srt.plugins) with the worker that runs a step:

    sglang serve --model-path MODEL --attention-backend idlm --speculative-algorithm IDLM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import idlm_kernels


@dataclass
class StridedMetadata:
    """What attention needs of a batch."""

    query_start_loc: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B], the rows of this step included
    page_table: Tensor  # int32 [B, max_pages]
    max_query_len: int
    tree_mask: Tensor | None  # int64 [T]


def page_views(buffer: Tensor, page_size: int) -> Tensor:
    """A layer's buffer [slots, Hkv, D] as [pages, page_size, Hkv, D]: a view. Slots beyond whole pages are left out."""
    pages = buffer.shape[0] // page_size
    return buffer[: pages * page_size].view(pages, page_size, *buffer.shape[1:])


def page_table(req_to_token: Tensor, req_pool_indices: Tensor, page_size: int) -> Tensor:
    """int32 [B, max_pages] out of the slot of each token [requests, max_context]; a page's slots follow each other."""
    return (req_to_token[req_pool_indices.long(), ::page_size] // page_size).to(torch.int32)


def tree_mask_of(custom_mask: Tensor, seq_lens: Tensor, num_rows: int) -> Tensor:
    """int64 [B * num_rows] out of the mask of a verify step.

    custom_mask: bool, for each request num_rows x (seq_len + num_rows) entries, one request after the other, possibly
    more at the end. seq_lens: [B] without the step's rows. A row sees all earlier slots, whatever its entries say.
    """
    length = seq_lens.long()
    sizes = num_rows * (length + num_rows)
    start = sizes.cumsum(0) - sizes
    i = torch.arange(num_rows, device=custom_mask.device)
    row = start.view(-1, 1) + i * (length + num_rows).view(-1, 1) + length.view(-1, 1)  # [B, m]
    bits = custom_mask[row.unsqueeze(2) + i].long() << i
    return bits.sum(2).flatten()


def metadata_of(forward_batch: Any, req_to_token: Tensor, page_size: int) -> StridedMetadata:
    """Of a ForwardBatch: one row per request (decode), the same number (verify), or prompts (extend)."""
    mode, seq_lens = forward_batch.forward_mode, forward_batch.seq_lens
    batch, tree_mask = seq_lens.shape[0], None
    if mode.is_decode_or_idle():
        counts, most = torch.ones_like(seq_lens), 1
    elif mode.is_target_verify():
        most = forward_batch.spec_info.draft_token_num
        if forward_batch.spec_info.custom_mask is not None:
            tree_mask = tree_mask_of(forward_batch.spec_info.custom_mask, seq_lens, most)
        counts, seq_lens = torch.full_like(seq_lens, most), seq_lens + most
    else:
        counts, most = forward_batch.extend_seq_lens, max(forward_batch.extend_seq_lens_cpu)
    query_start_loc = torch.zeros(batch + 1, dtype=torch.int32, device=seq_lens.device)
    query_start_loc[1:] = counts.cumsum(0)
    table = page_table(req_to_token, forward_batch.req_pool_indices, page_size)
    return StridedMetadata(query_start_loc, seq_lens.to(torch.int32), table, most, tree_mask)


def attend(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, metadata: StridedMetadata, page_size: int, scale: float
) -> Tensor:
    """Attention of [T, Hq, D] over a layer's buffers, which hold the step's K and V already."""
    return idlm_kernels.strided_attention(
        q,
        page_views(k_buffer, page_size),
        page_views(v_buffer, page_size),
        metadata.page_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        tree_mask=metadata.tree_mask,
        max_query_len=metadata.max_query_len,
        sm_scale=scale,
    )


def verify(
    logits: Tensor, input_ids: Tensor, num_drafts: Tensor, seq_lens: Tensor, sampling: dict[str, Tensor], **how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`verify_accept` of a verify step whose rows are pending, K places for drafts, and MASK rows, R for each request.

    logits: [B * R, V]. input_ids: int64 [B, R]. num_drafts: int32 [B], all K or 0 (a chain without drafts has its MASK
    rows behind pending). seq_lens: [B] without the step's rows, so that pending stands on position seq_len. sampling:
    temperature, top_k, top_p, min_p, seed. how: id_limit, mask_id, quadratic, rule; num_spec_tokens.

    The rows that a request does not use lie at the end of its R and are left out.
    """
    batch, width = input_ids.shape
    num_spec_tokens, quadratic = how.pop("num_spec_tokens"), how["quadratic"]
    used = 1 + num_drafts + ((num_drafts + 1) if quadratic else 1) * num_spec_tokens
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=logits.device)
    starts[1:] = used.cumsum(0)
    t = torch.arange(batch * width, device=logits.device)
    request = torch.searchsorted(starts[1:], t, right=True).clamp(max=batch - 1)
    row = request * width + (t - starts[request]).clamp(max=width - 1)
    drafts = input_ids[:, 1 : 1 + num_spec_tokens].contiguous()
    return idlm_kernels.verify_accept(
        logits[row], starts, num_drafts, drafts, seq_lens.to(torch.int32), **sampling, **how
    )


def register(worker: type) -> None:
    """Make the attention backend "idlm" and the algorithm IDLM known. worker: a BaseSpecWorker (see the page)."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.server_args import add_attention_backend_choices
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    class StridedBackend(AttentionBackend):
        def __init__(self, runner: Any):
            super().__init__()
            self.req_to_token, self.page_size = runner.req_to_token_pool.req_to_token, runner.page_size
            self.metadata: StridedMetadata | None = None

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.metadata = metadata_of(forward_batch, self.req_to_token, self.page_size)

        def forward_extend(
            self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
        ) -> Tensor:
            pool = forward_batch.token_to_kv_pool
            if save_kv_cache:
                pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
            assert self.metadata is not None  # init_forward_metadata comes first
            rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            buffers = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
            return attend(rows, *buffers, self.metadata, self.page_size, layer.scaling).flatten(1)

        forward_decode = forward_extend

    def check(server_args: Any) -> None:
        if server_args.speculative_eagle_topk not in (None, 1):
            raise ValueError("IDLM drafts chains: leave --speculative-eagle-topk out")

    add_attention_backend_choices(["idlm"])
    register_attention_backend("idlm")(StridedBackend)
    SpeculativeAlgorithm.register("IDLM", supports_overlap=False, validate_server_args=check)(
        lambda server_args: worker
    )
