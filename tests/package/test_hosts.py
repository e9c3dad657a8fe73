"""The skeletons for other engines: their translation on the tensor layouts of vLLM and SGLang, on a CPU.

The engines themselves are not here. Where a skeleton derives from one of their classes, stand-ins with the same names
and signatures take their place; that the real ones still look like this is not tested.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import idlm_kernels
from idlm_kernels.generate import Generator, SamplingParams, StepPlan
from idlm_kernels.generate.plan import plan_rows
from idlm_kernels.model.rows import Rows
from idlm_kernels.model.transformer import KVCache
from tests.tiny import MemoryCheckpoint, oracle_checkpoint, tiny_config, tiny_state

MASK = 60
HOSTS = Path(__file__).resolve().parents[2] / "examples" / "hosts"


def skeleton(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HOSTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


vllm, sglang = skeleton("vllm_backend"), skeleton("sglang_backend")


class Stand(ModuleType):
    """A module that stands in for one of an engine's."""


def stand_in(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, content in modules.items():
        path = name.replace("__", ".")
        for end in (i for i, c in enumerate(path + ".") if c == "."):
            monkeypatch.setitem(sys.modules, path[:end], sys.modules.get(path[:end], Stand(path[:end])))
        vars(sys.modules[path]).update(content)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# vLLM


def test_vllm_cache_and_metadata_pass_as_they_are() -> None:
    kv_cache = randn(9, 2, 16, 2, 64)
    k_cache, v_cache = vllm.kv_views(kv_cache)
    assert k_cache.shape == (9, 16, 2, 64) and k_cache.untyped_storage().data_ptr() == kv_cache.data_ptr()
    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 3, 4]).int(),
        seq_lens=torch.tensor([40, 17]).int(),
        block_table_tensor=torch.tensor([[7, 2, 5], [1, 8, 0]]).int(),
        slot_mapping=torch.tensor([0, 0, 0, 0, -1]),
        max_query_len=3,
    )
    query, out = randn(5, 4, 64, seed=1), torch.full((5, 256), 7.0)  # the last row is padding
    vllm.attend(query, kv_cache, vllm.metadata_of(common), out, 0.1, None)
    expected = idlm_kernels.strided_attention(
        query[:4],
        kv_cache[:, 0].contiguous(),
        kv_cache[:, 1].contiguous(),
        common.block_table_tensor,
        common.seq_lens,
        common.query_start_loc,
        max_query_len=3,
        sm_scale=0.1,
    )
    assert torch.equal(out[:4], expected.flatten(1)) and not out[4].any()
    vllm.attend(query, kv_cache, vllm.metadata_of(common), out, 0.1, 1)  # each row sees its own slot alone
    slot = 5 * 16 + 39 - 32
    assert torch.equal(out[2].view(4, 64)[0], v_cache[slot // 16, slot % 16, 0])


class VllmHost:
    """What vLLM does around a speculator, in small: blocks, rows, greedy verification of 2 K speculative tokens."""

    def __init__(self, generator: Generator, num_spec_tokens: int):
        self.model, self.num_spec_tokens = generator.model, num_spec_tokens
        config = self.model.config
        shape = (32, 2, 16, config.num_kv_heads, config.head_dim)  # as get_kv_cache_shape has it
        views = [vllm.kv_views(torch.zeros(shape)) for _ in range(config.num_layers)]
        self.cache = KVCache.__new__(KVCache)
        self.cache.page_size, self.cache.k, self.cache.v = 16, [k for k, _ in views], [v for _, v in views]

    def forward(self, texts: list[list[int]], starts: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and query_start_loc of tokens starts[b] .. of each text."""
        counts = [len(text) - start for text, start in zip(texts, starts, strict=True)]
        ids = torch.tensor([t for text, start in zip(texts, starts, strict=True) for t in text[start:]])
        positions = torch.tensor([p for text, s in zip(texts, starts, strict=True) for p in range(s, len(text))])
        request = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts))
        table = torch.arange(32).int().view(8, 4).t()[: len(texts)].contiguous()  # scattered blocks
        common = SimpleNamespace(
            query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([len(text) for text in texts]).int(),
            block_table_tensor=table,
            slot_mapping=table[request, positions // 16].long() * 16 + positions % 16,
            max_query_len=max(counts),
        )
        data = vllm.metadata_of(common)
        rows = Rows(
            ids,
            ids == MASK,
            positions,
            data.slot_mapping,
            data.page_table,
            data.seq_lens,
            data.query_start_loc,
            data.tree_mask,
            data.max_query_len,
        )
        logits, _ = self.model.forward(rows, self.cache)
        return logits.index_fill(1, torch.tensor([MASK]), -torch.inf), data.query_start_loc

    def decode(self, texts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
        """`count` new tokens of each text, and the steps that they took."""
        logits, loc = self.forward(texts, [0] * len(texts))
        texts = [[*text, int(logits[end - 1].argmax())] for text, end in zip(texts, loc[1:], strict=True)]
        ends = [len(text) - 1 + count for text in texts]
        tokens, n = torch.full((len(texts), 2 * self.num_spec_tokens), MASK), torch.zeros(len(texts), dtype=torch.int32)
        steps = 0
        while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
            steps += 1
            rows = [[*text, *more] for text, more in zip(texts, tokens.tolist(), strict=True)]
            logits, loc = self.forward(rows, [len(text) - 1 for text in texts])
            best = logits.argmax(1).view(len(texts), -1)
            accepted = (best[:, :-1] == tokens).long().cumprod(1).sum(1)
            texts = [[*text, *b[: a + 1]] for text, b, a in zip(texts, best.tolist(), accepted.tolist(), strict=True)]
            drafts = logits[vllm.mask_rows(loc, n, self.num_spec_tokens)].argmax(-1)
            tokens, n = vllm.speculative_tokens(drafts, loc, n, 2 * self.num_spec_tokens - accepted, MASK)
        return [text[:end] for text, end in zip(texts, ends, strict=True)], steps


@pytest.mark.parametrize("perfect", [True, False], ids=["drafts that stand", "drafts that fall"])
def test_vllm_decodes_with_drafts_from_mask_rows(make_generator: Callable[..., Generator], perfect: bool) -> None:
    """The text is that of ordinary decoding, in as many steps as a chain plan takes."""
    config = tiny_config(mask_token_id=MASK)
    generator = make_generator(oracle_checkpoint(config) if perfect else MemoryCheckpoint(config))
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    expected = generator.generate(prompts, SamplingParams(max_tokens=21), plan="ar")
    texts, steps = VllmHost(generator, num_spec_tokens=3).decode(prompts, 21)
    assert texts == [prompt + r.token_ids for prompt, r in zip(prompts, expected, strict=True)]
    assert steps == 6 if perfect else steps <= 20  # 1 of the prompt; the first step 1 token, then 4 each


def test_vllm_register(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}

    class Base:
        def __init__(self, *args: object) -> None:
            pass

    def write(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor, *scales: object) -> None:
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                k[slot // 16, slot % 16], v[slot // 16, slot % 16] = key[row], value[row]

    backend = {"AttentionBackend": Base, "AttentionImpl": Base, "AttentionMetadataBuilder": Base}
    stand_in(
        monkeypatch,
        vllm__v1__attention__backends__registry={
            "AttentionBackendEnum": SimpleNamespace(CUSTOM="CUSTOM"),
            "register_backend": lambda which, path: registered.update({which: path}),
        },
        vllm__v1__attention__backend=backend,
        vllm__v1__attention__ops__triton_reshape_and_cache_flash={"triton_reshape_and_cache_flash": write},
        vllm__v1__worker__gpu__spec_decode__speculator={"BaseSpeculator": Base},
    )
    vllm.register()
    module, _, name = registered["CUSTOM"].rpartition(".")
    chosen = getattr(sys.modules[module], name)
    assert chosen.get_kv_cache_shape(3, 16, 2, 64) == (3, 2, 16, 2, 64)
    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 4]).int(),
        seq_lens=torch.tensor([4]).int(),
        block_table_tensor=torch.tensor([[1]]).int(),
        slot_mapping=torch.tensor([16, 17, 18, 19, -1]),
        max_query_len=4,
    )
    metadata = chosen.get_builder_cls()().build(0, common)
    impl = chosen.get_impl_cls()(4, 64, 0.125, 2, sliding_window=None, kv_cache_dtype="auto")
    cache, output = torch.zeros(3, 2, 16, 2, 64), torch.empty(5, 4, 64)
    query, key, value = randn(5, 4, 64), randn(5, 2, 64, seed=1), randn(5, 2, 64, seed=2)
    layer = SimpleNamespace(_k_scale=None, _v_scale=None)
    impl.forward(layer, query, key, value, cache, metadata, output)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:4].transpose(0, 1), key[:4].transpose(0, 1), value[:4].transpose(0, 1), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(output[:4], expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert not impl.forward(layer, query, key, value, cache, None, output).any()
    with pytest.raises(NotImplementedError, match="soft cap"):
        chosen.get_impl_cls()(4, 64, 0.125, logits_soft_cap=30.0)

    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=4),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(mask_token_id=MASK)),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    speculator = vllm.MaskSpeculator(config, torch.device("cpu"))
    speculator.load_model(SimpleNamespace(compute_logits=lambda hidden: hidden))
    # Places 6, 2, 4: a prompt of one row; a step whose drafts stood; one whose second draft fell.
    speculator.num_drafts[[2, 4]] = 2
    best = [0, *[0, 0, 0, 11, 12], *[0, 0, 0, 21, 22]]
    hidden = torch.nn.functional.one_hot(torch.tensor(best), 61).float()
    batch = SimpleNamespace(
        idx_mapping=torch.tensor([6, 2, 4]), query_start_loc=torch.tensor([0, 1, 6, 11, 11]).int(), num_reqs=3
    )
    tokens = speculator.propose(batch, {}, {}, hidden, None, torch.tensor([1, 3, 2]), torch.tensor([0, 2, 3]))
    assert tokens.tolist() == [[MASK] * 4, [11, 12, MASK, MASK], [MASK] * 4]
    assert speculator.num_drafts.tolist() == [0, 0, 2, 0, 0, 0, 0, 0]


# SGLang


def sglang_pool(texts: list[int], page_size: int) -> tuple[Tensor, Tensor]:
    """A request pool whose requests have pages in no order: slots [requests, context], and which requests these are."""
    pages = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    req_to_token = torch.zeros(8, 32, dtype=torch.int32)
    indices = torch.tensor([5, 0, 3])[: len(texts)]
    used = 0
    for request, length in zip(indices.tolist(), texts, strict=True):
        for start in range(0, length, page_size):
            req_to_token[request, start : start + page_size] = pages[used] * page_size + torch.arange(page_size)
            used += 1
    return req_to_token, indices


@pytest.mark.parametrize("page_size", [1, 4])
def test_sglang_pool_becomes_pages(page_size: int) -> None:
    lengths = torch.tensor([17, 5, 9])
    req_to_token, indices = sglang_pool(lengths.tolist(), page_size)
    k_buffer, v_buffer = randn(64 * page_size + 3, 2, 64), randn(64 * page_size + 3, 2, 64, seed=1)
    q = randn(6, 4, 64, seed=2)
    mode = SimpleNamespace(is_decode_or_idle=lambda: False, is_target_verify=lambda: False)
    batch = SimpleNamespace(
        forward_mode=mode,
        seq_lens=lengths,
        req_pool_indices=indices,
        extend_seq_lens=torch.tensor([3, 1, 2]),
        extend_seq_lens_cpu=[3, 1, 2],
    )
    metadata = sglang.metadata_of(batch, req_to_token, page_size)
    out = sglang.attend(q, k_buffer, v_buffer, metadata, page_size, 0.125)
    row = 0
    for request, length, count in zip(indices.tolist(), lengths.tolist(), [3, 1, 2], strict=True):
        slots = req_to_token[request, :length].long()
        for i in range(count):
            seen = slots[: length - count + i + 1]
            expected = torch.nn.functional.scaled_dot_product_attention(
                q[row].unsqueeze(1), k_buffer[seen].transpose(0, 1), v_buffer[seen].transpose(0, 1), enable_gqa=True
            )
            torch.testing.assert_close(out[row], expected.squeeze(1), atol=1e-5, rtol=1e-5)
            row += 1
    batch.forward_mode = SimpleNamespace(is_decode_or_idle=lambda: True)
    decode = sglang.metadata_of(batch, req_to_token, page_size)
    assert decode.query_start_loc.tolist() == [0, 1, 2, 3] and decode.seq_lens.tolist() == [17, 5, 9]


def test_sglang_tree_masks_become_tree_masks() -> None:
    """The mask of a quadratic step as SGLang writes it, against that of the plan."""
    state = tiny_state([[1, 2, 3, 4], [5, 6]], max_pages=4, num_drafts=2)
    state.num_drafts[:] = 2
    rows = plan_rows(StepPlan("quadratic", 3), state, page_size=16)
    assert rows.tree_mask is not None
    prefix = state.lengths - 1
    sees = (rows.tree_mask.view(2, 9, 1) >> torch.arange(9)) & 1
    custom = [torch.cat([torch.ones(9, n), sees[b]], dim=1).bool().flatten() for b, n in enumerate(prefix.tolist())]
    mask = torch.cat([*custom, torch.zeros(50, dtype=torch.bool)])  # SGLang's buffer may be longer
    assert torch.equal(sglang.tree_mask_of(mask, prefix, 9), rows.tree_mask)
    mode = SimpleNamespace(is_decode_or_idle=lambda: False, is_target_verify=lambda: True)
    batch = SimpleNamespace(
        forward_mode=mode,
        seq_lens=prefix,
        req_pool_indices=torch.tensor([5, 0]),
        spec_info=SimpleNamespace(draft_token_num=9, custom_mask=mask),
    )
    metadata = sglang.metadata_of(batch, sglang_pool([13, 11], 4)[0], 4)
    assert torch.equal(metadata.query_start_loc, rows.query_start_loc)
    assert torch.equal(metadata.seq_lens, rows.seq_lens) and torch.equal(metadata.tree_mask, rows.tree_mask)


@pytest.mark.parametrize("quadratic", [False, True], ids=["chain", "quadratic"])
def test_sglang_verify_takes_the_rows_that_a_request_uses(quadratic: bool) -> None:
    num_spec_tokens, width = 2, 9 if quadratic else 5
    num_drafts = torch.tensor([2, 0, 2]).int()
    logits = randn(3 * width, 61)
    best = logits.argmax(1).view(3, width)
    ids = torch.full((3, width), MASK)
    ids[0, 1:3], ids[2, 1:3] = best[0, :2], torch.tensor([int(best[2, 0]), 7])  # all stand; the second falls
    assert best[2, 1] != 7
    one = torch.ones(3)
    sampling = {"temperature": 0 * one, "top_k": torch.zeros(3).int(), "top_p": one, "min_p": 0 * one}
    sampling["seed"] = torch.zeros(3, dtype=torch.int64)
    how = {"id_limit": 61, "mask_id": -1, "quadratic": quadratic, "rule": "match", "num_spec_tokens": num_spec_tokens}
    accepted, tokens, drafts, count = sglang.verify(logits, ids, num_drafts, torch.tensor([4, 9, 2]), sampling, **how)
    assert accepted.tolist() == [2, 0, 1]
    assert tokens.tolist() == [best[0, :3].tolist(), [int(best[1, 0]), -1, -1], [*best[2, :2].tolist(), -1]]
    branch = {True: (7, 1, 5), False: (3, 1, None)}[quadratic]
    for b, first in enumerate(branch):
        assert drafts[b].tolist() == ([-1, -1] if first is None else best[b, first : first + 2].tolist())
        assert count[b] == (0 if first is None else 2)


def test_sglang_register(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}

    class Algorithm:
        @staticmethod
        def register(name: str, *, supports_overlap: bool, validate_server_args: Any) -> Any:
            known[name] = validate_server_args
            return lambda factory: known.update(factory=factory)

    base = type("AttentionBackend", (), {"__init__": lambda self: None})
    stand_in(
        monkeypatch,
        sglang__srt__layers__attention__attention_registry={
            "register_attention_backend": lambda name: lambda made: known.update({name: made})
        },
        sglang__srt__layers__attention__base_attn_backend={"AttentionBackend": base},
        sglang__srt__server_args={"add_attention_backend_choices": lambda names: known.update(choices=names)},
        sglang__srt__speculative__spec_info={"SpeculativeAlgorithm": Algorithm},
    )
    worker = type("Worker", (), {})
    sglang.register(worker)
    assert known["factory"](None) is worker and known["choices"] == ["idlm"]
    with pytest.raises(ValueError, match="speculative-eagle-topk"):
        known["IDLM"](SimpleNamespace(speculative_eagle_topk=4))
    req_to_token, indices = sglang_pool([6], 4)
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=req_to_token), page_size=4)
    k_buffer, v_buffer = randn(256, 2, 64), randn(256, 2, 64, seed=1)

    def write(layer: object, slots: Tensor, k: Tensor, v: Tensor) -> None:
        k_buffer[slots], v_buffer[slots] = k, v

    pool = SimpleNamespace(
        set_kv_buffer=write, get_key_buffer=lambda layer: k_buffer, get_value_buffer=lambda layer: v_buffer
    )
    slots = req_to_token[5, :6].long()
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode_or_idle=lambda: True),
        seq_lens=torch.tensor([6]),
        req_pool_indices=indices,
        token_to_kv_pool=pool,
        out_cache_loc=slots[5:],
    )
    backend = known["idlm"](runner)
    backend.init_forward_metadata(batch)
    q, k, v = randn(1, 256, seed=3), randn(1, 2, 64, seed=4), randn(1, 2, 64, seed=5)
    layer = SimpleNamespace(tp_q_head_num=4, qk_head_dim=64, layer_id=0, scaling=0.125)
    out = backend.forward_decode(q, k, v, layer, batch)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.view(4, 1, 64), k_buffer[slots].transpose(0, 1), v_buffer[slots].transpose(0, 1), enable_gqa=True
    )
    torch.testing.assert_close(out.view(4, 64), expected.squeeze(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(k_buffer[slots[5]], k[0])
