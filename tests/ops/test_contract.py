"""Every op refuses what its docstring does not allow, with an error that names the argument."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import idlm_kernels
import python_ref
from idlm_kernels import use_backend
from idlm_kernels.ops import OPS
from tests.ops.cases import (
    STEP_OPS,
    arguments,
    mapped,
    new_out,
    public,
    reference,
    replaced,
    tensors,
    variants,
    with_all_arguments,
)


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def all_tensors() -> list[tuple[str, str]]:
    return [(op, name) for op in OPS for name, _ in tensors(with_all_arguments(op))]


def refused(op: str, args: dict[str, Any], kind: type[Exception] | tuple, name: str) -> str:
    """The op raises `kind`, and the message begins with the op and names the argument."""
    with pytest.raises(kind) as caught:
        public(op)(**args)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    assert name in message, message
    return message


def leads(op: str, name: str) -> bool:
    """Arguments that the shapes of others are compared with: they are not to blame for a mismatch."""
    return (
        name
        in {
            "strided_attention": ("q", "k_cache", "seq_lens"),
            "sample_rows": ("logits",),
            "verify_accept": ("logits", "drafts"),
            "apply_penalties": ("logits", "drafts", "penalties.bias_ids"),
            "top_logprobs": ("logits", "tokens"),
            "rerank_drafts": ("logits", "hidden", "drafts", "from_hidden"),
            "advance": ("tokens",),
            "plan_rows": ("state.lengths", "state.drafts"),
            "commit_step": ("state.lengths", "state.drafts"),
            "linear": ("x", "weight"),
            "gated_lora_linear": ("x", "weight", "lora_b"),
            "linear_silu_and_mul": ("x", "weight", "lora_b"),
            "rms_norm": ("x",),
            "silu_and_mul": ("x",),
            "embed": ("ids", "weight"),
            "qk_norm_rope_append": ("qkv", "k_cache"),
            "prepare_weight": ("weight",),
        }[op]
    )


# (op, argument, dimension) whose size nothing else fixes
FREE_SIZES = {
    ("strided_attention", "page_table", 1),
    ("top_logprobs", "logits", 0),
    ("top_logprobs", "logits", 1),
    ("apply_penalties", "drafts", 1),
    ("apply_penalties", "text", 1),
    ("rerank_drafts", "embedding", 0),
    ("rerank_drafts", "head_rows", 0),
    ("advance", "text", 1),
    ("advance", "stop_ids", 1),
    *((op, f"state.{name}", 1) for op in ("plan_rows", "commit_step") for name in ("text", "stop_ids", "page_table")),
    ("commit_step", "logits", 0),
    ("commit_step", "logits", 1),
    ("embed", "weight", 0),
    ("qk_norm_rope_append", "rotary", 0),
    ("prepare_weight", "weight", 0),
    ("prepare_weight", "weight", 1),
}


# Signatures


@pytest.mark.parametrize("op", OPS)
def test_signature_is_that_of_the_reference(op):
    """Names, order, kinds and defaults: either can stand in for the other."""

    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(public(op)) == shape(reference(op))
    annotations = {name: str(a) for name, a in inspect.get_annotations(public(op)).items()}
    assert annotations == {name: str(a) for name, a in inspect.get_annotations(reference(op)).items()}


@pytest.mark.parametrize("op", OPS)
def test_docstring_names_every_argument_and_the_errors(op):
    text = inspect.getdoc(public(op)) or ""
    for name in inspect.signature(public(op)).parameters:
        assert name in text, f"{op} does not explain {name}"
    if op != "prepare_weight":
        assert "Raises:" in text and "Returns:" in text and "Args:" in text
    assert reference(op).__doc__


def test_every_op_has_a_reference_and_a_case():
    assert set(OPS) <= set(python_ref.__all__)
    for op in OPS:
        given = set(with_all_arguments(op))
        parameters = set(inspect.signature(public(op)).parameters)
        # what the fullest case leaves out is covered by another one
        for _, variant in variants((op,)):
            given |= set(arguments(op, variant))
        assert parameters - given <= set(), f"{op}: no case gives {parameters - given}"


# Tensors


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_not_a_tensor(op, name):
    for value in ([1.0], 3, "a"):
        refused(op, replaced(with_all_arguments(op), name, value), TypeError, name)


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_wrong_rank(op, name):
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    message = refused(op, replaced(args, name, x.unsqueeze(0)), ValueError, name)
    assert str([1, *x.shape]) in message and "wanted" in message
    if x.dim() and (op, name) != ("strided_attention", "k_scale"):  # which may be one number as well
        refused(op, replaced(args, name, x[0]), ValueError, name)


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_wrong_size(op, name):
    """One more along each dimension; where others are compared with this argument the error may name them."""
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    for d in range(x.dim()):
        larger = replaced(args, name, torch.cat([x, x.narrow(d, 0, 1)], dim=d))
        if (op, name, d) in FREE_SIZES:
            public(op)(**larger)
        else:
            refused(op, larger, ValueError, "" if leads(op, name) else name)


def wrong_dtypes(x: torch.Tensor) -> list[torch.dtype]:
    swap = {torch.int32: [torch.int16], torch.int64: [torch.int16], torch.uint8: [torch.int8]}
    return [torch.complex64, *swap.get(x.dtype, [])]


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_wrong_dtype(op, name):
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    for dtype in wrong_dtypes(x):
        message = refused(op, replaced(args, name, x.to(dtype)), TypeError, name)
        assert str(dtype).removeprefix("torch.") in message and "wanted" in message


EXACT_DTYPES = [
    (op, name, dtype)
    for op, name in all_tensors()
    for dtype in (torch.int32, torch.int64, torch.float64)
    if dict(tensors(with_all_arguments(op)))[name].dtype in (torch.int32, torch.int64, torch.float32)
    and dict(tensors(with_all_arguments(op)))[name].dtype != dtype
    and dict(tensors(with_all_arguments(op)))[name].is_floating_point() == dtype.is_floating_point
    and (op, name) not in {("sample_rows", "positions"), ("qk_norm_rope_append", "positions")}  # either integer
]


@pytest.mark.parametrize(("op", "name", "dtype"), EXACT_DTYPES)
def test_almost_the_right_dtype(op, name, dtype):
    """int32 for int64 and the reverse; fp64 among fp32, where the op does not take any float."""
    args = with_all_arguments(op)
    x = dict(tensors(args))[name].to(dtype)
    any_float = {
        "linear": ("bias",),
        "gated_lora_linear": ("bias",),
        "linear_silu_and_mul": ("bias",),
        "rms_norm": ("weight",),
        "embed": ("weight", "mask_embedding"),
        "qk_norm_rope_append": ("q_weight", "k_weight"),
        "sample_rows": ("logits", "logit_bias"),
        "verify_accept": ("logit_bias",),
        "rerank_drafts": (
            *("hidden", "embedding", "head_rows"),
            *("from_hidden", "from_previous", "from_state", "to_query"),
        ),
        "prepare_weight": ("weight",),
        "commit_step": ("logits",),
    }
    if dtype == torch.float64 and name in any_float.get(op, ()):
        public(op)(**replaced(args, name, x))
        return
    refused(op, replaced(args, name, x), TypeError, "" if leads(op, name) else name)


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_mixed_devices(op, name):
    args = with_all_arguments(op)
    if len(list(tensors(args))) == 1:
        return
    x = dict(tensors(args))[name].to("meta")
    message = refused(op, replaced(args, name, x), ValueError, "" if leads(op, name) else name)
    assert "meta" in message and "cpu" in message


@pytest.mark.parametrize(("op", "name"), all_tensors())
def test_inner_stride(op, name):
    """The last dimension must be dense; a weight is exempt, as handles of prepare_weight are expanded tensors."""
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    if not x.dim() or x.shape[-1] < 2:
        return
    strided = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    assert strided.shape == x.shape and strided.stride(-1) == 2 and torch.equal(strided, x)
    if op in ("linear", "gated_lora_linear", "linear_silu_and_mul") and name == "weight":
        public(op)(**replaced(args, name, strided))
        return
    message = refused(op, replaced(args, name, strided), ValueError, name)
    assert "stride 2" in message


WRITTEN = {
    "strided_attention": ("lse",),
    "sample_rows": ("error_flags",),
    "verify_accept": ("draft_dists.logits", "draft_dists.cut", "draft_dists.log_norm", "error_flags"),
    "rerank_drafts": ("draft_dists.logits", "draft_dists.cut", "draft_dists.log_norm"),
    "advance": ("text", "lengths", "drafts", "num_drafts", "finish_reason"),
    "commit_step": (
        *("state.text", "state.lengths", "state.drafts", "state.num_drafts"),
        *("state.draft_source", "state.finish_reason"),
    ),
    "rms_norm": ("residual",),
    "qk_norm_rope_append": ("k_cache", "v_cache"),
}


def written(op: str) -> list[str]:
    outs = [name for name, _ in tensors(with_all_arguments(op)) if name.startswith("out")]
    return [*WRITTEN.get(op, ()), *outs]


def all_written() -> list[tuple[str, str]]:
    return [(op, name) for op in STEP_OPS for name in written(op)]


@pytest.mark.parametrize(("op", "name"), all_written())
def test_expanded_output(op, name):
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    expanded = x[:1].expand(x.shape)
    if x.dim() == 1:  # a stride of 0 in the only dimension is refused as an inner stride already
        refused(op, replaced(args, name, expanded), ValueError, name)
    else:
        message = refused(op, replaced(args, name, expanded), ValueError, name)
        assert "expanded" in message


MAY_BE_THE_SAME = (("rms_norm", {"out", "x"}), ("apply_penalties", {"out", "logits"}))


@pytest.mark.parametrize(("op", "name"), all_written())
def test_outputs_share_no_memory(op, name):
    """With no other tensor argument of the same dtype; some are documented exceptions."""
    args = with_all_arguments(op)
    x = dict(tensors(args))[name]
    for other_name, other in tensors(args):
        same_kind = other.dtype == x.dtype and other.numel() >= x.numel()
        if other_name == name or not same_kind:
            continue
        view = other.flatten()[: x.numel()].view(x.shape) if other.is_contiguous() else None
        if view is None or (op, {name, other_name}) in MAY_BE_THE_SAME:
            continue
        with pytest.raises(ValueError, match=rf"^{op}: .* shares its memory"):
            public(op)(**replaced(args, name, view))


@pytest.mark.parametrize(("op", "name"), [("rms_norm", "x"), ("apply_penalties", "logits")])
def test_out_may_be_an_input(op, name):
    args = arguments(op)
    want = public(op)(**args)
    assert torch.equal(public(op)(**args, out=args[name]), want)


def test_out_may_not_overlap_the_logits():
    args, wide = arguments("apply_penalties"), torch.zeros(14, 9)
    refused("apply_penalties", args | {"logits": wide[1:], "out": wide[:-1]}, ValueError, "out")


# Numbers, options and their combinations

NOT_INTS = (2.5, "3", None, True, torch.tensor(2))
NOT_NUMBERS = ("a", True, torch.tensor(1.0), [1.0])
BAD_OPTIONS = [
    ("strided_attention", "max_query_len", NOT_INTS, TypeError),
    ("strided_attention", "max_query_len", (0, -1), ValueError),
    ("strided_attention", "window", NOT_INTS, TypeError),
    ("strided_attention", "window", (-2,), ValueError),
    ("strided_attention", "sm_scale", NOT_NUMBERS, TypeError),
    ("sample_rows", "id_limit", NOT_INTS, TypeError),
    ("sample_rows", "id_limit", (0, -1, 10), ValueError),
    ("sample_rows", "mask_id", NOT_INTS, TypeError),
    ("sample_rows", "mask_id", (-2, 9), ValueError),
    ("sample_rows", "stream", (-1, 3, "0", None), ValueError),
    ("verify_accept", "id_limit", NOT_INTS, TypeError),
    ("verify_accept", "id_limit", (0, -1, 10), ValueError),
    ("verify_accept", "mask_id", NOT_INTS, TypeError),
    ("verify_accept", "mask_id", (-2, 9), ValueError),
    ("verify_accept", "quadratic", (1, None, "chain", torch.tensor(True)), TypeError),
    ("verify_accept", "rule", ("greedy", None, 0), ValueError),
    ("verify_accept", "draft_dists", ((1, 2, 3), "q"), TypeError),
    ("top_logprobs", "out", ((torch.zeros(3, 3, 3, dtype=torch.int64),),), ValueError),
    ("top_logprobs", "count", NOT_INTS, TypeError),
    ("top_logprobs", "count", (0, 9, 33), ValueError),
    ("top_logprobs", "id_limit", NOT_INTS, TypeError),
    ("top_logprobs", "id_limit", (0, 10), ValueError),
    ("apply_penalties", "penalties", (None, (1, 2), "s"), TypeError),
    ("apply_penalties", "quadratic", (1, None, torch.tensor(True)), TypeError),
    ("rerank_drafts", "id_limit", NOT_INTS, TypeError),
    ("rerank_drafts", "id_limit", (0, -1, 10), ValueError),
    ("rerank_drafts", "mask_id", NOT_INTS, TypeError),
    ("rerank_drafts", "mask_id", (-2, 9), ValueError),
    ("rerank_drafts", "draft_dists", ((1, 2, 3), "q"), TypeError),
    ("rerank_drafts", "greedy", (1, None, torch.tensor(True)), TypeError),
    ("plan_rows", "state", (None, (1, 2), "s"), TypeError),
    ("plan_rows", "mask_id", NOT_INTS, TypeError),
    ("plan_rows", "mask_id", (-1,), ValueError),
    ("plan_rows", "page_size", NOT_INTS, TypeError),
    ("plan_rows", "page_size", (0, -1), ValueError),
    ("plan_rows", "quadratic", (1, None, torch.tensor(True)), TypeError),
    ("commit_step", "state", (None, (1, 2), "s"), TypeError),
    ("commit_step", "quadratic", (1, None, torch.tensor(True)), TypeError),
    ("commit_step", "suffix", (1, None, torch.tensor(True)), TypeError),
    ("commit_step", "acceptance", NOT_NUMBERS, TypeError),
    ("commit_step", "acceptance", (-0.1, 1.1, float("nan")), ValueError),
    ("gated_lora_linear", "scale", (*NOT_NUMBERS, None), TypeError),
    ("gated_lora_linear", "output_sizes", ([5, 1], [2, 2], [0, 5], [6, -1], []), ValueError),
    ("linear_silu_and_mul", "scale", (*NOT_NUMBERS, None), TypeError),
    ("linear_silu_and_mul", "output_sizes", ([4, 1], [1, 1], [0, 4], [5, -1], []), ValueError),
    ("rms_norm", "eps", (*NOT_NUMBERS, None), TypeError),
    ("embed", "dtype", (torch.int64, torch.complex64, "float32"), TypeError),
    ("qk_norm_rope_append", "eps", (*NOT_NUMBERS, None), TypeError),
]


@pytest.mark.parametrize(("op", "name", "values", "kind"), BAD_OPTIONS)
def test_bad_options(op, name, values, kind):
    for value in values:
        args = with_all_arguments(op)
        if name == "window":
            args = arguments(op, "window")
        refused(op, args | {name: value}, kind, name)


def test_bad_combinations():
    attention = arguments("strided_attention", "tree_mask")
    assert "tree_mask" in refused("strided_attention", attention | {"window": 3}, ValueError, "window")
    refused("strided_attention", attention | {"max_query_len": 65}, ValueError, "max_query_len")
    public("strided_attention")(**attention | {"max_query_len": 64})
    odd_heads = arguments("strided_attention")
    odd_heads["q"] = torch.zeros(6, 3, 8)
    refused("strided_attention", odd_heads, ValueError, "heads")
    for name in ("k_scale", "v_scale"):
        for shape in ([3], [1], [2, 1]):
            message = refused("strided_attention", attention | {name: torch.ones(shape)}, ValueError, name)
            assert f"has shape {shape}, wanted [] or [2]" in message
    no_pages = arguments("strided_attention")
    no_pages |= {"k_cache": torch.zeros(0, 3, 2, 8), "v_cache": torch.zeros(0, 3, 2, 8)}
    refused("strided_attention", no_pages, ValueError, "k_cache")

    for op in ("sample_rows", "verify_accept", "rerank_drafts"):
        refused(op, arguments(op) | {"id_limit": 1, "mask_id": 0}, ValueError, "id_limit")
    rejection = arguments("verify_accept", "rejection")
    refused("verify_accept", rejection | {"draft_dists": None}, ValueError, "draft_dists")
    refused("verify_accept", rejection | {"rule": "match"}, ValueError, "draft_dists")
    narrow = arguments("verify_accept", "full")
    narrow["draft_dists"].logits = narrow["draft_dists"].logits.to(torch.bfloat16)
    narrow["logits"] = narrow["logits"].to(torch.bfloat16)
    refused("verify_accept", narrow, TypeError, "draft_dists.logits")  # a bias needs fp32
    del narrow["logit_bias"]
    public("verify_accept")(**narrow)
    refused("verify_accept", narrow | {"out": new_out("verify_accept", narrow)[:3]}, ValueError, "out")

    rerank = arguments("rerank_drafts")
    for name in ("embedding", "head_rows"):
        refused("rerank_drafts", rerank | {name: torch.zeros(7, 6)}, ValueError, name)  # id_limit is 8
    refused("rerank_drafts", rerank | {"hidden": torch.zeros(9, 0)}, ValueError, "hidden")
    refused("rerank_drafts", rerank | {"from_hidden": torch.zeros(0, 6)}, ValueError, "from_hidden")
    rowless = {name: rerank[name][:0] for name in ("logits", "hidden")}
    refused("rerank_drafts", rerank | rowless, ValueError, "logits")

    for quadratic, most in ((False, 31), (True, 7)):
        plan = arguments("plan_rows") | {"quadratic": quadratic}
        for columns in (most, most + 1):
            wide = replaced(plan, "state.drafts", torch.zeros(3, columns, dtype=torch.int64))
            if columns == most:
                public("plan_rows")(**wide)
            else:
                refused("plan_rows", wide, ValueError, "state.drafts")
    for name in ("text", "page_table"):
        empty = replaced(plan, f"state.{name}", getattr(plan["state"], name)[:, :0])
        refused("plan_rows", empty, ValueError, f"state.{name}")
    refused("plan_rows", plan | {"out": new_out("plan_rows", plan)[:6]}, ValueError, "out")
    penalties = arguments("apply_penalties")
    refused("apply_penalties", penalties | {"logits": torch.zeros(13, 0)}, ValueError, "logits")
    commit = arguments("commit_step", "full")
    for name in ("logits", "query_start_loc"):
        refused("commit_step", commit | {name: None}, ValueError, name)
    refused("commit_step", commit | {"logits": torch.zeros(0, 9)}, ValueError, "logits")

    refused("linear", arguments("linear") | {"weight": torch.zeros(5, 6).double()}, TypeError, "weight")
    half = arguments("linear") | {"x": torch.zeros(3, 6).half(), "weight": torch.zeros(5, 6).bfloat16()}
    refused("linear", half, TypeError, "weight")
    empty_rank = arguments("gated_lora_linear") | {"lora_a": torch.zeros(0, 6), "lora_b": torch.zeros(5, 0)}
    refused("gated_lora_linear", empty_rank, ValueError, "lora_b")
    refused("silu_and_mul", {"x": torch.zeros(2, 5)}, ValueError, "x")
    refused("linear_silu_and_mul", arguments("linear"), ValueError, "weight")  # 5 rows
    adapter = arguments("linear_silu_and_mul", "full")
    for name in ("lora_a", "lora_b", "lora_mask"):
        refused("linear_silu_and_mul", adapter | {name: None}, ValueError, name)
    plain = arguments("linear_silu_and_mul")
    refused("linear_silu_and_mul", plain | {"output_sizes": [2, 2]}, ValueError, "output_sizes")
    refused("embed", arguments("embed") | {"weight": torch.zeros(0, 6)}, ValueError, "weight")

    one_norm = arguments("qk_norm_rope_append") | {"q_weight": torch.ones(4)}
    refused("qk_norm_rope_append", one_norm, ValueError, "k_weight")
    no_query = arguments("qk_norm_rope_append") | {"qkv": torch.zeros(3, 4 * 4)}
    refused("qk_norm_rope_append", no_query, ValueError, "qkv")
    odd = arguments("qk_norm_rope_append")
    odd |= {"k_cache": torch.zeros(4, 3, 2, 3), "v_cache": torch.zeros(4, 3, 2, 3), "qkv": torch.zeros(3, 24)}
    refused("qk_norm_rope_append", odd, ValueError, "k_cache")


def test_vocabulary_limit():
    largest = 262_144
    args = arguments("sample_rows") | {"logits": torch.zeros(4, largest), "id_limit": largest}
    public("sample_rows")(**args)
    refused("sample_rows", args | {"logits": torch.zeros(4, largest + 1)}, ValueError, "logits")
    refused("sample_rows", args | {"logits": torch.zeros(4, 0)}, ValueError, "logits")


# Results


@pytest.mark.parametrize(("op", "variant"), variants())
def test_out_is_written_and_returned(op, variant):
    """The same numbers as without out, and the same effects on the state that is updated in place."""
    plain_args, out_args = arguments(op, variant), arguments(op, variant)
    want = public(op)(**plain_args)
    out = new_out(op, out_args)
    got = public(op)(**out_args, out=out)
    assert got is out
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (want, got)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for (name, a), (_, b) in zip(tensors(plain_args), tensors(out_args), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("op", "variant"), variants())
def test_only_documented_arguments_are_written(op, variant):
    args = arguments(op, variant)
    before = copy.deepcopy(args)
    public(op)(**args)
    for (name, a), (_, b) in zip(tensors(before), tensors(args), strict=True):
        assert torch.equal(a, b) or name in WRITTEN.get(op, ()), f"{op} changed {name}"


@pytest.mark.parametrize(("op", "variant"), variants())
def test_strided_out(op, variant):
    """Rows of out may lie apart."""
    args = arguments(op, variant)
    out = new_out(op, args)

    def apart(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2:
            return x
        return torch.stack([x, x], dim=1)[:, 1]

    strided = tuple(apart(x) for x in out) if isinstance(out, tuple) else apart(out)
    want = public(op)(**arguments(op, variant))
    got = public(op)(**args, out=strided)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (want, got)), strict=True):
        assert torch.equal(a, b)


def no_rows(op: str) -> dict[str, Any]:
    """The plain case with no rows (T = 0) and no requests, or with requests that have none."""
    args = arguments(op, "plain")
    per_row = {
        "strided_attention": ("q",),
        "sample_rows": ("logits", "positions", "temperature", "top_k", "top_p", "min_p", "seed"),
        "verify_accept": (),
        "rerank_drafts": (
            *("logits", "hidden", "first_mask", "previous", "positions", "drafts", "num_drafts"),
            *("temperature", "top_k", "top_p", "min_p", "seed"),
        ),
        "apply_penalties": ("logits",),
        "top_logprobs": ("logits", "tokens"),
        "advance": tuple(args),
        "commit_step": tuple(args),
        "linear": ("x",),
        "gated_lora_linear": ("x", "lora_mask"),
        "linear_silu_and_mul": ("x",),
        "rms_norm": ("x",),
        "silu_and_mul": ("x",),
        "embed": ("ids", "is_mask"),
        "qk_norm_rope_append": ("qkv", "positions", "slot_mapping"),
    }[op]
    args |= {name: mapped(lambda x: x[:0], args[name]) for name in per_row}
    if op == "top_logprobs":
        args["query_start_loc"] = args["query_start_loc"][:1]
    if op == "apply_penalties":
        args["query_start_loc"] = torch.zeros_like(args["query_start_loc"])
    if op == "strided_attention":
        args["query_start_loc"] = torch.zeros_like(args["query_start_loc"])
        args["seq_lens"] = torch.zeros_like(args["seq_lens"])
    return args


@pytest.mark.parametrize("op", [op for op in STEP_OPS if op not in ("verify_accept", "plan_rows")])
def test_no_rows(op):
    args = no_rows(op)
    caches = [args[name].clone() for name in ("k_cache",) if name in args]
    result = public(op)(**args)
    assert all(x.shape[0] == 0 for x in (result if isinstance(result, tuple) else (result,)))
    out = mapped(torch.empty_like, result)
    assert public(op)(**args, out=out) is out
    for before in caches:
        assert torch.equal(args["k_cache"], before)


@pytest.mark.parametrize("variant", ["plain", "rejection", "full"])
def test_no_rows_verify_accept(variant):
    """Requests without rows work, no requests work; requests without a single logits row are refused."""
    padded = arguments("verify_accept", variant)
    padded["query_start_loc"].zero_()
    a, tokens, drafts, n = public("verify_accept")(**padded)
    assert (a.tolist(), n.tolist()) == ([0] * 3, [0] * 3)
    assert (tokens == -1).all() and (drafts == -1).all()

    nobody = {}
    for name, value in arguments("verify_accept", variant).items():
        if name in ("logits", "logit_bias"):
            nobody[name] = value[:0]
        elif name == "query_start_loc":
            nobody[name] = value[:1]
        elif name == "draft_dists":
            nobody[name] = type(value)(value.logits[:0], value.cut[:0], value.log_norm[:0])
        else:
            nobody[name] = value[:0] if isinstance(value, torch.Tensor) else value
    shapes = [x.shape for x in public("verify_accept")(**nobody)]
    assert shapes == [(0,), (0, 3), (0, 2), (0,)]

    rowless = arguments("verify_accept", variant)
    rowless["logits"] = rowless["logits"][:0]
    if "logit_bias" in rowless:
        rowless["logit_bias"] = rowless["logit_bias"][:0]
    refused("verify_accept", rowless, ValueError, "logits")


@pytest.mark.parametrize("op", ["strided_attention", "gated_lora_linear", "linear_silu_and_mul"])
def test_a_workspace_that_nobody_wrote_is_taken_for_one_release(op):
    args = arguments(op, variants((op,))[0][1])
    want = public(op)(**args)
    with pytest.warns(DeprecationWarning, match=f"{op}: workspace has no effect"):
        assert torch.equal(public(op)(**args, workspace=torch.zeros(16, dtype=torch.uint8)), want)


@pytest.mark.parametrize(("old", "new"), [("gate", "lora_mask"), ("slices", "output_sizes")])
@pytest.mark.parametrize("op", ["gated_lora_linear", "linear_silu_and_mul"])
def test_the_adapter_of_a_linear_layer_is_taken_by_old_names(op, old, new):
    args = arguments(op, "full")
    want = public(op)(**args)
    args[old] = args.pop(new)
    with pytest.warns(DeprecationWarning, match=f"{op}: {old} is now {new}"):
        assert torch.equal(public(op)(**args), want)


def test_the_drafts_distributions_are_taken_by_their_old_names():
    with pytest.warns(DeprecationWarning, match="QState is now idlm_kernels.DraftDistributions"):
        assert idlm_kernels.QState is python_ref.DraftDistributions
    args = arguments("verify_accept", "full") | {"rule": "rejection"}
    assert args["draft_dists"] is not None
    args["q_state"] = args.pop("draft_dists")
    with pytest.warns(DeprecationWarning, match="q_state is now draft_dists"):
        public("verify_accept")(**args)


@pytest.mark.parametrize(
    ("op", "old", "new"),
    [
        ("strided_attention", "tail_mask", "tree_mask"),
        ("sample_rows", "status", "error_flags"),
        ("verify_accept", "status", "error_flags"),
        ("advance", "finish", "finish_reason"),
    ],
)
def test_arguments_are_taken_by_their_old_names(op, old, new):
    args = with_all_arguments(op)
    args[old] = args.pop(new)
    with pytest.warns(DeprecationWarning, match=f"{op}: {old} is now {new}"):
        public(op)(**args)


def test_the_rule_of_verify_accept_is_taken_by_its_old_name():
    args = arguments("verify_accept", variants(("verify_accept",))[0][1])
    want, old = public("verify_accept")(**args), copy.deepcopy(args)
    old["branched"] = old.pop("quadratic")
    old["mode"] = old.pop("rule")
    with pytest.warns(DeprecationWarning, match="verify_accept: mode is now rule"):
        got = public("verify_accept")(**old)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
