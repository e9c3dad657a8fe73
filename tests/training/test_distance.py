"""Total variation: what it counts, its gradient, and that chunks leave no trace."""

from __future__ import annotations

import pytest
import torch

from idlm_kernels.training import distance as module
from idlm_kernels.training.distance import total_variation


def a_case(rows: int = 7, size: int = 5, vocab: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    hidden, target = torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, size, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), head, target, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize(("hard", "kl"), [(0.0, 0.0), (0.5, 0.0), (0.3, 0.7)])
def test_it_is_that_of_a_plain_loop(hard: float, kl: float) -> None:
    hidden, head, target, labels = a_case()
    found = total_variation(hidden, head, target, labels, hard, kl).tolist()
    for i, label in enumerate(labels.tolist()):
        q, p = ((head @ x[i].detach()).softmax(0) for x in (hidden, target))
        p = (1 - hard) * p + hard * torch.eye(len(head), dtype=p.dtype)[label]
        want = sum(abs(a - b) + kl * a * (a / b).log() for a, b in zip(p, q, strict=True))
        assert found[i] == pytest.approx(float(want), rel=1e-5)


def test_half_of_it_is_the_chance_of_a_rejection() -> None:
    hidden, head, target, labels = a_case(rows=3)
    p, q = ((x @ head.T).softmax(1) for x in (target, hidden))
    accepted = torch.minimum(p, q).sum(1)  # a draft x of q is accepted with probability min(1, p(x) / q(x))
    found = total_variation(hidden, head, target, labels, 0.0, 0.0)
    torch.testing.assert_close(found.double(), 2 * (1 - accepted), rtol=1e-5, atol=1e-6)


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (1 << 23, 22):  # all rows at once, then two at a time
        monkeypatch.setattr(module, "_CHUNK_VALUES", values)
        hidden, head, target, labels = a_case()
        loss = total_variation(hidden, head, target, labels, 0.5, 0.1)
        loss.sum().backward()
        found.append((loss, hidden.grad))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1] is not None and bool(found[0][1].abs().sum(1).min() > 0)


def test_the_gradient_is_that_of_differences() -> None:
    hidden, head, target, labels = a_case(rows=2)
    head, target = head.float(), target.float()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return total_variation(x.float(), head, target, labels, 0.25, 0.2).sum()

    assert torch.autograd.gradcheck(loss, (hidden,), eps=1e-2, atol=2e-2)


def test_no_rows() -> None:
    hidden, head, target, labels = a_case()
    assert total_variation(hidden[:0], head, target[:0], labels[:0], 0.5, 0.0).shape == (0,)
