"""`apply_penalties`: presence, frequency and repetition penalties, and biases of single tokens.

Contract: design sections 3 and 5.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register
from python_ref import Penalties

_PENALTIES = tuple(field.name for field in dataclasses.fields(Penalties))


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
    """The logits of a step with biases added and tokens penalised that occurred before: what `verify_accept` takes.

    Every row is penalised for the tokens that ordinary decoding would have before it: the text, and the drafts before
    the row (d_1..d_i before clean row i, d_1..d_b before the MASK rows of branch b). So verification still gives the
    very tokens of ordinary decoding. With x a token's logit and c how often it is in the output, in fp32:

    - x + bias, where the request has a bias for it;
    - if it occurs in prompt or output: x / repetition where x > 0, else x * repetition;
    - x - frequency * c - presence * (c > 0), rounded to the dtype of logits.

    All other logits keep their bits, those of requests that ask for nothing too.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64.
        query_start_loc: int32 [B + 1], num_drafts: int32 [B], drafts: int64 [B, K]: as in `verify_accept`.
        text: int64 [B, max_len], the tokens of each request, of which `lengths` int32 [B] count: prompt and output,
            pending included. Ids outside the vocabulary are not counted, here and in drafts.
        penalties: prompt_lengths int32 [B]; presence, frequency (0 is off) and repetition (1 is off) fp32 [B]; bias_ids
            int64 [B, S], padded with -1, of equal ones the first counts; bias fp32 [B, S].
        quadratic: whether there is a branch after every draft (the quadratic plan).
        out: like logits, and may be logits itself; allocated when None.

    Returns:
        The logits, [T, V], in the dtype they came in.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: the order and the meaning of the three penalties are those of vLLM.

    Example: token 1 is the prompt, 2 the output and 3 a draft, before the second row alone.

        >>> def ints(*values):
        ...     return torch.tensor(values, dtype=torch.int32)
        >>> penalties = Penalties(
        ...     prompt_lengths=ints(1), presence=torch.tensor([0.5]), frequency=torch.tensor([0.25]),
        ...     repetition=torch.tensor([2.0]), bias_ids=torch.tensor([[0]]), bias=torch.tensor([[-8.0]]))
        >>> apply_penalties(torch.full((2, 5), 4.0), ints(0, 2), ints(1), torch.tensor([[3]]), torch.tensor([[1, 2]]),
        ...                 ints(2), penalties, quadratic=False)
        tensor([[-4.0000,  2.0000,  1.2500,  4.0000,  4.0000],
                [-4.0000,  2.0000,  1.2500,  1.2500,  4.0000]])
    """
    op = "apply_penalties"
    device = check.device_of(op, "logits", logits)
    check.tensor(op, "logits", logits, (None, None), check.FLOATS, device)
    check.tensor(op, "drafts", drafts, (None, None), check.INT64, device)
    batch = drafts.shape[0]
    check.tensor(op, "query_start_loc", query_start_loc, (batch + 1,), check.INT32, device)
    check.tensor(op, "num_drafts", num_drafts, (batch,), check.INT32, device)
    check.tensor(op, "text", text, (batch, None), check.INT64, device)
    check.tensor(op, "lengths", lengths, (batch,), check.INT32, device)
    if not isinstance(penalties, Penalties):
        raise TypeError(f"{op}: penalties must be a Penalties, got {type(penalties).__name__}")
    check.tensor(op, "penalties.prompt_lengths", penalties.prompt_lengths, (batch,), check.INT32, device)
    for name in ("presence", "frequency", "repetition"):
        check.tensor(op, f"penalties.{name}", getattr(penalties, name), (batch,), (torch.float32,), device)
    check.tensor(op, "penalties.bias_ids", penalties.bias_ids, (batch, None), check.INT64, device)
    check.tensor(op, "penalties.bias", penalties.bias, tuple(penalties.bias_ids.shape), (torch.float32,), device)
    if not isinstance(quadratic, bool):
        raise TypeError(f"{op}: quadratic must be a bool, got {type(quadratic).__name__}")
    if logits.shape[1] == 0:
        raise ValueError(f"{op}: logits have no columns, wanted at least 1")
    tensors = (query_start_loc, num_drafts, drafts, text, lengths, *_tensors(penalties))
    if out is not None:
        check.tensor(op, "out", out, tuple(logits.shape), (logits.dtype,), device)
        in_place = out is logits or (
            not torch.compiler.is_compiling()
            and out.data_ptr() == logits.data_ptr()
            and out.stride() == logits.stride()
        )
        check.all_writable(op, [("out", out)], *(() if in_place else (logits,)), *tensors)
    if traced(logits):
        if out is None:
            return torch.ops.idlm.apply_penalties(logits, *tensors, quadratic)
        torch.ops.idlm.apply_penalties_out(logits, *tensors, quadratic, out)
        return out
    return implementation(op, device.type)(
        *(logits, query_start_loc, num_drafts, drafts, text, lengths, penalties), quadratic=quadratic, out=out
    )


def _tensors(penalties: Penalties) -> list[Tensor]:
    return [getattr(penalties, name) for name in _PENALTIES]


def _run(**arguments: Any) -> Tensor | None:
    penalties = Penalties(**{name: arguments.pop(name) for name in _PENALTIES})
    function = implementation("apply_penalties", arguments["logits"].device.type)
    result: Tensor = function(penalties=penalties, **arguments)
    return None if "out" in arguments else result


register(
    "apply_penalties",
    "Tensor logits, Tensor query_start_loc, Tensor num_drafts, Tensor drafts, Tensor text, Tensor lengths, "
    + ", ".join(f"Tensor {name}" for name in _PENALTIES)
    + ", *, bool quadratic",
    lambda logits, *rest: logits.new_empty(logits.shape),
    run=_run,
)
