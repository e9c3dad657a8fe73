"""What an op may write over, and that none of them pretends to have a gradient."""

from __future__ import annotations

import pytest
import torch

import idlm_kernels
from idlm_kernels.ops._checks import _share_memory

BACKENDS = ("torch", "cpu")


def attention(q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    k, v = torch.randn(2, 2, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    table, lengths, start = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [7], [0, q.shape[0]]))
    return idlm_kernels.strided_attention(q, k, v, table, lengths, start, max_query_len=q.shape[0], out=out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_an_output_that_is_the_input_shifted_is_refused(backend: str, shift: int) -> None:
    rows = torch.randn(16, 2, 8)
    with idlm_kernels.use_backend(backend):
        with pytest.raises(ValueError, match="out shares its memory"):
            attention(rows[:5], rows[shift : shift + 5])
        alone = attention(rows[:5], None)
        assert torch.equal(attention(rows[:5], rows[5:10]), alone), "what only lies beside it is fine"


def test_views_share_memory_where_a_byte_is_common() -> None:
    """Against the bytes themselves, for views that are woven into each other in several ways."""
    base = torch.empty(24, 8)
    address = base.data_ptr()
    views = [base[a : a + n, c : c + w] for a in (0, 1, 3) for n in (1, 2, 4) for c in (0, 2, 5) for w in (1, 3)]
    views += [base[::2, :4], base[1::2, 4:], base.view(-1)[5:40], base.view(12, 16)[:, 3:9]]
    views += [base.view(6, 4, 8)[:, ::2, 1:6:2], base.view(6, 4, 8)[:, 1::2]]

    def bytes_of(x: torch.Tensor) -> set[int]:
        index = torch.zeros(1, dtype=torch.long)
        for size, stride in zip(x.shape, x.stride(), strict=True):
            index = (index[:, None] + torch.arange(size) * stride).flatten()
        return {x.data_ptr() - address + 4 * int(i) + byte for i in index for byte in range(4)}

    for x in views:
        for y in views:
            assert _share_memory(x, y) == bool(bytes_of(x) & bytes_of(y))
    assert not _share_memory(base[:, :4], base[:, 4:]) and not _share_memory(base[:, 4:], base[:, :4])
    assert not _share_memory(base[:3], base[3:]) and not _share_memory(base[3:], base[:3])
    assert not _share_memory(base[:0], base) and not _share_memory(base, torch.empty(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_refused_in_one_way_everywhere(backend: str) -> None:
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    a, b, lora_mask = torch.randn(4, 64), torch.randn(32, 4), torch.tensor([True, False, True])
    calls = {
        "x": lambda: idlm_kernels.linear(x.requires_grad_(), weight),
        "weight": lambda: idlm_kernels.linear(x, weight.requires_grad_()),
        "lora_a": lambda: idlm_kernels.gated_lora_linear(x, weight, a.requires_grad_(), b, lora_mask, 1.0),
        "lora_b": lambda: idlm_kernels.gated_lora_linear(x, weight, a, b.requires_grad_(), lora_mask, 1.0),
        "q": lambda: attention(torch.randn(2, 2, 8, requires_grad=True), None),
        "out": lambda: idlm_kernels.linear(x, weight, out=torch.empty(3, 32, requires_grad=True)),
    }
    with idlm_kernels.use_backend(backend):
        for name, call in calls.items():
            for tensor in (x, weight, a, b):
                tensor.requires_grad_(False)
            with pytest.raises(RuntimeError, match=rf"{name} requires a gradient.*torch\.no_grad"):
                call()
            with torch.no_grad():
                assert call().grad_fn is None
