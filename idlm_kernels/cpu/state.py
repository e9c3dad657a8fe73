"""The end of a step on a CPU: one call of the compiled kernels, the reference without them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import native


def advance(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    *,
    text: Tensor,
    lengths: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    length_limits: Tensor,
    stop_ids: Tensor,
    finish: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Move the state of every running request forward in place; returns num_emitted int32 [B]; see the reference."""
    library = native.library()
    small = (num_accepted, next_num_drafts, lengths, num_drafts, length_limits, finish)
    large = (tokens, next_drafts, text, drafts, stop_ids)
    if (
        library is None
        or any(x.dtype != torch.int32 or not x.is_contiguous() for x in small)
        or any(x.dtype != torch.int64 or (x.stride(1) != 1 and x.shape[1] > 1) for x in large)
    ):
        return python_ref.advance(
            num_accepted,
            tokens,
            next_drafts,
            next_num_drafts,
            text=text,
            lengths=lengths,
            drafts=drafts,
            num_drafts=num_drafts,
            length_limits=length_limits,
            stop_ids=stop_ids,
            finish=finish,
            out=out,
        )
    emitted = torch.empty(len(lengths), dtype=torch.int32)
    move = native.Move(
        *(x.data_ptr() for x in (num_accepted, tokens, next_drafts, next_num_drafts, stop_ids, length_limits)),
        *(x.stride(0) for x in (tokens, next_drafts, stop_ids, text, drafts)),
        *(len(lengths), tokens.shape[1], drafts.shape[1], stop_ids.shape[1]),
        *(x.data_ptr() for x in (text, drafts, lengths, num_drafts, finish, emitted)),
    )
    library.idlm_cpu_advance(ctypes.byref(move))
    return emitted if out is None else out.copy_(emitted)
