"""Every op of a decode step on backend `triton` in bf16 at the shapes of Qwen3-8B, Qwen3-32B and SmolLM2-135M.

The rows are those of one request's quadratic step of stride 4: 4 clean rows, then 12 MASK rows. Each result is judged
against fp64, and a row alone (an AR step) has the bits that it has among the 16. Of the Qwens the LM head and the model
that decodes are cut; they are whole with `-m slow`. Nothing else is cut.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import idlm_kernels
import python_ref
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import Transformer
from idlm_kernels.model.random_weights import SHAPES, RandomCheckpoint
from idlm_kernels.testing import QkNormRopeAppend, RmsNorm, check, check_bits, check_close, check_rows
from idlm_kernels.testing.problems import repaged, request_rows
from idlm_kernels.triton import attention, gemm, layers, sampling
from tests.triton.support import DEVICE
from tests.triton.test_attention import SPLIT, TOGETHER, attend, check_same
from tests.triton.test_attention import check as check_attention
from tests.triton.test_end_to_end import recorded_rows
from tests.triton.test_layers import check_rms_norm, check_silu_and_mul
from tests.triton.test_rejection import Chain, check_chain
from tests.triton.test_sampling import compare_steps

pytestmark = pytest.mark.compiled


class Model(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool
    rank: int  # of the adapter


MODELS = {
    "qwen3-8b": Model(4096, 12_288, 32, 8, 128, 151_936, True, 128),
    "qwen3-32b": Model(5120, 25_600, 64, 8, 128, 151_936, True, 128),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 49_152, False, 16),
}
LARGE = ("qwen3-8b", "qwen3-32b")
EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())

NUM_CLEAN, NUM_ROWS = 4, 16
CLEAN, MASK = slice(3, 4), slice(15, 16)  # rows that are also computed alone


def mask_rows() -> Tensor:
    return torch.arange(NUM_ROWS) >= NUM_CLEAN


def slow(name: str) -> list[pytest.MarkDecorator]:
    """The marks of what takes minutes with a large model."""
    return [pytest.mark.slow] if name in LARGE else []


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).mul_(scale)


def test_the_shapes_are_those_of_the_presets() -> None:
    for name, config in SHAPES.items():
        for field in Model._fields[:-1]:
            assert getattr(MODELS[name], field) == getattr(config, field), (name, field)


# Around the matrices


@EVERY_MODEL
def test_embed(model: Model) -> None:
    table = torch.zeros(model.vocab_size, model.hidden_size, dtype=torch.bfloat16)
    ids = torch.randint(model.vocab_size, (NUM_ROWS,))
    ids[0], ids[1] = 0, model.vocab_size - 1
    table[ids] = bf16(NUM_ROWS, model.hidden_size)
    mask_embedding = bf16(model.hidden_size)
    got = layers.embed(ids, table, is_mask=mask_rows(), mask_embedding=mask_embedding)
    check_bits(got, torch.where(mask_rows()[:, None], mask_embedding, table[ids]))
    check_bits(layers.embed(ids, table, is_mask=mask_rows()), table[ids])
    for row in (CLEAN, MASK):
        alone = layers.embed(ids[row], table, is_mask=mask_rows()[row], mask_embedding=mask_embedding)
        check_bits(alone, got[row])


@EVERY_MODEL
def test_rms_norm(model: Model) -> None:
    check_rms_norm(layers, NUM_ROWS, model.hidden_size, torch.bfloat16)
    check_rows(RmsNorm(rows=NUM_ROWS, width=model.hidden_size).call(), layers.rms_norm, CLEAN, MASK)


@EVERY_MODEL
def test_silu_and_mul(model: Model) -> None:
    check_silu_and_mul(layers, NUM_ROWS, model.intermediate_size, torch.bfloat16)


@EVERY_MODEL
def test_qk_norm_rope_append(model: Model) -> None:
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    call = QkNormRopeAppend(rows=NUM_ROWS, heads=heads, norm=model.qk_norm).call()
    whole = check(call, layers.qk_norm_rope_append)
    check_rows(call, layers.qk_norm_rope_append, CLEAN, MASK, among=whole)
    for row in (CLEAN, MASK):
        left = call.rows(row).run(layers.qk_norm_rope_append).left
        for name in ("k_cache", "v_cache"):
            written = ~left[name].isnan()
            assert written.sum() == left[name][0, 0].numel()
            check_bits(left[name][written], whole.left[name][written], name)


# Matrices


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in this dtype, piece by piece: the whole of a large weight would not fit into memory."""
    return torch.cat([x.to(dtype) @ rows.to(dtype).T for rows in weight.split(4096)], dim=1)


