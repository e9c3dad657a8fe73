"""Acceptance and tokens per forward, worked out from one forward, against the decoder itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.explorer import budgeted_tpf
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import Transformer
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import Sample
from idlm_kernels.training.train import Trainee, TrainSettings
from tests.tiny import MemoryCheckpoint, oracle_checkpoint, tiny_config
from tests.training.conftest import Trained
from tests.training.support import dense, exported, greedy_samples, noisy_lora, random_samples


@dataclass
class Walk:
    """Steps of a plan over one answer, after the rules of design section 3; the first one rode on the prefill."""

    tokens: int = 0
    forwards: int = 0
    verified: list[int] = field(default_factory=lambda: [0] * 9)
    accepted: list[int] = field(default_factory=lambda: [0] * 9)

    def over(self, stands: Tensor, num_spec_tokens: int, quadratic: bool) -> Walk:
        pending, last, drafts = 0, len(stands) - 1, num_spec_tokens
        while pending < last:
            stood = 0
            while stood < drafts and pending + stood < last and bool(stands[pending, stood]):
                stood += 1
            committed = min(stood + 1, last - pending)
            for j in range(min(drafts, stood + 1, committed)):
                self.verified[j] += 1
                self.accepted[j] += j < stood
            self.tokens, self.forwards, pending = self.tokens + committed, self.forwards + 1, pending + committed
            drafts = num_spec_tokens if quadratic or stood == drafts else 0
        return self


def random_stands(lengths: list[int], num_spec_tokens: int, share: float, seed: int = 0) -> list[Tensor]:
    """As Predictions holds them: nothing stands beyond the end of an answer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        stands = torch.rand(n, num_spec_tokens, generator=generator) < share
        inside = torch.arange(n).unsqueeze(1) + 1 + torch.arange(num_spec_tokens) < n
        found.append(stands & inside)
    return found


# The figures, given what stands


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("num_spec_tokens", [1, 2, 3, 5])
def test_tokens_per_forward_are_those_of_a_walk(num_spec_tokens: int, share: float) -> None:
    plain, other = (random_stands([1, 2, 3, 4, 9, 40, 77], num_spec_tokens, share, seed) for seed in (0, 1))
    predictions = Predictions(plain, other)
    for reranked, stands in ((False, plain), (True, other)):
        for quadratic in (False, True):
            for stride in [*range(2, num_spec_tokens + 2), None]:
                walk = Walk()
                for one in stands:
                    walk.over(one, num_spec_tokens if stride is None else stride - 1, quadratic)
                found = predictions.tpf(quadratic=quadratic, reranked=reranked, stride=stride)
                assert found == walk.tokens / walk.forwards


@pytest.mark.parametrize("widths", [[1], [0, 2], [1, 0], [2, 0, 3], [3, 2, 1], [5, 0, 4, 1, 2]])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_steps_of_budgeted_plans_are_those_of_a_walk(widths: list[int], share: float) -> None:
    predictions = Predictions(*(random_stands([1, 2, 3, 4, 9, 40, 77], 5, share, seed) for seed in (0, 1)))
    for reranked, samples in ((False, predictions.plain), (True, predictions.reranked)):
        want = []
        for stands in samples:
            left, drafts = stands.tolist(), stands[0, : len(widths)].tolist()
            while len(left) > 1:
                accepted = drafts.index(False) if False in drafts else len(drafts)
                want.append(min(accepted + 1, len(left) - 1))
                left = left[want[-1] :]
                # All stood, so the branch after the last draft goes on: it is never cut.
                drafts = left[0][: len(widths) if accepted == len(drafts) else widths[accepted]]
        assert predictions.budgeted_steps(widths, reranked=reranked) == want


def test_budgeted_plans_between_the_two() -> None:
    """Their formula, and their walk over drafts that are as independent as the formula takes them to be."""
    predictions = Predictions(*([random_stands([60_000], 3, 0.7)] * 2))
    for widths in ([0, 0, 0], [1, 0, 0], [2, 0, 3], [3, 2, 1], [3, 3, 3]):
        steps = predictions.budgeted_steps(widths)
        assert sum(steps) / len(steps) == pytest.approx(float(budgeted_tpf(torch.tensor([widths]), [0.7])), rel=0.015)


@pytest.mark.parametrize("widths", [[], [1, 1, 1, 1], [3, 0], [0, -1]])
def test_widths_that_no_plan_has(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="widths"):
        Predictions([torch.ones(4, 3, dtype=torch.bool)], []).budgeted_steps(widths)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("num_spec_tokens", [1, 3, 5])
def test_acceptance_is_a_share_of_what_would_be_verified(num_spec_tokens: int, share: float) -> None:
    plain, other = (random_stands([1, 2, 3, 4, 9, 40], num_spec_tokens, share, seed) for seed in (0, 1))
    for reranked, stands in ((False, plain), (True, other)):
        verified, accepted = [0] * num_spec_tokens, [0] * num_spec_tokens
        for one in stands:
            for i in range(len(one)):
                for j in range(num_spec_tokens):
                    if i + 1 + j >= len(one):
                        break
                    verified[j] += 1
                    if not one[i, j]:
                        break
                    accepted[j] += 1
        want = [a / max(1, v) for a, v in zip(accepted, verified, strict=True)]
        assert Predictions(plain, other).acceptance(reranked=reranked) == want
        assert share < 1 or want == [1.0] * num_spec_tokens, "drafts beyond the end of an answer are no failures"


