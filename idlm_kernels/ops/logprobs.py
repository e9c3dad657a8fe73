"""`top_logprobs`: what else the model thought likely where a step committed tokens.

Contract: design section 5.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register

MAX_LISTED = 32  # ids of a token, in every backend


def top_logprobs(
    logits: Tensor,
    query_start_loc: Tensor,
    tokens: Tensor,
    count: int,
    id_limit: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at each place where a step committed one, and their logprobs.

    They are of the logits that are given: of the model's own distribution, before penalties, temperature and
    truncation, where those of the model are given. A committed token has here the logprob that `commit_step` reports.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64, of the step.
        query_start_loc: int32 [B + 1], of the step; row i of a request gives its token i.
        tokens: int64 [B, N], of `verify_accept`; negative where there is none.
        count: how many are listed for each token, at most 32 and at most id_limit.
        id_limit: ids from here on are not listed (the tokenizer's size); they are part of the distribution.
        out: the two results, to write into; allocated when None.

    Returns:
        ids int64 [B, N, count], the likeliest first and the lowest of ties first, and their logprobs fp32 (fp64 of fp64
        logits), [B, N, count]. Without a token: ids of -1, and 0. A NaN comes last.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: two tokens of one request; a third row was not accepted.

        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0], [9.0, 0.0, 0.0]])
        >>> starts, tokens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[1, 2, -1]])
        >>> ids, logprobs = top_logprobs(logits, starts, tokens, count=2, id_limit=3)
        >>> ids.tolist()
        [[[1, 2], [0, 2], [-1, -1]]]
        >>> logprobs[0, 0]
        tensor([-0.4076, -1.4076])
    """
    op = "top_logprobs"
    device = check.device_of(op, "logits", logits)
    check.tensor(op, "logits", logits, (None, None), check.FLOATS, device)
    check.tensor(op, "tokens", tokens, (None, None), check.INT64, device)
    batch, width = tokens.shape
    check.tensor(op, "query_start_loc", query_start_loc, (batch + 1,), check.INT32, device)
    check.positive(op, "count", count)
    check.positive(op, "id_limit", id_limit)
    if count > MAX_LISTED or count > id_limit:
        raise ValueError(f"{op}: count is {count}, wanted at most {min(MAX_LISTED, id_limit)}")
    if id_limit > logits.shape[1]:
        raise ValueError(f"{op}: id_limit is {id_limit}, wanted at most the {logits.shape[1]} columns of logits")
    if len(logits) == 0 and batch:
        raise ValueError(f"{op}: logits have no rows but there are {batch} requests; pad to one row at least")
    if out is not None:
        if len(out) != 2:
            raise ValueError(f"{op}: out has {len(out)} tensors, wanted 2")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        check.tensor(op, "out[0]", out[0], (batch, width, count), check.INT64, device)
        check.tensor(op, "out[1]", out[1], (batch, width, count), (dtype,), device)
        check.all_writable(op, [("out[0]", out[0]), ("out[1]", out[1])], logits, query_start_loc, tokens)
    arguments = (logits, query_start_loc, tokens, count, id_limit)
    if not traced(logits):
        result: tuple[Tensor, Tensor] = implementation(op, device.type)(*arguments, out=out)
        return result
    if out is None:
        result = torch.ops.idlm.top_logprobs(*arguments)
        return result
    torch.ops.idlm.top_logprobs_out(*arguments, *out)
    return out


def _run(**arguments: Any) -> tuple[Tensor, Tensor] | None:
    function = implementation("top_logprobs", arguments["logits"].device.type)
    if "ids" not in arguments:
        result: tuple[Tensor, Tensor] = function(**arguments)
        return result
    out = arguments.pop("ids"), arguments.pop("logprobs")
    function(out=out, **arguments)
    return None


def _fake(logits: Tensor, query_start_loc: Tensor, tokens: Tensor, count: int, id_limit: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (*tokens.shape, count), torch.promote_types(logits.dtype, torch.float32)
    return tokens.new_empty(shape), logits.new_empty(shape, dtype=dtype)


register(
    "top_logprobs",
    "Tensor logits, Tensor query_start_loc, Tensor tokens, SymInt count, SymInt id_limit",
    _fake,
    out="Tensor! ids, Tensor! logprobs",
    returns="(Tensor, Tensor)",
    run=_run,
)
