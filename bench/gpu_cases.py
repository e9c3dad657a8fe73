"""Calls of the ops at the shapes of a model, as a decode step makes them, for bench.gpu_report: problems of the test
kit, and the bytes that a call has to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from idlm_kernels.model import ModelConfig
from idlm_kernels.testing import (
    Call,
    Draw,
    GatedLoraLinear,
    Linear,
    LinearSiluAndMul,
    Problem,
    QkNormRopeAppend,
    Ran,
    RerankDrafts,
    RmsNorm,
    StridedAttention,
    check_bits,
    check_rows,
)
from idlm_kernels.testing.problems import request_rows

PAGE_SIZE = 64
RANK, HEAD_WIDTH = 128, 256  # of the adapter, of the re-ranking head


def last_row(call: Call, function: Callable[..., object], among: Ran) -> None:
    """Raise Wrong unless the last row has the bits that it has alone."""
    check_rows(call, function, slice(len(among.result) - 1, None), among=among)


def first_rows(call: Call, function: Callable[..., object], among: Ran) -> None:
    """Raise Wrong unless the first rows of the first and the last request have the bits that AR gives them."""
    starts = call["query_start_loc"].tolist()
    for b in dict.fromkeys((0, len(starts) - 2)):
        alone = request_rows(call, b, slice(1)).run(function).result
        check_bits(alone, among.result[starts[b] : starts[b] + 1], "a row as AR sees it")


@dataclass
class Case:
    """A call to measure. bytes: that it has to move. make: draws it. shared: arguments that copies of the call have in
    common. wide: dtype of the reference. alone: raises Wrong where bits depend on the other rows. peer: its row in the
    file of peers; where that row is of another shape, its time is multiplied by peer_scale, the ratio of bytes, and
    peer_note says so."""

    op: str
    shape: str
    bytes: int
    make: Callable[[], Call]
    shared: tuple[str, ...] = ()
    wide: torch.dtype = torch.float32
    alone: Callable[[Call, Callable[..., object], Ran], None] | None = None
    peer: tuple[str, ...] | None = None
    peer_scale: float = 1.0
    peer_note: str = ""


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
    for name, (k, output_sizes) in layers.items():
        for rank in (0, RANK) if rows > 1 and name != "lm_head" else (0,):
            problem: Problem = GatedLoraLinear(rows=rows, k=k, output_sizes=output_sizes, rank=rank, bias=False)
            if name == "gate_up":
                problem = LinearSiluAndMul(rows=rows, k=k, output_sizes=output_sizes, rank=rank, bias=False)
            elif not rank:
                problem = Linear(rows=rows, n=sum(output_sizes), k=k, bias=False)

            def make(problem: Problem = problem) -> Call:
                call = problem.call(device)
                lora_mask = torch.arange(rows, device=device) >= rows // 2
                return call.changed(lora_mask=lora_mask) if "lora_mask" in call.arguments else call

            n = sum(output_sizes)
            shape = f"{name} rows={rows}" + (f" rank={rank}" if rank else "")
            floor = 2 * (n * k + rank * (n + k * len(output_sizes)))
            # Peers were measured at the width of gate or up alone, and at an LM head of 65,536 ids.
            peer_n = {"gate_up": config.intermediate_size, "lm_head": 65_536}.get(name, n)
            scale = (n * k + rows * (n + k)) / (peer_n * k + rows * (peer_n + k))
            note = "" if n == peer_n else f", its N={peer_n} scaled by bytes"
            peer = ("gemm_bf16", str(rows), str(peer_n), str(k), "")
            yield Case(problem.op, shape, floor, make, (), torch.float32, last_row, peer, scale, note)


def attention_case(
    config: ModelConfig, device: torch.device, batch: int, rows: int, context: int, quadratic: bool
) -> Case:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    problem = StridedAttention(
        lengths=(context,) * batch,
        rows=(rows,) * batch,
        heads=(heads, kv_heads, dim),
        page_size=PAGE_SIZE,
        padding=0,
        tail="quadratic" if quadratic else None,
    )
    shape = f"batch={batch} rows={rows}{' quadratic' if quadratic else ''} context={context}"
    peer = ("decode_attention_bf16", str(batch), str(heads), str(kv_heads), str(context))
    floor = batch * context * kv_heads * dim * 4
    return Case(problem.op, shape, floor, lambda: problem.call(device).changed(lse=None), alone=first_rows, peer=peer)


def sampling_case(config: ModelConfig, device: torch.device, batch: int, stride: int, top_p: float) -> Case:
    rows, vocab_size = stride * stride, config.vocab_size

    def make() -> Call:
        draw, arguments = Draw(device), {}
        arguments["logits"] = draw.normal(batch * rows, vocab_size, scale=3.0)
        arguments["query_start_loc"] = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
        arguments["num_drafts"] = draw.tensor([stride - 1] * batch)
        arguments["drafts"] = draw.integers(0, vocab_size, batch, stride - 1)
        arguments["positions"] = draw.tensor([100] * batch)
        options = {"id_limit": vocab_size, "mask_id": -1, "quadratic": True, "rule": "match"}
        return Call("verify_accept", {**arguments, **sampling(draw, batch, top_p), **options})

    # Clean rows up to the first draft that falls, and the MASK rows of that branch: all drafts here are wrong.
    floor = batch * stride * vocab_size * 2
    shape = f"batch={batch} stride={stride} quadratic top_p={top_p}"
    return Case("verify_accept", shape, floor, make, wide=torch.float64)


def sampling(draw: Draw, batch: int, top_p: float) -> dict[str, torch.Tensor]:
    """Parameters of requests that all sample alike."""
    floats = {"temperature": 0.8, "top_p": top_p, "min_p": 0.0}
    each = {name: draw.tensor([value] * batch, torch.float32) for name, value in floats.items()}
    return {**each, "top_k": draw.tensor([0] * batch), "seed": torch.arange(batch, device=draw.device)}


def rerank_case(config: ModelConfig, device: torch.device, batch: int, num_spec_tokens: int) -> Case:
    hidden, vocab_size = config.hidden_size, config.vocab_size
    problem = RerankDrafts(
        batch=batch, num_spec_tokens=num_spec_tokens, vocab_size=vocab_size, hidden=hidden, width=HEAD_WIDTH
    )

    def make() -> Call:
        draw = Draw(device)
        options = {"num_drafts": draw.tensor([num_spec_tokens] * batch), "id_limit": vocab_size, "mask_id": -1}
        return problem.call(device).changed(**sampling(draw, batch, 1.0), **options)

    # The rows of logits, and for each draft the candidates' rows of the LM head; the head's matrices once.
    floor = 2 * batch * num_spec_tokens * (vocab_size + 32 * hidden) + 2 * HEAD_WIDTH * (3 * hidden + HEAD_WIDTH)
    tables = ("embedding", "head_rows")  # gigabytes of which a call reads a few rows: one of each for all
    return Case(problem.op, f"batch={batch} K={num_spec_tokens}", floor, make, tables, torch.float64)


def layer_cases(config: ModelConfig, device: torch.device, rows: int) -> Iterator[Case]:
    hidden, dim = config.hidden_size, config.head_dim
    heads = (config.num_heads, config.num_kv_heads, dim)
    # x, residual and both results; qkv and where it goes.
    norm, rope = RmsNorm(rows=rows, width=hidden), QkNormRopeAppend(rows=rows, heads=heads, page_size=PAGE_SIZE)
    for problem, floor in ((norm, 2 * rows * hidden * 4), (rope, 4 * rows * (heads[0] + 2 * heads[1]) * dim)):
        yield Case(problem.op, f"rows={rows}", floor, lambda p=problem: p.call(device), alone=last_row)


def cases(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    """What a decode step calls: AR, chain N=4 (7 rows), quadratic N=4 (16), and 8 requests of each."""
    for rows in (1, 7, 16, 8, 56, 128):
        yield from linear_cases(config, device, rows)
    for batch, context in ((1, 1024), (1, 4096), (1, 32_768), (8, 1024), (8, 4096), (32, 4096)):
        for rows, quadratic in ((1, False), (7, False), (16, True)):
            yield attention_case(config, device, batch, rows, context, quadratic)
    for batch in (1, 8):
        for top_p in (1.0, 0.9):
            yield sampling_case(config, device, batch, 4, top_p)
        yield rerank_case(config, device, batch, 3)
    for rows in (16, 128):
        yield from layer_cases(config, device, rows)
