"""The state of a batch on a CPU: one call of the compiled kernels for each op, the reference without them."""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import native
from python_ref import StepState
from python_ref.step import OUTCOME, Planned, token_logprobs


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
    finish_reason: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Move the state of every running request forward in place; returns num_emitted int32 [B]; see the reference."""
    library = native.library()
    small = (num_accepted, next_num_drafts, lengths, num_drafts, length_limits, finish_reason)
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
            finish_reason=finish_reason,
            out=out,
        )
    emitted = torch.empty(len(lengths), dtype=torch.int32)
    move = native.Move(
        *(x.data_ptr() for x in (num_accepted, tokens, next_drafts, next_num_drafts, stop_ids, length_limits)),
        *(x.stride(0) for x in (tokens, next_drafts, stop_ids, text, drafts)),
        *(len(lengths), tokens.shape[1], drafts.shape[1], stop_ids.shape[1]),
        *(x.data_ptr() for x in (text, drafts, lengths, num_drafts, finish_reason, emitted)),
    )
    library.idlm_cpu_advance(ctypes.byref(move))
    return emitted if out is None else out.copy_(emitted)


# A state is asked for at every step, and its tensors stay where they are.
_structs: WeakKeyDictionary[StepState, native.State] = WeakKeyDictionary()


def _struct(state: StepState) -> native.State:
    """The state as the kernels take it. That its tensors have no gaps is part of the contract."""
    struct = _structs.get(state)
    if struct is None:
        tables = (state.text, state.drafts, state.stop_ids, state.page_table)
        text, drafts, stop_ids, page_table = tables
        struct = _structs[state] = native.State(
            *(
                x.data_ptr()
                for x in (text, drafts, state.lengths, state.num_drafts, state.draft_source, state.finish_reason)
            ),
            *(x.data_ptr() for x in (state.max_drafts, state.length_limits, state.error_flags)),
            *(x.data_ptr() for x in (stop_ids, page_table, state.seed)),
            *(x.stride(0) for x in tables),
            len(state.lengths),
            *(x.shape[1] for x in tables),
        )
    return struct


def plan_rows(
    state: StepState, mask_id: int, page_size: int, *, quadratic: bool, noise_below: int = 0, out: Planned | None = None
) -> Planned:
    """The rows of the next step of every running request, packed; see the reference."""
    library = native.library()
    if library is None:
        return python_ref.plan_rows(state, mask_id, page_size, quadratic=quadratic, noise_below=noise_below, out=out)
    if out is None:
        batch, num_spec_tokens = state.drafts.shape
        rows = batch * ((num_spec_tokens + 1) ** 2 if quadratic else 2 * num_spec_tokens + 1)
        ids, positions, slots, tree_mask = torch.empty(4, rows, dtype=torch.int64).unbind()
        seq_lens, starts = torch.empty(batch, dtype=torch.int32), torch.empty(batch + 1, dtype=torch.int32)
        out = ids, torch.empty(rows, dtype=torch.bool), positions, slots, tree_mask, seq_lens, starts
    plan = native.Plan(mask_id, noise_below, page_size, quadratic, out[0].shape[0], *(x.data_ptr() for x in out))
    library.idlm_cpu_plan_rows(ctypes.byref(_struct(state)), ctypes.byref(plan))
    return out


def commit_step(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    state: StepState,
    *,
    quadratic: bool = False,
    suffix: bool = False,
    acceptance: float | None = None,
    logits: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Move the state of every running request forward in place; returns what the host reads; see the reference."""
    library = native.library()
    if library is None:
        return python_ref.commit_step(
            *(num_accepted, tokens, next_drafts, next_num_drafts, state),
            quadratic=quadratic,
            suffix=suffix,
            acceptance=acceptance,
            logits=logits,
            query_start_loc=query_start_loc,
            out=out,
        )
    batch, width = tokens.shape
    end = len(OUTCOME) + width
    if out is None:
        out = torch.empty(batch, end if logits is None else end + width, dtype=torch.int64)
    commit = native.Commit(
        *(x.data_ptr() for x in (num_accepted, tokens, next_drafts, next_num_drafts, out)),
        *(x.stride(0) for x in (tokens, next_drafts, out)),
        *(-1.0 if acceptance is None else acceptance, quadratic, suffix),
    )
    library.idlm_cpu_commit_step(ctypes.byref(_struct(state)), ctypes.byref(commit))
    if logits is not None and query_start_loc is not None:
        logprobs = token_logprobs(logits, query_start_loc, out[:, len(OUTCOME) : end])
        out[:, end:] = logprobs.double().view(torch.int64)
    return out
