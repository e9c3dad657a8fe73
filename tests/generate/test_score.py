"""Scores of given texts: the model's own log-probabilities, whatever is packed beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.score import Scorer
from idlm_kernels.model import Transformer
from idlm_kernels.model.rows import Rows
from tests.tiny import MemoryCheckpoint, tiny_config

MakeGenerator = Callable[..., Generator]


@pytest.fixture(scope="module")
def generator(make_generator: MakeGenerator) -> Generator:
    return make_generator(page_size=4)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_score_is_what_the_decode_of_these_tokens_reports(generator: Generator) -> None:
    context = tokens(11, seed=0)
    result = generator.generate([context], SamplingParams(max_tokens=9), plan="ar", logprobs=True)[0]
    score = generator.score([(context, result.token_ids)])[0]
    assert score.logprobs == result.logprobs, "to the bit: the rows are those of the decode"
    assert score.is_greedy and score.total == sum(score.logprobs)
    other = [(t + 1) % 61 for t in result.token_ids[:1]] + result.token_ids[1:]
    assert not generator.score([(context, other)])[0].is_greedy


def test_a_score_is_log_softmax_of_the_logits() -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = MemoryCheckpoint(tiny_config(), scale=0.1)
    config = tiny_config()
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
        )
    ).eval()
    reference.load_state_dict(checkpoint.tensors)
    mine = Generator(Transformer(checkpoint, dtype=torch.float32), page_size=4)  # type: ignore[arg-type]
    context, continuation = tokens(9, seed=1), tokens(6, seed=2)
    with torch.inference_mode():
        logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    expected = logits.log_softmax(1).gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)
    score = mine.score([(context, continuation)])[0]
    torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-5, rtol=1e-5)
    assert score.is_greedy == (logits.argmax(1).tolist() == continuation)


@pytest.mark.parametrize("sizes", [{}, {"head_dim": 32, "hidden_size": 64}], ids=["ops", "compiled stack"])
def test_what_else_is_scored_changes_no_bit(make_generator: MakeGenerator, sizes: dict[str, int]) -> None:
    """Contexts that are shared, choices of one token, long texts in several chunks, many waves: all the same bits."""
    context, other = tokens(13, seed=3), tokens(50, seed=4)
    pairs = [(context, [token]) for token in range(61)]
    pairs += [(context, tokens(n, seed=n)) for n in (2, 5, 9)]
    pairs += [(context[:9], tokens(3, seed=5)), (other, tokens(7, seed=6)), ([7], tokens(70, seed=7)), (other, [])]
    together = make_generator(page_size=4, **sizes).score(pairs)
    alone = [make_generator(page_size=16, **sizes).score([pair])[0] for pair in pairs]
    assert together == alone
    assert sum(score.is_greedy for score in together[:61]) == 1
    assert abs(torch.tensor([s.total for s in together[:61]]).exp().sum() - 1) < 1e-5
    small = make_generator(page_size=4, **sizes)
    small.max_num_seqs, small.max_num_batched_tokens = 3, 5
    assert small.score(pairs) == alone


def test_one_text_cut_in_several_places_is_scored_at_each(generator: Generator) -> None:
    text = tokens(12, seed=20)
    pairs = [(text[:cut], [*text[cut:], last]) for cut in (9, 3, 11, 1) for last in (7, 8)]
    together = generator.score(pairs)
    assert together == [generator.score([pair])[0] for pair in pairs]
    assert [len(score.logprobs) for score in together] == [4, 4, 10, 10, 2, 2, 12, 12]
    assert together[0].logprobs[:3] == together[2].logprobs[6:9], "the same tokens after the same text"


def test_one_token_that_is_not_greedy_is_enough(generator: Generator) -> None:
    context = tokens(5, seed=21)
    best = generator.generate([context], SamplingParams(max_tokens=1), plan="ar")[0].token_ids[0]
    begun = [*context, (best + 1) % 61]
    rest = generator.generate([begun], SamplingParams(max_tokens=4), plan="ar")[0].token_ids
    off, on = generator.score([(context, [begun[-1], *rest]), (begun, rest)])
    assert on.is_greedy and not off.is_greedy


def test_a_small_cache_takes_several_waves(generator: Generator) -> None:
    """Four choices share two whole pages of context and have one to three of their own; six pages hold two or three."""
    context = tokens(10, seed=22)
    pairs = [(context, tokens(n, seed=n)) for n in (1, 3, 5, 9, 2)] + [(tokens(6, seed=23), [1, 2])]
    small = Scorer(generator.model, num_pages=6, page_size=4, id_limit=61, max_num_seqs=64, max_rows=512)
    assert small.score(pairs) == generator.score(pairs)


def test_a_context_is_computed_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, forward = 0, generator.model.forward

    def counted(batch: Rows, *rest: object, **more: object) -> object:
        nonlocal rows
        rows += len(batch.ids)
        return forward(batch, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(generator.model, "forward", counted)
    context = tokens(40, seed=24)
    generator.score([(context, tokens(3, seed=n)) for n in range(5)])
    assert rows == 36 + 5 * 6  # nine whole pages without the row that is read; then four tokens and two of each
    rows = 0
    generator.score([(context, [token]) for token in range(61)])
    assert rows == 40


def test_the_order_is_that_of_the_pairs_and_progress_reaches_their_number(generator: Generator) -> None:
    pairs = [(tokens(5 + i % 3, seed=i), tokens(1 + i % 4, seed=100 + i)) for i in range(150)]
    seen: list[int] = []
    scores = generator.score(pairs, progress=seen.append)
    assert seen == sorted(set(seen)) and seen[-1] == len(pairs)
    for i in (0, 77, 149):
        assert scores[i] == generator.score([pairs[i]])[0]


def test_ids_that_are_never_sampled_are_never_greedy(make_generator: MakeGenerator) -> None:
    checkpoint = MemoryCheckpoint(tiny_config(mask_token_id=3))
    generator = make_generator(checkpoint)
    context = tokens(6, seed=8)
    scores = generator.score([(context, [token]) for token in range(61)])
    likeliest = max(range(61), key=lambda token: scores[token].total)
    masked = make_generator(MemoryCheckpoint(tiny_config(mask_token_id=likeliest)))
    again = masked.score([(context, [token]) for token in range(61)])
    assert scores[likeliest].is_greedy and not again[likeliest].is_greedy
    assert [s.logprobs for s in again] == [s.logprobs for s in scores], "the distribution is the model's own"


def test_a_pair_that_cannot_run_is_named(generator: Generator) -> None:
    good = ([1], [2])
    for pair, word in (
        (([], [1]), "pair 1 is empty"),
        (([1], [61]), "the id 61"),
        (([1], [-1]), "the id -1"),
        (([1] * 200, [1] * 58), "258 tokens, wanted at most 257"),
    ):
        with pytest.raises(ValueError, match=word):
            generator.score([good, pair])
    with pytest.raises(TypeError, match="pair 0 holds a str"):
        generator.score([("a", [1])])  # type: ignore[list-item]
    assert generator.score([]) == []
    longest = generator.score([([1] * 200, [1] * 57)])[0]
    assert len(longest.logprobs) == 57
