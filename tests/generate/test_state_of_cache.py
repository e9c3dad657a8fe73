"""What a step leaves in the cache, and what its rows see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from idlm_kernels import current_backend
from idlm_kernels.generate import Generator, SamplingParams, StepPlan
from idlm_kernels.generate.generator import Batch
from idlm_kernels.generate.plan import plan_rows, prefill_rows
from idlm_kernels.generate.step import decode_step, prefill
from tests.tiny import oracle_checkpoint

MakeGenerator = Callable[..., Generator]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5]]


def start(generator: Generator, plan: str, stride: int, verify: str = "match") -> Batch:
    params = SamplingParams(temperature=1.0, seed=9, max_tokens=50)
    batch = Batch(generator, PROMPTS, params, StepPlan(plan, stride), verify)  # type: ignore[arg-type]
    prefill(batch._decoder, batch._state, 0, [len(prompt) for prompt in PROMPTS], 512)
    return batch


def assert_same(found: torch.Tensor, want: torch.Tensor) -> None:
    if current_backend() == "torch":  # plain BLAS: the last bits depend on the number of rows
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, want)


@pytest.mark.parametrize("oracle", [False, True], ids=["rejects", "accepts"])
@pytest.mark.parametrize("verify", ["match", "rejection"])
@pytest.mark.parametrize(("plan", "stride"), [("ar", 1), ("chain", 4), ("branched", 4), ("branched", 2)])
def test_cache_holds_a_fresh_prefill(
    plan: str, stride: int, verify: str, oracle: bool, make_generator: MakeGenerator
) -> None:
    generator = make_generator(oracle_checkpoint() if oracle else None, page_size=3)
    batch = start(generator, plan, stride, verify)
    state, cache = batch._state, batch._decoder.cache
    for _ in range(6):
        decode_step(batch._decoder, state)
        for b in range(len(PROMPTS)):
            cached = int(state.lengths[b]) - 1  # pending has no KV yet
            fresh = generator.model.new_cache(-(-cached // 3), 3)
            pages = torch.arange(len(fresh.k[0]), dtype=torch.int32).view(1, -1)
            alone = dataclasses.replace(state.requests(b, b + 1), page_table=pages)
            generator.model.forward(prefill_rows(alone, [0], [cached], 0, 3), fresh)
            own = state.page_table[b].long()
            for layer in range(generator.config.num_layers):
                for mine, other in ((cache.k, fresh.k), (cache.v, fresh.v)):
                    assert_same(mine[layer][own].flatten(0, 1)[:cached], other[layer].flatten(0, 1)[:cached])


@pytest.mark.parametrize(("plan", "stride"), [("chain", 4), ("branched", 4), ("branched", 8), ("chain", 9)])
def test_rows_see_nothing_that_they_must_not(plan: str, stride: int, make_generator: MakeGenerator) -> None:
    """Another token in a row leaves the logits of all rows that do not see it bit-identical, and moves the others."""
    generator = make_generator(page_size=3)
    batch = start(generator, plan, stride)
    decoder, state = batch._decoder, batch._state
    state.num_drafts.fill_(stride - 1)
    state.drafts.copy_(torch.arange(2 * (stride - 1)).view(2, -1) + 7)
    rows = plan_rows(decoder.plan, state, 3)
    base = generator.model.forward(rows, decoder.cache)
    m = int(rows.query_start_loc[1])
    assert m == (stride**2 if plan == "branched" else 2 * stride - 1)
    for changed in range(m):
        other = dataclasses.replace(rows, ids=rows.ids.clone(), is_mask=rows.is_mask.clone())
        other.ids[changed] = 59
        other.is_mask[changed] = False
        logits = generator.model.forward(other, decoder.cache)
        for r in range(rows.ids.shape[0]):
            mask = 2 ** (r + 1) - 1 if rows.tail_mask is None else int(rows.tail_mask[r])
            sees = r < m and mask >> changed & 1
            assert torch.equal(logits[r], base[r]) == (not sees), (changed, r)


@pytest.mark.parametrize(("plan", "stride"), [("ar", 1), ("chain", 4), ("branched", 4)])
def test_stale_slots_are_never_seen(plan: str, stride: int, make_generator: MakeGenerator) -> None:
    """NaN in every slot that no row of the request has written changes nothing."""
    generator = make_generator(page_size=3)
    outcomes = []
    for poison in (False, True):
        batch = start(generator, plan, stride)
        for _ in range(4):
            if poison:
                for b in range(len(PROMPTS)):
                    for page_index, page in enumerate(batch._state.page_table[b].tolist()):
                        stale = range(3)[max(0, min(3, int(batch._state.lengths[b]) - 1 - 3 * page_index)) :]
                        for layer in range(generator.config.num_layers):
                            for offset in stale:
                                batch._decoder.cache.k[layer][page, offset] = float("nan")
                                batch._decoder.cache.v[layer][page, offset] = float("nan")
            decode_step(batch._decoder, batch._state)
        outcomes.append(batch._state.text.clone())
        assert not batch._state.status.any()
    assert torch.equal(*outcomes)
