"""Drafts chosen again by a re-ranking head, each with the token before it in view.

Contract: design sections 3 and 5.5. Drafts may come from anywhere, so the output of `match` does not change; for
`rejection` the distributions that the drafts are drawn from are kept.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from idlm_kernels._deprecated import renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register
from idlm_kernels.ops.sampling import check_logits, check_parameters, with_draft_dists
from python_ref import DraftDistributions


@renamed(q_state="draft_dists")
def rerank_drafts(
    logits: Tensor,
    hidden: Tensor,
    first_mask: Tensor,
    previous: Tensor,
    positions: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    embedding: Tensor,
    head_rows: Tensor,
    from_hidden: Tensor,
    from_previous: Tensor,
    from_state: Tensor,
    to_query: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    draft_dists: DraftDistributions | None = None,
    greedy: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the drafts of the next step again, after `verify_accept`, with the re-ranking head of an adapter.

    For draft j, from MASK row j of the branch that goes on, with x = unit(hidden row), e = unit(embedding of the token
    before it) and unit(x) = x / rms(x):

        s_j = silu(from_hidden x + from_previous e + from_state s_{j-1}),    u = to_query s_j

    The row's 32 best ids that may be sampled (the lowest of ties) gain head_rows[id] . u, and the draft is sampled
    among them by the transform and the noise of `sample_rows`: with stream 0, the noise of its position, or, if
    draft_dists is given, with stream 1. A NaN score counts as -inf; without a finite score the lowest allowed id is
    taken. In fp32 at least, fp64 for fp64 logits.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64; V up to 262,144.
        hidden: [T, H], of the same rows: what the LM head is given.
        first_mask: int32 [B], the row of the first of a request's K MASK rows (beyond the last one: that one).
        previous: int64 [B], the new pending token; one that is no row of the embedding is read as the nearest.
        positions: int32 [B], of `previous`; the drafts are those of the K positions after it.
        drafts: int64 [B, K], as `verify_accept` gave them.
        num_drafts: int32 [B]; where it is 0 the drafts stay as they are and draft_dists is not touched.
        temperature, top_k, top_p, min_p, seed: [B], as in `sample_rows`.
        embedding: [at least id_limit, H], of tokens.
        head_rows: [at least id_limit, H], of the LM head.
        from_hidden: [W, H], and from_previous [W, H], from_state [W, W], to_query [H, W]: the head, W its width.
        id_limit: ids from here on are never sampled; mask_id: nor is this one; -1 when there is none.
        draft_dists: given for `rejection`, as to `verify_accept`: overwritten with the distributions of the new drafts.
        greedy: the caller knows that all temperatures are below 1e-4. Spares work, changes no result.
        out: int64 [B, K]; allocated when None.

    Returns:
        The drafts, int64 [B, K].

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: the row says 3, the head adds 5 to the score of 4 (H = W = 2, one draft).

        >>> logits, hidden = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
        >>> one, zero, eye = torch.ones(1), torch.zeros(1), torch.eye(2)
        >>> head_rows = torch.zeros(5, 2)
        >>> head_rows[4] = 5.0
        >>> rerank_drafts(
        ...     logits, hidden, first_mask=zero.int(), previous=torch.tensor([0]), positions=torch.tensor([9]).int(),
        ...     drafts=torch.tensor([[3]]), num_drafts=one.int(), temperature=zero, top_k=zero.int(), top_p=one,
        ...     min_p=zero, seed=torch.tensor([0]), embedding=torch.ones(5, 2), head_rows=head_rows,
        ...     from_hidden=eye, from_previous=eye, from_state=eye, to_query=eye, id_limit=5, mask_id=-1)
        tensor([[4]])
    """
    op = "rerank_drafts"
    check_logits(op, logits, id_limit, mask_id, None)
    device, (num_rows, vocab_size) = logits.device, logits.shape
    check.tensor(op, "hidden", hidden, (num_rows, None), check.FLOATS, device)
    check.tensor(op, "drafts", drafts, (None, None), check.INT64, device)
    (batch, num_spec_tokens), size = drafts.shape, hidden.shape[1]
    check.positive(op, "hidden's last dimension", size)
    if num_rows == 0 and batch:
        raise ValueError(f"{op}: logits have no rows but there are {batch} requests; pad to one row at least")
    for name, x in (("first_mask", first_mask), ("positions", positions), ("num_drafts", num_drafts)):
        check.tensor(op, name, x, (batch,), check.INT32, device)
    check.tensor(op, "previous", previous, (batch,), check.INT64, device)
    check_parameters(op, batch, device, temperature, top_k, top_p, min_p, seed)
    for name, x in (("embedding", embedding), ("head_rows", head_rows)):
        check.tensor(op, name, x, (None, size), check.FLOATS, device)
        if x.shape[0] < id_limit:
            raise ValueError(f"{op}: {name} has {x.shape[0]} rows, wanted at least id_limit = {id_limit}")
    check.tensor(op, "from_hidden", from_hidden, (None, size), check.FLOATS, device)
    width = from_hidden.shape[0]
    check.positive(op, "from_hidden's first dimension", width)
    check.tensor(op, "from_previous", from_previous, (width, size), check.FLOATS, device)
    check.tensor(op, "from_state", from_state, (width, width), check.FLOATS, device)
    check.tensor(op, "to_query", to_query, (size, width), check.FLOATS, device)
    if not isinstance(greedy, bool):
        raise TypeError(f"{op}: greedy must be a bool, got {type(greedy).__name__}")
    distributions: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if draft_dists is not None:
        if not isinstance(draft_dists, DraftDistributions):
            raise TypeError(f"{op}: draft_dists must be a DraftDistributions, got {type(draft_dists).__name__}")
        acc = torch.promote_types(logits.dtype, torch.float32)
        check.tensor(
            op,
            "draft_dists.logits",
            draft_dists.logits,
            (batch, num_spec_tokens, vocab_size),
            (logits.dtype, acc),
            device,
        )
        check.tensor(op, "draft_dists.cut", draft_dists.cut, (batch, num_spec_tokens), (acc,), device)
        check.tensor(op, "draft_dists.log_norm", draft_dists.log_norm, (batch, num_spec_tokens), (acc,), device)
        distributions = (draft_dists.logits, draft_dists.cut, draft_dists.log_norm)
    if out is not None:
        check.tensor(op, "out", out, (batch, num_spec_tokens), check.INT64, device)
    request = (first_mask, previous, positions, drafts, num_drafts, temperature, top_k, top_p, min_p, seed)
    weights = (embedding, head_rows, from_hidden, from_previous, from_state, to_query)
    written = [
        *zip(("draft_dists.logits", "draft_dists.cut", "draft_dists.log_norm"), distributions, strict=True),
        ("out", out),
    ]
    check.all_writable(op, written, logits, hidden, *request, *weights)
    if traced(logits):
        args = (logits, hidden, *request, *weights, id_limit, mask_id, greedy, *distributions)
        if out is None:
            return torch.ops.idlm.rerank_drafts(*args)
        torch.ops.idlm.rerank_drafts_out(*args, out)
        return out
    run = implementation(op, device.type)
    return run(logits, hidden, *request, *weights, id_limit, mask_id, draft_dists=draft_dists, greedy=greedy, out=out)


register(
    "rerank_drafts",
    "Tensor logits, Tensor hidden, Tensor first_mask, Tensor previous, Tensor positions, Tensor drafts, "
    "Tensor num_drafts, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor embedding, "
    "Tensor head_rows, Tensor from_hidden, Tensor from_previous, Tensor from_state, Tensor to_query, SymInt id_limit, "
    "SymInt mask_id, *, bool greedy, Tensor!? q_logits, Tensor!? q_cut, Tensor!? q_log_norm",
    lambda logits, hidden, first_mask, previous, positions, drafts, *rest: drafts.new_empty(drafts.shape),
    run=partial(with_draft_dists, "rerank_drafts"),
)
