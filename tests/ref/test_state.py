"""advance against a loop over requests and tokens in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_kernels import advance, use_backend

RUNNING, STOPPED, LENGTH = 0, 1, 2
MAX_LEN = 12


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


@dataclass
class Request:
    """State of a request before the step, and what verify_accept gave for it."""

    accepted: int
    tokens: list[int]  # N entries, -1 after the emitted ones
    next_drafts: list[int]
    next_n: int
    text: list[int]  # MAX_LEN entries
    length: int
    drafts: list[int]
    n: int
    limit: int
    stop_ids: list[int]
    finish_reason: int = RUNNING


def step_in_python(r: Request) -> int:
    """Advance one request, token after token; returns how many were committed."""
    had_rows = r.tokens[0] != -1
    if r.finish_reason != RUNNING or not had_rows:
        return 0
    emitted = 0
    for token in r.tokens[: r.accepted + 1]:
        if r.length == r.limit:
            break
        r.text[r.length] = token
        r.length += 1
        emitted += 1
        if token in r.stop_ids:
            r.finish_reason = STOPPED
            break
    if r.finish_reason == RUNNING and r.length >= r.limit:
        r.finish_reason = LENGTH
    r.drafts = list(r.next_drafts)
    r.n = r.next_n if r.finish_reason == RUNNING else 0
    return emitted


def run(requests: list[Request], out: torch.Tensor | None = None) -> tuple[list[int], dict[str, Any]]:
    """`advance` over the batch: tokens committed, and the state after it."""

    def column(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor([getattr(r, name) for r in requests], dtype=dtype)

    width = len(requests[0].tokens)
    state = {
        "text": column("text", torch.int64),
        "lengths": column("length"),
        "drafts": column("drafts", torch.int64).view(len(requests), width - 1),
        "num_drafts": column("n"),
        "finish_reason": column("finish_reason"),
    }
    constant = {
        "length_limits": column("limit"),
        "stop_ids": column("stop_ids", torch.int64).view(len(requests), -1),
    }
    results = (
        column("accepted"),
        column("tokens", torch.int64),
        column("next_drafts", torch.int64).view(len(requests), width - 1),
        column("next_n"),
    )
    inputs_before = [x.clone() for x in (*results, *constant.values())]
    emitted = advance(*results, **state, **constant, out=out)
    assert emitted.dtype == torch.int32
    for before, after in zip(inputs_before, (*results, *constant.values()), strict=True):
        assert torch.equal(before, after), "an input that is not state was written"
    return emitted.tolist(), {name: value.tolist() for name, value in state.items()}


def state_of(requests: list[Request]) -> dict[str, Any]:
    return {
        "text": [r.text for r in requests],
        "lengths": [r.length for r in requests],
        "drafts": [r.drafts for r in requests],
        "num_drafts": [r.n for r in requests],
        "finish_reason": [r.finish_reason for r in requests],
    }


def check(requests: list[Request]) -> list[int]:
    got, got_state = run(requests)
    want = [step_in_python(r) for r in requests]
    assert got == want
    assert got_state == state_of(requests)
    return got


def request(**changes: Any) -> Request:
    """A running request of 5 tokens with room, whose step accepted both drafts."""
    base = {
        "accepted": 2,
        "tokens": [21, 22, 23],
        "next_drafts": [31, 32],
        "next_n": 2,
        "text": [10, 11, 12, 13, 14, 0, 0, 0, 0, 0, 0, 0],
        "length": 5,
        "drafts": [21, 22],
        "n": 2,
        "limit": MAX_LEN,
        "stop_ids": [-1, -1],
    }
    return Request(**{**base, **changes})


def test_a_plain_step():
    r = request()
    assert check([r]) == [3]
    assert r.text[:8] == [10, 11, 12, 13, 14, 21, 22, 23]
    assert (r.length, r.finish_reason, r.drafts, r.n) == (8, RUNNING, [31, 32], 2)


@pytest.mark.parametrize(
    ("stop_ids", "emitted"),
    [([21, -1], 1), ([22, -1], 2), ([-1, 23], 3), ([23, 22], 2), ([22, 22], 2), ([99, 10], 3)],
)
def test_stops_inside_a_step(stop_ids, emitted):
    """The stop id is committed, nothing after it; an id of the prompt stops nothing."""
    r = request(stop_ids=stop_ids)
    assert check([r]) == [emitted]
    assert (r.finish_reason, r.n) == ((RUNNING, 2) if emitted == 3 and 23 not in stop_ids else (STOPPED, 0))
    assert r.text[5 + emitted :] == [0] * (7 - emitted)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4])
def test_limits_inside_a_step(room):
    r = request(limit=5 + room)
    assert check([r]) == [min(room, 3)]
    assert (r.finish_reason, r.n) == ((LENGTH, 0) if room <= 3 else (RUNNING, 2))


def test_a_stop_at_the_limit_is_a_stop():
    r = request(limit=6, stop_ids=[21, -1])
    assert check([r]) == [1]
    assert r.finish_reason == STOPPED


def test_a_stop_beyond_the_limit_is_not_seen():
    r = request(limit=6, stop_ids=[22, -1])
    assert check([r]) == [1]
    assert r.finish_reason == LENGTH


def test_a_stop_id_among_rejected_drafts_does_not_stop():
    """Only d_1..d_a and y_a count, whatever lies behind them."""
    r = request(accepted=0, tokens=[21, -1, -1], stop_ids=[-1, 22])
    assert check([r]) == [1]
    r = request(accepted=0, tokens=[21, 22, 23], stop_ids=[22, -1])
    assert check([r]) == [1]
    assert r.finish_reason == RUNNING


def test_a_context_filled_to_the_last_entry():
    r = request(length=10, text=[*range(100, 110), 0, 0], limit=12)
    assert check([r]) == [2]
    assert r.text == [*range(100, 110), 21, 22]


@pytest.mark.parametrize("finish_reason", [STOPPED, LENGTH])
def test_finished_requests_are_untouched(finish_reason):
    """Also drafts that were never cleared, of a request that somebody else ended."""
    r = request(finish_reason=finish_reason, n=2, drafts=[7, 8])
    before = request(finish_reason=finish_reason, n=2, drafts=[7, 8])
    assert check([r]) == [0]
    assert r == before


def test_a_request_without_rows_keeps_its_drafts():
    r = request(accepted=0, tokens=[-1, -1, -1], next_drafts=[-1, -1], next_n=0, drafts=[7, 8], n=2, stop_ids=[-1, 0])
    assert check([r]) == [0]
    assert (r.drafts, r.n, r.length) == ([7, 8], 2, 5)


def test_drafts_are_cleared_when_none_are_proposed():
    r = request(accepted=1, tokens=[21, 40, -1], next_drafts=[-1, -1], next_n=0)
    assert check([r]) == [2]
    assert (r.drafts, r.n) == ([-1, -1], 0)


def test_ar_steps_have_no_drafts():
    r = request(accepted=0, tokens=[21], next_drafts=[], next_n=0, drafts=[], n=0)
    assert check([r]) == [1]


def test_no_stop_ids_at_all():
    r = request(stop_ids=[])
    assert check([r]) == [3]


def test_out_is_written_and_returned():
    out = torch.full((2,), -9, dtype=torch.int32)
    emitted, _ = run([request(), request(finish_reason=STOPPED)], out)
    assert emitted == out.tolist() == [3, 0]


ids = st.integers(0, 5)


@st.composite
def requests_of_width(draw: Any, width: int, num_stops: int) -> Request:
    length = draw(st.integers(1, MAX_LEN))
    accepted = draw(st.integers(0, width - 1))
    has_rows = draw(st.integers(0, 9)) > 0
    tokens = [draw(ids) if i <= accepted and has_rows else -1 for i in range(width)]
    proposed = draw(st.booleans()) and has_rows
    return Request(
        accepted=accepted if has_rows else 0,
        tokens=tokens,
        next_drafts=[draw(ids) if proposed else -1 for _ in range(width - 1)],
        next_n=width - 1 if proposed else 0,
        text=[draw(ids) if i < length else 77 for i in range(MAX_LEN)],
        length=length,
        drafts=[draw(ids) for _ in range(width - 1)],
        n=draw(st.integers(0, width - 1)),
        limit=draw(st.integers(length, MAX_LEN)),
        stop_ids=[draw(st.one_of(st.just(-1), ids)) for _ in range(num_stops)],
        finish_reason=draw(st.sampled_from([RUNNING, RUNNING, RUNNING, STOPPED, LENGTH])),
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_batches(data):
    width, num_stops = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2))
    batch = data.draw(st.lists(requests_of_width(width, num_stops), min_size=1, max_size=5))
    check(batch)
