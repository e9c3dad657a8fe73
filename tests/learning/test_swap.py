"""Another adapter while requests run: their text stays AR's, and clean rows never know of it."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from idlm_kernels.generate import Engine, EngineOptions, Generator, Request, SamplingParams
from idlm_kernels.generate.plan import plan_rows
from idlm_kernels.learning import adapters as rule
from idlm_kernels.learning.adapters import AdapterFolder, DraftCounts, is_worse
from idlm_kernels.learning.traces import Trace
from idlm_kernels.model import Adapter, Transformer
from idlm_kernels.model.adapter import BLOCK_OF
from tests.generate.test_engine import RandomPolicy, alone, assert_nothing_leaks, random_request
from tests.learning.conftest import make_adapter
from tests.tiny import oracle_checkpoint, tiny_config, tiny_state

MakeModel = Callable[..., Transformer]
PLAN = EngineOptions(plan="chain", stride=4, max_num_seqs=3, max_model_len=64, page_size=4, window_steps=3)


def forward(model: Transformer) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Logits of a step with clean and MASK rows, which of them are MASK rows, and the cache's slots of the text."""
    from idlm_kernels.generate import StepPlan

    state = tiny_state([[5, 6, 7, 8, 9], [10, 11, 12]], max_pages=6, num_drafts=3)
    state.num_drafts.copy_(torch.tensor([3, 1]))
    state.drafts.copy_(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    rows = plan_rows(StepPlan("quadratic", 4), state, 4)
    cache = model.new_cache(12, 4)
    with torch.inference_mode():
        logits, _ = model.forward(rows, cache)
    clean = rows.slot_mapping[~rows.is_mask & (rows.slot_mapping >= 0)]
    page, slot = clean // 4, clean % 4
    if model.stack is None:
        written = [x[page, slot] for x in (*cache.k, *cache.v)]  # type: ignore[union-attr]
    else:
        written = [cache.k[:, page, :, 0, :, slot], cache.v[:, page, :, slot]]  # type: ignore[union-attr, call-overload]
    count = int(rows.query_start_loc[-1])
    return logits[:count], rows.is_mask[:count], [x.clone() for x in written]


@pytest.mark.parametrize("head", [False, True])
def test_mask_rows_take_it_and_clean_rows_do_not(make_model: MakeModel, head: bool) -> None:
    model, other = make_model(1, head=head), make_model(2, head=head)
    logits, is_mask, written = forward(model)
    wanted, _, _ = forward(other)
    assert not torch.equal(logits[is_mask], wanted[is_mask])
    before = model.install_adapter(model.prepare_adapter(make_adapter(model.config, 2, head=head)))
    swapped, _, written_now = forward(model)
    assert torch.equal(swapped[is_mask], wanted[is_mask])
    assert torch.equal(swapped[~is_mask], logits[~is_mask]) and torch.equal(swapped[~is_mask], wanted[~is_mask])
    assert all(map(torch.equal, written, written_now)) and any(bool(x.any()) for x in written)
    if head:
        assert all(map(torch.equal, model.rerank_head.parameters(), other.rerank_head.parameters()))  # type: ignore[union-attr]
    assert (model.adapter.name, before.name) == ("seed 2", "seed 1")  # type: ignore[union-attr]
    model.install_adapter(before)  # and back
    assert torch.equal(forward(model)[0], logits) and model.acceptance == [0.5, 0.4, 0.3]


def test_recorded_steps_find_the_numbers_where_they_were(make_model: MakeModel) -> None:
    """A graph holds addresses: on the path of ops, which a GPU takes, none may change."""
    model = make_model(1, head=True)
    if model.stack is not None:
        pytest.skip("compiled CPU kernels are not recorded")

    def addresses() -> list[int]:
        pairs = [half for projection in model._projections for half in projection.lora or ()]
        assert model.mask_embedding is not None and model.rerank_head is not None
        return [x.data_ptr() for x in (*pairs, model.mask_embedding, *model.rerank_head.parameters())]

    at = addresses()
    before = model.install_adapter(model.prepare_adapter(make_adapter(model.config, 2, head=True)))
    assert addresses() == at
    model.install_adapter(before)
    assert addresses() == at


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": 1.0}, "its scale is 1.0, wanted 0.5"),
        ({"mask_embedding": None}, "its MASK rows embed what it does not say, wanted {'kind': 'vector'}"),
        ({"rerank_head": None}, "its width of the re-ranking head is 0, wanted 4"),
        ({"pairs": {}}, "its linears are 0, wanted 14"),
        ({"rank": 2}, "its ranks are"),
    ],
)
def test_an_adapter_of_another_form_is_refused(make_model: MakeModel, change: dict[str, Any], named: str) -> None:
    model = make_model(1, head=True)
    other = make_adapter(model.config, 2, head=True)
    if "rank" in change:
        other = make_adapter(model.config, 2, head=True, rank=2)
    else:
        other = dataclasses.replace(other, **change)
    logits = forward(model)[0]
    with pytest.raises(ValueError, match=named):
        model.prepare_adapter(other)
    with pytest.raises(ValueError, match="same form"):
        Engine(model, None, options=PLAN).swap_adapter(other)
    assert torch.equal(forward(model)[0], logits)