def adapter_update(x: Tensor, lora_a: Tensor, lora_b: Tensor, output_sizes: list[int]) -> Tensor:
    """(x A^T) B^T of every slice, in x's dtype."""
    shrunk = (x @ lora_a.to(x.dtype).T).split(lora_b.shape[1], dim=1)
    return torch.cat([h @ b.T for h, b in zip(shrunk, lora_b.to(x.dtype).split(output_sizes), strict=True)], dim=1)


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@EVERY_MODEL
def test_projection(model: Model, name: str) -> None:
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    output_sizes, k = {
        "qkv": ([q_size, kv_size, kv_size], model.hidden_size),
        "o": ([model.hidden_size], q_size),
        "gate_up": ([model.intermediate_size] * 2, model.hidden_size),
        "down": ([model.hidden_size], model.intermediate_size),
    }[name]
    x, weight = bf16(NUM_ROWS, k), bf16(sum(output_sizes), k, scale=k**-0.5)
    lora_a = bf16(len(output_sizes) * model.rank, k, scale=k**-0.5)
    lora_b = bf16(sum(output_sizes), model.rank, scale=model.rank**-0.5)
    scale = 0.7
    exact = product(x, weight, torch.float64)
    peer = product(x, weight, torch.float32).bfloat16()
    exact_gated = exact + scale * adapter_update(x.double(), lora_a, lora_b, output_sizes)
    peer_gated = peer + scale * adapter_update(x, lora_a, lora_b, output_sizes)

    residue = {"bias": -exact[CLEAN][0].float()}
    plain_op, gated_op = gemm.linear, gemm.gated_lora_linear
    if name == "gate_up":
        plain_op = gated_op = gemm.linear_silu_and_mul
        exact, peer, exact_gated, peer_gated = map(python_ref.silu_and_mul, (exact, peer, exact_gated, peer_gated))
    adapter = {"lora_a": lora_a, "lora_b": lora_b, "scale": scale, "output_sizes": output_sizes}
    plain = plain_op(x, weight)
    gated = gated_op(x, weight, lora_mask=mask_rows(), **adapter)
    check_close(plain, exact, peer, "plain")
    check_close(gated[mask_rows()], exact_gated[mask_rows()], peer_gated[mask_rows()], "gated")
    check_bits(gated[~mask_rows()], plain[~mask_rows()])
    if name == "gate_up":
        check_bits(plain, layers.silu_and_mul(gemm.linear(x, weight)))
    check_bits(gated_op(x[MASK], weight, lora_mask=mask_rows()[MASK], **adapter), gated[MASK])
    # Two orders of a sum mostly give the same bf16. This bias leaves nothing but the sum's last bits, which differ.
    alone = plain_op(x[CLEAN], weight, **residue)
    check_bits(alone, gated_op(x, weight, lora_mask=mask_rows(), **adapter, **residue)[CLEAN])


HEADS = [
    # Weights of 16384 rows and more have the same tiles, so that all that the cut leaves out are more of them.
    *(pytest.param(MODELS[name], 16_384, id=f"{name}-cut") for name in LARGE),
    *(pytest.param(model, model.vocab_size, id=name, marks=slow(name)) for name, model in MODELS.items()),
]


@pytest.mark.parametrize("model, num_ids", HEADS)
def test_lm_head(model: Model, num_ids: int) -> None:
    k = model.hidden_size
    assert gemm.gemm_config(num_ids, k, torch.bfloat16) == gemm.gemm_config(model.vocab_size, k, torch.bfloat16)
    x, weight = bf16(NUM_ROWS, k), bf16(num_ids, k, scale=k**-0.5)
    exact = product(x, weight, torch.float64)
    check_close(gemm.linear(x, weight), exact, product(x, weight, torch.float32).bfloat16())
    residue = -exact[CLEAN][0].float()
    check_bits(gemm.linear(x[CLEAN], weight, bias=residue), gemm.linear(x, weight, bias=residue)[CLEAN])


# Attention


