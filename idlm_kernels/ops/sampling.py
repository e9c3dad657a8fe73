"""Sampling of rows, and verify-and-accept.

Contract: design sections 3, 4 and 5.2. The noise of a token is a function of (seed, position, id, stream) alone, so in
rule `match` the output of a decode is token for token what AR sampling with the same seed gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlm_kernels._deprecated import renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register, run_op
from python_ref import STREAM_ACCEPT, STREAM_DRAFT, STREAM_TARGET, DraftDistributions

RULES = ("match", "rejection")
MAX_VOCAB = 262_144
_LOGITS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_logits(op: str, logits: Tensor, id_limit: int, mask_id: int, logit_bias: Tensor | None) -> None:
    check.tensor(op, "logits", logits, (None, None), _LOGITS, check.device_of(op, "logits", logits))
    vocab_size = logits.shape[1]
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"{op}: logits have {vocab_size} columns, wanted 1 to {MAX_VOCAB}")
    check.positive(op, "id_limit", id_limit)
    if id_limit > vocab_size:
        raise ValueError(f"{op}: id_limit is {id_limit}, wanted at most the {vocab_size} columns of logits")
    check.positive(op, "mask_id", mask_id, -1)
    if mask_id >= vocab_size:
        raise ValueError(f"{op}: mask_id is {mask_id}, wanted -1 (none) or an id below {vocab_size}")
    if mask_id == 0 and id_limit == 1:
        raise ValueError(f"{op}: id_limit = 1 and mask_id = 0 leave no id to sample")
    if logit_bias is not None:
        check.tensor(op, "logit_bias", logit_bias, tuple(logits.shape), _LOGITS, logits.device)


def check_parameters(
    op: str,
    count: int,
    device: torch.device,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
) -> None:
    for name, x in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check.tensor(op, name, x, (count,), (torch.float32,), device)
    check.tensor(op, "top_k", top_k, (count,), check.INT32, device)
    check.tensor(op, "seed", seed, (count,), check.INT64, device)


@renamed(status="error_flags")
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
    """Sample one token per row: argmax of (kept logits / T + Gumbel noise). Parameters are values, never branches.

    The transform of a row: ids from `id_limit` on and `mask_id` become -inf; NaN becomes -inf, +inf the largest finite
    value; divide by T; keep the top_k largest (all ties of the last), then the smallest set of the most probable
    that reaches mass top_p (ties too), then those of at least min_p times the largest probability.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64; V up to 262,144.
        positions: int32 or int64 [T], of the *predicted* tokens (the row's own position + 1).
        temperature: fp32 [T]; below 1e-4 the row is an argmax, ties to the lowest id.
        top_k: int32 [T]; 0 is off.
        top_p: fp32 [T]; 1 is off.
        min_p: fp32 [T]; 0 is off.
        seed: int64 [T], read as 64 bits.
        id_limit: ids from here on are never sampled (the tokenizer's size).
        mask_id: this id is never sampled either; -1 when there is none.
        stream: 0 target, 1 drafts of `rejection`, 2 acceptance.
        logit_bias: [T, V], added to the logits first (penalties, grammars).
        error_flags: int32 [T]; bits are or-ed in: 1 a NaN, 2 a +inf, 4 no finite logit (the lowest allowed id then).
        out: int64 [T]; allocated when None.

    Returns:
        Token ids, int64 [T].

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: greedy, and sampled with a seed.

        >>> logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> sample_rows(logits, torch.tensor([7, 7]), torch.tensor([0.0, 1.0]), zero.int(), one, zero,
        ...             torch.tensor([1, 1]), id_limit=3, mask_id=-1)
        tensor([1, 2])
    """
    op = "sample_rows"
    check_logits(op, logits, id_limit, mask_id, logit_bias)
    device, count = logits.device, logits.shape[0]
    check.tensor(op, "positions", positions, (count,), (torch.int32, torch.int64), device)
    check_parameters(op, count, device, temperature, top_k, top_p, min_p, seed)
    if stream not in (STREAM_TARGET, STREAM_DRAFT, STREAM_ACCEPT):
        raise ValueError(f"{op}: stream is {stream}, wanted 0 (target), 1 (draft) or 2 (acceptance)")
    if error_flags is not None:
        check.tensor(op, "error_flags", error_flags, (count,), check.INT32, device)
    if out is not None:
        check.tensor(op, "out", out, (count,), check.INT64, device)
    inputs = (logits, positions, temperature, top_k, top_p, min_p, seed, logit_bias)
    check.all_writable(op, (("error_flags", error_flags), ("out", out)), *inputs)
    args = (logits, positions, temperature, top_k, top_p, min_p, seed, id_limit, mask_id)
    return run_op(op, args, {"stream": stream, "logit_bias": logit_bias, "error_flags": error_flags}, out)


@renamed(mode="rule", branched="quadratic", q_state="draft_dists", status="error_flags")
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
    """Decide a step: which drafts are accepted, the token after them, and the drafts of the next step.

    Rows of a request: clean rows 0..n (pending, its n drafts), then K MASK rows for each branch: branches 0..n if
    `quadratic`, else branch n alone; without MASK rows (AR) nothing is proposed. Clean row i gives y_i for position
    L + i, where L = positions + 1.

    `match`: y_i as by `sample_rows` with stream 0. A draft is accepted iff it equals y_i and all before it are
    accepted. New drafts are sampled from MASK rows with the same noise. The output is that of AR sampling, whatever
    the drafts.
    `rejection`: a draft x of the distribution q is accepted iff u q(x) < p(x). In place of the first that is rejected
    comes a sample of max(0, p - q), renormalised (of p where that is empty). Exact in distribution. New drafts are
    sampled with stream 1.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64; V up to 262,144.
        query_start_loc: int32 [B + 1]; a request without rows is a no-op.
        num_drafts: int32 [B], n.
        drafts: int64 [B, K], K from 0 up; the first n count.
        positions: int32 [B], of pending (L - 1).
        temperature, top_k, top_p, min_p, seed: [B], as in `sample_rows`.
        id_limit, mask_id: as in `sample_rows`.
        quadratic: whether there is a branch after every draft (the quadratic plan).
        rule: "match" or "rejection".
        draft_dists: the distributions of the current drafts, needed by `rejection`; overwritten with those of the next.
            Its logits have the dtype of `logits`, or fp32; all of it is fp64 for fp64 logits.
        logit_bias: [T, V], added to the logits first, in fp32. With `rejection` draft_dists.logits must then be fp32.
        error_flags: int32 [B]; bits are or-ed in: 1, 2, 4 as in `sample_rows` for any row used, 8 a draft id or draft
            count out of range (the draft is rejected, the token is of p).
        out: the four results, to write into; allocated when None.

    Returns:
        num_accepted int32 [B] (a); tokens int64 [B, K + 1] (d_1..d_a, y_a, then -1); next_drafts int64 [B, K] (-1
        where there is none); next_num_drafts int32 [B] (K, or 0 without the branch). A request without rows yields
        0, -1, -1, 0.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: I-DLM, arXiv 2604.11035; branches after every draft (quadratic decoding): Samragh et al., arXiv 2507.11851;
    the rejection rule: Leviathan et al., arXiv 2211.17192.

    Example: two drafts, the first of which is what clean row 0 gives; the second is not. No MASK rows.

        >>> logits = torch.nn.functional.one_hot(torch.tensor([5, 6, 7]), 10).float()
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> num_accepted, tokens, next_drafts, next_num_drafts = verify_accept(
        ...     logits, torch.tensor([0, 3]).int(), torch.tensor([2]).int(), torch.tensor([[5, 9]]),
        ...     torch.tensor([11]).int(), zero, zero.int(), one, zero, torch.tensor([0]),
        ...     id_limit=10, mask_id=-1, quadratic=False, rule="match")
        >>> num_accepted, tokens, next_drafts
        (tensor([1], dtype=torch.int32), tensor([[ 5,  6, -1]]), tensor([[-1, -1]]))
    """
    op = "verify_accept"
    check_logits(op, logits, id_limit, mask_id, logit_bias)
    device = logits.device
    check.tensor(op, "drafts", drafts, (None, None), check.INT64, device)
    batch, num_spec_tokens = drafts.shape
    check.tensor(op, "query_start_loc", query_start_loc, (batch + 1,), check.INT32, device)
    check.tensor(op, "num_drafts", num_drafts, (batch,), check.INT32, device)
    check.tensor(op, "positions", positions, (batch,), check.INT32, device)
    check_parameters(op, batch, device, temperature, top_k, top_p, min_p, seed)
    if logits.shape[0] == 0 and batch:
        raise ValueError(f"{op}: logits have no rows but there are {batch} requests; pad to one row at least")
    if not isinstance(quadratic, bool):
        raise TypeError(f"{op}: quadratic must be a bool, got {type(quadratic).__name__}")
    if rule not in RULES:
        raise ValueError(f"{op}: rule is {rule!r}, wanted one of {', '.join(RULES)}")
    if error_flags is not None:
        check.tensor(op, "error_flags", error_flags, (batch,), check.INT32, device)
    state: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if rule == "rejection":
        if draft_dists is None:
            raise ValueError(f"{op}: rule 'rejection' needs a draft_dists (DraftDistributions.empty)")
        if not isinstance(draft_dists, DraftDistributions):
            raise TypeError(f"{op}: draft_dists must be a DraftDistributions, got {type(draft_dists).__name__}")
        acc = torch.promote_types(logits.dtype, torch.float32)
        dtypes = (acc,) if logit_bias is not None else (logits.dtype, acc)
        check.tensor(
            op, "draft_dists.logits", draft_dists.logits, (batch, num_spec_tokens, logits.shape[1]), dtypes, device
        )
        check.tensor(op, "draft_dists.cut", draft_dists.cut, (batch, num_spec_tokens), (acc,), device)
        check.tensor(op, "draft_dists.log_norm", draft_dists.log_norm, (batch, num_spec_tokens), (acc,), device)
        state = (draft_dists.logits, draft_dists.cut, draft_dists.log_norm)
    elif draft_dists is not None:
        raise ValueError(f"{op}: draft_dists is for rule 'rejection', wanted None with {rule!r}")
    if out is not None:
        if len(out) != 4:
            raise ValueError(f"{op}: out has {len(out)} tensors, wanted 4")
        check.tensor(op, "out[0]", out[0], (batch,), check.INT32, device)
        check.tensor(op, "out[1]", out[1], (batch, num_spec_tokens + 1), check.INT64, device)
        check.tensor(op, "out[2]", out[2], (batch, num_spec_tokens), check.INT64, device)
        check.tensor(op, "out[3]", out[3], (batch,), check.INT32, device)
    written = [
        ("error_flags", error_flags),
        *zip(("draft_dists.logits", "draft_dists.cut", "draft_dists.log_norm"), state, strict=True),
    ]
    written += [(f"out[{i}]", x) for i, x in enumerate(out or ())]
    inputs = (logits, query_start_loc, num_drafts, drafts, positions, temperature, top_k, top_p, min_p, seed)
    check.all_writable(op, written, *inputs, logit_bias)
    if traced(logits):
        args = (logits, query_start_loc, num_drafts, drafts, positions, temperature, top_k, top_p, min_p, seed)
        options = (id_limit, mask_id, quadratic, rule, *state, logit_bias, error_flags)
        if out is None:
            return torch.ops.idlm.verify_accept(*args, *options)
        torch.ops.idlm.verify_accept_out(*args, *options, *out)
        return out
    return implementation(op, device.type)(
        logits,
        query_start_loc,
        num_drafts,
        drafts,
        positions,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        id_limit,
        mask_id,
        quadratic=quadratic,
        rule=rule,
        draft_dists=draft_dists,
        logit_bias=logit_bias,
        error_flags=error_flags,
        out=out,
    )


def with_draft_dists(
    op: str, q_logits: Tensor | None, q_cut: Tensor | None, q_log_norm: Tensor | None, **arguments: Any
) -> Any:
    """The backend of an op whose registered form takes the parts of a DraftDistributions."""
    state = None
    if q_logits is not None and q_cut is not None and q_log_norm is not None:
        state = DraftDistributions(q_logits, q_cut, q_log_norm)
    return implementation(op, arguments["logits"].device.type)(draft_dists=state, **arguments)


def _run(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if "tokens" not in arguments:
        return with_draft_dists("verify_accept", **arguments)
    out = tuple(arguments.pop(name) for name in ("num_accepted", "tokens", "next_drafts", "next_num_drafts"))
    with_draft_dists("verify_accept", out=out, **arguments)
    return None


def _fake_results(logits: Tensor, query_start_loc: Tensor, num_drafts: Tensor, drafts: Tensor, *rest: Any) -> Any:
    batch, num_spec_tokens = drafts.shape
    return (
        drafts.new_empty(batch, dtype=torch.int32),
        drafts.new_empty(batch, num_spec_tokens + 1),
        drafts.new_empty(batch, num_spec_tokens),
        drafts.new_empty(batch, dtype=torch.int32),
    )


register(
    "sample_rows",
    "Tensor logits, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
    "SymInt id_limit, SymInt mask_id, *, SymInt stream, Tensor? logit_bias, Tensor!? error_flags",
    lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
register(
    "verify_accept",
    "Tensor logits, Tensor query_start_loc, Tensor num_drafts, Tensor drafts, Tensor positions, Tensor temperature, "
    "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, SymInt id_limit, SymInt mask_id, *, bool quadratic, "
    "str rule, Tensor!? q_logits, Tensor!? q_cut, Tensor!? q_log_norm, Tensor? logit_bias, Tensor!? error_flags",
    _fake_results,
    out="Tensor! num_accepted, Tensor! tokens, Tensor! next_drafts, Tensor! next_num_drafts",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    run=_run,
)