def test_a_model_without_an_adapter_takes_none(make_model: MakeModel) -> None:
    model = make_model(None)
    with pytest.raises(ValueError, match="loaded without an adapter"):
        model.prepare_adapter(make_adapter(model.config, 2))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_swaps_at_random_boundaries_change_no_text(make_model: MakeModel, seed: int, lag: int) -> None:
    """Under load: preemptions, shared pages, another plan in every window, and an adapter from any thread."""
    rng = random.Random(seed)
    model, plain = make_model(1, head=True), make_model(None)
    reference = Generator(plain, max_model_len=64)
    ended: list[Request] = []
    engine = Engine(
        model,
        None,
        RandomPolicy(rng),
        dataclasses.replace(PLAN, num_pages=rng.choice((22, 30, 48)), lag=lag, rerank=rng.random() < 0.5),
        on_trace=ended.append,
    )
    others = [make_adapter(model.config, i, size=rng.choice((0.1, 1.0)), head=True) for i in range(2, 6)]
    requests: list[tuple[Request, tuple[Any, ...]]] = []
    swaps = 0
    while len(requests) < 12 or engine.busy:
        if len(requests) < 12 and rng.random() < 0.7:
            asked = random_request(rng)
            requests.append((engine.submit(*asked), asked))
        if rng.random() < 0.5:
            swaps += 1
            if rng.random() < 0.5:
                thread = threading.Thread(target=engine.swap_adapter, args=(rng.choice(others),))
                thread.start()
                thread.join()
            else:
                engine.swap_adapter(rng.choice(others))
        for _ in engine.window():
            if rng.random() < 0.05:
                break  # left in the middle
    assert swaps > 3 and engine.replaced is not None
    for request, asked in requests:
        assert (request.output.token_ids, request.output.finish_reason) == alone(reference, *asked)
    assert_nothing_leaks(engine)
    assert sorted(r.arrival for r in ended) == list(range(12))
    for request in ended:
        check_trace(request.trace(), request)
    assert any(len(request.adapters) > 1 for request in ended)


def check_trace(trace: Trace, request: Request) -> None:
    """That a trace tells what happened: of the text, and of the figures of the request."""
    assert trace.answer == tuple(request.output.token_ids) and trace.prompt == tuple(request.prompt)
    assert set(trace.adapters) <= {f"seed {i}" for i in range(1, 6)}
    at = 0
    for cycle in trace.cycles:
        assert cycle.at >= at and len(cycle.drafts) >= cycle.accepted
        at = cycle.at + cycle.accepted + 1
        assert trace.answer[cycle.at : cycle.at + cycle.accepted] == cycle.drafts[: cycle.accepted]
    for index in trace.rejected():
        (cycle,) = [c for c in trace.cycles if c.at + c.accepted == index and c.accepted < len(c.drafts)]
        assert cycle.drafts[cycle.accepted] != trace.answer[index]
    result = request.output.result("chain", 4)
    shares = [a / v if v else None for v, a in zip(*trace.counts(), strict=True)]
    assert shares == result.acceptance[: len(shares)] and not any(result.acceptance[len(shares) :])


