"""What a decode step does around its forward, by the compiled kernels: all of it where every request decodes greedily,
row by row where one does not.

Each function returns None where the kernels are absent or do not take the call; the general way then computes it.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from idlm_kernels.cpu import native
from idlm_kernels.cpu.native import PackedWeight
from python_ref.contract import GREEDY_BELOW

_MASK32 = 0xFFFFFFFF

Decided = tuple[Tensor, Tensor, Tensor, Tensor]


def _rows_are_dense(*tensors: Tensor) -> bool:
    return all(x.stride(-1) == 1 or x.shape[-1] <= 1 for x in tensors)


def verify_greedy(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    temperature: Tensor,
    id_limit: int,
    mask_id: int,
    quadratic: bool,
) -> Decided | None:
    """`verify_accept` with rule="match"; None too where NaN, infinity or a draft beyond the vocabulary is met."""
    library = native.library()
    if library is None or logits.dtype != torch.float32 or logits.shape[0] == 0 or not _rows_are_dense(logits, drafts):
        return None
    small = (query_start_loc.dtype, num_drafts.dtype, drafts.dtype, temperature.dtype)
    if small != (torch.int32, torch.int32, torch.int64, torch.float32):
        return None
    batch, num_spec_tokens = drafts.shape
    query_start_loc, num_drafts = query_start_loc.contiguous(), num_drafts.contiguous()
    temperature = temperature.contiguous()
    counts = torch.empty(2, batch, dtype=torch.int32)
    tokens = torch.empty(batch, num_spec_tokens + 1, dtype=torch.int64)
    next_drafts = torch.empty(batch, num_spec_tokens, dtype=torch.int64)
    decision = native.Decision(
        logits.data_ptr(),
        query_start_loc.data_ptr(),
        num_drafts.data_ptr(),
        drafts.data_ptr(),
        temperature.data_ptr(),
        logits.stride(0),
        drafts.stride(0),
        logits.shape[1],
        id_limit,
        mask_id,
        logits.shape[0],
        batch,
        num_spec_tokens,
        quadratic,
        counts.data_ptr(),
        tokens.data_ptr(),
        next_drafts.data_ptr(),
        counts[1].data_ptr(),
        GREEDY_BELOW,
    )
    if library.idlm_cpu_verify_greedy(ctypes.byref(decision)):
        return None
    return counts[0], tokens, next_drafts, counts[1]


def draw(
    logits: Tensor,
    id_limit: int,
    mask_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
    stream: int,
) -> int | None:
    """The token of one row of logits fp32 [V] with temperature, truncation and noise; None too where the row holds
    NaN, or its largest logit is not finite."""
    library = native.library()
    if library is None or logits.dtype != torch.float32 or not _rows_are_dense(logits):
        return None
    count = min(id_limit, logits.shape[0])
    where = position & _MASK32  # as the reference counts: modulo 2^32
    drawing = native.Drawing(
        logits.data_ptr(), count, mask_id, seed, where, temperature, top_p, min_p, min(top_k, count), stream
    )
    found = int(library.idlm_cpu_draw(ctypes.byref(drawing)))
    return None if found < 0 else found


class Sampling(NamedTuple):
    """What the requests of a step sample with, each [B]: top_k int32, seed int64, the others fp32."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def rerank(
    logits: Tensor,
    hidden: Tensor,
    first_mask: Tensor,
    previous: Tensor,
    positions: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    sampling: Sampling,
    embedding: Tensor | PackedWeight,
    head: Tensor | PackedWeight,
    small: tuple[Tensor, Tensor, Tensor, Tensor],
    id_limit: int,
    mask_id: int,
) -> Tensor | None:
    """`rerank_drafts` without a draft_dists. small: from_hidden, from_previous, from_state, to_query.

    Of candidates within rounding of each other another one may be chosen than the reference chooses.
    """
    library = native.library()
    if library is None or logits.dtype != torch.float32 or hidden.dtype != torch.float32 or logits.shape[0] == 0:
        return None
    (kind, address, count), (head_kind, head_address, head_count) = _table(embedding), _table(head)
    if kind is None or head_kind is None or hidden.shape[1] % 16 or min(count, head_count) < id_limit:
        return None
    if small[0].shape[0] % 16 or any(x.dtype != torch.float32 or not x.is_contiguous() for x in small):
        return None
    ints = (first_mask.dtype, num_drafts.dtype, positions.dtype, sampling.top_k.dtype)
    if ints != (torch.int32,) * 4 or not drafts.is_contiguous():
        return None
    floats = (sampling.temperature.dtype, sampling.top_p.dtype, sampling.min_p.dtype)
    if floats != (torch.float32,) * 3 or sampling.seed.dtype != torch.int64:
        return None
    if not (hidden.is_contiguous() and _rows_are_dense(logits)):
        return None
    first_mask, previous, num_drafts = first_mask.contiguous(), previous.contiguous(), num_drafts.contiguous()
    positions, sampling = positions.contiguous(), Sampling(*(x.contiguous() for x in sampling))
    out = torch.empty_like(drafts)
    reranking = native.Reranking(
        logits.data_ptr(),
        hidden.data_ptr(),
        first_mask.data_ptr(),
        previous.data_ptr(),
        drafts.data_ptr(),
        num_drafts.data_ptr(),
        address,
        head_address,
        *(x.data_ptr() for x in small),
        logits.stride(0),
        count,
        id_limit,
        mask_id,
        *drafts.shape,
        logits.shape[0],
        hidden.shape[1],
        small[0].shape[0],
        kind,
        head_kind,
        isinstance(head, PackedWeight),
        out.data_ptr(),
        sampling.temperature.data_ptr(),
        sampling.top_p.data_ptr(),
        sampling.min_p.data_ptr(),
        sampling.top_k.data_ptr(),
        positions.data_ptr(),
        sampling.seed.data_ptr(),
        GREEDY_BELOW,
    )
    fault = library.idlm_cpu_rerank(ctypes.byref(reranking), torch.get_num_threads())
    if fault is not None:
        raise RuntimeError(f"rerank_drafts: {fault.decode()}")
    return out


def _table(x: Tensor | PackedWeight) -> tuple[int | None, int, int]:
    """Kind, address and rows; no kind where the kernels do not take it."""
    if isinstance(x, PackedWeight):
        return x.kind, x.address, x.n
    return native.DTYPES.get(x.dtype) if x.is_contiguous() else None, x.data_ptr(), x.shape[0]
