"""apply_penalties against loops over rows, tokens and ids in plain Python; what it is for: rows as AR has them."""

from __future__ import annotations

import pytest
import torch

import python_ref
from idlm_kernels import apply_penalties, use_backend
from idlm_kernels.testing import ApplyPenalties, Call, check, check_bits

BACKENDS = ("torch", "cpu")


def by_loops(call: Call) -> torch.Tensor:
    """In fp64."""
    out = call["logits"].double().clone()
    vocab_size, p = out.shape[1], call["penalties"]
    for b in range(len(call["lengths"])):
        start, end = call["query_start_loc"][b : b + 2].tolist()
        n, length = int(call["num_drafts"][b]), int(call["lengths"][b])
        prompt_length = min(int(p.prompt_lengths[b]), length)
        num_spec_tokens = call["drafts"].shape[1]
        bias: dict[int, float] = {}
        for token, value in zip(p.bias_ids[b].tolist(), p.bias[b].tolist(), strict=True):
            bias.setdefault(token, value)
        for r in range(end - start):
            branch = (r - n - 1) // num_spec_tokens if call["quadratic"] else n
            drafts = r if r <= n else branch
            output = call["text"][b, prompt_length:length].tolist() + call["drafts"][b, :drafts].tolist()
            seen = set(output) | set(call["text"][b, :prompt_length].tolist())
            for token in range(vocab_size):
                x = float(out[start + r, token])
                x += bias.get(token, 0.0)
                if token in seen:
                    repetition = float(p.repetition[b])
                    x = x / repetition if x > 0 else x * repetition
                count = output.count(token)
                out[start + r, token] = x - float(p.frequency[b]) * count - float(p.presence[b]) * (count > 0)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quadratic", [False, True])
def test_against_loops(backend: str, quadratic: bool) -> None:
    call = ApplyPenalties(quadratic=quadratic, vocab_size=80, max_len=60, dtype=torch.float32).call()
    call = call.changed(lengths=call["lengths"].clamp(max=60), logits=call["logits"].nan_to_num(0.0, 9.0, -9.0))
    with use_backend(backend):
        got = apply_penalties(**call.arguments)
    torch.testing.assert_close(got.double(), by_loops(call), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("quadratic", [False, True])
def test_the_cpu_backend_has_the_bits_of_the_reference(quadratic: bool, dtype: torch.dtype) -> None:
    from idlm_kernels.cpu.penalties import apply_penalties as on_cpu

    call = ApplyPenalties(quadratic=quadratic, dtype=dtype).call()
    check(call, on_cpu)
    want = python_ref.apply_penalties(**call.arguments)
    check_bits(on_cpu(**call.arguments).nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    before = call["logits"].clone()
    assert on_cpu(**call.arguments, out=call["logits"]) is call["logits"]
    changed = call["logits"].nan_to_num(nan=7.0)
    check_bits(changed, want.nan_to_num(nan=7.0))
    assert not torch.equal(changed, before.nan_to_num(nan=7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b", range(5))
def test_a_clean_row_is_that_of_ordinary_decoding(b: int, backend: str) -> None:
    """Row i, behind drafts, has the bits of the only row of a request whose text ends with those drafts."""
    call = ApplyPenalties().call()
    start, length = int(call["query_start_loc"][b]), int(call["lengths"][b])
    with use_backend(backend):
        whole = apply_penalties(**call.arguments)
        for i in range(int(call["num_drafts"][b]) + 1):
            text = torch.cat([call["text"][b, :length], call["drafts"][b, :i]])
            alone = apply_penalties(
                call["logits"][start + i : start + i + 1],
                torch.tensor([0, 1], dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
                torch.zeros(1, 0, dtype=torch.int64),
                text.unsqueeze(0),
                torch.tensor([len(text)], dtype=torch.int32),
                call.mapped(lambda x: x[b : b + 1])["penalties"],
                quadratic=False,
            )
            check_bits(alone[0], whole[start + i], f"row {i}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_asks_for_nothing_keeps_its_bits(backend: str) -> None:
    """Also -0.0 and NaN of ids that occur."""
    call = ApplyPenalties().call()
    start, end = call["query_start_loc"][3:5].tolist()
    call["logits"][start:end, :40] = -0.0
    call["logits"][start, 3] = torch.nan
    with use_backend(backend):
        got = apply_penalties(**call.arguments)
    check_bits(got[start:end], call["logits"][start:end])
    check_bits(got[-2:], call["logits"][-2:], "padding")
