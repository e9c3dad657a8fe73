"""Drafts from finished outputs: what the index finds, what the device finds in it, and that no text changes by it."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import pytest
import torch

from bench.history import rows_of
from idlm_kernels.generate import DecodeOptions, EngineOptions, Generator, Request, SamplingParams
from idlm_kernels.generate.history import (
    CONTEXT,
    HANDED_OVER,
    PASSAGES,
    History,
    draft_from_history,
    history_drafts,
)
from idlm_kernels.generate.state import DecodeState
from python_ref.contract import HISTORY_DRAFTS, MASK_DRAFTS, NO_DRAFTS, RUNNING, STOPPED, SUFFIX_DRAFTS
from python_ref.step import LONGEST_MATCH
from tests.tiny import oracle_checkpoint

MakeGenerator = Callable[..., Generator]


def split(handed: list[int]) -> list[list[int]]:
    passages: list[list[int]] = [[]]
    for token in handed:
        if token >= 0:
            passages[-1].append(token)
        elif passages[-1]:
            passages.append([])
    return passages[:-1]


def in_common(a: list[int], b: list[int]) -> int:
    count = 0
    while count < min(len(a), len(b), CONTEXT) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


# The index


@pytest.mark.parametrize("seed", range(30))
def test_the_best_passage_goes_on_from_the_longest_context(seed: int) -> None:
    rng = random.Random(seed)
    history, texts = History(10_000), []
    for _ in range(5):
        texts.append([rng.randrange(4) for _ in range(rng.randrange(1, 40))])
        history.add([], texts[-1])
    found_some = False
    for _ in range(20):
        text = [rng.randrange(4) for _ in range(12)]
        places = [(in_common(text, t[:end]), t[max(0, end - 8) :]) for t in texts for end in range(3, len(t))]
        longest = max((common for common, _ in places), default=0)
        handed = history.passages(text)
        assert len(handed) == HANDED_OVER
        passages = split(handed)
        assert len(passages) <= PASSAGES
        if longest < 3:
            assert passages == []
        else:
            assert (longest, passages[-1]) in places
            found_some = True
    assert found_some


def test_a_question_asked_again_finds_its_own_answer() -> None:
    """Whose last words, a template's, are those of every prompt."""
    history, ending = History(1000), [50, 51, 52, 53, 54]
    for question in range(8):
        history.add([question, 9, *ending], [100 + question, 3, 4, 5])
    for question in range(8):
        passages = split(history.passages([question, 9, *ending]))
        assert passages[-1] == [question, 9, *ending, 100 + question, 3, 4, 5]
        assert len({tuple(p) for p in passages}) == PASSAGES, "the others are different ones"


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    rng = random.Random(1)
    history = History(50)
    for i in range(200):
        history.add([1] * rng.choice((0, 5, 100)), [rng.randrange(5) for _ in range(rng.randrange(0, 80))])
        assert history.num_tokens == sum(map(len, history._texts.values())) <= 50, i
        assert sum(map(len, history._places.values())) == sum(len(t) - 3 for t in history._texts.values())
        assert all(history._places.values()), "no place, no entry"
        for anchor, places in history._places.items():
            assert all(tuple(history._texts[number][end - 3 : end]) == anchor for number, end in places)
    history.add([6] * 100, [7, 8, 9, 10, 11])
    assert split(history.passages([7, 8, 9]))[-1][-5:] == [7, 8, 9, 10, 11], "of a long prompt the output stays"
    history.add([], [1] * 50)
    assert split(history.passages([7, 8, 9])) == [] and len(history._texts) == 1


def test_too_little_to_draft_from() -> None:
    history = History(100)
    for prompt, output in (([1, 2, 3, 4], []), ([1], [2, 3])):
        history.add(prompt, output)
    assert history.num_tokens == 0
    assert set(history.passages([1, 2, 3])) == set(history.passages([])) == {-1}


# The device


@pytest.mark.parametrize("seed", range(30))
def test_the_device_finds_what_a_loop_finds(seed: int) -> None:
    rng = random.Random(seed)
    batch, size, num_drafts = 6, rng.choice((1, 5, 40)), rng.randrange(1, 6)
    text = torch.tensor([[rng.randrange(3) for _ in range(12)] for _ in range(batch)])
    lengths = torch.tensor([rng.randrange(1, 13) for _ in range(batch)], dtype=torch.int32)
    history = torch.tensor([[rng.choice((-1, 0, 0, 1, 1, 2)) for _ in range(size)] for _ in range(batch)])
    drafts, count, matched = history_drafts(text, lengths, history, num_drafts)
    for b in range(batch):
        own, other = text[b, : int(lengths[b])].tolist(), history[b].tolist()
        best, follows = 0, []
        for end in range(1, size):
            common = 0
            while common < min(len(own), end, LONGEST_MATCH) and own[-1 - common] == other[end - 1 - common]:
                common += 1
            if common and common >= best and other[end] >= 0:
                best = common
                follows = other[end : end + num_drafts]
        follows = follows[: follows.index(-1)] if -1 in follows else follows
        assert (int(matched[b]), int(count[b]), drafts[b, : len(follows)].tolist()) == (best, len(follows), follows)


