"""What belongs together, from the launch to the device functions.

Triton passes a tuple on as its elements, so a struct costs nothing on the device. It specialises every element of a
tuple that a kernel is given: an integer for the value 1, a pointer for whether it begins at a multiple of 16 bytes. So
what must not decide which kernel is compiled (numbers that change between steps, the state of some requests) is a flat
argument of a kernel, which makes its structs of them.

Fields are given by name inside of kernels: Triton's cache knows the source of a kernel, not the order of these. What
the compiler knows of a call is a struct of numbers, flags and tuples of them: Triton writes it into its cache as JSON.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from python_ref import DraftDistributions


class Logits(NamedTuple):
    data: Any  # [T, V]
    bias: Any  # [T, V] or None
    stride: Any
    stride_bias: Any
    vocab_size: Any

    @classmethod
    def of(cls, logits: Tensor, bias: Tensor | None) -> Logits:
        return cls(logits, bias, logits.stride(0), 0 if bias is None else bias.stride(0), logits.shape[1])


class LogitsRow(NamedTuple):
    """One row, or as many as there are ids to look up, and what its transform takes."""

    logits: Logits
    row: Any  # int64
    temperature: Any
    id_limit: Any
    mask_id: Any


class Slices(NamedTuple):
    """What the slices of rows hold, each [T, slices]."""

    score: Any  # fp32: the best
    ids: Any  # int32: its id
    flags: Any  # int32
    # Where distributions are wanted, fp32:
    max: Any  # the largest kept z
    total: Any  # the sum of exp(z - max) over what is kept
    least: Any  # the least kept z


class SamplingParameters(NamedTuple):
    """By request, or by row."""

    temperature: Any  # fp32 [B]
    top_k: Any  # int32 [B]
    top_p: Any  # fp32 [B]
    min_p: Any  # fp32 [B]
    seed: Any  # int64 [B]


class DraftLogits(NamedTuple):
    """Of the distributions of drafts what a kernel may be compiled for."""

    logits: Any  # [B, K, V]
    stride_request: Any
    stride_draft: Any
    stride_cut: Any
    stride_log_norm: Any

    @classmethod
    def of(cls, draft_dists: DraftDistributions | None) -> DraftLogits:
        """None: of a call that has none."""
        if draft_dists is None:
            return cls(None, 0, 0, 0, 0)
        request, draft, _ = draft_dists.logits.stride()
        return cls(draft_dists.logits, request, draft, draft_dists.cut.stride(0), draft_dists.log_norm.stride(0))


class DraftDistributionArgs(NamedTuple):
    """What `DraftDistributions` is on the host."""

    of: DraftLogits
    cut: Any  # fp32 [B, K]
    log_norm: Any  # fp32 [B, K]
