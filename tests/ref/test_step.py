"""commit_step against loops over requests and tokens in plain Python, and its search for drafts in the text.

The rows of plan_rows are held to the design in tests/generate/test_plan.py.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_kernels import StepState, commit_step, use_backend
from python_ref import FLAG_EMPTY_ROW, FLAG_INF, FLAG_NAN, uniform
from python_ref.contract import FAILED, LENGTH, MASK_DRAFTS, NO_DRAFTS, RUNNING, STOPPED, SUFFIX_DRAFTS
from python_ref.step import LONGEST_MATCH, OUTCOME, suffix_drafts
from tests.ref.steps import random_commit


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def by_search(tokens: list[int], num_drafts: int) -> tuple[list[int], int]:
    """What followed the latest of the longest earlier occurrences of the end of the text, and the match length."""
    best, matched = -1, 0
    for end in range(len(tokens) - 1):
        run = 0
        while run < LONGEST_MATCH and run <= end and tokens[end - run] == tokens[-1 - run]:
            run += 1
        if run and run >= matched:
            best, matched = end, run
    return tokens[best + 1 : best + 1 + num_drafts] if matched else [], matched


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_drafts_of_the_text_equal_a_search(texts: list[list[int]], num_drafts: int) -> None:
    padded = torch.full((len(texts), 45), 1)  # stale tokens lie after the text
    for b, tokens in enumerate(texts):
        padded[b, : len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in texts], dtype=torch.int32)
    drafts, count, matched = suffix_drafts(padded, lengths, num_drafts)
    for b, tokens in enumerate(texts):
        want, match = by_search(tokens, num_drafts)
        assert drafts[b, : int(count[b])].tolist() == want
        assert int(matched[b]) == match


def committed(args: dict[str, Any], b: int) -> tuple[list[int], dict[str, Any]]:
    """The outcome of request b and its state after the step: token after token."""
    state = {f.name: getattr(args["state"], f.name)[b].tolist() for f in dataclasses.fields(StepState)}
    a, tokens = int(args["num_accepted"][b]), args["tokens"][b].tolist()
    next_drafts, next_n = args["next_drafts"][b].tolist(), int(args["next_num_drafts"][b])
    n, source, num_spec_tokens = state["num_drafts"], state["draft_source"], len(next_drafts)
    if args["acceptance"] is not None:
        has_rows, sampled = tokens[0] >= 0, max(0, *tokens, -1)
        a = 0
        while has_rows and a < n:
            at = torch.tensor(state["lengths"] + a)
            if uniform(torch.tensor(state["seed"]), at) >= args["acceptance"]:
                break
            a += 1
        tokens = [*(max(0, d) for d in state["drafts"][:a]), sampled] if has_rows else []
        tokens += [-1] * (num_spec_tokens + 1 - len(tokens))
        next_n = num_spec_tokens if has_rows and (args["quadratic"] or a == n) else 0
        next_drafts = [max(0, d) for d in next_drafts]
    if failed := bool(state["error_flags"] & (FLAG_NAN | FLAG_EMPTY_ROW)):
        tokens = [-1] * len(tokens)
    emitted = 0
    if state["finish_reason"] == RUNNING and tokens[0] >= 0:
        for token in tokens[: a + 1]:
            if state["lengths"] == state["length_limits"]:
                break
            state["text"][state["lengths"]] = token
            state["lengths"] += 1
            emitted += 1
            if token in state["stop_ids"]:
                state["finish_reason"] = STOPPED
                break
        if state["finish_reason"] == RUNNING and state["lengths"] >= state["length_limits"]:
            state["finish_reason"] = LENGTH
        state["drafts"], state["num_drafts"] = next_drafts, next_n if state["finish_reason"] == RUNNING else 0
    if failed and state["finish_reason"] == RUNNING:
        state["finish_reason"] = FAILED
    state["num_drafts"] = min(state["num_drafts"], state["max_drafts"])
    if emitted:
        state["draft_source"] = MASK_DRAFTS if state["num_drafts"] else NO_DRAFTS
    if args["suffix"] and num_spec_tokens and state["max_drafts"] and state["finish_reason"] == RUNNING:
        drafts, matched = by_search(state["text"][: state["lengths"]], num_spec_tokens)
        if matched >= (6 if state["num_drafts"] else 2):
            rest = state["drafts"][len(drafts) :]  # no drafts; nobody reads them
            state |= {"drafts": drafts + rest, "num_drafts": min(len(drafts), state["max_drafts"])}
            state["draft_source"] = SUFFIX_DRAFTS
    return [n, a, emitted, state["finish_reason"], state["error_flags"], source, *tokens], state


def check(args: dict[str, Any]) -> torch.Tensor:
    want = [committed(args, b) for b in range(len(args["tokens"]))]
    outcome = commit_step(**args)
    for b, (row, state) in enumerate(want):
        assert outcome[b, : len(row)].tolist() == row
        for name, value in state.items():
            got = getattr(args["state"], name)[b].tolist()
            if name == "drafts":
                count = state["num_drafts"] if state["draft_source"] == SUFFIX_DRAFTS else len(value)
                got, value = got[:count], value[:count]
            assert got == value, name
    return outcome


@pytest.mark.parametrize("seed", range(40))
def test_equals_a_loop(seed: int) -> None:
    check(random_commit(seed))


def test_the_random_steps_hold_every_case() -> None:
    seen: set[tuple[str, int]] = set()
    for seed in range(40):
        args = random_commit(seed)
        outcome = commit_step(**args)
        seen |= {("finish_reason", int(x)) for x in outcome[:, OUTCOME.index("finish_reason")]}
        seen |= {("draft_source", int(x)) for x in args["state"].draft_source}
        seen |= {("emitted", int(x)) for x in outcome[:, OUTCOME.index("num_emitted")]}
        seen |= {("acceptance", int(args["acceptance"] is not None)), ("suffix", int(args["suffix"]))}
    assert seen >= {("finish_reason", x) for x in range(5)} | {("draft_source", x) for x in range(3)}
    assert seen >= {("emitted", x) for x in range(5)} | {(x, y) for x in ("acceptance", "suffix") for y in (0, 1)}


@pytest.mark.parametrize(
    ("error_flags", "finish_reason"), [(FLAG_NAN, FAILED), (FLAG_EMPTY_ROW, FAILED), (FLAG_INF, RUNNING), (8, RUNNING)]
)
def test_a_request_ends_before_the_token_that_nan_would_decide(error_flags: int, finish_reason: int) -> None:
    args = random_commit(0, suffix=False, acceptance=None)
    args["state"].finish_reason.zero_()
    args["state"].error_flags.fill_(error_flags)
    args["state"].stop_ids.fill_(-1)
    args["state"].length_limits.fill_(args["state"].text.shape[1])
    args["state"].lengths.clamp_(max=20)
    args["tokens"].clamp_(min=0)
    before = args["state"].lengths.clone()
    outcome = check(args)
    assert (outcome[:, OUTCOME.index("finish_reason")] == finish_reason).all()
    assert torch.equal(args["state"].lengths, before) == (finish_reason == FAILED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logprobs_are_those_of_the_models_own_logits(dtype: torch.dtype) -> None:
    args = random_commit(3, acceptance=None)
    batch, width = args["tokens"].shape
    logits = (torch.randn(batch * width, 60) * 3).to(dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32) * width
    outcome = commit_step(**args, logits=logits, query_start_loc=starts)
    assert outcome.shape == (batch, 6 + 2 * width)
    want = torch.log_softmax(logits.double(), 1).view(batch, width, 60)
    for b in range(batch):
        tokens, bits = outcome[b, 6 : 6 + width].tolist(), outcome[b, 6 + width :].tolist()
        for i, (token, value) in enumerate(zip(tokens, bits, strict=True)):
            (logprob,) = struct.unpack("d", struct.pack("q", value))
            assert logprob == pytest.approx(float(want[b, i, token]), abs=2e-6) if token >= 0 else logprob == 0
