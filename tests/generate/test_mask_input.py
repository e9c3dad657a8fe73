"""MASK rows that embed random ids: which ids, in every backend, and that no clean row notices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import python_ref
from idlm_kernels import use_backend
from idlm_kernels.cpu import native
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.plan import StepPlan, plan_rows, prefill_rows
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model import Transformer
from idlm_kernels.model.mask_input import MaskInput
from python_ref.noise import STREAM_INPUT, noise_ids, noise_words
from tests.generate.test_exactness import SAMPLERS, decode, prompts_of, results
from tests.generate.test_no_sync import NoSync
from tests.generate.test_plan import make_state
from tests.tiny import MemoryCheckpoint, save_tiny_bundle, tiny_config

BELOW = 50
KEY = 0x1234_5678_9ABC_DEF0


def noisy_state(num_drafts: list[int], stride: int) -> DecodeState:
    state = make_state([5, 9, 12], num_drafts, stride, 16, set())
    state.seed.copy_(torch.tensor([KEY, -7, 3]))
    return dataclasses.replace(state, noise_below=BELOW)


@pytest.fixture(scope="module")
def noisy() -> Generator:
    """Wide enough for the compiled CPU kernels."""
    config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)
    checkpoint = MemoryCheckpoint(config, scale=0.15)
    model = Transformer(checkpoint, dtype=torch.float32, mask_input=MaskInput("uniform", BELOW))  # type: ignore[arg-type]
    return Generator(model, page_size=16)


# Which ids


def test_ids_are_words_of_a_stream_of_their_own() -> None:
    seed, place, position = torch.tensor([KEY, KEY, 5]), torch.tensor([0, 4, 4]), torch.tensor([7, 7, 9])
    found = noise_ids(seed, place, position, BELOW)
    for i in range(3):  # noise_words counts quads of ids where a row's place stands here
        word = noise_words(seed[i], position[i], 4 * int(place[i]) + 1, STREAM_INPUT)[-1]
        assert int(found[i]) == 1 + int(word) * (BELOW - 1) // 2**32


@pytest.mark.parametrize("below", [2, 3, 50, 151_669])
def test_ids_are_uniform_on_their_range(below: int) -> None:
    place = torch.arange(20_000)
    found = noise_ids(torch.full_like(place, 11), place, place // 4, below)
    assert found.min() >= 1 and found.max() <= below - 1
    share = (found - 1).double() / max(1, below - 2)
    if below > 2:
        assert abs(float(share.mean()) - 0.5) < 0.02
        assert abs(float(((found - 1) * 2 < below - 1).double().mean()) - (below // 2) / (below - 1)) < 0.02


@pytest.mark.parametrize(("kind", "stride"), [("chain", 2), ("chain", 6), ("quadratic", 2), ("quadratic", 4)])
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_a_step(kind: str, stride: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of MASK rows are those of place and position, all else is as without noise; compiled and not."""
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no CPU kernels here: {native.status()}")
    plan, num_spec_tokens = StepPlan(kind, stride), stride - 1  # type: ignore[arg-type]
    state = noisy_state([num_spec_tokens, 0, num_spec_tokens], stride)
    plain = plan_rows(plan, dataclasses.replace(state, noise_below=0), 16)
    rows = plan_rows(plan, state, 16)
    assert torch.equal(rows.ids[~rows.is_mask], plain.ids[~rows.is_mask])
    for name in ("is_mask", "positions", "slot_mapping", "query_start_loc", "seq_lens"):
        assert torch.equal(getattr(rows, name), getattr(plain, name)), name
    for b in range(3):
        first, last = rows.query_start_loc[b : b + 2].tolist()
        where = torch.arange(first, last)
        place = int(state.lengths[b]) - 1 + where - first
        want = noise_ids(state.seed[b].expand(len(where)), place, rows.positions[where], BELOW)
        mask = rows.is_mask[where]
        assert torch.equal(rows.ids[where][mask], want[mask])
    ids = rows.ids[rows.is_mask].tolist()
    assert len(set(ids)) > len(ids) / 3, "noise differs by row, in the branches of a quadratic plan too"


def test_every_step_and_every_request_draws_anew() -> None:
    state = noisy_state([3, 3, 3], 4)
    state.text[1], state.lengths[1] = state.text[0], state.lengths[0]
    rows = plan_rows(StepPlan("quadratic", 4), state, 16)
    first, second = rows.ids.view(3, 16)[:2]
    assert not torch.equal(first[4:], second[4:]), "another seed"
    state.lengths.add_(1)
    later = plan_rows(StepPlan("quadratic", 4), state, 16).ids.view(3, 16)[0]
    assert not torch.equal(first[4:], later[4:]), "another step"
    state.lengths.sub_(1)
    assert torch.equal(plan_rows(StepPlan("quadratic", 4), state, 16).ids, rows.ids), "a run repeats"


