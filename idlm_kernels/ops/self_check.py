"""Small problems by which a kernel shows on the device at hand that it is right: what `auto` asks of a device backend.

Each check runs one op of a backend on problems of the test kit (idlm_kernels/testing) and holds it to `python_ref`.
Where decoding rests on bits (design section 4) bits are compared too: a row alone and among others, in a prefill and in
a decode step, with another page size, beside an adapter full of NaN. Inputs have fixed seeds, and no sampled id is a
near-tie.

Passing is not the test suite: a few shapes, bf16 alone, no schedule but the device's own. It keeps a kernel that is
miscompiled, or that this device does not take, out of `auto`. To add an op, write a function like those below and enter
it in `CHECKS`; until then `auto` takes the op from no device backend.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import python_ref
from idlm_kernels.testing import (
    Advance,
    ApplyPenalties,
    Call,
    CommitStep,
    Draw,
    Embed,
    GatedLoraLinear,
    Linear,
    LinearSiluAndMul,
    PlanRows,
    QkNormRopeAppend,
    Ran,
    RerankDrafts,
    RmsNorm,
    SampleRows,
    SiluAndMul,
    StridedAttention,
    TopLogprobs,
    VerifyAccept,
    Wrong,
    check,
    check_bits,
    check_close,
    check_rows,
)
from idlm_kernels.testing.numerics import GRANTED
from idlm_kernels.testing.problems import repaged, request_rows

Case = tuple[ModuleType, torch.device]

CPU = torch.device("cpu")

# Ops whose promises to each other hold within one backend: a prepared weight, the bits of rows without an adapter and
# of the activation; the noise and the cuts of a row. `auto` takes all of a group from a backend, as far as it has them,
# or none.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("prepare_weight", "linear", "gated_lora_linear", "linear_silu_and_mul", "silu_and_mul"),
    ("sample_rows", "verify_accept"),
)


def self_check(module: ModuleType, op: str, device: torch.device) -> str | None:
    """Why `op` of a backend's module is not to be trusted on this device; None if it passes. Never raises."""
    if op not in CHECKS:
        return "not checked: there is no self-check for it yet"
    # In a thread of its own: the caller's modes, autocast, default device and CUDA stream end at its thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_outcome, module, op, device).result()


def _outcome(module: ModuleType, op: str, device: torch.device) -> str | None:
    try:
        if device.type != "cuda":
            CHECKS[op]((module, device))
        else:
            with torch.cuda.device(device):
                CHECKS[op]((module, device))
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # whatever a compiler, a driver or a kernel may raise
        reason = " ".join(f"it raised {type(error).__name__}: {error}".split())[:300]
        return reason + _aftermath(device)
    return None


