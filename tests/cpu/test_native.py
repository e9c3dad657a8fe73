"""The compiled CPU kernels: the model they compute, the bits they keep, and what they refuse."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

import python_ref
from idlm_kernels import StepState
from idlm_kernels.cpu import native, step
from idlm_kernels.cpu import state as cpu_state
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate import plan as plans
from idlm_kernels.generate.plan import StepPlan, prefill_rows
from idlm_kernels.model import ModelConfig, Rows, Transformer
from idlm_kernels.model.adapter import MODULES, Adapter
from idlm_kernels.model.cpu_stack import CpuCache, unsupported
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.testing import check_bits
from tests.ref.steps import random_commit, random_places
from tests.tiny import MemoryCheckpoint, tiny_config, tiny_state

# Where they could be built and are not, or are switched on and do not load, that is a failure and no reason to skip.
HAS_COMPILER = bool(os.environ.get("CXX")) or any(map(shutil.which, ("c++", "g++", "clang++")))
IS_OFF = os.environ.get("IDLM_CPU_NATIVE") == "0"
pytestmark = pytest.mark.skipif(
    native.library() is None and (IS_OFF or not HAS_COMPILER), reason=f"no CPU kernels here: {native.status()}"
)

WIDE = tiny_config(hidden_size=64, intermediate_size=96, head_dim=32, num_heads=4, num_kv_heads=2)


class BlockCheckpoint(MemoryCheckpoint):
    """A model whose matrices are stored in GGUF blocks of some kind, and read back as fp32 without the kernels."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__(config, scale=0.15)
        self._stored: dict[str, native.Blocks] = {}
        number = getattr(gguf.GGMLQuantizationType, kind)
        for name, tensor in self.tensors.items():
            if tensor.dim() == 2:
                data = quantize(tensor.numpy(), number)
                self._stored[name] = native.Blocks(kind, torch.from_numpy(data), None)
                self.tensors[name] = torch.from_numpy(dequantize(data, number))

    def blocks(self, name: str) -> native.Blocks | None:
        return self._stored.get(name)


