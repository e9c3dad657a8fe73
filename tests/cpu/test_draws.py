"""Single draws of the compiled CPU kernels beside the reference: temperature, truncation, noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import step
from tests.cpu.test_native import pytestmark as pytestmark


def drawn(logits: Tensor, *how: Any, id_limit: int = 1 << 30, mask_id: int = -1, stream: int = 0) -> int | None:
    temperature, top_k, top_p, min_p, seed, position = how
    return step.draw(logits, id_limit, mask_id, temperature, top_k, top_p, min_p, seed, position, stream)


def by_reference(logits: Tensor, *how: Any, id_limit: int = 1 << 30, mask_id: int = -1, stream: int = 0) -> int:
    temperature, top_k, top_p, min_p, seed, position = how
    limits = min(id_limit, len(logits)), mask_id
    t, p, m = (torch.tensor([x]) for x in (temperature, top_p, min_p))
    k = torch.tensor([top_k], dtype=torch.int32)
    args = (torch.tensor([position]), t, k, p, m, torch.tensor([seed]))
    return int(python_ref.sample_rows(logits.unsqueeze(0), *args, *limits, stream=stream))


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("vocab_size", [1, 17, 64, 4099])
def test_draws(vocab_size: int, spread: float, isa: str) -> None:
    random = torch.Generator().manual_seed(vocab_size)
    for case in range(40):
        logits = torch.randn(vocab_size, generator=random) * spread
        if case % 3 == 0:
            logits = logits.round()  # ties
        if case % 4 == 0:
            logits[torch.rand(vocab_size, generator=random) < 0.3] = -torch.inf
            logits[vocab_size // 2] = 0.0
        how = (
            (0.3, 1.0, 2.5)[case % 3],
            (0, 0, 1, 5, vocab_size + 1)[case % 5],
            (1.0, 0.9, 1.0, 0.3, 1e-6, 0.9999)[case % 6],
            (0.0, 0.0, 0.1, 1.0)[case % 4],
            int(torch.randint(-(1 << 62), 1 << 62, (), generator=random)),
            (0, 7, 12_345, (1 << 32) - 1)[case % 4],
        )
        limits: dict[str, int] = {"stream": case % 2}
        if vocab_size > 1 and case % 4:
            limits |= {"id_limit": vocab_size - case % 3, "mask_id": (-1, 0, vocab_size - 1)[case % 3]}
        assert drawn(logits, *how, **limits) == by_reference(logits, *how, **limits), (case, how, limits)


def test_noise_reaches_every_id(isa: str) -> None:
    """Of equal logits each id is drawn as often as the reference draws it: no id is passed over that could win."""
    logits = torch.zeros(700)
    for position in range(300):
        how = (1.0, 0, 1.0, 0.0, 11, position)
        assert drawn(logits, *how) == by_reference(logits, *how)


def test_an_id_far_below_the_best_wins_where_its_noise_does(isa: str) -> None:
    """The largest noise of 2^16 ids at a distance that it just bridges, and just does not."""
    noise = python_ref.noise.gumbel(torch.tensor(5), torch.tensor(9), 1 << 16, 0)
    winner = int(noise[64:].argmax()) + 64
    for gap, want in ((-0.01, winner), (0.01, 3)):
        logits = torch.full((1 << 16,), -1e9)
        logits[3], logits[winner] = 0.0, noise[3] - noise[winner] - gap
        assert drawn(logits, 1.0, 0, 1.0, 0.0, 5, 9) == want


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_out_of_the_ordinary_is_not_drawn_from(value: float, isa: str) -> None:
    logits = torch.zeros(100)
    logits[41] = value
    assert drawn(logits, 1.0, 0, 1.0, 0.0, 0, 0) is None
    assert drawn(logits, 1.0, 0, 1.0, 0.0, 0, 0, mask_id=41) is not None
    assert drawn(logits, 1.0, 0, 1.0, 0.0, 0, 0, id_limit=41) is not None
    assert drawn(torch.full((100,), -torch.inf), 1.0, 0, 1.0, 0.0, 0, 0) is None
    assert drawn(torch.full((100,), 3e38), 1e-3, 0, 1.0, 0.0, 0, 0) is None  # overflows in the division
    assert drawn(torch.zeros(100), 0.0, 0, 1.0, 0.0, 0, 0) is None  # greedy
    assert drawn(torch.zeros(0), 1.0, 0, 1.0, 0.0, 0, 0) is None