def test_a_prefill_ends_in_the_rows_of_a_step() -> None:
    state = noisy_state([0, 0, 0], 4)
    rows = prefill_rows(state, [2, 0, 11], [5, 9, 12], 3, 16)
    step = plan_rows(StepPlan("chain", 4), state, 16)
    assert torch.equal(rows.ids[rows.is_mask], step.ids[step.is_mask])
    assert not torch.equal(rows.ids[rows.is_mask], torch.full((9,), state.mask_id))


@pytest.mark.parametrize("quadratic", [False, True])
def test_to_draw_needs_no_host(quadratic: bool) -> None:
    """So a recorded step draws anew at each replay: what it draws from is the state, on the device."""
    state = noisy_state([3, 0, 2], 4)
    how: dict[str, Any] = {"quadratic": quadratic, "noise_below": state.noise_below}
    with NoSync() as first:
        python_ref.plan_rows(state, state.mask_id, 16, **how)
    state.lengths.add_(1)
    state.num_drafts.copy_(torch.tensor([0, 3, 1]))
    with NoSync() as second:
        python_ref.plan_rows(state, state.mask_id, 16, **how)
    assert first.trace == second.trace and len(first.trace) > 100


# What comes out


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
def test_no_clean_row_notices(backend: str) -> None:
    """Two noises, one quadratic step: the logits and hidden states of clean rows are the same to the bit."""
    with use_backend(backend):
        config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)
        checkpoint = MemoryCheckpoint(config, scale=0.15)
        model = Transformer(checkpoint, dtype=torch.float32, mask_input=MaskInput("uniform", BELOW))  # type: ignore[arg-type]
        found = []
        for seed in (1, 2):
            state = noisy_state([3, 0, 2], 4)
            state.seed.fill_(seed)
            cache = model.new_cache(int(state.page_table.max()) + 1, 16)
            starts, lengths = [0] * 3, state.lengths.tolist()
            model.forward(prefill_rows(state, starts, lengths, 0, 16), cache)
            rows = plan_rows(StepPlan("quadratic", 4), state, 16)
            count = int(rows.query_start_loc[-1])
            found.append((rows, *(x[:count] for x in (rows.is_mask, *model.forward(rows, cache)))))
    (rows, mask, logits, hidden), (other, _, other_logits, other_hidden) = found
    clean = ~mask
    assert torch.equal(logits[clean], other_logits[clean]) and torch.equal(hidden[clean], other_hidden[clean])
    assert not torch.equal(rows.ids, other.ids)
    assert (logits[mask] != other_logits[mask]).any(1).all(), "MASK rows do notice"


@pytest.mark.parametrize("sampler", ["greedy", "all"])
@pytest.mark.parametrize(("plan", "stride"), [("chain", 4), ("quadratic", 2), ("quadratic", 5)])
def test_equals_ar(plan: str, stride: int, sampler: str, noisy: Generator) -> None:
    prompts = prompts_of(1, 7, 23)
    ar = decode(noisy, prompts, "ar", 1, **SAMPLERS[sampler])
    assert decode(noisy, prompts, plan, stride, **SAMPLERS[sampler]) == ar


def test_a_run_repeats(noisy: Generator) -> None:
    """Same seed, same drafts: the number of forwards does not move, and another seed's may."""
    prompts = prompts_of(1, 7, 23, 4)
    counts = [
        [r.forwards for r in results(noisy, prompts, "quadratic", 4, max_tokens=60, seed=seed)] for seed in (5, 5, 6)
    ]
    assert counts[0] == counts[1]


def test_a_token_of_the_users_choice(make_generator: Callable[..., Generator]) -> None:
    checkpoint = MemoryCheckpoint(tiny_config())
    model = Transformer(checkpoint, dtype=torch.float32, mask_input=MaskInput("token", 9))  # type: ignore[arg-type]
    assert model.mask_embedding is None
    state = DecodeState.empty(
        1, 8, 1, 3, 1, mask_token_id=None, id_limit=61, device=torch.device("cpu"), mask_input=model.mask_input
    )
    assert (state.mask_id, state.sampled_mask_id, state.noise_below) == (9, -1, 0), "embedded, and sampled as before"


def test_a_bundle_is_identical_to_ar(tmp_path: Path) -> None:
    bundle = save_tiny_bundle(tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    generator = Generator.from_pretrained(bundle, mask_token_id=250, dtype="fp32")
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=30)
    ar, quadratic = (generator.generate([[1, 2, 3]], params, plan=p, stride=4)[0] for p in ("ar", "quadratic"))  # type: ignore[arg-type]
    assert ar.token_ids == quadratic.token_ids and quadratic.forwards <= ar.forwards
