"""Rows of logits as the sampling kernels see them: the transform of their values, and whose they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from python_ref.contract import FLAG_BAD_DRAFT, FLAG_EMPTY_ROW, FLAG_INF, FLAG_NAN, GREEDY_BELOW

kGreedyBelow = tl.constexpr(GREEDY_BELOW)
kLargest = tl.constexpr(3.4028234663852886e38)
kNan, kInf = tl.constexpr(FLAG_NAN), tl.constexpr(FLAG_INF)
kEmptyRow, kBadDraft = tl.constexpr(FLAG_EMPTY_ROW), tl.constexpr(FLAG_BAD_DRAFT)
kFinite = tl.constexpr(1 << 30)  # inner bit: the slice has a finite logit
kNoId = tl.constexpr(0x7FFFFFFF)


@triton.jit
def transformed(row, id_):
    """z of ids of a LogitsRow, -inf where it cannot be sampled, and where a NaN and where a +inf stood."""
    # Loaded up to the width of the table, whose alignment the compiler knows; then cut down to what is allowed.
    logits = row.logits
    inside = id_ < logits.vocab_size
    x = tl.load(logits.data + row.row * logits.stride + id_, mask=inside, other=0.0).to(tl.float32)
    if logits.bias is not None:
        x += tl.load(logits.bias + row.row * logits.stride_bias + id_, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((id_ < row.id_limit) & (id_ != row.mask_id), x, float("-inf"))
    is_nan, is_inf = x != x, x == float("inf")
    x = tl.where(is_nan, float("-inf"), tl.where(is_inf, kLargest, x))
    divisor = tl.where(row.temperature < kGreedyBelow, 1.0, row.temperature)
    z = tl.div_rn(x, tl.zeros_like(x) + divisor)
    z = tl.where(x == float("-inf"), x, tl.minimum(tl.maximum(z, -kLargest), kLargest))
    return tl.where(z == 0.0, 0.0, z), is_nan, is_inf  # -0.0 and 0.0 tie


@triton.jit
def key_of(z):
    """Integers in the order of z."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The z of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest_id(mask_id):
    """The id of a row without a finite logit."""
    return tl.where(mask_id == 0, 1, 0)


@triton.jit
def request_of(gQueryStart, row, batch, BLOCK_BATCH: tl.constexpr):
    """The request that a row belongs to, `batch` for a row of none."""
    b = tl.arange(0, BLOCK_BATCH)
    ends = tl.load(gQueryStart + 1 + b, mask=b < batch, other=0x7FFFFFFF)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


class Span(NamedTuple):
    """A request's part of a step."""

    request: Any
    start: Any  # its first row
    m_rows: Any
    n: Any  # how many drafts it has


@triton.jit
def span_of(gQueryStart, gNumDrafts, request, num_spec_tokens):
    start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - start
    return Span(
        request=request, start=start, m_rows=m_rows, n=draft_count(gNumDrafts, request, m_rows, num_spec_tokens)
    )


@triton.jit
def draft_count(gNumDrafts, request, m_rows, num_spec_tokens):
    return tl.minimum(
        tl.maximum(tl.load(gNumDrafts + request), 0), tl.minimum(tl.maximum(m_rows - 1, 0), num_spec_tokens)
    )


@triton.jit
def or_(a, b):
    return a | b
