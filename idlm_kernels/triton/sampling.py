"""sample_rows and verify_accept.

    token of a row = argmax over kept ids of z + g,    z = logit / T,    g = Gumbel noise of (seed, position, id)

Three launches, none of them sorts: the cut of what is truncated (truncation.py), the best of every slice of every row
(perturb.py), and the choice among the slices: here for sample_rows, in decision.py for `match`. `rejection` takes one
more, in rejection.py. IEEE throughout: division is rounded, nothing is flushed to zero. Ties go to the lowest id
everywhere. fp64 is left to the references.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from idlm_kernels.triton.decision import Step, best_of_slices, decide
from idlm_kernels.triton.perturb import sampled_slices
from idlm_kernels.triton.rejection import judge
from idlm_kernels.triton.structs import Logits, SamplingParameters
from python_ref import STREAM_TARGET, DraftDistributions


@triton.jit(do_not_specialize=["num_rows", "mask_id"], do_not_specialize_on_alignment=["gOut", "gErrorFlags"])
def _pick_kernel(
    slices,  # Slices
    gOut,  # int64 [T]
    gErrorFlags,  # int32 [T]
    num_rows,
    mask_id,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
):
    follow_previous_launch()
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = row < num_rows
    token, error_flags = best_of_slices(slices, row, has_row, mask_id, SLICES, BLOCK_SLICES)
    tl.store(gOut + row, token.to(tl.int64), mask=has_row)
    if HAS_FLAGS:
        tl.store(gErrorFlags + row, tl.load(gErrorFlags + row, mask=has_row, other=0) | error_flags, mask=has_row)


def sample_rows(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    stream: int = STREAM_TARGET,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.sample_rows`."""
    parameters = SamplingParameters(temperature, top_k, top_p, min_p, seed)
    if logits.dtype == torch.float64 or (logit_bias is not None and logit_bias.dtype == torch.float64):
        return python_ref.sample_rows(
            logits,
            positions,
            *parameters,
            id_limit,
            mask_id,
            stream=stream,
            logit_bias=logit_bias,
            error_flags=error_flags,
            out=out,
        )
    num_rows = logits.shape[0]
    y = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows == 0:
        return y
    sampled = sampled_slices(Logits.of(logits, logit_bias), positions, parameters, id_limit, mask_id, stream)
    block_rows = 32
    launch(
        _pick_kernel,
        (triton.cdiv(num_rows, block_rows),),
        logits,
        sampled.slices,
        y,
        error_flags,
        num_rows,
        mask_id,
        SLICES=sampled.count,
        BLOCK_SLICES=next_power_of_2(sampled.count),
        BLOCK_ROWS=block_rows,
        HAS_FLAGS=error_flags is not None,
        num_warps=4,
    )
    return y


def verify_accept(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    quadratic: bool,
    rule: str,
    draft_dists: DraftDistributions | None = None,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `idlm_kernels.verify_accept`."""
    parameters = SamplingParameters(temperature, top_k, top_p, min_p, seed)
    batch, num_spec_tokens = drafts.shape
    is_fp64 = logits.dtype == torch.float64 or (logit_bias is not None and logit_bias.dtype == torch.float64)
    if is_fp64 or batch == 0:
        return python_ref.verify_accept(
            logits,
            query_start_loc,
            num_drafts,
            drafts,
            positions,
            *parameters,
            id_limit,
            mask_id,
            quadratic=quadratic,
            rule=rule,
            draft_dists=draft_dists,
            logit_bias=logit_bias,
            error_flags=error_flags,
            out=out,
        )
    if out is None:
        a, count = (torch.empty(batch, dtype=torch.int32, device=logits.device) for _ in range(2))
        tokens = drafts.new_empty(batch, num_spec_tokens + 1)
        out = (a, tokens, drafts.new_empty(batch, num_spec_tokens), count)
    step = Step(
        Logits.of(logits, logit_bias),
        query_start_loc,
        num_drafts,
        drafts,
        positions,
        parameters,
        id_limit,
        mask_id,
        quadratic,
        error_flags,
        out,
    )
    sampled = sampled_slices(
        step.logits,
        positions,
        parameters,
        id_limit,
        mask_id,
        STREAM_TARGET,
        query_start_loc,
        num_drafts,
        num_spec_tokens,
        quadratic,
        with_distribution=rule == "rejection",
    )
    if rule == "rejection":
        assert draft_dists is not None
        return judge(sampled, step, draft_dists)
    return decide(sampled, step)
