"""Calls of the ops at the shapes of a model, as a decode step makes them, for bench.gpu_report: inputs, the bytes that
a call has to move, and the same by the reference in higher precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import idlm_kernels
import python_ref
from idlm_kernels.model import ModelConfig

PAGE_SIZE = 64
RANK, HEAD_WIDTH = 128, 256  # of the adapter, of the re-ranking head

Call = Callable[[], Any]


@dataclass
class Problem:
    """A call on inputs of its own, and the same by the reference in higher precision. alone: a result that has to have
    the bits of its counterpart, for instance rows on their own and among others."""

    call: Call
    reference: Call
    alone: Callable[[], tuple[Tensor, Tensor]] | None = None


@dataclass
class Case:
    """A call to measure. bytes: that it has to move. make: draws inputs. peer: its row in the file of peers; where that
    row is of another shape, its time is multiplied by peer_scale, the ratio of bytes, and peer_note says so."""

    op: str
    shape: str
    bytes: int
    make: Callable[[], Problem]
    peer: tuple[str, ...] | None = None
    peer_scale: float = 1.0
    peer_note: str = ""


def _normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).bfloat16()


def linear_cases(config: ModelConfig, device: torch.device, rows: int) -> Iterator[Case]:
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    gate_up = (config.intermediate_size, config.intermediate_size)
    layers: dict[str, tuple[int, tuple[int, ...]]] = {
        "qkv": (hidden, (q, kv, kv)),
        "o": (q, (hidden,)),
        "gate_up": (hidden, gate_up),
        "down": (config.intermediate_size, (hidden,)),
        "lm_head": (hidden, (config.vocab_size,)),
    }
    gate = torch.arange(rows, device=device) >= rows // 2
    for name, (k, slices) in layers.items():
        for rank in (0, RANK) if rows > 1 and name != "lm_head" else (0,):

            def make(
                k: int = k, n: int = sum(slices), slices: tuple[int, ...] = slices, rank: int = rank, name: str = name
            ) -> Problem:
                x, weight = _normal(device, rows, k), _normal(device, n, k, scale=k**-0.5)
                adapter: dict[str, Any] = {}
                if rank:
                    a, b = _normal(device, rank * len(slices), k, scale=k**-0.5), _normal(device, n, rank)
                    adapter = {"lora_a": a, "lora_b": b, "gate": gate, "scale": 0.1, "slices": slices}

                def call(module: Any, *tensors: Tensor, **options: Any) -> Tensor:
                    if name == "gate_up":
                        return module.linear_silu_and_mul(*tensors, **options)
                    op = module.gated_lora_linear if options else module.linear
                    return op(*tensors, **options)

                wide = {n: t.float() if isinstance(t, Tensor) and n != "gate" else t for n, t in adapter.items()}
                last = {n: t[-1:] if n == "gate" else t for n, t in adapter.items()}
                return Problem(
                    lambda: call(idlm_kernels, x, weight, **adapter),
                    lambda: call(python_ref, x.float(), weight.float(), **wide),
                    lambda: (
                        call(idlm_kernels, x[-1:], weight, **last),
                        call(idlm_kernels, x, weight, **adapter)[-1:],
                    ),
                )

            n = sum(slices)
            op = "linear_silu_and_mul" if name == "gate_up" else "gated_lora_linear" if rank else "linear"
            shape = f"{name} rows={rows}" + (f" rank={rank}" if rank else "")
            floor = 2 * (n * k + rank * (n + k * len(slices)))
            # Peers were measured at the width of gate or up alone, and at an LM head of 65,536 ids.
            peer_n = {"gate_up": config.intermediate_size, "lm_head": 65_536}.get(name, n)
            scale = (n * k + rows * (n + k)) / (peer_n * k + rows * (peer_n + k))
            note = "" if n == peer_n else f", its N={peer_n} scaled by bytes"
            yield Case(op, shape, floor, make, ("gemm_bf16", str(rows), str(peer_n), str(k), ""), scale, note)


def attention_case(
    config: ModelConfig, device: torch.device, batch: int, rows: int, context: int, branched: bool
) -> Case:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = -(-context // PAGE_SIZE)

    def make() -> Problem:
        q = _normal(device, batch * rows, heads, dim)
        k, v = (_normal(device, batch * pages, PAGE_SIZE, kv_heads, dim) for _ in range(2))
        table = torch.randperm(batch * pages, device=device).view(batch, pages).to(torch.int32)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        start = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
        tail = None
        if branched:  # some tree: every row sees itself and the rows before it that its bits say
            own = 1 << torch.arange(rows, device=device)
            tail = ((torch.randint(0, 1 << rows, (rows,), device=device) & (own - 1)) | own).repeat(batch)
        options = {"max_query_len": rows, "tail_mask": tail}

        def call() -> Tensor:
            return idlm_kernels.strided_attention(q, k, v, table, lengths, start, **options)

        def first_rows() -> tuple[Tensor, Tensor]:
            """As AR sees them."""
            before = lengths - rows + 1
            alone = idlm_kernels.strided_attention(q[::rows], k, v, table, before, start // rows, max_query_len=1)
            return alone, call()[::rows]

        return Problem(
            call,
            lambda: python_ref.strided_attention(q.float(), k.float(), v.float(), table, lengths, start, **options),
            first_rows,
        )

    shape = f"batch={batch} rows={rows}{' branched' if branched else ''} context={context}"
    peer = ("decode_attention_bf16", str(batch), str(heads), str(kv_heads), str(context))
    return Case("strided_attention", shape, batch * context * kv_heads * dim * 4, make, peer)


def sampling_case(config: ModelConfig, device: torch.device, batch: int, stride: int, top_p: float) -> Case:
    rows, vocab_size = stride * stride, config.vocab_size

    def make() -> Problem:
        logits = _normal(device, batch * rows, vocab_size, scale=3.0)
        integers = torch.zeros(batch, dtype=torch.int32, device=device)
        ones = torch.ones(batch, device=device)
        arguments = (
            torch.arange(batch + 1, dtype=torch.int32, device=device) * rows,
            integers + stride - 1,
            torch.randint(0, vocab_size, (batch, stride - 1), device=device),
            integers + 100,
            ones * 0.8,
            integers,
            ones * top_p,
            ones * 0,
            torch.arange(batch, device=device),
            vocab_size,
            -1,
        )
        options: dict[str, Any] = {"branched": True, "mode": "match"}
        return Problem(
            lambda: idlm_kernels.verify_accept(logits, *arguments, **options),
            lambda: python_ref.verify_accept(logits.double(), *arguments, **options),
        )

    # Clean rows up to the first draft that falls, and the MASK rows of that branch: all drafts here are wrong.
    floor = batch * stride * vocab_size * 2
    return Case("verify_accept", f"batch={batch} stride={stride} branched top_p={top_p}", floor, make)


def rerank_case(config: ModelConfig, device: torch.device, batch: int, num_k: int) -> Case:
    hidden, vocab_size = config.hidden_size, config.vocab_size
    # Gigabytes of which a call reads a few rows: one for all.
    embedding, head_rows = (_normal(device, vocab_size, hidden, scale=scale) for scale in (1.0, hidden**-0.5))

    def make() -> Problem:
        logits = _normal(device, batch * num_k, vocab_size, scale=3.0)
        x = _normal(device, batch * num_k, hidden)
        shapes = ((HEAD_WIDTH, hidden), (HEAD_WIDTH, hidden), (HEAD_WIDTH, HEAD_WIDTH), (hidden, HEAD_WIDTH))
        head = [_normal(device, *shape, scale=shape[1] ** -0.5) for shape in shapes]
        integers, ones = torch.zeros(batch, dtype=torch.int32, device=device), torch.ones(batch, device=device)
        request = (
            torch.arange(batch, dtype=torch.int32, device=device) * num_k,
            torch.arange(batch, device=device),
            integers + 100,
            torch.zeros(batch, num_k, dtype=torch.int64, device=device),
            integers + num_k,
            ones * 0.8,
            integers,
            ones,
            ones * 0,
            torch.arange(batch, device=device),
        )
        limits = (vocab_size, -1)
        weights = (embedding, head_rows, *head)
        return Problem(
            lambda: idlm_kernels.rerank_drafts(logits, x, *request, *weights, *limits),
            lambda: python_ref.rerank_drafts(
                logits.double(), x.double(), *request, *(weight.double() for weight in weights), *limits
            ),
        )

    # The rows of logits, and for each draft the candidates' rows of the LM head; the head's matrices once.
    floor = 2 * batch * num_k * (vocab_size + 32 * hidden) + 2 * HEAD_WIDTH * (3 * hidden + HEAD_WIDTH)
    return Case("rerank_drafts", f"batch={batch} K={num_k}", floor, make)


def layer_cases(config: ModelConfig, device: torch.device, rows: int) -> Iterator[Case]:
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads

    def norm() -> Problem:
        x, residual, weight = _normal(device, rows, hidden), _normal(device, rows, hidden), _normal(device, hidden)
        wide = residual.float()
        return Problem(
            lambda: idlm_kernels.rms_norm(x, weight, 1e-6, residual=residual.clone()),
            lambda: python_ref.rms_norm(x.float(), weight.float(), 1e-6, residual=wide.clone()),
        )

    yield Case("rms_norm", f"rows={rows} with a copy of the residual", 2 * rows * hidden * 6, norm)

    def rope() -> Problem:
        qkv, table = _normal(device, rows, (heads + 2 * kv_heads) * dim), torch.randn(rows, dim, device=device)
        k, v = (_normal(device, 2, PAGE_SIZE, kv_heads, dim) for _ in range(2))
        weights = {"q_weight": _normal(device, dim), "k_weight": _normal(device, dim)}
        wide = {name: weight.float() for name, weight in weights.items()}
        where = torch.arange(rows, device=device)
        return Problem(
            lambda: idlm_kernels.qk_norm_rope_append(qkv, where, table, where, k, v, **weights),
            lambda: python_ref.qk_norm_rope_append(qkv.float(), where, table, where, k.float(), v.float(), **wide),
        )

    yield Case("qk_norm_rope_append", f"rows={rows}", 4 * rows * (heads + 2 * kv_heads) * dim, rope)


def cases(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    """What a decode step calls: AR, chain N=4 (7 rows), branched N=4 (16), and 8 requests of each."""
    for rows in (1, 7, 16, 8, 56, 128):
        yield from linear_cases(config, device, rows)
    for batch, context in ((1, 1024), (1, 4096), (1, 32_768), (8, 1024), (8, 4096), (32, 4096)):
        for rows, branched in ((1, False), (7, False), (16, True)):
            yield attention_case(config, device, batch, rows, context, branched)
    for batch in (1, 8):
        for top_p in (1.0, 0.9):
            yield sampling_case(config, device, batch, 4, top_p)
        yield rerank_case(config, device, batch, 3)
    for rows in (16, 128):
        yield from layer_cases(config, device, rows)
