"""`plan_rows` and `commit_step`: what a step does besides the model, each in one launch.

Contract: design sections 3 and 5.2. Between the two lie the forward, `verify_accept` and, where the adapter has a head
for it, `rerank_drafts`.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from idlm_kernels._deprecated import renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register
from python_ref import StepState

Planned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_PLANNED = ("ids", "is_mask", "positions", "slot_mapping", "tree_mask", "seq_lens", "query_start_loc")
_STATE = tuple(field.name for field in dataclasses.fields(StepState))
_WRITTEN = ("text", "lengths", "drafts", "num_drafts", "draft_source", "finish_reason")
MAX_DRAFTS = {False: 31, True: 7}  # a row sees at most 64 slots of its step; by `quadratic`

# A state is asked for at every step. Once found to be in order, which metadata alone decide, it stays so. Kept are the
# spans of what is written.
_in_order: WeakKeyDictionary[StepState, list[tuple[int, int]]] = WeakKeyDictionary()


def _check_state(op: str, state: StepState) -> torch.device:
    if not isinstance(state, StepState):
        raise TypeError(f"{op}: state must be a StepState, got {type(state).__name__}")
    if not torch.compiler.is_compiling() and state in _in_order:
        return state.lengths.device
    device = check.device_of(op, "state.lengths", state.lengths)
    check.tensor(op, "state.lengths", state.lengths, (None,), check.INT32, device)
    batch = state.lengths.shape[0]
    for name in ("num_drafts", "max_drafts", "draft_source", "length_limits", "finish_reason", "error_flags"):
        check.tensor(op, f"state.{name}", getattr(state, name), (batch,), check.INT32, device)
    for name in ("text", "drafts", "stop_ids"):
        check.tensor(op, f"state.{name}", getattr(state, name), (batch, None), check.INT64, device)
    check.tensor(op, "state.page_table", state.page_table, (batch, None), check.INT32, device)
    check.tensor(op, "state.seed", state.seed, (batch,), check.INT64, device)
    for name in ("text", "page_table"):
        if getattr(state, name).shape[1] == 0:
            raise ValueError(f"{op}: state.{name} has no columns, wanted at least 1")
    read = (getattr(state, name) for name in _STATE if name not in _WRITTEN)
    check.all_writable(op, [(f"state.{name}", getattr(state, name)) for name in _WRITTEN], *read)
    if not torch.compiler.is_compiling() and all(type(x) is Tensor for x in _tensors(state)):
        _in_order[state] = [check.span(getattr(state, name)) for name in _WRITTEN]
    return device


@renamed(branched="quadratic")
def plan_rows(
    state: StepState, mask_id: int, page_size: int, *, quadratic: bool, noise_below: int = 0, out: Planned | None = None
) -> Planned:
    """The rows of the next step of every running request, packed, with padding last.

    A request with n drafts runs clean rows 0..n (pending, its drafts), then K MASK rows for each branch: branches
    0..n if `quadratic`, else branch n alone. T is B * R, where R is (K + 1)^2 if quadratic, else 2K + 1.

    Args:
        state: `lengths` (at least 1), `text`, `drafts` [B, K], `num_drafts` (0..K), `finish_reason` and `page_table`
            are read. K is at most 31, or 7 if quadratic.
        mask_id: the id of MASK rows.
        page_size: tokens of a page.
        quadratic: whether there is a branch after every draft (the quadratic plan).
        noise_below: if not 0, MASK rows have ids drawn from 1 .. noise_below - 1 instead of mask_id, by the request's
            seed, the row's place and its position.
        out: the seven results, to write into; allocated when None.

    Returns:
        ids int64 [T]; is_mask bool [T]; positions int64 [T]; slot_mapping int64 [T] (-1 beyond the pages of a
        request); tree_mask int64 [T], as `strided_attention` takes it (plain causal rows without branches); seq_lens
        int32 [B], these rows included, 0 for a request that does not run; query_start_loc int32 [B + 1]. Padding rows
        have slot -1, and zeros.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: pending and one draft, with a MASK row after the draft.

        >>> def ints(*values):
        ...     return torch.tensor(values, dtype=torch.int32)
        >>> state = StepState(
        ...     text=torch.tensor([[3, 1, 4, 0, 0]]), lengths=ints(3), drafts=torch.tensor([[7]]), num_drafts=ints(1),
        ...     max_drafts=ints(1), draft_source=ints(1), length_limits=ints(5), stop_ids=torch.tensor([[-1]]),
        ...     finish_reason=ints(0), error_flags=ints(0), page_table=ints(2).view(1, 1), seed=torch.tensor([0]))
        >>> ids, is_mask, positions, slots, _, seq_lens, _ = plan_rows(state, 9, 16, quadratic=False)
        >>> ids, positions, slots, seq_lens
        (tensor([4, 7, 9]), tensor([2, 3, 4]), tensor([34, 35, 36]), tensor([5], dtype=torch.int32))
    """
    op = "plan_rows"
    device = _check_state(op, state)
    check.positive(op, "mask_id", mask_id, 0)
    check.positive(op, "page_size", page_size)
    check.positive(op, "noise_below", noise_below, 0)
    if noise_below == 1:
        raise ValueError(f"{op}: noise_below is 1, which leaves no id to draw")
    if not isinstance(quadratic, bool):
        raise TypeError(f"{op}: quadratic must be a bool, got {type(quadratic).__name__}")
    batch, num_spec_tokens = state.drafts.shape
    if num_spec_tokens > MAX_DRAFTS[quadratic]:
        raise ValueError(f"{op}: state.drafts has {num_spec_tokens} columns, wanted at most {MAX_DRAFTS[quadratic]}")
    if out is not None:
        if len(out) != len(_PLANNED):
            raise ValueError(f"{op}: out has {len(out)} tensors, wanted {len(_PLANNED)}")
        rows = batch * _max_rows(num_spec_tokens, quadratic)
        dtypes = (check.INT64, (torch.bool,), check.INT64, check.INT64, check.INT64, check.INT32, check.INT32)
        sizes = (rows, rows, rows, rows, rows, batch, batch + 1)
        for i, (x, dtype, size) in enumerate(zip(out, dtypes, sizes, strict=True)):
            check.tensor(op, f"out[{i}]", x, (size,), dtype, device)
        check.all_writable(op, [(f"out[{i}]", x) for i, x in enumerate(out)], *_tensors(state))
    if not traced(state.lengths):
        return implementation(op, device.type)(
            state, mask_id, page_size, quadratic=quadratic, noise_below=noise_below, out=out
        )
    if out is None:
        return torch.ops.idlm.plan_rows(*_tensors(state), mask_id, page_size, quadratic, noise_below)
    torch.ops.idlm.plan_rows_out(*_tensors(state), mask_id, page_size, quadratic, noise_below, *out)
    return out


@renamed(branched="quadratic")
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
    """Move the state of every running request forward by the outcome of one step; give the host all that it reads.

    As `advance` does: commits tokens up to and including the first stop id, as far as the length limits allow. A
    request whose error_flags say that a row was NaN, or had no finite logit, commits nothing and ends with
    finish_reason 4.

    Args:
        num_accepted: int32 [B], tokens: int64 [B, N], next_drafts: int64 [B, N - 1], next_num_drafts: int32 [B]: the
            results of `verify_accept`, the drafts possibly re-ranked.
        state: `text`, `lengths`, `drafts`, `num_drafts`, `draft_source` and `finish_reason` are written. draft_source:
            0 no drafts, 1 those of MASK rows, 2 those of the text. A request has at most max_drafts drafts.
        quadratic: whether the step was of a quadratic plan; for `acceptance` alone.
        suffix: draft what followed the last earlier occurrence of the end of the text: after a match of 2 tokens
            where MASK rows gave no draft, of 6 in place of theirs. With `match` only.
        acceptance: do not verify, but accept each draft with this probability, drawn from the request's own noise.
            To measure speed; the text is noise.
        logits: [T, V], bf16, fp16, fp32 or fp64, of the step: the outcome then has logprobs.
        query_start_loc: int32 [B + 1], of the step; with logits.
        out: int64 [B, 6 + N], or [B, 6 + 2N] with logits; allocated when None.

    Returns:
        int64 [B, 6 + N]: the drafts that were verified, num_accepted, the tokens committed, finish_reason, error_flags,
        draft_source of those drafts, then the tokens. With logits N more columns: log softmax of the logits at each
        token, before temperature and truncation, as the bits of an fp64; 0 where there is no token.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: a step that accepted one draft commits two tokens; 6 is a stop id.

        >>> def ints(*values):
        ...     return torch.tensor(values, dtype=torch.int32)
        >>> state = StepState(
        ...     text=torch.tensor([[3, 1, 0, 0, 0]]), lengths=ints(2), drafts=torch.tensor([[5]]), num_drafts=ints(1),
        ...     max_drafts=ints(1), draft_source=ints(1), length_limits=ints(5), stop_ids=torch.tensor([[6]]),
        ...     finish_reason=ints(0), error_flags=ints(0), page_table=ints(2).view(1, 1), seed=torch.tensor([0]))
        >>> commit_step(ints(1), torch.tensor([[5, 6]]), torch.tensor([[8]]), ints(1), state)
        tensor([[1, 1, 2, 1, 0, 1, 5, 6]])
        >>> state.text, state.lengths
        (tensor([[3, 1, 5, 6, 0]]), tensor([4], dtype=torch.int32))
    """
    op = "commit_step"
    device = _check_state(op, state)
    batch, num_spec_tokens = state.drafts.shape
    for name, x in (("num_accepted", num_accepted), ("next_num_drafts", next_num_drafts)):
        check.tensor(op, name, x, (batch,), check.INT32, device)
    check.tensor(op, "tokens", tokens, (batch, num_spec_tokens + 1), check.INT64, device)
    check.tensor(op, "next_drafts", next_drafts, (batch, num_spec_tokens), check.INT64, device)
    for name, flag in (("quadratic", quadratic), ("suffix", suffix)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(flag).__name__}")
    if acceptance is not None:
        check.number(op, "acceptance", acceptance)
        if not torch.compiler.is_compiling() and not 0 <= acceptance <= 1:
            raise ValueError(f"{op}: acceptance is {acceptance}, wanted a probability")
    if (logits is None) != (query_start_loc is None):
        raise ValueError(f"{op}: logits and query_start_loc go together, wanted both or neither")
    if logits is not None and query_start_loc is not None:
        check.tensor(op, "logits", logits, (None, None), check.FLOATS, device)
        check.tensor(op, "query_start_loc", query_start_loc, (batch + 1,), check.INT32, device)
        if logits.numel() == 0 and batch:
            raise ValueError(f"{op}: logits have shape {list(logits.shape)}, wanted a row and a column at least")
    columns = 6 + (num_spec_tokens + 1) * (1 if logits is None else 2)
    if out is not None:
        check.tensor(op, "out", out, (batch, columns), check.INT64, device)
    read = (num_accepted, tokens, next_drafts, next_num_drafts, logits, query_start_loc)
    if out is not None:
        check.all_writable(op, [("out", out)], *_tensors(state), *read)
    spans = None if torch.compiler.is_compiling() else _in_order.get(state)
    if spans is None or not check.apart(spans + [check.span(x) for x in read if x is not None]):
        check.all_writable(op, [(f"state.{name}", getattr(state, name)) for name in _WRITTEN], *read)
    results = (num_accepted, tokens, next_drafts, next_num_drafts)
    options = (quadratic, suffix, acceptance, logits, query_start_loc)
    if traced(tokens):
        if out is None:
            return torch.ops.idlm.commit_step(*results, *_tensors(state), *options)
        torch.ops.idlm.commit_step_out(*results, *_tensors(state), *options, out)
        return out
    return implementation(op, device.type)(
        *results,
        state,
        quadratic=quadratic,
        suffix=suffix,
        acceptance=acceptance,
        logits=logits,
        query_start_loc=query_start_loc,
        out=out,
    )


def _max_rows(num_spec_tokens: int, quadratic: bool) -> int:
    return (num_spec_tokens + 1) ** 2 if quadratic else 2 * num_spec_tokens + 1


def _tensors(state: StepState) -> list[Tensor]:
    return [getattr(state, name) for name in _STATE]


def _state(arguments: dict[str, Any]) -> StepState:
    """The state of which a registered op has the tensors; they are taken out of its arguments."""
    return StepState(**{name: arguments.pop(name) for name in _STATE})


def _run_plan(**arguments: Any) -> Planned | None:
    state = _state(arguments)
    out = tuple(arguments.pop(name) for name in _PLANNED) if "ids" in arguments else None
    planned: Planned = implementation("plan_rows", state.lengths.device.type)(state, out=out, **arguments)
    return planned if out is None else None


def _run_commit(**arguments: Any) -> Any:
    return implementation("commit_step", arguments["tokens"].device.type)(state=_state(arguments), **arguments)


def _fake_plan(*arguments: Any) -> Planned:
    lengths, drafts, quadratic = arguments[1], arguments[2], arguments[-2]
    batch, num_spec_tokens = drafts.shape
    rows = batch * _max_rows(num_spec_tokens, quadratic)
    ids, positions, slots, tree_mask = (drafts.new_empty(rows) for _ in range(4))
    starts = lengths.new_empty(batch + 1)
    return ids, drafts.new_empty(rows, dtype=torch.bool), positions, slots, tree_mask, lengths.new_empty(batch), starts


def _fake_commit(*arguments: Any) -> Tensor:
    tokens, logits = arguments[1], arguments[-2]
    return tokens.new_empty(tokens.shape[0], 6 + tokens.shape[1] * (1 if logits is None else 2))


register(
    "plan_rows",
    f"{', '.join(f'Tensor {name}' for name in _STATE)}, SymInt mask_id, SymInt page_size, *, bool quadratic, "
    "SymInt noise_below",
    _fake_plan,
    out=", ".join(f"Tensor! {name}" for name in _PLANNED),
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_plan,
)
register(
    "commit_step",
    "Tensor num_accepted, Tensor tokens, Tensor next_drafts, Tensor next_num_drafts, "
    + ", ".join(f"Tensor{'!' * (name in _WRITTEN)} {name}" for name in _STATE)
    + ", *, bool quadratic, bool suffix, float? acceptance, Tensor? logits, Tensor? query_start_loc",
    _fake_commit,
    run=_run_commit,
)