def random_adapter(config: ModelConfig, rank: int = 5, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    random = torch.Generator().manual_seed(7)
    shapes, pairs = config.tensor_shapes(), {}
    for layer, module in [(i, m) for i in range(config.num_layers) for m in MODULES]:
        if (layer, module) == (1, "k_proj"):
            continue  # a module that the adapter leaves alone
        block = "self_attn" if module[0] in "qkvo" else "mlp"
        n, k = shapes[f"model.layers.{layer}.{block}.{module}.weight"]
        a, b = (torch.randn(shape, generator=random) * 0.2 for shape in ((rank, k), (n, rank)))
        pairs[layer, module] = a.to(dtype), b.to(dtype)
    mask = torch.randn(config.hidden_size, generator=random)
    return Adapter("random", rank, 1.5, mask, pairs)


def models(checkpoint: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[Transformer, Transformer]:
    """A model by the kernels, and the same by torch."""
    fast = Transformer(checkpoint, **how)
    assert fast.stack is not None
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        slow = Transformer(checkpoint, **{**how, "dtype": "fp32"})
    assert slow.stack is None
    return fast, slow


def prompt_rows(lengths: list[int], masks: int, page_size: int) -> Rows:
    state = tiny_state([[(7 * i + b) % 61 for i in range(n)] for b, n in enumerate(lengths)], 64, masks)
    return prefill_rows(state, [0] * len(lengths), lengths, masks, page_size)


def logits_of(model: Transformer, rows: Rows, page_size: int, **how: Any) -> Tensor:
    with torch.inference_mode():
        return model.forward(rows, model.new_cache(64 * len(rows.seq_lens), page_size), **how)[0]


CONFIGS = {
    "llama": WIDE,
    "qwen3": dataclasses.replace(WIDE, architecture="qwen3", qk_norm=True, tie_word_embeddings=True),
    "biases": dataclasses.replace(WIDE, attention_bias=True, mlp_bias=True),
    "wide heads": dataclasses.replace(WIDE, head_dim=96, num_heads=3, num_kv_heads=3),
    "one kv head": dataclasses.replace(WIDE, head_dim=64, num_heads=5, num_kv_heads=1, vocab_size=67),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_computes_the_model(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    fast, slow = models(MemoryCheckpoint(config, scale=0.15), monkeypatch, adapter=random_adapter(config), dtype="fp32")
    rows = prompt_rows([21, 3, 40], 3, 16)
    want, got = logits_of(slow, rows, 16), logits_of(fast, rows, 16)
    assert (got - want).abs().max() < 2e-5 * want.abs().max(), "fp32 weights: nothing but rounding"


@pytest.mark.parametrize("page_size", [5, 16])
def test_rows_that_see_what_their_masks_say(page_size: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 64 bits of them, behind tokens that every row sees."""
    random = torch.Generator().manual_seed(5)
    fast, slow = models(MemoryCheckpoint(WIDE, scale=0.15), monkeypatch, adapter=random_adapter(WIDE), dtype="fp32")
    state = tiny_state([[7 * i % 61 for i in range(74)]], 64, 3)
    before, rows = (prefill_rows(state, [a], [b], 0, page_size) for a, b in ((0, 10), (10, 74)))
    sees = torch.rand(64, 64, generator=random).tril() > 0.5
    sees |= torch.eye(64, dtype=torch.bool)
    masks = [sum(1 << j for j in range(64) if row[j]) for row in sees.tolist()]
    tree_mask = torch.tensor([m - (1 << 64) if m >> 63 else m for m in masks])
    is_mask = torch.rand(64, generator=random) > 0.5
    rows = dataclasses.replace(rows, tree_mask=tree_mask, is_mask=is_mask, has_masks=True)
    got = []
    for model in (fast, slow):
        cache = model.new_cache(64, page_size)
        with torch.inference_mode():
            model.forward(before, cache)
            got.append(model.forward(rows, cache)[0])
    assert (got[0] - got[1]).abs().max() < 2e-5 * got[1].abs().max()


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.bfloat16, 16), (torch.bfloat16, 600), (torch.float16, 3), (torch.float32, 33)]
)
def test_weights_and_adapters_of_any_dtype(dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = MemoryCheckpoint(WIDE, scale=0.15)
    checkpoint.tensors = {name: x.to(dtype) for name, x in checkpoint.tensors.items()}
    fast, slow = models(checkpoint, monkeypatch, adapter=random_adapter(WIDE, rank, dtype))
    rows = prompt_rows([9], 2, 16)
    want = logits_of(slow, rows, 16)
    assert (logits_of(fast, rows, 16) - want).abs().max() < 2e-5 * want.abs().max(), "stored values, not rounded ones"


def test_weights_that_are_subnormal_in_half_precision(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = MemoryCheckpoint(WIDE, scale=0.15)
    checkpoint.tensors["lm_head.weight"] *= 1e-4
    checkpoint.tensors = {name: x.half() for name, x in checkpoint.tensors.items()}
    head = checkpoint.tensors["lm_head.weight"].abs()
    assert (head[head > 0] < 2**-14).float().mean() > 0.9
    fast, slow = models(checkpoint, monkeypatch)
    rows = prompt_rows([9], 0, 16)
    want = logits_of(slow, rows, 16)
    assert (logits_of(fast, rows, 16) - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_as_they_are_stored(kind: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean rows are fp32's but for activations of 16 bits; MASK rows, which only propose, have 8."""
    checkpoint = BlockCheckpoint(WIDE, kind)
    fast, slow = models(checkpoint, monkeypatch, adapter=random_adapter(WIDE))
    rows = prompt_rows([30], 4, 16)
    want, got = logits_of(slow, rows, 16), logits_of(fast, rows, 16)
    error = (got - want).abs().amax(1) / want.std()
    assert error[:30].max() < 2e-3
    assert error[30:].max() < 0.15


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_activations_of_8_bits_for_all_rows(kind: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = BlockCheckpoint(WIDE, kind)
    fast, slow = models(checkpoint, monkeypatch, adapter=random_adapter(WIDE))
    coarse = Transformer(BlockCheckpoint(WIDE, kind), adapter=random_adapter(WIDE), activations="int8")
    rows = prompt_rows([30], 4, 16)
    want, got = logits_of(slow, rows, 16), logits_of(coarse, rows, 16)
    error = (got - want).abs().amax(1) / want.std()
    assert error.max() < 0.15
    assert error[:30].min() > 2e-3, "it is not the faithful way"
    one = dataclasses.replace(rows, is_mask=torch.zeros_like(rows.is_mask))
    assert torch.equal(logits_of(coarse, one, 16)[:30], got[:30]), "a clean row has its bits with any neighbours"
    assert not torch.equal(logits_of(fast, rows, 16)[:30], got[:30])


def test_activations_of_8_bits_want_quantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="blocks of 4 or 8 bits"):
        Transformer(MemoryCheckpoint(WIDE), activations="int8")
    with pytest.raises(ValueError, match="wanted auto or int8"):
        Transformer(BlockCheckpoint(WIDE, "Q4_0"), activations="int4")
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match="idlm doctor"):
        Transformer(BlockCheckpoint(WIDE, "Q4_0"), activations="int8")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_a_packed_weight_gives_its_rows_back(kind: str) -> None:
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    weight[5] *= 1e-6  # scales that are subnormal in fp16
    if kind in native.GGUF_BLOCKS:
        number = getattr(gguf.GGMLQuantizationType, kind)
        data = quantize(weight.numpy(), number)
        stored: Tensor | native.Blocks = native.Blocks(kind, torch.from_numpy(data), None)
        want = torch.from_numpy(dequantize(data, number))
        packed = native.PackedWeight(native.GGUF_BLOCKS[kind][1], 37, 96)
    else:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        stored = weight.to(dtype)
        want, packed = stored.float(), native.PackedWeight(native.DTYPES[dtype], 37, 96)
    packed.put(stored)
    ids = torch.tensor([0, 36, 5, 3, 17, -1, 37])
    got = packed.rows(ids)
    torch.testing.assert_close(got[:5], want[ids[:5]], rtol=1e-6, atol=0)
    assert not got[5:].any()


def test_a_scale_that_is_not_finite_is_refused() -> None:
    data = quantize(np.ones((16, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    data[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        native.PackedWeight(native.Q8, 16, 32).put(native.Blocks("Q8_0", torch.from_numpy(data), None))


@pytest.mark.parametrize("kind", ["Q4_1", "F32"])
def test_a_row_keeps_its_bits(kind: str, isa: str) -> None:
    """Whatever other rows, requests, pages and threads there are; MASK rows at equal slots too."""
    checkpoint = BlockCheckpoint(WIDE, kind) if kind == "Q4_1" else MemoryCheckpoint(WIDE)
    model = Transformer(checkpoint, adapter=random_adapter(WIDE))  # type: ignore[arg-type]
    alone = logits_of(model, prompt_rows([45], 3, 16), 16)
    clean = logits_of(model, prompt_rows([45], 0, 16), 16)
    assert torch.equal(clean, alone[:45])
    for page_size in (1, 5, 24, 64):
        assert torch.equal(logits_of(model, prompt_rows([45], 3, page_size), page_size), alone)
    for others in ([1], [17, 80, 2], [33] * 4):
        together = logits_of(model, prompt_rows([45, *others], 3, 16), 16)
        assert torch.equal(together[:48], alone)
    for some in (torch.tensor([2, 44, 47]), torch.tensor([47, 2, 46, 44, 2])):
        assert torch.equal(logits_of(model, prompt_rows([45], 3, 16), 16, logits_rows=some), alone[some])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(logits_of(model, prompt_rows([45], 3, 16), 16), alone)
    finally:
        torch.set_num_threads(threads)
    # Token by token over the cache what the prompt gave at once.
    cache, state = model.new_cache(8, 16), tiny_state([[7 * i % 61 for i in range(45)]], 8)
    with torch.inference_mode():
        for i in range(45):
            one = model.forward(prefill_rows(state, [i], [i + 1], 0, 16), cache)[0]
            assert torch.equal(one[0], clean[i])


def test_a_value_that_a_row_does_not_see(isa: str) -> None:
    """NaN in the cache, in slots of other requests and in those of MASK rows, reaches no clean row."""
    model = Transformer(MemoryCheckpoint(WIDE), adapter=random_adapter(WIDE))  # type: ignore[arg-type]
    rows = prompt_rows([20], 3, 16)
    want = logits_of(model, rows, 16)
    cache = model.new_cache(256, 16)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    with torch.inference_mode():
        assert torch.equal(model.forward(rows, cache)[0], want)
    adapter = random_adapter(WIDE, dtype=torch.float32)
    for pair in adapter.pairs.values():
        pair[0].mul_(1e20), pair[1].mul_(1e20)
    wild = Transformer(MemoryCheckpoint(WIDE), adapter=adapter)  # type: ignore[arg-type]
    with torch.inference_mode():
        logits, hidden = wild.forward(rows, wild.new_cache(256, 16))
    assert torch.equal(logits[:20], want[:20]) and hidden.isfinite().all()


def test_a_row_without_a_slot_leaves_the_cache_alone(isa: str) -> None:
    model, rows = Transformer(MemoryCheckpoint(WIDE)), prompt_rows([20], 0, 16)  # type: ignore[arg-type]
    cache = model.new_cache(64, 16)
    assert isinstance(cache, CpuCache)
    with torch.inference_mode():
        model.forward(rows, cache)
        before = cache.k.clone(), cache.v.clone()
        slots = torch.where(torch.arange(20) == 11, rows.slot_mapping, -1)
        model.forward(dataclasses.replace(rows, ids=rows.ids + 1, slot_mapping=slots), cache)
    for now, then in zip((cache.k, cache.v), before, strict=True):
        changed = (now != then).any(4).any(2).any(0).flatten()  # by slot: over head_dim, heads and layers
        assert changed.nonzero().flatten().tolist() == [int(rows.slot_mapping[11])]


def test_an_activation_that_is_not_finite_stays_in_its_row(isa: str) -> None:
    checkpoint = BlockCheckpoint(WIDE, "Q4_1")
    model = Transformer(checkpoint)  # type: ignore[arg-type]
    rows = prompt_rows([5, 5], 0, 16)
    want = logits_of(model, rows, 16)
    assert model.stack is not None
    x = model.stack.embedding.rows(rows.ids)
    x[0, 3] = torch.inf  # of the first request, whose other rows see it
    with torch.inference_mode():
        logits, _ = model.stack.forward(x, rows, model.new_cache(128, 16), None)  # type: ignore[arg-type]
    assert logits[:5].isnan().all() and torch.equal(logits[5:], want[5:])


def test_rows_that_lie_outside_are_refused() -> None:
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    rows = prompt_rows([20], 0, 16)
    cache = model.new_cache(4, 16)
    for name, value, message in [
        ("positions", torch.full((20,), 5000), "position 5000"),
        ("positions", torch.full((20,), -1), "position -1"),
        ("slot_mapping", torch.full((20,), 64), "slot 64, beyond the cache"),
        ("page_table", torch.full((1, 64), 9, dtype=torch.int32), "page 9 of 4"),
        ("seq_lens", torch.tensor([19], dtype=torch.int32), "20 rows, but a length of 19"),
        ("seq_lens", torch.tensor([2000], dtype=torch.int32), "more than its pages hold"),
        ("query_start_loc", torch.tensor([1, 20], dtype=torch.int32), "begins with 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.forward(dataclasses.replace(rows, **{name: value}), cache)
    with pytest.raises(ValueError, match="row 20, there are 20"):
        model.forward(rows, cache, logits_rows=torch.tensor([20]))
    more = dataclasses.replace(rows, query_start_loc=torch.tensor([0, 21]).int(), seq_lens=torch.tensor([21]).int())
    with pytest.raises(ValueError, match="ends with 21, there are 20 rows"):
        model.forward(more, cache, logits_rows=torch.tensor([3]))
    with pytest.raises(ValueError, match="there are 20"):
        model.forward(rows, cache, logits_rows=torch.tensor([-1]))


def test_rows_of_another_dtype_are_refused() -> None:
    """Their memory would be read as something that it is not."""
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    rows, cache = prompt_rows([20], 0, 16), model.new_cache(4, 16)
    for name in ("positions", "slot_mapping", "page_table", "seq_lens", "query_start_loc"):
        with pytest.raises(TypeError, match=f"forward: {name} is torch.int16"):
            model.forward(dataclasses.replace(rows, **{name: getattr(rows, name).to(torch.int16)}), cache)
    with pytest.raises(TypeError, match="forward: logits_rows is torch.int32"):
        model.forward(rows, cache, logits_rows=torch.tensor([3], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"forward: positions is torch.int64 with strides \(2,\)"):
        model.forward(dataclasses.replace(rows, positions=torch.arange(40)[::2]), cache)
    with pytest.raises(TypeError, match="ids are torch.int32"):
        model.forward(dataclasses.replace(rows, ids=rows.ids.int()), cache)
    for name in ("positions", "slot_mapping", "page_table", "query_start_loc"):
        with pytest.raises(ValueError, match=f"forward: {name} has [0-9]+ entries, wanted [0-9]+"):
            model.forward(dataclasses.replace(rows, **{name: getattr(rows, name)[:-1]}), cache)


@pytest.mark.parametrize("page_size", [1, 5, 16, 24])
def test_the_memory_that_pages_are_counted_with(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys lie in tiles of 16 slots: pages of one token take 8.5 times what their tokens do."""
    fast, slow = models(MemoryCheckpoint(WIDE), monkeypatch)
    cache = fast.new_cache(3, page_size)
    assert cache.k.nbytes + cache.v.nbytes == 3 * fast.page_bytes(page_size)  # type: ignore[union-attr]
    cache = slow.new_cache(3, page_size)
    assert sum(x.nbytes for x in (*cache.k, *cache.v)) == 3 * slow.page_bytes(page_size)


def test_weights_beyond_the_dtype_that_was_asked_for_are_refused() -> None:
    checkpoint = MemoryCheckpoint(WIDE)
    checkpoint.tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that torch.float16"):
        Transformer(checkpoint, dtype="fp16")  # type: ignore[arg-type]
    assert Transformer(checkpoint, dtype="bf16").stack is not None  # type: ignore[arg-type]


def test_shapes_that_the_kernels_do_not_take() -> None:
    assert unsupported(WIDE) is None
    assert "head_dim is 8" in str(unsupported(tiny_config()))
    assert "no multiples of 16" in str(unsupported(dataclasses.replace(WIDE, hidden_size=72)))
    assert Transformer(MemoryCheckpoint(tiny_config())).stack is None  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", ["chain", "quadratic"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}])
def test_strided_decoding_is_ar(plan: Any, sampling: dict[str, Any]) -> None:
    model = Transformer(BlockCheckpoint(WIDE, "Q4_1"), adapter=random_adapter(WIDE))  # type: ignore[arg-type]
    generator = Generator(model, max_model_len=120, page_size=8)
    prompts = [[1, 2, 3], [9] * 20, [4]]
    params = SamplingParams(max_tokens=60, **sampling)
    want = [generator.generate([p], params, plan="ar")[0].token_ids for p in prompts[:1]]
    together = generator.generate(prompts, params, plan=plan, stride=3)
    assert together[0].token_ids == want[0] and len(want[0]) == 60
    assert [r.token_ids for r in together] == [r.token_ids for r in generator.generate(prompts, params, plan="ar")]


# Threads


def test_the_bits_do_not_depend_on_how_a_thread_treats_subnormal_numbers(isa: str) -> None:
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    rows, stack = prompt_rows([9], 0, 16), model.stack
    x = torch.full((9, WIDE.hidden_size), 1e-39)
    assert stack is not None

    def logits() -> Tensor:
        with torch.inference_mode():
            return stack.forward(x.clone(), rows, model.new_cache(64, 16), None)[0]  # type: ignore[arg-type]

    want = logits()
    assert want.any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    try:
        check_bits(logits(), want)
        assert torch.tensor([1e-39]).mul(0.5).item() == 0, "and the mode is the owner's again"
    finally:
        torch.set_flush_denormal(False)


def test_numbers_of_threads_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    for count in (0, 1025):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        with pytest.raises(ValueError, match=f"{count} threads, wanted 1 to 1024"):
            logits_of(model, prompt_rows([3], 0, 16), 16)
        with pytest.raises(RuntimeError, match=f"{count} threads, wanted 1 to 1024"):
            rerank_problem(torch.float32)[0]()


def in_a_process(program: str) -> None:
    start = "import os, sys, threading, torch\nsys.path.insert(0, '.')\nfrom tests.cpu.test_native import *\n"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start + program], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_threads_that_the_system_does_not_give() -> None:
    """A forward, and re-ranking, go on with those there are."""
    in_a_process(
        """
import resource
model = Transformer(MemoryCheckpoint(WIDE))
want = logits_of(model, prompt_rows([20], 0, 16), 16)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
torch.get_num_threads = lambda: 300
rerank_problem(torch.float32)[0]()
for _ in range(3):
    assert torch.equal(logits_of(model, prompt_rows([20], 0, 16), 16), want)
assert len(os.listdir("/proc/self/task")) < 300, "the limit did not hold"
"""
    )


def test_two_engines_in_two_threads() -> None:
    """The pool and its memory serve one forward at a time, with as many threads as each wants."""
    in_a_process(
        """
wishes = threading.local()
torch.get_num_threads = lambda: getattr(wishes, "count", 1)
failed = []
def work(config, masks, count):
    wishes.count = count
    try:
        model = Transformer(MemoryCheckpoint(config), adapter=random_adapter(config))
        rows = prompt_rows([30, 5], masks, 16)
        want = logits_of(model, rows, 16)
        for _ in range(100):
            assert torch.equal(logits_of(model, rows, 16), want)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work, args=x) for x in ((WIDE, 3, 2), (CONFIGS["one kv head"], 0, 3))]
for t in threads: t.start()
for t in threads: t.join()
assert not failed, failed
"""
    )


@pytest.mark.slow
def test_more_units_of_attention_than_a_share_can_hold() -> None:
    """1,025 requests by 1,024 heads are more than 2^20: a forward never ended. In a process of its own, of 1 GB."""
    in_a_process(
        """
config = tiny_config(hidden_size=32, intermediate_size=16, head_dim=32, num_heads=1024, num_kv_heads=1024, num_layers=1)
model, n = Transformer(MemoryCheckpoint(config)), 1025
zeros, table = torch.zeros(n, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int32)
lengths, ends = torch.ones(n, dtype=torch.int32), torch.arange(n + 1, dtype=torch.int32)
slots = torch.full((n,), -1)
slots[0] = 0
rows = Rows(zeros, zeros.bool(), zeros, slots, table, lengths, ends, None, 1)
with torch.inference_mode():
    logits = model.forward(rows, model.new_cache(1, 16))[0]
assert torch.equal(logits, logits[:1].expand(n, -1))
"""
    )


def test_a_forward_keeps_the_rotary_table_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in another thread may let the model have a longer one meanwhile, and the kernels hold no lock."""
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    rows, stack = prompt_rows([20], 0, 16), model.stack
    want = logits_of(model, rows, 16)
    assert stack is not None
    library, tables = stack._library, [weakref.ref(model.rotary)]

    class Meanwhile:
        def idlm_cpu_forward(self, *arguments: Any) -> Any:
            for _ in range(2):
                model.reserve_positions(2 * len(model.rotary))
                tables.append(weakref.ref(model.rotary))
            assert tables[0]() is not None and tables[1]() is None
            return library.idlm_cpu_forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stack, "_library", Meanwhile())
        assert torch.equal(logits_of(model, rows, 16), want)
    assert tables[0]() is None and torch.equal(logits_of(model, rows, 16), want)


# What a step does around its forward


@pytest.mark.parametrize(
    ("num_spec_tokens", "quadratic"),
    [(0, False), (0, True), (1, False), (3, False), (31, False), (1, True), (3, True), (7, True)],
)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_rows_of_a_plan(num_spec_tokens: int, quadratic: bool, page_size: int) -> None:
    for seed in range(5):
        state = random_places(seed, num_spec_tokens, page_size)
        how: dict[str, Any] = {"quadratic": quadratic, "noise_below": (0, 151_669)[seed % 2]}
        want = python_ref.plan_rows(state, 60, page_size, **how)
        out = tuple(torch.full_like(x, 1) for x in want)
        assert cpu_state.plan_rows(state, 60, page_size, out=out, **how) is out
        for got in (out, cpu_state.plan_rows(state, 60, page_size, **how)):
            for x, y in zip(got, want, strict=True):
                assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("num_spec_tokens", [0, 1, 4])
def test_the_commit_of_a_step(num_spec_tokens: int) -> None:
    for seed in range(40):
        mine, other = random_commit(seed, num_spec_tokens), random_commit(seed, num_spec_tokens)
        if seed % 5 == 0:
            starts = torch.arange(13, dtype=torch.int32) * (num_spec_tokens + 1)
            logits = {"logits": torch.randn(int(starts[-1]), 7), "query_start_loc": starts}
            mine, other = mine | logits, other | logits
        if seed % 2:  # places of a larger batch, whose drafts are more
            wide = torch.full((12, num_spec_tokens + 2), 9)
            wide[:, :num_spec_tokens] = mine["state"].drafts
            mine["state"] = dataclasses.replace(mine["state"], drafts=wide[:, :num_spec_tokens])
            out = torch.full((14, 6 + 2 * (num_spec_tokens + 1)), -7)[
                1:13, : 6 + (num_spec_tokens + 1) * (1 + ("logits" in mine))
            ]
            mine["out"] = out
        assert torch.equal(cpu_state.commit_step(**mine), python_ref.commit_step(**other))
        for field in dataclasses.fields(StepState):
            assert torch.equal(getattr(mine["state"], field.name), getattr(other["state"], field.name)), field.name


def test_rows_of_a_plan_stay_where_there_is_room() -> None:
    """A state that holds what it should not: nothing is written past the end, and the forward refuses the request."""
    plan, state = StepPlan("chain", 2), tiny_state([[1, 2, 3], [5] * 16], 1, 3)
    state.num_drafts.fill_(3)  # of a plan with one draft
    rows = plans.plan_rows(plan, state, 16)
    assert rows.query_start_loc.tolist() == [0, 3, 6] and rows.slot_mapping.tolist()[3:] == [31, -1, -1]
    model = Transformer(MemoryCheckpoint(WIDE))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="request 1 has 18 tokens, more than its pages hold"):
        model.forward(rows, model.new_cache(2, 16))


def step_problem(seed: int, vocab_size: int = 600) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    counts = [1 + 2 + 2, 0, 1 + 2, 1 + 1 + 2 * 2]
    logits = torch.randn(sum(counts), vocab_size, generator=random)
    num_drafts = torch.tensor([2, 1, 0, 1], dtype=torch.int32)
    drafts = torch.randint(0, vocab_size - 10, (4, 2), generator=random)
    drafts[0, 0] = logits[0, : vocab_size - 10].argmax()
    zeros = torch.zeros(4)
    return {
        "logits": logits,
        "query_start_loc": torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        "num_drafts": num_drafts,
        "drafts": drafts,
        "positions": torch.arange(4, dtype=torch.int32),
        "temperature": zeros,
        "top_k": zeros.int(),
        "top_p": zeros + 1,
        "min_p": zeros,
        "seed": torch.arange(4),
        "id_limit": vocab_size - 10,
        "mask_id": int(logits[2].argmax()),
    }


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_verification(quadratic: bool, ties: bool, isa: str) -> None:
    for seed in range(5):
        problem = step_problem(seed)
        if seed == 4:  # the second draft is right, after one that is not
            problem["drafts"][0] = torch.tensor([3, int(problem["logits"][1, :590].argmax())])
        if ties:  # of several best ids the first one, and never the MASK id, which is as good
            problem["logits"] = problem["logits"].clamp(max=1.5)
            problem["mask_id"] = int(problem["logits"][2].argmax())
        want = python_ref.verify_accept(**problem, quadratic=quadratic, rule="match")
        names = ("logits", "query_start_loc", "num_drafts", "drafts", "temperature", "id_limit", "mask_id")
        got = step.verify_greedy(**{name: problem[name] for name in names}, quadratic=quadratic)
        assert got is not None
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_out_of_the_ordinary_take_the_general_way(value: float, isa: str) -> None:
    problem = step_problem(1)
    names = ("logits", "query_start_loc", "num_drafts", "drafts", "temperature", "id_limit", "mask_id")
    problem["logits"][0, 599] = value  # beyond the limit: no matter
    assert step.verify_greedy(**{name: problem[name] for name in names}, quadratic=False) is not None
    problem["logits"][0, 77] = value
    assert step.verify_greedy(**{name: problem[name] for name in names}, quadratic=False) is None
    problem = step_problem(1)
    problem["drafts"][0, 0] = 600
    assert step.verify_greedy(**{name: problem[name] for name in names}, quadratic=False) is None
    problem = step_problem(1)
    problem["query_start_loc"][-1] += 1  # a row that is not there
    assert step.verify_greedy(**{name: problem[name] for name in names}, quadratic=False) is None
    problem = step_problem(1)
    problem["temperature"][3] = 0.5
    assert step.verify_greedy(**{name: problem[name] for name in names}, quadratic=False) is None


def rerank_problem(
    dtype: torch.dtype, is_packed: bool = False, ties: bool = False, sampling: step.Sampling | None = None
) -> tuple[Callable[[], Tensor | None], Callable[[], Tensor]]:
    """A problem by the kernels and by the reference. The embedding has more rows than the head."""
    random = torch.Generator().manual_seed(3)
    width, small, vocab_size = 48, 32, 600

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.3

    logits, hidden = matrix(12, vocab_size) * 10, matrix(12, width)
    if ties:
        logits = (logits / 2.5).round()  # some 60 of the best values, of which the first 32 are candidates
        logits[:, 576:] = 2
    logits[4, 100] = torch.nan
    logits[5, 200] = -torch.inf
    first_mask = torch.tensor([2, 5, 8], dtype=torch.int32)
    previous, num_drafts = torch.tensor([599, 4, 0]), torch.tensor([3, 0, 3], dtype=torch.int32)
    drafts = torch.randint(0, 500, (3, 3), generator=random)
    head = matrix(590, width) * 3  # so that all candidates have a chance
    if ties:
        head[-1] *= 30  # the last of the ties would be chosen often, were it a candidate
    weights = (
        matrix(vocab_size, width).to(dtype),
        head.to(dtype),
        matrix(small, width),
        matrix(small, width),
        matrix(small, small),
        matrix(width, small),
    )
    zeros, is_greedy = torch.zeros(3), sampling is None
    sampling = sampling or step.Sampling(zeros, zeros.int(), zeros + 1, zeros, torch.arange(3))
    positions = torch.arange(3, dtype=torch.int32)
    request = (logits, hidden, first_mask, previous)
    tables: list[Any] = list(weights[:2])
    if is_packed:
        tables = [native.PackedWeight(native.DTYPES[dtype], *weight.shape) for weight in weights[:2]]
        for table, weight in zip(tables, weights, strict=False):
            table.put(weight)
    return (
        lambda: step.rerank(*request, positions, drafts, num_drafts, sampling, *tables, weights[2:], 590, 7),
        lambda: python_ref.rerank_drafts(
            *request, positions, drafts, num_drafts, *sampling, *weights, 590, 7, greedy=is_greedy
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_re_ranking(is_packed: bool, ties: bool, dtype: torch.dtype, isa: str) -> None:
    kernels, reference = rerank_problem(dtype, is_packed, ties)
    got = kernels()
    assert got is not None and torch.equal(got, reference())


@pytest.mark.parametrize("seed", range(8))
def test_sampled_re_ranking(seed: int, isa: str) -> None:
    """A greedy request among sampled ones, with each way to truncate."""
    random = torch.Generator().manual_seed(seed)
    sampling = step.Sampling(
        torch.tensor([(0.0, 0.6, 1.5)[(seed + b) % 3] for b in range(3)]),
        torch.tensor([(0, 4, 40)[(seed // 2 + b) % 3] for b in range(3)], dtype=torch.int32),
        torch.tensor([1.0, 0.7, 0.3])[torch.randperm(3, generator=random)],
        torch.tensor([0.0, 0.2, 0.0])[torch.randperm(3, generator=random)],
        torch.randint(-(1 << 62), 1 << 62, (3,), generator=random),
    )
    kernels, reference = rerank_problem(torch.float32, is_packed=bool(seed % 2), sampling=sampling)
    got = kernels()
    assert got is not None and torch.equal(got, reference())


def test_weights_lie_side_by_side_and_apart() -> None:
    """Rooms of many threads: zeros, on multiples of 64 bytes, none over another; a large one begins a huge page."""
    sizes = [1, 64, 65, 0, 4097, 1 << 20, 3 << 20] * 12
    with ThreadPoolExecutor(8) as pool:
        rooms = list(pool.map(native.room, sizes))
    for i, (tensor, size) in enumerate(zip(rooms, sizes, strict=True)):
        assert len(tensor) == size and tensor.data_ptr() % 64 == 0 and not tensor.any()
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(rooms))
    large = native.room(20 << 20)
    assert len(large) == 20 << 20 and large.data_ptr() % (2 << 20) == 0


def test_weights_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not native.room(20 << 20).any()


def test_a_chunk_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[weakref.ref[mmap.mmap]] = []
    real = mmap.mmap

    def recorded(*args: Any, **how: Any) -> mmap.mmap:
        chunk = real(*args, **how)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(mmap, "mmap", recorded)
    rooms = [native.room(7 << 20) for _ in range(6)]
    assert len(chunks) >= 2 and all(chunk() is not None for chunk in chunks)
    rooms.clear()
    assert sum(chunk() is not None for chunk in chunks) == 1  # the one that the next weights go into


# The library


def test_the_library_is_there() -> None:
    assert native.library() is not None, f"{native.status()} (python csrc/build_cpu.py)"


def test_a_child_of_fork_computes_too() -> None:
    in_a_process(  # OMP_NUM_THREADS is 1: with more it is torch that does not survive a fork
        """
torch.get_num_threads = lambda: 3
model = Transformer(MemoryCheckpoint(WIDE))
want = logits_of(model, prompt_rows([20], 0, 16), 16)
child = os.fork()
if child == 0:
    for count in (3, 2, 4):  # none of the threads that it would wait for is there
        torch.get_num_threads = lambda: count
        if not torch.equal(logits_of(model, prompt_rows([20], 0, 16), 16), want):
            os._exit(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )


def test_why_there_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def status() -> str:
        native._load.cache_clear()
        return native.status()

    try:
        monkeypatch.setattr(native, "source_hash", lambda: "0" * 16)
        assert "built from other sources" in status() and native.library() is None
        monkeypatch.setattr(native, "LIBRARY", str(tmp_path / "none.so"))
        assert "make native-cpu" in status()
        (tmp_path / "none.so").write_text("no library")
        assert "does not load" in status()
        monkeypatch.setenv("IDLM_CPU_NATIVE", "0")
        assert "IDLM_CPU_NATIVE=0" in status()
        monkeypatch.undo()
        monkeypatch.setenv("IDLM_CPU_ISA", "sse9")
        with pytest.raises(ValueError, match="IDLM_CPU_ISA is 'sse9', wanted one of"):
            status()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
    assert native.library() is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    build = Path(__file__).parents[2] / "csrc" / "build_cpu.py"
    command = [sys.executable, str(build), "--output", str(tmp_path / "file" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no CPU kernels: cannot build into" in done.stderr or "no C++ compiler" in done.stderr


def test_the_structs_are_those_of_the_header() -> None:
    library = ctypes.CDLL(str(native._HERE / native.LIBRARY))
    assert library.idlm_cpu_abi() == native._abi()