def _aftermath(device: torch.device) -> str:
    """What an exception left behind: some CUDA errors stay until the process ends."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:  # the error once more
            return "; the error stays with this process, start it again with IDLM_BACKEND=torch"
    return ""


def _function(case: Case, op: str) -> Callable[..., Any]:
    """What a backend lacks the references compute."""
    return getattr(case[0], op, getattr(python_ref, op))


def _run(case: Case, call: Call) -> Any:
    return call.run(_function(case, call.op), case[1]).result


def _check(case: Case, call: Call, *rows: slice) -> Ran:
    """`check`, and `check_rows` of some rows."""
    function = _function(case, call.op)
    among = check(call, function, case[1])
    return check_rows(call, function, *rows, device=case[1], among=among) if rows else among


# Linear layers

BATCHES = slice(1), slice(1, 8), slice(3, 68)  # rows of a prefill of 130, as steps of one request and of eight see them


def _linear(case: Case) -> None:
    """Odd sizes: a prefill and steps of 1, 7, 65 rows, of which each fills the machine in its way; then an LM head."""
    _check(case, Linear(rows=130, n=8516, k=520).call(CPU), slice(1), slice(7), slice(3, 68))
    _check(case, Linear(rows=5, n=16390, k=136, bias=False).call(CPU), slice(3, 4))


def _prepare_weight(case: Case) -> None:
    """A prepared weight looks like the plain one and gives the result of it."""
    weights: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        weights.extend((weight, _function(case, "prepare_weight")(weight)))
        return _function(case, "linear")(x=x, weight=weights[1])

    check(Linear(rows=5, bias=False).call(CPU), linear, case[1])
    looks = [(w.shape, w.dtype, w.device) for w in weights]
    if looks[0] != looks[1]:
        raise Wrong("a prepared weight has another shape, dtype or device")


def _gated_lora_linear(case: Case) -> None:
    call = GatedLoraLinear(rows=7, k=584, output_sizes=(52, 30, 18)).call(CPU)
    clean = ~call["lora_mask"]
    base = _run(case, call.of("linear", "x", "weight", "bias"))[clean]
    got = _check(case, call).result
    check_bits(got[clean], base, "a row without the adapter and the same row of linear")
    nan = {name: torch.full_like(call[name], torch.nan) for name in ("lora_a", "lora_b")}
    got = _run(case, call.changed(**nan))
    check_bits(got[clean], base, "a row without the adapter beside an adapter of NaN")
    _check(case, GatedLoraLinear(rows=130, k=520, output_sizes=(52, 8464)).call(CPU), *BATCHES)


def _linear_silu_and_mul(case: Case) -> None:
    call = LinearSiluAndMul(rows=7, k=584, output_sizes=(52, 30, 18)).call(CPU)
    for given, layer in (
        (call.of(call.op, "x", "weight", "bias"), "linear"),
        (call, "gated_lora_linear"),
    ):
        got = _check(case, given).result
        apart = _run(case, Call("silu_and_mul", {"x": _run(case, given.of(layer, *given.arguments))}))
        check_bits(got, apart, f"linear_silu_and_mul and silu_and_mul of {layer}")
    _check(case, LinearSiluAndMul(rows=130, k=200, output_sizes=(52, 150)).call(CPU), *BATCHES)


# Attention


def _strided_attention(case: Case) -> None:
    # A chain: a context of more than one chunk, a short one, a request that is absent.
    chain = StridedAttention(heads=(8, 2, 128)).call(CPU)
    got = _check(case, chain).result
    causal = torch.tensor([(2 << i) - 1 for i in (*range(7), *range(4), 0)], device=CPU)
    check_bits(_run(case, chain.changed(tree_mask=causal)), got, "a chain with a tree mask and without")
    # The first row of request 0 as AR sees it: one row, one request, pages of another size.
    first = _run(case, repaged(request_rows(chain, 0, slice(1)), 24))
    check_bits(first, got[:1], "a row alone on pages of 24 slots and among others on pages of 16")
    # A tree of drafts: every row sees the context and some of the step's rows.
    tree = StridedAttention(lengths=(70, 290, 0), rows=(9, 6, 0), heads=(8, 2, 128), tail="random").call(CPU)
    scales = {
        f"{x}_scale": torch.tensor(scale, dtype=torch.float32, device=CPU) for x, scale in (("k", 0.7), ("v", 1.3))
    }
    _check(case, tree.changed(**scales))
    _check(case, chain.changed(window=20))
    # A prefill long enough for tiles of its own, and its last row as a step of one row.
    prefill = StridedAttention(lengths=(290,), rows=(290,), heads=(32, 8, 128)).call(CPU)
    got = _check(case, prefill).result
    last = _run(case, request_rows(prefill, 0, slice(289, 290)))
    check_bits(last, got[289:290], "the last row of a prefill and the same row alone")
    # The heads of a small Llama.
    _check(case, StridedAttention(lengths=(300, 20), rows=(4, 5), heads=(9, 3, 64)).call(CPU))


# Rows


def _rms_norm(case: Case) -> None:
    _check(case, RmsNorm(residual=False).call(CPU))
    _check(case, RmsNorm().call(CPU), slice(3, 4))


def _silu_and_mul(case: Case) -> None:
    _check(case, SiluAndMul().call(CPU), slice(3, 4))


def _embed(case: Case) -> None:
    """Ids out of range, and MASK rows with and without a vector of their own."""
    call = Embed().call(CPU)
    _check(case, call)
    _check(case, call.changed(mask_embedding=None, is_mask=call["is_mask"] != 0))


def _qk_norm_rope_append(case: Case) -> None:
    """Positions other than slots, a row that is not written; with norms as Qwen3 and without as Llama has it."""
    _check(case, QkNormRopeAppend(norm=False).call(CPU))
    _check(case, QkNormRopeAppend().call(CPU), slice(1, 2))


# Sampling


def _sample_rows(case: Case) -> None:
    call = SampleRows().call(CPU)
    _check(case, call, slice(3, 4))
    # A row without a finite logit takes the lowest id that is not MASK.
    _check(case, call.rows(slice(13, 14)).changed(mask_id=0))


def _apply_penalties(case: Case) -> None:
    """Both kinds of plans; without biases, on a text of one block; a large vocabulary."""
    for quadratic in (True, False):
        _check(case, ApplyPenalties(quadratic=quadratic).call(CPU))
    _check(case, ApplyPenalties(num_biases=0, vocab_size=50_003, max_len=200).call(CPU))
    call = ApplyPenalties().call(CPU)
    got = _run(case, call)

    def in_place(logits: Tensor, **others: Any) -> Tensor:
        result: Tensor = _function(case, call.op)(logits=logits, **others, out=logits)
        return result

    check_bits(call.run(in_place, case[1]).result, got, "in place and not")


def _verify_accept(case: Case) -> None:
    for quadratic, rule in ((True, "match"), (False, "match"), (True, "rejection")):
        _check(case, VerifyAccept(quadratic=quadratic, rule=rule).call(CPU))


def _top_logprobs(case: Case) -> None:
    for problem in (TopLogprobs(), TopLogprobs(count=1), TopLogprobs(vocab_size=900, count=32)):
        _check(case, problem.call(CPU))


def _rerank_drafts(case: Case) -> None:
    for rejection in (False, True):
        _check(case, RerankDrafts(rejection=rejection).call(CPU))


def _advance(case: Case) -> None:
    _check(case, Advance().call(CPU))


def _plan_rows(case: Case) -> None:
    """AR, a chain, branches, random ids; the longest text goes beyond its pages."""
    for num_spec_tokens, quadratic, noise_below in ((0, False, 0), (3, False, 0), (3, True, 0), (3, True, 151_669)):
        _check(case, PlanRows(num_spec_tokens=num_spec_tokens, quadratic=quadratic, noise_below=noise_below).call(CPU))


def _commit_step(case: Case) -> None:
    """With drafts of the text, with a pretended acceptance, and with logprobs, which are judged as floats."""
    call = CommitStep().call(CPU)
    for options in ({"suffix": True}, {"acceptance": 0.6}, {"acceptance": 0.6, "quadratic": True}):
        _check(case, call.changed(**options))
    rows, columns = call["tokens"].numel(), 6 + call["tokens"].shape[1]
    logits = Draw(CPU).normal(rows, 5003, scale=3.0)
    starts = torch.arange(0, rows + 1, call["tokens"].shape[1], dtype=torch.int32, device=CPU)
    call = call.changed(logits=logits, query_start_loc=starts)
    got, peer, exact = _run(case, call), call.run().result, call.changed(logits=logits.double()).run().result
    check_close(got[:, :columns], peer[:, :columns], peer[:, :columns], "the outcome")
    logprobs, peer, exact = (x[:, columns:].view(torch.float64) for x in (got, peer, exact))
    check_close(logprobs.float(), exact, peer.float(), "logprobs", GRANTED["commit_step", "logprobs"])


CHECKS: dict[str, Callable[[Case], None]] = {
    "prepare_weight": _prepare_weight,
    "linear": _linear,
    "gated_lora_linear": _gated_lora_linear,
    "linear_silu_and_mul": _linear_silu_and_mul,
    "silu_and_mul": _silu_and_mul,
    "rms_norm": _rms_norm,
    "embed": _embed,
    "qk_norm_rope_append": _qk_norm_rope_append,
    "strided_attention": _strided_attention,
    "sample_rows": _sample_rows,
    "apply_penalties": _apply_penalties,
    "verify_accept": _verify_accept,
    "top_logprobs": _top_logprobs,
    "rerank_drafts": _rerank_drafts,
    "advance": _advance,
    "plan_rows": _plan_rows,
    "commit_step": _commit_step,
}