# The figures of a model


@pytest.fixture(scope="module")
def texts(trained: Trained) -> list[Sample]:
    """Greedy answers of several lengths."""
    return [Sample(s.prompt, s.answer[: 24 - 3 * (i % 8)]) for i, s in enumerate(trained.held_out[:16])]


@pytest.fixture(scope="module")
def generator(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(
        exported(tmp_path_factory.mktemp("adapter"), trained.checkpoint, trained.trainee), max_model_len=64
    )


@pytest.mark.parametrize("rerank", [False, True])
@pytest.mark.parametrize("plan", ["chain", "quadratic"])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_the_generator_takes_the_steps_of_the_walk(
    stride: int, plan: str, rerank: bool, generator: Generator, trained: Trained, texts: list[Sample]
) -> None:
    lora, head = trained.trainee.lora, trained.trainee.rerank
    predictions = Predictions.of(trained.model, lora, head, texts, 3)
    params = [SamplingParams(max_tokens=len(sample.answer)) for sample in texts]
    prompts = [sample.prompt for sample in texts]
    results = generator.generate(prompts, params, plan=plan, stride=stride, rerank=rerank)  # type: ignore[arg-type]
    tokens = forwards = 0
    shares = set()
    for sample, stands, result in zip(
        texts, predictions.reranked if rerank else predictions.plain, results, strict=True
    ):
        assert result.token_ids == sample.answer
        walk = Walk().over(stands, stride - 1, plan == "quadratic")
        assert (result.tokens, result.forwards) == (walk.tokens + 1, walk.forwards + 1)
        counts = zip(walk.accepted, walk.verified, strict=True)
        assert result.acceptance == [a / v if v else None for a, v in counts][: stride - 1]
        tokens, forwards = tokens + walk.tokens, forwards + walk.forwards
        shares |= {share for share in result.acceptance if share is not None}
    assert predictions.tpf(quadratic=plan == "quadratic", reranked=rerank, stride=stride) == tokens / forwards
    assert len(shares) > 5, "drafts stand and fall"


def test_the_head_changes_drafts(trained: Trained) -> None:
    found = Predictions.of(trained.model, trained.trainee.lora, trained.trainee.rerank, trained.held_out, 3)
    assert any(not torch.equal(a, b) for a, b in zip(found.plain, found.reranked, strict=True))
    without = Predictions.of(trained.model, trained.trainee.lora, None, trained.held_out, 3)
    assert all(torch.equal(a, b) for a, b in zip(without.plain, found.plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(without.plain, without.reranked, strict=True))


def test_an_oracle_is_always_right() -> None:
    checkpoint = oracle_checkpoint()
    model = dense(checkpoint)
    lora = Trainee.new(model, TrainSettings()).lora  # starts as the mean embedding and no change of any linear
    found = Predictions.of(model, lora, None, greedy_samples(model, 4, 17), 3)
    assert found.acceptance() == [1.0] * 3
    assert found.tpf(quadratic=True) == found.tpf(quadratic=False) == 4.0
    assert found.tpf(quadratic=True, stride=3) == 16 * 4 / (6 * 4), "the last step is cut short"


def test_mask_is_never_drafted(tmp_path: Path) -> None:
    """As in the generator, where it is never sampled: the next best id is the draft."""
    checkpoint = MemoryCheckpoint(tiny_config(mask_token_id=60), seed=2, scale=0.2)
    model = dense(checkpoint)
    trainee = Trainee.new(model, TrainSettings(rerank_width=8))
    samples = greedy_samples(model, 20, 12)
    want = Predictions.of(model, trainee.lora, trainee.rerank, samples, 3)
    assert want.acceptance()[0] > 0
    model.head[60] = 5 * model.head.abs().amax(0)  # far from every label, but with the largest logits
    model.head[60] *= model.clean(torch.tensor([samples[0].prompt])).hidden[0, -1].sign()
    found = Predictions.of(model, trainee.lora, trainee.rerank, samples, 3)
    for one in ("plain", "reranked"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(found, one), getattr(want, one), strict=True))


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    model = dense(MemoryCheckpoint(tiny_config(vocab_size=11)))
    trainee = Trainee.new(model, TrainSettings(rerank_width=8))
    samples = random_samples([(2, 5)], vocab_size=11)
    found = Predictions.of(model, noisy_lora(model.config), trainee.rerank, samples, 3)
    assert torch.equal(found.plain[0], found.reranked[0]), "the head starts without a say"


def test_a_partial_adapter_leaves_the_other_linears_alone(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(tiny_config())
    model, lora = dense(checkpoint), noisy_lora(tiny_config())
    lora.pairs = {key: pair for key, pair in lora.pairs.items() if key[1] == "q_proj"}
    paged: Transformer = exported(tmp_path, checkpoint, Trainee(lora, None))
    assert paged.layers[0].qkv.lora is not None and paged.layers[0].down.lora is None
    clean = model.clean(torch.tensor([[1, 2, 3]]))
    with torch.no_grad():
        some = model.masked(clean, torch.tensor([[2]]), 2, lora.mask_embedding, lora)
        none = model.masked(clean, torch.tensor([[2]]), 2, lora.mask_embedding, None)
    assert bool(some.isfinite().all()) and not torch.equal(some, none)
