"""A tiny model whose every op runs on backend `triton`: what it decodes, and that strided decoding is AR to the bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import idlm_kernels
from bench.ptx import recorded_launches
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import ModelConfig, Transformer
from idlm_kernels.model.adapter import MODULES, Adapter
from idlm_kernels.testing import check_bits
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.triton.support import DEVICE

pytestmark = pytest.mark.compiled

PROMPTS = [[3, 14, 15, 9, 26], [5]]


def random_adapter(config: ModelConfig, rank: int = 8) -> Adapter:
    pairs = {}
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        if len(parts) > 4 and parts[4] in MODULES and name.endswith("weight"):
            pairs[int(parts[2]), parts[4]] = torch.randn(rank, shape[1]), torch.randn(shape[0], rank)
    return Adapter("random", rank, 0.2, torch.randn(config.hidden_size), pairs)


def tiny_generator(dtype: torch.dtype, with_adapter: bool = False, **changes: Any) -> Generator:
    config = tiny_config(**changes)
    adapter = random_adapter(config) if with_adapter else None
    checkpoint: Any = MemoryCheckpoint(config)
    model = Transformer(checkpoint, device=DEVICE, dtype=dtype, adapter=adapter)
    for layer in model.layers:  # activations, cache and adapter in this dtype too, as on a GPU
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            if projection.lora is not None:
                projection.lora = projection.lora[0].to(dtype), projection.lora[1].to(dtype)
    model.dtype = dtype
    return Generator(model, page_size=16)


def test_generates_what_the_references_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=8)
    tokens = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("IDLM_BACKEND", backend)
        idlm_kernels.ops._dispatch._chosen.clear()
        assert idlm_kernels.backends(DEVICE.type)["strided_attention"] == backend
        results = tiny_generator(torch.float32).generate(PROMPTS, params, plan="quadratic", stride=3)
        tokens[backend] = [result.token_ids for result in results]
    assert tokens["triton"] == tokens["torch"]
    assert all(len(ids) == 8 for ids in tokens["triton"])


@pytest.mark.parametrize("context", [5, 300], ids=["one KV chunk", "two KV chunks"])
@pytest.mark.parametrize("plan, with_adapter, most", [("chain", False, 8), ("chain", True, 12), ("ar", True, 8)])
def test_launches_of_a_layer(plan: Any, with_adapter: bool, most: int, context: int, softgpu: ModuleType) -> None:
    """Per layer of a decode step. Without MASK rows there is nothing for an adapter to do."""
    counts = []
    for num_layers in (1, 2):
        generator = tiny_generator(torch.bfloat16, with_adapter, num_layers=num_layers, max_position_embeddings=512)
        with idlm_kernels.use_backend("triton"), recorded_launches(softgpu) as launches:
            generator.generate([[7] * context], SamplingParams(max_tokens=1), plan=plan, stride=2)
        counts.append(len(launches))
    assert counts[1] - counts[0] == most


def recorded_rows(generator: Generator) -> list[tuple[list[int], list[int], Tensor]]:
    """Positions, ids and logits of the ordinary rows of every forward, from now on."""
    found: list[tuple[list[int], list[int], Tensor]] = []
    forward: Callable[..., tuple[Tensor, Tensor]] = generator.model.forward

    def recording(rows: Any, cache: Any, logits_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, hidden = forward(rows, cache, logits_rows)
        chosen = torch.arange(rows.ids.shape[0]) if logits_rows is None else logits_rows
        clean = ~rows.is_mask[chosen] & (chosen < rows.query_start_loc[-1])
        found.append((rows.positions[chosen][clean].tolist(), rows.ids[chosen][clean].tolist(), logits[clean]))
        return logits, hidden

    generator.model.forward = recording  # type: ignore[method-assign]
    return found


QWEN = {"head_dim": 64, "hidden_size": 256, "qk_norm": True, "architecture": "qwen3"}


@pytest.mark.parametrize("changes", [{"with_adapter": True}, QWEN], ids=["llama-adapter", "qwen3"])
@pytest.mark.parametrize("plan, stride", [("quadratic", 4), ("chain", 3)])
def test_strided_decoding_has_the_bits_of_ar(plan: Any, stride: int, changes: dict[str, Any]) -> None:
    prompt, params = PROMPTS[0], SamplingParams(max_tokens=8, temperature=0.9, seed=3)
    with idlm_kernels.use_backend("triton"):
        runs = {}
        for kind, n in (("ar", 2), (plan, stride)):
            generator = tiny_generator(torch.bfloat16, **changes)
            rows = recorded_rows(generator)
            runs[kind] = generator.generate([prompt], params, plan=kind, stride=n)[0].token_ids, rows
    tokens, ar_rows = runs["ar"]
    assert runs[plan][0] == tokens
    text = [*prompt, *tokens]
    wanted = {
        position: row for positions, _, logits in ar_rows for position, row in zip(positions, logits, strict=True)
    }
    compared = 0
    for positions, ids, logits in runs[plan][1]:
        for position, token, row in zip(positions, ids, logits, strict=True):
            if position >= len(text) or token != text[position]:
                break  # a draft that is not the text: this row and those behind it are other sequences
            if position in wanted:
                check_bits(row, wanted[position])
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize("plan", ["chain", "quadratic"])
def test_an_adapter_whose_values_overflow_costs_drafts_and_no_token(plan: str) -> None:
    """Its weights are finite, the V of its MASK rows is not: no ordinary row sees that."""
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3)
    with idlm_kernels.use_backend("triton"):
        generator = tiny_generator(torch.float32, with_adapter=True)
        for layer in generator.model.layers:
            assert layer.qkv.lora is not None
            layer.qkv.lora = tuple(torch.full_like(factor, 1e20) for factor in layer.qkv.lora)
        wanted, got = (generator.generate(PROMPTS, params, plan=p, stride=3) for p in ("ar", plan))
    assert [r.token_ids for r in got] == [r.token_ids for r in wanted]
    assert all(len(r.token_ids) == 6 for r in got)
