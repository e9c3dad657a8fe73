"""Valid arguments of every public op, for tests that run over all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import idlm_kernels
import python_ref
from idlm_kernels import DraftDistributions, Penalties, StepState
from idlm_kernels.ops import OPS
from idlm_kernels.testing import Draw

Arguments = dict[str, Any]

# `prepare_weight` runs once, at load, and may return its argument: it is no registered op and takes no `out`.
STEP_OPS = tuple(op for op in OPS if op != "prepare_weight")


def public(op: str) -> Callable[..., Any]:
    return getattr(idlm_kernels, op)


def reference(op: str) -> Callable[..., Any]:
    return getattr(python_ref, op)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return Draw(seed=seed).normal(*shape, dtype=torch.float32)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention(variant: str) -> Arguments:
    """Requests of 3 and 2 rows with 5 and 2 tokens, a padded request, a padding row. `other`: 1 and 4 rows."""
    rows = (1, 4) if variant == "other" else (3, 2)
    args: Arguments = {
        "q": _randn(6, 4, 8),
        "k_cache": _randn(5, 3, 2, 8, seed=1),
        "v_cache": _randn(5, 3, 2, 8, seed=2),
        "page_table": torch.tensor([[3, 1], [4, 2], [0, 0]], dtype=torch.int32),
        "seq_lens": _int32(5, 4, 0) if variant == "other" else _int32(5, 2, 0),
        "query_start_loc": _int32(0, rows[0], sum(rows), sum(rows)),
        "max_query_len": 4,
    }
    if variant == "tree_mask":
        args |= {"tree_mask": torch.tensor([1, 3, 5, 1, 3, 0]), "sm_scale": 0.3, "k_scale": torch.tensor([0.5, 2.0])}
        args |= {"v_scale": torch.tensor(2.0), "lse": torch.zeros(6, 4)}
    if variant == "window":
        args |= {"window": 2}
    return args


def _parameters(count: int) -> Arguments:
    return {
        "temperature": torch.tensor([1.0, 0.0, 0.7, 2.0])[:count].clone(),
        "top_k": _int32(0, 3, 5, 1)[:count].clone(),
        "top_p": torch.tensor([0.9, 1.0, 0.5, 1.0])[:count].clone(),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.2])[:count].clone(),
        "seed": torch.tensor([1, -2, 3, 2**62])[:count].clone(),
    }


def _sample_rows(variant: str) -> Arguments:
    args = {"logits": _randn(4, 9), "positions": torch.tensor([3, 1, 4, 1]), **_parameters(4)}
    args |= {"id_limit": 8, "mask_id": 2}
    if variant == "full":
        args |= {"stream": 1, "logit_bias": _randn(4, 9, seed=1), "error_flags": torch.zeros(4, dtype=torch.int32)}
    if variant == "other":
        args["logits"] = torch.full((4, 9), float("nan"))
    return args


def _verify_accept(variant: str) -> Arguments:
    """K = 2, quadratic: requests with 2, 0 and no drafts and no rows; 9 + 3 + 0 rows and a padding row."""
    other = variant == "other"
    args: Arguments = {
        "logits": _randn(13, 9),
        "query_start_loc": _int32(0, 3, 9, 13) if other else _int32(0, 9, 12, 12),
        "num_drafts": _int32(0, 1, 0) if other else _int32(2, 0, 0),
        "drafts": torch.tensor([[3, 5], [0, 0], [-1, -1]]),
        "positions": _int32(6, 0, 0),
        **_parameters(3),
        "id_limit": 8,
        "mask_id": 2,
        "quadratic": True,
        "rule": "match",
    }
    if variant in ("rejection", "full"):
        draft_dists = DraftDistributions.empty(3, 2, 9, torch.float32, torch.device("cpu"))
        draft_dists.logits.copy_(_randn(3, 2, 9, seed=4))
        draft_dists.cut.fill_(-9.0)
        draft_dists.log_norm.fill_(3.0)
        args |= {"rule": "rejection", "draft_dists": draft_dists, "quadratic": variant == "full"}
    if variant == "full":
        args |= {"logit_bias": _randn(13, 9, seed=5), "error_flags": torch.zeros(3, dtype=torch.int32)}
    return args


def _top_logprobs(variant: str) -> Arguments:
    """Requests with two tokens, none, and three. `other`: the other way round."""
    other = variant == "other"
    return {
        "logits": _randn(9, 9),
        "query_start_loc": _int32(0, 3, 5, 9) if other else _int32(0, 5, 5, 9),
        "tokens": torch.tensor([[-1] * 3, [1, 2, 3], [4, -1, -1]] if other else [[1, 2, -1], [-1] * 3, [4, 5, 6]]),
        "count": 3,
        "id_limit": 8,
    }


def _apply_penalties(variant: str) -> Arguments:
    """K = 2: requests with 2 drafts, none, and no rows. `other`: other texts and drafts."""
    other = variant == "other"
    return {
        "logits": _randn(13, 9),
        "query_start_loc": _int32(0, 3, 9, 13) if other else _int32(0, 9, 12, 12),
        "num_drafts": _int32(0, 1, 0) if other else _int32(2, 0, 0),
        "drafts": torch.tensor([[3, 5], [0, 0], [-1, -1]]),
        "text": torch.tensor([[8, 8, 8, 8]] * 3 if other else [[1, 2, 1, 3], [4, 4, 0, 0], [0, 0, 0, 0]]),
        "lengths": _int32(4, 4, 4) if other else _int32(4, 2, 1),
        "penalties": Penalties(
            prompt_lengths=_int32(4, 0, 1) if other else _int32(1, 2, 1),
            presence=torch.tensor([0.5, 0.0, 1.0]),
            frequency=torch.tensor([0.25, -0.5, 1.0]),
            repetition=torch.tensor([1.5, 1.0, 1.0]),
            bias_ids=torch.tensor([[6, 2], [-1, 9], [-1, -1]]),
            bias=torch.tensor([[2.0, -3.0], [1.0, 1.0], [0.0, 0.0]]),
        ),
        "quadratic": variant == "plain" or other,
    }


def _rerank_drafts(variant: str) -> Arguments:
    """K = 2, H = 6, W = 3: requests with drafts to choose, without, and with; 9 rows."""
    other = variant == "other"
    args: Arguments = {
        "logits": _randn(9, 9),
        "hidden": _randn(9, 6, seed=6),
        "first_mask": _int32(4, 0, 2) if other else _int32(1, 0, 7),
        "previous": torch.tensor([8, 7, 0] if other else [3, -1, 5]),
        "positions": _int32(0, 4, 7) if other else _int32(6, 0, 2),
        "drafts": torch.tensor([[3, 5], [-1, -1], [4, 4]]),
        "num_drafts": _int32(0, 2, 2) if other else _int32(2, 0, 2),
        **_parameters(3),
        "embedding": _randn(9, 6, seed=7),
        "head_rows": _randn(9, 6, seed=8),
        "from_hidden": _randn(3, 6, seed=9),
        "from_previous": _randn(3, 6, seed=10),
        "from_state": _randn(3, 3, seed=11),
        "to_query": _randn(6, 3, seed=12),
        "id_limit": 8,
        "mask_id": 2,
    }
    if variant == "greedy":
        args |= {"greedy": True, "temperature": torch.zeros(3)}
    if variant == "rejection":
        draft_dists = DraftDistributions.empty(3, 2, 9, torch.float32, torch.device("cpu"))
        args |= {"draft_dists": draft_dists}
    return args


def _advance(variant: str) -> Arguments:
    other = variant == "other"
    return {
        "num_accepted": _int32(0, 0, 1) if other else _int32(2, 0, 0),
        "tokens": torch.tensor([[3, 5, 1], [7, -1, -1], [4, 4, -1]]),
        "next_drafts": torch.tensor([[1, 2], [-1, -1], [3, 3]]),
        "next_num_drafts": _int32(2, 0, 2),
        "text": torch.zeros(3, 8, dtype=torch.int64),
        "lengths": _int32(3, 8, 1) if other else _int32(2, 5, 1),
        "drafts": torch.zeros(3, 2, dtype=torch.int64),
        "num_drafts": _int32(2, 2, 2),
        "length_limits": _int32(8, 8, 8),
        "stop_ids": torch.tensor([[5, -1], [-1, -1], [-1, 4]]),
        "finish_reason": _int32(0, 0, 1) if other else _int32(0, 0, 0),
    }


def _state(variant: str) -> StepState:
    """Three places of K = 2: with both drafts, with none, and one that does not run. `other`: other ones run."""
    other = variant == "other"
    return StepState(
        text=torch.tensor([[3, 1, 4, 1, 3, 1, 0, 0], [2] * 8, [5] * 8]),
        lengths=_int32(3, 8, 1) if other else _int32(6, 3, 1),
        drafts=torch.tensor([[3, 5], [1, 1], [0, 0]]),
        num_drafts=_int32(0, 1, 2) if other else _int32(2, 0, 2),
        max_drafts=_int32(2, 1, 0),
        draft_source=_int32(1, 0, 1),
        length_limits=_int32(8, 8, 8),
        stop_ids=torch.tensor([[5, -1], [-1, -1], [-1, 4]]),
        finish_reason=_int32(0, 3, 0) if other else _int32(0, 0, 3),
        error_flags=_int32(0, 1, 0) if other else _int32(0, 2, 0),
        page_table=torch.tensor([[3, 1, 5], [4, 2, 0], [0, 0, 0]], dtype=torch.int32),
        seed=torch.tensor([1, -2, 2**62]),
    )


def _plan_rows(variant: str) -> Arguments:
    how = {"quadratic": variant == "quadratic", "noise_below": 7 if variant == "noise" else 0}
    return {"state": _state(variant), "mask_id": 9, "page_size": 4, **how}


def _commit_step(variant: str) -> Arguments:
    other = variant == "other"
    args: Arguments = {
        "num_accepted": _int32(0, 0, 1) if other else _int32(2, 0, 0),
        "tokens": torch.tensor([[3, 5, 1], [7, -1, -1], [4, 4, -1]]),
        "next_drafts": torch.tensor([[1, 2], [-1, -1], [3, 3]]),
        "next_num_drafts": _int32(2, 0, 2),
        "state": _state(variant),
    }
    if variant == "full":
        args |= {"quadratic": True, "suffix": True, "acceptance": 0.5}
        args |= {"logits": _randn(9, 9), "query_start_loc": _int32(0, 5, 8, 8)}
    return args


def _linear(variant: str) -> Arguments:
    args = {"x": _randn(3, 6), "weight": _randn(5, 6, seed=1)}
    return args | {"bias": _randn(5, seed=2)} if variant == "full" else args


def _gated_lora_linear(variant: str) -> Arguments:
    output_sizes = [2, 3] if variant == "full" else None
    args: Arguments = {
        "x": _randn(3, 6),
        "weight": _randn(5, 6, seed=1),
        "lora_a": _randn(4 if output_sizes else 2, 6, seed=3),
        "lora_b": _randn(5, 2, seed=4),
        "lora_mask": torch.tensor([False, True, True] if variant == "other" else [True, False, False]),
        "scale": 0.5,
    }
    if variant == "full":
        args |= {"bias": _randn(5, seed=2), "output_sizes": output_sizes}
    return args


def _linear_silu_and_mul(variant: str) -> Arguments:
    args: Arguments = {"x": _randn(3, 6), "weight": _randn(4, 6, seed=1)}
    if variant == "full":
        args |= {"lora_a": _randn(4, 6, seed=3), "lora_b": _randn(4, 2, seed=4), "output_sizes": [1, 3], "scale": 0.5}
        args |= {"lora_mask": torch.tensor([True, False, False])}
        args |= {"bias": _randn(4, seed=2)}
    return args


def _rms_norm(variant: str) -> Arguments:
    args = {"x": _randn(3, 6), "weight": _randn(6, seed=1), "eps": 1e-6}
    return args | {"residual": _randn(3, 6, seed=2)} if variant == "full" else args


def _silu_and_mul(variant: str) -> Arguments:
    return {"x": _randn(3, 6)}


def _embed(variant: str) -> Arguments:
    args = {"ids": torch.tensor([4, 0, -1]), "weight": _randn(5, 6), "is_mask": torch.tensor([False, True, False])}
    if variant == "full":
        args |= {"mask_embedding": _randn(6, seed=1), "dtype": torch.bfloat16}
    if variant == "other":
        args |= {"ids": torch.tensor([9, 9, 9]), "is_mask": torch.tensor([True, True, True])}
    return args


def _qk_norm_rope_append(variant: str) -> Arguments:
    args: Arguments = {
        "qkv": _randn(3, 8 * 4),
        "positions": torch.tensor([2, 0, 6]),
        "rotary": python_ref.rotary_table(torch.tensor([1.0, 0.1]), 7),
        "slot_mapping": torch.tensor([-1, -1, -1]) if variant == "other" else torch.tensor([4, -1, 0]),
        "k_cache": torch.zeros(4, 3, 2, 4),
        "v_cache": torch.zeros(4, 3, 2, 4),
    }
    if variant == "full":
        args |= {"q_weight": _randn(4, seed=1), "k_weight": _randn(4, seed=2), "eps": 1e-5}
    return args


def _prepare_weight(variant: str) -> Arguments:
    return {"weight": _randn(5, 6)}


_BUILDERS: dict[str, tuple[Callable[[str], Arguments], tuple[str, ...]]] = {
    "strided_attention": (_attention, ("plain", "tree_mask", "window")),
    "sample_rows": (_sample_rows, ("plain", "full")),
    "verify_accept": (_verify_accept, ("plain", "rejection", "full")),
    "top_logprobs": (_top_logprobs, ("plain",)),
    "apply_penalties": (_apply_penalties, ("plain", "chain")),
    "rerank_drafts": (_rerank_drafts, ("plain", "greedy", "rejection")),
    "advance": (_advance, ("plain",)),
    "plan_rows": (_plan_rows, ("plain", "quadratic", "noise")),
    "commit_step": (_commit_step, ("plain", "full")),
    "linear": (_linear, ("plain", "full")),
    "gated_lora_linear": (_gated_lora_linear, ("plain", "full")),
    "linear_silu_and_mul": (_linear_silu_and_mul, ("plain", "full")),
    "rms_norm": (_rms_norm, ("plain", "full")),
    "silu_and_mul": (_silu_and_mul, ("plain",)),
    "embed": (_embed, ("plain", "full")),
    "qk_norm_rope_append": (_qk_norm_rope_append, ("plain", "full")),
    "prepare_weight": (_prepare_weight, ("plain",)),
}


def arguments(op: str, variant: str = "plain") -> Arguments:
    """Fresh, valid arguments. `other` has the shapes of `plain` but other data: lengths, gates, skips, faults."""
    return _BUILDERS[op][0](variant)


def variants(ops: tuple[str, ...] = STEP_OPS) -> list[tuple[str, str]]:
    """(op, variant) of all cases; together they use every optional argument."""
    return [(op, variant) for op in ops for variant in _BUILDERS[op][1]]


def with_all_arguments(op: str) -> Arguments:
    """The variant that gives every tensor argument, with `out` where the op takes one."""
    args = arguments(op, _BUILDERS[op][1][1 if op == "strided_attention" else -1])
    return args if op == "prepare_weight" else args | {"out": new_out(op, args)}


def new_out(op: str, args: Arguments) -> Any:
    """Tensors of the shape of the results, filled with a value that no op gives."""
    results = reference(op)(**copy.deepcopy(args))
    if isinstance(results, tuple):
        return tuple(torch.full_like(x, -77) for x in results)
    return torch.full_like(results, -77)


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with all tensors in it changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: mapped(change, getattr(value, f.name)) for f in dataclasses.fields(value)})
    return tree_map_only(Tensor, change, value)


def tensors(args: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Every tensor argument by the name that errors give it: also draft_dists.logits, state.text, out[0]."""
    for name, value in args.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (DraftDistributions, Penalties, StepState)):
            yield from ((f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
        elif isinstance(value, tuple):
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(value))


def replaced(args: Arguments, name: str, value: Any) -> Arguments:
    """A shallow copy of the arguments with one tensor, named as in `tensors`, replaced."""
    args = dict(args)
    if "." in name:
        outer, part = name.split(".")
        args[outer] = dataclasses.replace(args[outer], **{part: value})
    elif "[" in name:
        outer, index = name.rstrip("]").split("[")
        parts = list(args[outer])
        parts[int(index)] = value
        args[outer] = tuple(parts)
    else:
        args[name] = value
    return args
