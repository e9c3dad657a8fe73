"""apply_penalties: one launch, in place.

What a request has before a row is one list: its biased ids, its text, its drafts. A CTA takes 128 entries of it, finds
which of them are the first of their id, and counts each id in the text by comparing with all of it; then it changes
that id in all rows of the request, adding what the drafts before a row count. So every logit has one writer, which
counts in integers: no scratch, no atomics, nothing that depends on an order. Requests that ask for nothing, and entries
beyond the list, end at once.

Work: length^2 comparisons per request, length scattered logits per row. At 1,024 tokens that is a million comparisons
over 8 CTAs; at 32,768 it is 1.1e9 over 256, two passes of an H100's 16,896 lanes over 64 thousand each. Bytes: the text
once per CTA out of L2, a sector of 32 per logit that is changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from idlm_kernels.triton.rows import span_of
from python_ref import Penalties

kEntries = tl.constexpr(128)  # of a CTA
kCompared = tl.constexpr(64)  # at a time


class History(NamedTuple):
    """The list of a request: biased ids, then its text, then its drafts."""

    bias_ids: Any  # int64 [S]
    text: Any  # int64 [max_len]
    drafts: Any  # int64 [K]
    num_biases: Any
    length: Any
    num_drafts: Any
    vocab_size: Any


@triton.jit
def _entries(history, i):
    """Ids of entries i of the list, -1 where there is none, or none of the vocabulary."""
    is_bias = i < history.num_biases
    token = tl.load(history.bias_ids + i, mask=is_bias, other=-1)
    place = i - history.num_biases
    is_text = ~is_bias & (place < history.length)
    token = tl.where(is_text, tl.load(history.text + place, mask=is_text, other=-1), token)
    place -= history.length
    is_draft = (place >= 0) & (place < history.num_drafts)
    token = tl.where(is_draft, tl.load(history.drafts + place, mask=is_draft, other=-1), token)
    return tl.where(token < history.vocab_size, token, -1)


@triton.jit(
    do_not_specialize=[
        "num_spec_tokens",
        "num_biases",
        "max_len",
        "stride_drafts",
        "stride_text",
        "stride_ids",
        "stride_bias",
    ],
    do_not_specialize_on_alignment=[
        *("gLogits", "gQueryStart", "gNumDrafts", "gDrafts", "gText", "gLengths", "gPromptLengths"),
        *("gPresence", "gFrequency", "gRepetition", "gBiasIds", "gBias"),
    ],
)
def _penalties_kernel(
    gLogits,  # [T, V], changed in place
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gText,  # [B, max_len]
    gLengths,  # [B]
    gPromptLengths,  # [B]
    gPresence,  # [B]
    gFrequency,  # [B]
    gRepetition,  # [B]
    gBiasIds,  # [B, S]
    gBias,  # [B, S]
    num_spec_tokens,
    num_biases,
    max_len,
    vocab_size,
    stride_logits,
    stride_drafts,
    stride_text,
    stride_ids,
    stride_bias,
    QUADRATIC: tl.constexpr,
    BLOCK_BIASES: tl.constexpr,
):
    follow_previous_launch()
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * kEntries
    span = span_of(gQueryStart, gNumDrafts, b, num_spec_tokens)
    length = tl.minimum(tl.load(gLengths + b), max_len)
    presence, frequency = tl.load(gPresence + b), tl.load(gFrequency + b)
    repetition = tl.load(gRepetition + b)
    s = tl.arange(0, BLOCK_BIASES)
    largest = tl.max(tl.load(gBiasIds + b * stride_ids + s, mask=s < num_biases, other=-1), axis=0)
    asks = (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0) | (largest >= 0)
    if asks & (span.m_rows > 0) & (first < num_biases + length + span.n):
        history = History(
            bias_ids=gBiasIds + b * stride_ids,
            text=gText + b * stride_text,
            drafts=gDrafts + b * stride_drafts,
            num_biases=num_biases,
            length=length,
            num_drafts=span.n,
            vocab_size=vocab_size,
        )
        prompt_length = tl.load(gPromptLengths + b)
        i = first + tl.arange(0, kEntries)
        token = _entries(history, i)
        is_first = token >= 0
        in_prompt, in_output = tl.zeros([kEntries], tl.int32), tl.zeros([kEntries], tl.int32)
        for start in range(0, num_biases + length + span.n, kCompared):
            other = start + tl.arange(0, kCompared)
            equal = token[:, None] == _entries(history, other)[None, :]
            is_first &= tl.sum((equal & (other[None, :] < i[:, None])).to(tl.int32), axis=1) == 0
            place = other - num_biases
            is_prompt = (place >= 0) & (place < length) & (place < prompt_length)
            is_output = (place >= 0) & (place < length) & (place >= prompt_length)
            in_prompt += tl.sum((equal & is_prompt[None, :]).to(tl.int32), axis=1)
            in_output += tl.sum((equal & is_output[None, :]).to(tl.int32), axis=1)
        is_biased = i < num_biases
        bias = tl.load(gBias + b * stride_bias + i, mask=is_biased, other=0.0)
        for r in range(span.m_rows):
            visible = r
            if r > span.n:
                visible = span.n
                if QUADRATIC:
                    visible = tl.minimum((r - 1 - span.n) // tl.maximum(num_spec_tokens, 1), span.n)
            count = in_output
            for j in range(visible):
                count += (token == tl.load(history.drafts + j)).to(tl.int32)
            is_seen = (in_prompt > 0) | (count > 0)
            is_changed = is_first & (is_biased | is_seen)
            gLogit = gLogits + (span.start + r).to(tl.int64) * stride_logits + token
            x = tl.load(gLogit, mask=is_changed, other=0.0).to(tl.float32)
            x = tl.where(is_biased, x + bias, x)
            x = tl.where(is_seen, tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition), x)
            x = x - frequency * count.to(tl.float32) - presence * (count > 0).to(tl.float32)
            tl.store(gLogit, x.to(gLogits.dtype.element_ty), mask=is_changed)


def apply_penalties(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    text: Tensor,
    lengths: Tensor,
    penalties: Penalties,
    *,
    quadratic: bool,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.apply_penalties`."""
    (batch, num_spec_tokens), num_biases = drafts.shape, penalties.bias_ids.shape[1]
    if batch == 0 or logits.dtype == torch.float64:
        return python_ref.apply_penalties(
            *(logits, query_start_loc, num_drafts, drafts, text, lengths, penalties), quadratic=quadratic, out=out
        )
    if out is None:
        out = logits.clone()
    elif out.data_ptr() != logits.data_ptr():
        out.copy_(logits)
    launch(
        _penalties_kernel,
        (batch, -(-(num_biases + text.shape[1] + num_spec_tokens) // kEntries.value)),
        logits,
        out,
        query_start_loc,
        num_drafts,
        drafts,
        text,
        lengths,
        penalties.prompt_lengths,
        penalties.presence,
        penalties.frequency,
        penalties.repetition,
        penalties.bias_ids,
        penalties.bias,
        num_spec_tokens,
        num_biases,
        text.shape[1],
        logits.shape[1],
        out.stride(0),
        drafts.stride(0),
        text.stride(0),
        penalties.bias_ids.stride(0),
        penalties.bias.stride(0),
        QUADRATIC=quadratic,
        BLOCK_BIASES=next_power_of_2(num_biases),
        num_warps=4,
    )
    return out
