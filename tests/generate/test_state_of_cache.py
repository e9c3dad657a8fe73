"""What a step leaves in the cache, and what its rows see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm_kernels import current_backend
from idlm_kernels.generate import Engine, EngineOptions, Generator, PlanPolicy, SamplingParams, StepPlan
from idlm_kernels.generate.plan import plan_rows, prefill_rows
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import Decoder, decode_step
from tests.tiny import oracle_checkpoint

MakeGenerator = Callable[..., Generator]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5]]
PAGE_SIZE = 3


def run_steps(generator: Generator, plan: str, stride: int, step: Any, rule: str = "match") -> list[list[int]]:
    """Decode PROMPTS, with `step` in the place of decode_step; returns the tokens."""
    policy = PlanPolicy.fixed(StepPlan(plan, stride))  # type: ignore[arg-type]
    options = EngineOptions(rule=rule, max_num_seqs=2, max_model_len=64, page_size=PAGE_SIZE)
    engine = Engine(generator.model, None, policy, options, step=step)
    params = SamplingParams(temperature=1.0, seed=9, max_tokens=12)
    requests = [engine.submit(prompt, params, 9 + i) for i, prompt in enumerate(PROMPTS)]
    for _ in engine.events():
        pass
    assert [request.output.error for request in requests] == [None, None]
    return [request.output.token_ids for request in requests]


def assert_same(found: torch.Tensor, want: torch.Tensor) -> None:
    if current_backend() == "torch":  # plain BLAS: the last bits depend on the number of rows
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, want)


@pytest.mark.parametrize("oracle", [False, True], ids=["rejects", "accepts"])
@pytest.mark.parametrize("rule", ["match", "rejection"])
@pytest.mark.parametrize(("plan", "stride"), [("ar", 1), ("chain", 4), ("quadratic", 4), ("quadratic", 2)])
def test_cache_holds_a_fresh_prefill(
    plan: str, stride: int, rule: str, oracle: bool, make_generator: MakeGenerator
) -> None:
    generator = make_generator(oracle_checkpoint() if oracle else None)
    checked = 0

    def step(decoder: Decoder, state: DecodeState) -> Tensor:
        nonlocal checked
        outcome = decode_step(decoder, state)
        for b in range(state.batch):
            cached = int(state.lengths[b]) - 1  # pending has no KV yet
            fresh = generator.model.new_cache(-(-cached // PAGE_SIZE), PAGE_SIZE)
            pages = torch.arange(len(fresh.k[0]), dtype=torch.int32).view(1, -1)
            alone = dataclasses.replace(state.requests(b, b + 1), page_table=pages)
            generator.model.forward(prefill_rows(alone, [0], [cached], 0, PAGE_SIZE), fresh)
            own = state.page_table[b].long()
            for layer in range(generator.config.num_layers):
                for mine, other in ((decoder.cache.k, fresh.k), (decoder.cache.v, fresh.v)):
                    assert_same(mine[layer][own].flatten(0, 1)[:cached], other[layer].flatten(0, 1)[:cached])
            checked += 1
        return outcome

    run_steps(generator, plan, stride, step, rule)
    assert checked >= 6


@pytest.mark.parametrize(("plan", "stride"), [("chain", 4), ("quadratic", 4), ("quadratic", 8), ("chain", 9)])
def test_rows_see_nothing_that_they_must_not(plan: str, stride: int, make_generator: MakeGenerator) -> None:
    """Another token in a row leaves the logits of all rows that do not see it bit-identical, and moves the others."""
    generator = make_generator()
    checked = 0

    def step(decoder: Decoder, state: DecodeState) -> Tensor:
        nonlocal checked
        if not checked:
            state.num_drafts.fill_(stride - 1)
            state.drafts.copy_(torch.arange(2 * (stride - 1)).view(2, -1) + 7)
            rows = plan_rows(decoder.plan, state, PAGE_SIZE)
            base, _ = generator.model.forward(rows, decoder.cache)
            m = int(rows.query_start_loc[1])
            assert m == (stride**2 if plan == "quadratic" else 2 * stride - 1)
            for changed in range(m):
                other = dataclasses.replace(rows, ids=rows.ids.clone(), is_mask=rows.is_mask.clone())
                other.ids[changed] = 59
                other.is_mask[changed] = False
                logits, _ = generator.model.forward(other, decoder.cache)
                for r in range(rows.ids.shape[0]):
                    mask = 2 ** (r + 1) - 1 if rows.tree_mask is None else int(rows.tree_mask[r])
                    sees = r < m and mask >> changed & 1
                    assert torch.equal(logits[r], base[r]) == (not sees), (changed, r)
                    checked += 1
        return decode_step(decoder, state)

    run_steps(generator, plan, stride, step)
    assert checked


@pytest.mark.parametrize(("plan", "stride"), [("ar", 1), ("chain", 4), ("quadratic", 4)])
def test_stale_slots_are_never_seen(plan: str, stride: int, make_generator: MakeGenerator) -> None:
    """NaN in every slot that no row of the request has written changes nothing."""
    generator = make_generator()

    def poisoned(decoder: Decoder, state: DecodeState) -> Tensor:
        nan = float("nan")
        for b in range(state.batch):
            committed = int(state.lengths[b]) - 1
            for slot in range(committed, state.page_table.shape[1] * PAGE_SIZE):
                page = int(state.page_table[b, slot // PAGE_SIZE])
                if slot // PAGE_SIZE and page == 0:
                    break  # the rest of the table is not in use
                for layer in range(generator.config.num_layers):
                    decoder.cache.k[layer][page, slot % PAGE_SIZE] = nan
                    decoder.cache.v[layer][page, slot % PAGE_SIZE] = nan
        return decode_step(decoder, state)

    want = run_steps(generator, plan, stride, decode_step)
    assert run_steps(generator, plan, stride, poisoned) == want