def test_which_drafts_make_room() -> None:
    """Of seven requests with the same text and passages: those that want, and may have, drafts of history."""
    match, other = [1, 2, 3, 4, 5, 6], 9
    state = DecodeState.empty(
        7, 8, 1, 3, 1, mask_token_id=None, id_limit=50, device=torch.device("cpu"), handed_over=10
    )
    state.text[:, :6] = torch.tensor(match)
    state.lengths.fill_(6)
    state.finish_reason.fill_(RUNNING)
    state.drafts.fill_(other)
    state.history[:] = torch.tensor([*match, 7, 8, -1, -1])
    state.history[1, 0] = 0  # five tokens in common: too few to take the place of MASK rows' drafts
    state.history[2, :5] = 0  # one: too few for anything
    sources = [MASK_DRAFTS, MASK_DRAFTS, NO_DRAFTS, NO_DRAFTS, SUFFIX_DRAFTS, MASK_DRAFTS, MASK_DRAFTS]
    state.draft_source[:] = torch.tensor(sources)
    state.num_drafts[:] = torch.tensor([3, 3, 0, 0, 3, 3, 3])
    state.max_drafts[5] = 1
    state.finish_reason[6] = STOPPED
    draft_from_history(state)
    assert state.num_drafts.tolist() == [2, 3, 0, 2, 3, 1, 3]
    taken = [HISTORY_DRAFTS, MASK_DRAFTS, NO_DRAFTS, HISTORY_DRAFTS, SUFFIX_DRAFTS, HISTORY_DRAFTS, MASK_DRAFTS]
    assert state.draft_source.tolist() == taken
    for b, source in enumerate(taken):
        assert state.drafts[b, :2].tolist() == ([7, 8] if source == HISTORY_DRAFTS else [other, other])


# The engine


@pytest.fixture(scope="module")
def models(make_generator: MakeGenerator) -> list[Generator]:
    return [make_generator(), make_generator(oracle_checkpoint())]


@pytest.mark.parametrize("plan", ["chain", "quadratic"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_was_answered_is_drafted_again(plan: str, temperature: float, models: list[Generator]) -> None:
    """And a text is that of AR whatever others have answered before."""
    generator = models[0]  # whose MASK rows know nothing
    engine = generator.engine(
        EngineOptions(plan=plan, stride=4, max_num_seqs=2, max_model_len=64, window_steps=4, history_tokens=500)  # type: ignore[arg-type]
    )
    params = SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True)
    asked: list[Request] = []
    for prompt, seed in (([5, 6, 7], 1), ([5, 6, 7], 1), ([5, 6, 7], 2), ([8, 9], 3), ([5, 6, 7], 1)):
        asked.append(engine.submit(prompt, params, seed))
        for _ in engine.events():
            pass
    for request in asked:
        ordinary = generator.generate(
            [request.prompt],
            [SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True, seed=request.seed)],
            plan="ar",
        )[0]
        assert request.output.token_ids == ordinary.token_ids
    results = [request.output.result("", 0) for request in asked]
    assert "history" not in results[0].acceptance_by_source
    for again in (results[1], results[4]):
        assert again.acceptance_by_source["history"] > 0.9
        assert again.forwards < results[0].forwards / 2
    counts = engine.draft_counts
    assert sum(counts.accepted) < sum(counts.verified) / 2, "the adapter is not praised for what history drafts"


def test_a_cancelled_or_failed_request_leaves_nothing(models: list[Generator]) -> None:
    engine = models[0].engine(EngineOptions(max_num_seqs=1, max_model_len=64, history_tokens=500, window_steps=1))
    request = engine.submit([1, 2, 3, 4], SamplingParams(max_tokens=40, ignore_eos=True), 0)
    list(engine.window())
    engine.cancel(request)
    list(engine.window())
    assert engine._history is not None and engine._history.num_tokens == 0
    assert not engine.busy


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"history_tokens": -1}, ValueError),
        ({"history_tokens": True}, TypeError),
        ({"history_tokens": 1.5}, TypeError),
        ({"history_tokens": 9, "rule": "rejection"}, ValueError),
    ],
)
def test_refused(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match="history_tokens|finished outputs"):
        DecodeOptions(**changes)  # type: ignore[arg-type]


def test_the_bench_counts_what_a_history_is_worth(models: list[Generator]) -> None:
    """On a model whose MASK rows know nothing: what is asked again is drafted, what is asked once is not."""
    options = argparse.Namespace(plan="chain", stride=4, tokens=30, samples=2)
    prompts = [[i, 50, i + 1, 51] for i in range(5)]
    rows = {(row["traffic"], row["history"] > 0): row for row in rows_of(models[0], prompts, options)}
    assert len(rows) == 6
    assert rows["asked again", True]["tpf"] > 1.5 * rows["asked again", False]["tpf"]
    assert rows["asked again", True]["acceptance, history"] > 0.9
    assert all(rows[traffic, False]["acceptance, history"] is None for traffic, _ in rows)
