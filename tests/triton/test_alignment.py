"""Serving compiles nothing anew: where the state of some requests begins in memory decides no kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from idlm_kernels.testing import bits
from idlm_kernels.triton import (
    attention,
    attention_kernel,
    decision,
    layers,
    layers_kernel,
    perturb,
    rejection,
    rerank,
    rerank_candidates,
    rerank_kernel,
    sampling,
    state,
    truncation,
)
from python_ref import DraftDistributions
from tests.ops.cases import arguments
from tests.ref.test_rerank import distributions_for
from tests.triton.test_attention import attend
from tests.triton.test_rejection import Chain
from tests.triton.test_rerank import mixed

pytestmark = pytest.mark.compiled

MODULES = (
    attention_kernel,
    decision,
    layers_kernel,
    perturb,
    rejection,
    rerank_candidates,
    rerank_kernel,
    sampling,
    state,
    truncation,
)


def compiled() -> int:
    """How many kernels of these modules there are by now."""
    kernels = {f for m in MODULES for f in vars(m).values() if isinstance(f, JITFunction)}
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def shifted(x: Any) -> Any:
    """The same values one row further in memory."""
    if isinstance(x, DraftDistributions):
        return dataclasses.replace(x, cut=shifted(x.cut), log_norm=shifted(x.log_norm))
    return torch.cat([x[:1], x])[1:] if isinstance(x, Tensor) else x


STATE = (
    *("page_table", "seq_lens", "query_start_loc", "tree_mask", "num_drafts", "drafts", "positions", "temperature"),
    *(
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "draft_dists",
        "error_flags",
        "first_mask",
        "previous",
        "num_accepted",
        "tokens",
    ),
    *(
        "next_drafts",
        "next_num_drafts",
        "text",
        "lengths",
        "length_limits",
        "stop_ids",
        "finish_reason",
        "ids",
        "is_mask",
    ),
    "slot_mapping",
)


def _attention(**options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    return attention.strided_attention, attend((70, 9), (3, 2), **options).arguments


def _rejection() -> tuple[Callable[..., Any], dict[str, Any]]:
    chain = Chain(batch=3)
    chain.follow(first := chain.arguments(), sampling.verify_accept(**first, draft_dists=chain.q), chain.q)
    return sampling.verify_accept, {**chain.arguments(), "draft_dists": chain.q, "error_flags": torch.zeros(3).int()}


def _rerank() -> tuple[Callable[..., Any], dict[str, Any]]:
    args = mixed(num_spec_tokens=3, batch=3)
    return rerank.rerank_drafts, {**args, "draft_dists": distributions_for(args)}


CALLS: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "attention": _attention,
    "attention, tree_mask": lambda: _attention(tail="random"),
    "sample_rows": lambda: (sampling.sample_rows, arguments("sample_rows", "full")),
    "match": lambda: (
        sampling.verify_accept,
        {**arguments("verify_accept", "full"), "rule": "match", "draft_dists": None},
    ),
    "rejection": _rejection,
    "rerank_drafts": _rerank,
    "advance": lambda: (state.advance, arguments("advance", "")),
    "embed": lambda: (layers.embed, arguments("embed", "")),
    "qk_norm_rope_append": lambda: (layers.qk_norm_rope_append, arguments("qk_norm_rope_append", "")),
}


@pytest.mark.parametrize("call", CALLS)
def test_where_the_state_begins_decides_no_kernel(call: str) -> None:
    results, counts = [], []
    for shift in (False, True):
        torch.manual_seed(0)
        function, given = CALLS[call]()
        if shift:
            moved = {name: shifted(x) if name in STATE else x for name, x in given.items()}
            assert any(x is not None and x is not given[name] for name, x in moved.items())
            given = moved
        result = function(**given)
        results.append([bits(x) for x in (result if isinstance(result, tuple) else (result,))])
        counts.append(compiled())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counts[0] and counts[0] == counts[1], "the shift made kernels of its own"