@EVERY_MODEL
def test_attention(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose clean rows stand on both sides of a chunk's edge, beside a short request."""
    length = 2 * attention.kChunk - 2 + NUM_ROWS
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    call = attend((length, 40), (NUM_ROWS, NUM_ROWS), heads=heads, dtype=torch.bfloat16, tail="quadratic")
    for target in (SPLIT, TOGETHER):
        check_attention(attention, call, target)
    whole = call.run(attention.strided_attention)
    for row in range(NUM_CLEAN):
        part = repaged(request_rows(call, 0, slice(row, row + 1)), 16)
        for target in (SPLIT, TOGETHER):
            monkeypatch.setattr(attention, "kTargetCtas", target)
            check_same(part.run(attention.strided_attention), whole, among=slice(row, row + 1))


# Sampling


VOCABULARIES = sorted({model.vocab_size for model in MODELS.values()})
PER_REQUEST = ("drafts", "temperature", "top_k", "top_p", "min_p", "seed")


def confident_chain(vocab_size: int, batch: int) -> Chain:
    """Requests whose model is as sure of itself as a trained one, so that some drafts stand."""
    chain = Chain(vocab=vocab_size, batch=batch, num_spec_tokens=NUM_CLEAN - 1, dtype=torch.bfloat16)
    chain.table *= 3
    return chain


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_verify_accept(vocab_size: int) -> None:
    """Steps of four requests; then every committed token of the last one again from its row alone, by an AR step."""
    chain = confident_chain(vocab_size, 4)
    for _ in range(3):
        arguments = {**chain.arguments(), "rule": "match"}
        result = compare_steps(sampling, arguments)
        chain.follow(arguments, result, chain.q)
    num_accepted, tokens, _, _ = result
    assert 0 < num_accepted.sum() < arguments["num_drafts"].sum()
    starts, positions = arguments["query_start_loc"], arguments["positions"]
    for b, start in enumerate(starts[:-1].tolist()):
        if starts[b + 1] == start:
            continue
        for i in range(int(num_accepted[b]) + 1):
            step = {
                "logits": arguments["logits"][start + i : start + i + 1],
                "query_start_loc": torch.tensor([0, 1], dtype=torch.int32),
                "num_drafts": torch.zeros(1, dtype=torch.int32),
                "positions": positions[b : b + 1] + i,
            }
            request = {key: arguments[key][b : b + 1] for key in PER_REQUEST}
            assert sampling.verify_accept(**{**arguments, **step, **request})[1][0, 0] == tokens[b, i]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_verify_accept_by_rejection(vocab_size: int) -> None:
    check_chain(sampling, confident_chain(vocab_size, 3), steps=2)


# A whole model


def one_layer(model: Model, intermediate_size: int, vocab_size: int) -> Transformer:
    """A model of one layer with random weights, all of it in bf16 as on a GPU.

    Its tokens embed much alike and MASK as their mean, so that MASK rows draft well enough for some drafts to stand.
    """
    config = dataclasses.replace(
        SHAPES["qwen3-8b"],
        architecture="qwen3" if model.qk_norm else "llama",
        num_layers=1,
        hidden_size=model.hidden_size,
        intermediate_size=intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=vocab_size,
        qk_norm=model.qk_norm,
    )
    transformer = Transformer(RandomCheckpoint(config, device=DEVICE), device=DEVICE, dtype=torch.bfloat16)
    transformer.dtype = torch.bfloat16
    layer = transformer.layers[0]
    layer.attention_norm, layer.mlp_norm = layer.attention_norm.bfloat16(), layer.mlp_norm.bfloat16()
    if layer.q_norm is not None and layer.k_norm is not None:
        layer.q_norm, layer.k_norm = layer.q_norm.bfloat16(), layer.k_norm.bfloat16()
    transformer.norm = transformer.norm.bfloat16()
    transformer.embedding += transformer.embedding[0] / 2
    transformer.mask_embedding = transformer.embedding.float().mean(0).bfloat16()
    return transformer


END_OF_CHUNK = attention.kChunk - 3  # so many tokens that decoding leaves attention's first chunk
GENERATORS = [
    *(pytest.param(MODELS[name], 1024, 1024, 5, id=f"{name}-cut") for name in LARGE),
    *(
        pytest.param(model, model.intermediate_size, model.vocab_size, END_OF_CHUNK, id=name, marks=slow(name))
        for name, model in MODELS.items()
    ),
]


@pytest.mark.parametrize("model, intermediate_size, vocab_size, prompt_tokens", GENERATORS)
def test_strided_decoding_has_the_bits_of_ar(
    model: Model, intermediate_size: int, vocab_size: int, prompt_tokens: int
) -> None:
    prompt = torch.randint(vocab_size, (prompt_tokens,)).tolist()
    params = SamplingParams(max_tokens=6, temperature=0.9, seed=3)
    with idlm_kernels.use_backend("triton"):
        generator = Generator(one_layer(model, intermediate_size, vocab_size), page_size=16)
        forwards = recorded_rows(generator)
        ar = generator.generate([prompt], params, plan="ar")[0]
        num_ar = len(forwards)
        strided = generator.generate([prompt], params, plan="quadratic", stride=4)[0]
    assert strided.token_ids == ar.token_ids and strided.forwards < ar.forwards
    text = [*prompt, *ar.token_ids]
    wanted = {positions[-1]: logits[-1] for positions, _, logits in forwards[:num_ar]}
    compared = set()
    for positions, ids, logits in forwards[num_ar:]:
        for position, token, row in zip(positions, ids, logits, strict=True):
            if position not in wanted or token != text[position]:
                break  # behind a draft that is not the text stand other sequences
            check_bits(row, wanted[position])
            compared.add(position)
    assert compared == wanted.keys()
