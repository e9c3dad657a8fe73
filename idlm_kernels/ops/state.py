"""`advance`: the end of a step, on the device.

Contract: design sections 3 and 5.2. Commits the emitted tokens, applies stop ids and the length limit, and leaves the
state that the next step starts from. Pages need no move: they are reserved for the whole window ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idlm_kernels._deprecated import renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._register import register, run_op


@renamed(finish="finish_reason")
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
    """Move the state of every running request forward by the outcome of one step.

    Commits the first tokens of `tokens` up to and including the first stop id, as far as `length_limits` allow.

    Args:
        num_accepted: int32 [B], tokens: int64 [B, N], next_drafts: int64 [B, N - 1], next_num_drafts: int32 [B]: the
            results of `verify_accept`.
        text: int64 [B, max_len], committed tokens; written at lengths .. lengths + emitted - 1.
        lengths: int32 [B], L; updated. At least 1 and at most max_len.
        drafts: int64 [B, N - 1]; updated.
        num_drafts: int32 [B]; updated (0 for a request that ends).
        length_limits: int32 [B], the largest L; at most max_len.
        stop_ids: int64 [B, S], padded with -1.
        finish_reason: int32 [B], 0 running, 1 stopped by an id, 2 length limit; updated. Requests that are not
            running, or had no rows, do not change.
        out: int32 [B]; allocated when None.

    Returns:
        The number of tokens committed per request, int32 [B].

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: a step that accepted one draft commits two tokens; 6 is a stop id.

        >>> text, lengths = torch.tensor([[3, 1, 0, 0, 0, 0]]), torch.tensor([2]).int()
        >>> drafts, num_drafts, finish_reason = torch.tensor([[5]]), torch.tensor([1]).int(), torch.tensor([0]).int()
        >>> advance(
        ...     torch.tensor([1]).int(), torch.tensor([[5, 6]]), torch.tensor([[8]]), torch.tensor([1]).int(),
        ...     text=text, lengths=lengths, drafts=drafts, num_drafts=num_drafts,
        ...     length_limits=torch.tensor([6]).int(), stop_ids=torch.tensor([[6]]), finish_reason=finish_reason)
        tensor([2], dtype=torch.int32)
        >>> text, lengths, finish_reason
        (tensor([[3, 1, 5, 6, 0, 0]]), tensor([4], dtype=torch.int32), tensor([1], dtype=torch.int32))
    """
    op, device = "advance", check.device_of("advance", "tokens", tokens)
    check.tensor(op, "tokens", tokens, (None, None), check.INT64, device)
    batch, width = tokens.shape
    if width == 0:
        raise ValueError(f"{op}: tokens have no columns, wanted at least 1")
    for name, x in (
        ("num_accepted", num_accepted),
        ("next_num_drafts", next_num_drafts),
        ("lengths", lengths),
        ("num_drafts", num_drafts),
        ("length_limits", length_limits),
        ("finish_reason", finish_reason),
    ):
        check.tensor(op, name, x, (batch,), check.INT32, device)
    check.tensor(op, "next_drafts", next_drafts, (batch, width - 1), check.INT64, device)
    check.tensor(op, "drafts", drafts, (batch, width - 1), check.INT64, device)
    check.tensor(op, "text", text, (batch, None), check.INT64, device)
    check.tensor(op, "stop_ids", stop_ids, (batch, None), check.INT64, device)
    if out is not None:
        check.tensor(op, "out", out, (batch,), check.INT32, device)
    results = (num_accepted, tokens, next_drafts, next_num_drafts)
    written = (("text", text), ("lengths", lengths), ("drafts", drafts), ("num_drafts", num_drafts))
    check.all_writable(
        op, (*written, ("finish_reason", finish_reason), ("out", out)), *results, length_limits, stop_ids
    )
    state = dict(written) | {"length_limits": length_limits, "stop_ids": stop_ids, "finish_reason": finish_reason}
    return run_op(op, results, state, out)


register(
    "advance",
    "Tensor num_accepted, Tensor tokens, Tensor next_drafts, Tensor next_num_drafts, *, Tensor! text, Tensor! lengths, "
    "Tensor! drafts, Tensor! num_drafts, Tensor length_limits, Tensor stop_ids, Tensor! finish_reason",
    lambda num_accepted, *rest: torch.empty_like(num_accepted),
)
