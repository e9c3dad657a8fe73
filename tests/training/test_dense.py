"""The model of training against the rules of decoding, and against the paged model that decodes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idlm_kernels.generate import StepPlan
from idlm_kernels.generate.plan import plan_rows, prefill_rows
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model import RopeScaling, Transformer
from idlm_kernels.ops import use_backend
from idlm_kernels.training.dense import DenseModel, visibility
from idlm_kernels.training.train import Trainee
from tests.tiny import MemoryCheckpoint, tiny_config, tiny_state
from tests.training.support import dense, exported, noisy_lora

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-mqa": {"tie_word_embeddings": True, "num_kv_heads": 1},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 4},
    "llama3-rope": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "attention_bias": True},
}
IDS = random.Random(1).sample(range(61), 14)
PAGE_SIZE = 16


def logits_of(model: DenseModel, hidden: Tensor) -> Tensor:
    return F.linear(hidden, model.head)


def after_prefill(model: Transformer, length: int, num_spec_tokens: int) -> tuple[DecodeState, Any]:
    """A request whose text is IDS[:length] and whose drafts are the ids that follow, ready for a step."""
    state = tiny_state([IDS[:length]], 8, num_spec_tokens)
    state.drafts.copy_(torch.tensor([IDS[length : length + num_spec_tokens]]))
    state.num_drafts.fill_(num_spec_tokens)
    cache = model.new_cache(8, PAGE_SIZE)
    if length > 1:
        model.forward(prefill_rows(state, [0], [length - 1], 0, PAGE_SIZE), cache)
    return state, cache


# Visibility


@pytest.mark.parametrize("num_spec_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("anchors", [[[0]], [[3, 3, 0]], [[1, 4, 7], [6, 2, 0]]])
def test_visibility_is_that_of_the_design(anchors: list[list[int]], num_spec_tokens: int) -> None:
    length = 8
    seen = visibility(torch.tensor(anchors), length, num_spec_tokens)
    count = len(anchors[0])
    assert seen.shape == (len(anchors), count * num_spec_tokens, length + count * num_spec_tokens)
    for b, row_anchors in enumerate(anchors):
        for block, anchor in enumerate(row_anchors):
            for j in range(num_spec_tokens):
                own = {length + block * num_spec_tokens + i for i in range(j + 1)}
                want = set(range(anchor + 1)) | own
                assert set(seen[b, block * num_spec_tokens + j].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize(("kind", "num_spec_tokens"), [("chain", 1), ("chain", 3), ("quadratic", 1), ("quadratic", 3)])
def test_visibility_is_that_of_a_step(kind: str, num_spec_tokens: int) -> None:
    """Step row r is column L - 1 + r: clean rows at their position, then the MASK rows, block by block."""
    length = 6
    plan = StepPlan(kind, num_spec_tokens + 1)  # type: ignore[arg-type]
    state = tiny_state([IDS[:length]], 8, num_spec_tokens)
    state.num_drafts.fill_(num_spec_tokens)
    rows = plan_rows(plan, state, PAGE_SIZE)
    total = int(rows.query_start_loc[-1])
    branches = range(num_spec_tokens + 1) if kind == "quadratic" else [num_spec_tokens]
    seen = visibility(torch.tensor([[length - 1 + b for b in branches]]), length + num_spec_tokens, num_spec_tokens)[0]
    assert total == num_spec_tokens + 1 + len(seen)
    for row, columns in enumerate(seen, num_spec_tokens + 1):
        bits = int(rows.tree_mask[row]) if rows.tree_mask is not None else (2 << row) - 1
        want = set(range(length - 1)) | {length - 1 + r for r in range(total) if bits >> r & 1}
        assert set(columns.nonzero().flatten().tolist()) == want


# The paged model computes the same


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_clean_rows_are_those_of_the_paged_model(changes: dict[str, Any]) -> None:
    checkpoint = MemoryCheckpoint(tiny_config(**changes), seed=4)
    model = dense(checkpoint)
    with use_backend("torch"):
        paged = Transformer(checkpoint, dtype=torch.float32)  # type: ignore[arg-type]
        rows = prefill_rows(tiny_state([IDS], 8), [0], [len(IDS)], 0, PAGE_SIZE)
        want, _ = paged.forward(rows, paged.new_cache(8, PAGE_SIZE))
    batch = torch.tensor([IDS, [*IDS[:5], *[0] * (len(IDS) - 5)]])
    found = logits_of(model, model.clean(batch).hidden)
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, :5], want[:5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("kind", "num_spec_tokens"), [("chain", 3), ("quadratic", 3), ("quadratic", 1)])
def test_mask_rows_are_those_of_a_step(
    changes: dict[str, Any], kind: str, num_spec_tokens: int, tmp_path: Path
) -> None:
    checkpoint = MemoryCheckpoint(tiny_config(**changes), seed=4)
    model, lora, length = dense(checkpoint), noisy_lora(checkpoint.config), 7
    with use_backend("torch"):
        paged = exported(tmp_path, checkpoint, Trainee(lora, None))
        state, cache = after_prefill(paged, length, num_spec_tokens)
        rows = plan_rows(StepPlan(kind, num_spec_tokens + 1), state, PAGE_SIZE)  # type: ignore[arg-type]
        step, _ = paged.forward(rows, cache)
    branches = range(num_spec_tokens + 1) if kind == "quadratic" else [num_spec_tokens]
    anchors = torch.tensor([[length - 1 + b for b in branches]])
    with torch.no_grad():
        clean = model.clean(torch.tensor([IDS]))
        masked = logits_of(model, model.masked(clean, anchors, num_spec_tokens, lora.mask_embedding, lora))[0].flatten(
            0, 1
        )
    first = num_spec_tokens + 1
    torch.testing.assert_close(step[first : first + len(masked)], masked, rtol=1e-4, atol=1e-4)
    ordinary = logits_of(model, clean.hidden[0, length - 1 : length + num_spec_tokens])
    torch.testing.assert_close(step[:first], ordinary, rtol=1e-4, atol=1e-4)
    without = logits_of(model, model.masked(clean, anchors, num_spec_tokens, lora.mask_embedding, None))[0].flatten(
        0, 1
    )
    assert (without - masked).abs().max() > 0.1, "the adapter has a say"


def test_decode_continues_each_row_at_its_own_length() -> None:
    model = dense(MemoryCheckpoint(tiny_config(**CONFIGS["qwen3"]), seed=4))
    ids = torch.tensor([IDS, IDS[::-1]])
    want = model.clean(ids).hidden
    lengths = torch.tensor([4, 9])
    cut = torch.where(torch.arange(10) < lengths.unsqueeze(1), ids[:, :10], 0)
    clean = model.clean(cut)
    k, v = ([F.pad(layer, (0, 0, 0, 4)) for layer in side] for side in (clean.k, clean.v))
    for _ in range(5):
        tokens = ids.gather(1, lengths.unsqueeze(1)).squeeze(1)
        hidden = model.decode(tokens, lengths, k, v)
        torch.testing.assert_close(hidden, want[[0, 1], lengths], rtol=1e-4, atol=1e-5)
        lengths = lengths + 1


# What reaches what


def test_mask_rows_see_no_token_behind_their_anchor() -> None:
    model = dense(MemoryCheckpoint(tiny_config(), seed=4))
    lora = noisy_lora(model.config)
    anchors = torch.tensor([[2, 5, 9]])

    def masked(changed: int) -> Tensor:
        ids = torch.tensor([IDS])
        ids[0, changed] = (ids[0, changed] + 1) % 61
        with torch.no_grad():
            return model.masked(model.clean(ids), anchors, 3, lora.mask_embedding, lora)[0]

    plain = masked(len(IDS) - 1)  # behind every anchor
    for changed in range(len(IDS) - 1):
        moved = (masked(changed) - plain).abs().flatten(1).amax(1)
        for anchor, difference in zip([2, 5, 9], moved.tolist(), strict=True):
            assert difference == 0 if changed > anchor else difference > 1e-4


def test_clean_rows_see_neither_padding_nor_mask_rows() -> None:
    model = dense(MemoryCheckpoint(tiny_config(), seed=4))
    one, other = (model.clean(torch.tensor([IDS[:6] + [pad] * 4])).hidden[0, :6] for pad in (0, 33))
    assert torch.equal(one, other)


def test_the_gradient_reaches_the_adapter_alone() -> None:
    model = dense(MemoryCheckpoint(tiny_config(**CONFIGS["qwen3"]), seed=4))
    lora = noisy_lora(model.config)
    with torch.no_grad():
        clean = model.clean(torch.tensor([IDS]))
    logits = logits_of(model, model.masked(clean, torch.tensor([[2, 6]]), 2, lora.mask_embedding, lora))
    logits.square().sum().backward()
    for parameter in lora.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in model.weights.values())


@pytest.mark.parametrize("module", ["q_proj", "v_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize("half", [0, 1])
def test_the_gradient_is_that_of_finite_differences(module: str, half: int) -> None:
    model = dense(MemoryCheckpoint(tiny_config(), seed=4, scale=0.2))
    lora = noisy_lora(model.config)
    with torch.no_grad():
        clean = model.clean(torch.tensor([IDS]))
    weight = torch.randn(2, 3, 61, generator=torch.Generator().manual_seed(1))

    def value() -> Tensor:
        hidden = model.masked(clean, torch.tensor([[2, 6]]), 3, lora.mask_embedding, lora)
        return (logits_of(model, hidden)[0].log_softmax(-1).double() * weight).sum()

    parameter = lora.pairs[0, module][half]
    value().backward()
    assert parameter.grad is not None
    place = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
    step, around = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * step
            around.append(float(value()))
            parameter[place] -= sign * step
    assert float(parameter.grad[place]) == pytest.approx((around[0] - around[1]) / (2 * step), rel=0.02)


def test_a_model_without_mask_token_says_so() -> None:
    with pytest.raises(ValueError, match="no mask_token_id"):
        _ = dense(MemoryCheckpoint(tiny_config())).own_mask