def test_a_swap_while_steps_are_recorded(make_model: MakeModel) -> None:
    from tests.generate.test_engine import EagerRecorder

    model = make_model(1)
    if model.stack is not None:
        pytest.skip("compiled CPU kernels are not recorded")
    engine = Engine(model, None, options=PLAN, recorder=EagerRecorder())
    params = SamplingParams(max_tokens=40)
    wanted = alone(Generator(make_model(None), max_model_len=64), [1, 2, 3], params, 5)
    request = engine.submit([1, 2, 3], params, 5)
    for i in range(2, 6):
        list(engine.window())
        engine.swap_adapter(make_adapter(model.config, i))
    list(engine.events())
    assert (request.output.token_ids, request.output.finish_reason) == wanted


def test_pages_of_one_adapter_serve_another(make_model: MakeModel) -> None:
    """Requests of one prompt share its pages, though an adapter was exchanged in between."""
    model = make_model(1)
    engine = Engine(model, None, options=PLAN)
    params, prompt = SamplingParams(max_tokens=40), [7, 8, 9, 10, 11, 12, 13, 14, 15]
    wanted = alone(Generator(make_model(None), max_model_len=64), prompt, params, 0)
    requests = []
    for i in range(1, 4):
        requests.append(engine.submit(prompt, params, 0))
        list(engine.window())
        engine.swap_adapter(make_adapter(model.config, i + 1))
    pages = [request.pages for request in requests]
    assert pages[0][:2] == pages[1][:2] == pages[2][:2]
    list(engine.events())
    assert [(r.output.token_ids, r.output.finish_reason) for r in requests] == [wanted] * 3


def test_what_is_known_of_acceptance_goes_with_the_adapter(make_model: MakeModel) -> None:
    model = make_model(1)
    engine = Engine(model, None, options=PLAN)
    engine.submit([1, 2, 3], SamplingParams(max_tokens=20), 0)
    list(engine.events())
    counts = engine.draft_counts
    assert sum(counts.verified) > 0
    engine.swap_adapter(dataclasses.replace(make_adapter(model.config, 2), acceptance=[0.9, 0.8]))
    engine.submit([1, 2, 3], SamplingParams(max_tokens=1), 0)
    list(engine.events())
    assert engine.adapter_name == "seed 2" and model.acceptance == [0.9, 0.8]
    assert engine.replaced is not None and engine.replaced.counts is counts
    assert engine.policy.acceptance[:2] == [0.9, 0.8] and sum(engine.draft_counts.verified) == 0


def test_traces_cost_nothing_where_they_are_off(make_model: MakeModel) -> None:
    engine = Engine(make_model(1), None, options=PLAN)
    request = engine.submit([1, 2, 3], SamplingParams(max_tokens=20), 0)
    list(engine.events())
    assert request.cycles == [] and request.adapters == []


# A folder of adapters


def save_adapter(folder: Path, adapter: Adapter) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for (layer, module), (a, b) in adapter.pairs.items():
        prefix = f"base_model.model.model.layers.{layer}.{BLOCK_OF[module]}.{module}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert adapter.mask_embedding is not None
    save_file({"mask_embedding": adapter.mask_embedding}, folder / "mask_embedding.safetensors")
    settings = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture
def oracle() -> Transformer:
    """A model whose drafts are right with the adapter `good`, which does nothing."""
    checkpoint = oracle_checkpoint(tiny_config())
    return Transformer(checkpoint, adapter=good(checkpoint.tensors["model.embed_tokens.weight"][0]))  # type: ignore[arg-type]


def good(embedding: torch.Tensor) -> Adapter:
    adapter = make_adapter(tiny_config(), 1, size=0.0)
    return dataclasses.replace(adapter, name="good", mask_embedding=embedding.clone())


@pytest.fixture
def folder(tmp_path: Path, oracle: Transformer) -> AdapterFolder:
    """v1 drafts well and v2 badly, v3 is of another form, and v4 is damaged."""
    save_adapter(tmp_path / "v1", good(oracle.embedding[0].float()))
    save_adapter(tmp_path / "v2", make_adapter(oracle.config, 2, size=3.0))
    save_adapter(tmp_path / "v3", make_adapter(oracle.config, 3, rank=2))
    save_adapter(tmp_path / "v4", make_adapter(oracle.config, 4))
    (tmp_path / "v4" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    save_adapter(tmp_path / ".v5", make_adapter(oracle.config, 5))  # is being written
    (tmp_path / "notes").mkdir()
    return AdapterFolder(tmp_path)


def decode(engine: Engine, count: int = 1) -> None:
    for i in range(count):
        engine.submit([i % 50, 1, 2], SamplingParams(max_tokens=58, temperature=1.0), i)
    list(engine.events())


def test_an_adapter_is_taken_by_name(folder: AdapterFolder, oracle: Transformer) -> None:
    engine = Engine(oracle, None, options=PLAN)
    assert folder.names() == ["v1", "v2", "v3", "v4"]
    for name in ("v0", "../v1", ".v5", "notes", ""):
        with pytest.raises(KeyError):
            folder.take(engine, name)
    for name, named in (("v3", "same form"), ("v4", "v4")):
        with pytest.raises(ValueError, match=named):
            folder.take(engine, name)
    folder.take(engine, "v1")
    assert engine.adapter_name == "good"  # until the next window
    decode(engine)
    assert engine.adapter_name == "v1"


def test_a_worse_adapter_is_sent_back_and_not_taken_again(folder: AdapterFolder, oracle: Transformer) -> None:
    engine = Engine(oracle, None, options=PLAN)
    decode(engine, 8)
    assert sum(engine.draft_counts.accepted) == sum(engine.draft_counts.verified) > rule.MIN_DRAFTS
    folder.take(engine, "v2")
    for _ in range(40):
        folder.look(engine)
        if folder.refused:
            break
        assert sum(engine.draft_counts.verified) < 4 * rule.MIN_DRAFTS or engine.adapter_name == "good"
        decode(engine, 8)
    assert "v2" in folder.refused and "of good" in folder.refused["v2"]
    decode(engine, 8)
    assert engine.adapter_name == "good" and sum(engine.draft_counts.accepted) == sum(engine.draft_counts.verified)
    for name in ("v3", "v4"):
        (folder.path / name / "adapter_config.json").unlink()
    folder.look(engine, take_newest=True)
    decode(engine)
    assert engine.adapter_name == "good"  # v2 is the newest now, and was refused
    folder.take(engine, "v2")  # but by name it is taken
    decode(engine)
    assert engine.adapter_name == "v2" and folder.refused == {}


def test_the_newest_is_taken_once_and_a_damaged_one_never(folder: AdapterFolder, oracle: Transformer) -> None:
    engine = Engine(oracle, None, options=PLAN)
    folder.look(engine, take_newest=True)
    assert list(folder.refused) == ["v4"]
    decode(engine)
    assert engine.adapter_name == "good"
    folder.look(engine, take_newest=True)
    save_adapter(folder.path / "v9", good(oracle.embedding[0].float()))
    folder.look(engine)
    decode(engine)
    assert engine.adapter_name == "good"
    folder.look(engine, take_newest=True)
    folder.look(engine, take_newest=True)
    decode(engine)
    assert engine.adapter_name == "v9" and engine.replaced is not None and engine.replaced.adapter.name == "good"
    folder.look(engine, take_newest=True)
    decode(engine)
    assert engine.replaced.adapter.name == "good"


def test_who_is_worse() -> None:
    def counts(verified: int, accepted: int) -> DraftCounts:
        return DraftCounts([verified, 0], [accepted, 0])

    old = counts(1000, 700)
    assert is_worse(counts(1000, 500), old)
    assert not is_worse(counts(1000, 690), old)  # within the margin
    assert not is_worse(counts(260, 170), old) and is_worse(counts(260, 130), old)  # chance
    assert not is_worse(counts(100, 0), old) and not is_worse(counts(1000, 0), counts(100, 100))  # too few
    assert not is_worse(counts(1000, 900), old)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AdapterFolder(tmp_path / "none")
