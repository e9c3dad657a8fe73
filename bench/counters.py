"""What the Triton kernels ask of the machine at the shapes of Qwen3-8B, counted by softgpu: no GPU, no time.

    SOFTGPU_DIR=... python -m bench.counters [--write]
    SOFTGPU_DIR=... python -m bench.counters --family gemm --backend cuda [--write]    # see native_gemm.py
    SOFTGPU_DIR=... python -m bench.counters --family attention --backend cuda [--write]    # see native_attention.py

For each launch: bytes of weights or KV requested, over their floor (each once); other global reads (activations, parts
of split sums: out of L2) and writes in KB; sector efficiency of reads and writes; shared-memory waves over the
conflict-free count; warp instructions; registers, spills and shared memory from ptxas; how many CTAs fit on an SM,
how many groups of copies may be under way at the wait of each main loop, and whether ptxas serialises wgmma. Some
minutes. --write records all of it in bench/budgets/triton.json, which a test holds.

Limits: softgpu knows no time, no caches and nothing of what ptxas makes of the PTX; the registers are those of ptxas.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from bench import native_attention, native_gemm
from bench.ptx import Launch, copies_in_flight, ctas_per_sm, recorded_launches, resources
from idlm_kernels.triton import attention, gemm, layers, perturb, rerank, sampling
from python_ref import DraftDistributions

BUDGET = Path(__file__).parent / "budgets" / "triton.json"
ROOT = Path(__file__).resolve().parents[1]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 12288, 32, 8, 128, 151_936  # Qwen3-8B
LAYERS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}


@dataclass(frozen=True)
class Case:
    """A name, what to run, and the floor in bytes (weights or KV, each once) of the launch that reads them."""

    name: str
    run: Callable[[], object]
    main: str
    floor_bytes: int
    model_bytes: int  # the other global reads that the main launch makes, as its docstring models them


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def linear_case(name: str, rows: int, n: int, k: int, rank: int = 0, output_sizes: tuple[int, ...] = ()) -> Case:
    """A linear layer; gate_up takes the activation along."""
    x, weight = bf16(rows, k), bf16(n, k)
    paired = name.startswith("gate_up")
    op = gemm.linear_silu_and_mul if paired else gemm.linear
    config = gemm.gemm_config(n, k, x.dtype)
    tiles = -(-n // config.block_n)
    groups = -(-rows // (config.block_t * 2))
    apart = config.splits if tiles * groups * config.splits <= gemm.kMaxCtasApart and config.splits > 1 else 0
    model = tiles * rows * k * 2 + apart * rows * n * 4
    floor = groups * n * k * 2
    if not rank:
        return Case(f"{op.__name__} {name} rows={rows}", lambda: op(x, weight), "linear", floor, model)
    output_sizes = output_sizes or (n,)
    a, b, lora_mask = bf16(rank * len(output_sizes), k), bf16(n, rank), torch.arange(rows) % 7 > 3
    # h of the gated rows, once per weight tile, twice where gate and up rows share it; the gate of a lane's rows, which
    # are a fourth of all; B again for further tiles of 64 rows.
    model += tiles * int(lora_mask.sum()) * rank * 2 * (len(output_sizes) if paired else 1)
    model += tiles * config.num_warps * 32 * rows // 4 + (-(-rows // 64) - 1) * n * rank * 2

    def run() -> Tensor:
        if paired:
            return gemm.linear_silu_and_mul(
                x, weight, lora_a=a, lora_b=b, lora_mask=lora_mask, output_sizes=output_sizes
            )
        return gemm.gated_lora_linear(x, weight, a, b, lora_mask, 1.0, output_sizes=output_sizes)

    kind = op.__name__ if paired else "gated_lora_linear"
    return Case(f"{kind} {name} rows={rows} rank={rank}", run, "linear", floor + n * rank * 2, model)


def attention_case(batch: int, rows: int, context: int, quadratic: bool = False) -> Case:
    page_size = 64
    pages = -(-(context + rows) // page_size)
    cache = [bf16(batch * pages, page_size, KV_HEADS, HEAD_DIM) for _ in range(2)]
    table = torch.randperm(batch * pages).view(batch, pages).to(torch.int32)
    lengths = torch.full((batch,), context + rows, dtype=torch.int32)
    start = torch.arange(batch + 1, dtype=torch.int32) * rows
    q = bf16(batch * rows, HEADS, HEAD_DIM)
    tail = torch.randint(0, 1 << rows, (batch * rows,)) if quadratic else None

    def run() -> Tensor:
        return attention.strided_attention(q, *cache, table, lengths, start, max_query_len=rows, tree_mask=tail)

    # A tile reads what its last row sees, once.
    block_m = attention.attention_config(HEAD_DIM, q.dtype).block_m
    if -(-rows * HEADS // KV_HEADS // (2 * block_m)) * batch * KV_HEADS >= attention.kMinLargeCtas and rows > 64:
        block_m *= 2
    rows_per_tile = block_m * KV_HEADS // HEADS
    last_rows = [min(first + rows_per_tile, rows) for first in range(0, rows, rows_per_tile)]
    seen = sum(context + (rows if quadratic else last) for last in last_rows)
    floor = batch * seen * KV_HEADS * HEAD_DIM * 2 * 2
    # q once per CTA that has a chunk; query_start_loc twice and seq_len once per lane of every CTA; the page of a slot
    # once per tile; the tree mask of a lane's two rows.
    chunks = triton.cdiv(context + rows, attention.kChunk)
    splits = attention.num_splits(
        len(last_rows) * batch * KV_HEADS * block_m // 64, triton.cdiv(pages * page_size, attention.kChunk), 0
    )
    lanes = 2 * block_m
    model = batch * min(chunks, splits) * rows * HEADS * HEAD_DIM * 2
    model += len(last_rows) * batch * KV_HEADS * splits * lanes * (12 + (16 if quadratic else 0))
    model += batch * seen * KV_HEADS * 4
    if splits > 1:
        # Folding CTAs read the lengths again; of the chunks o once, m twice and t once per lane (a warp has one).
        model += len(last_rows) * batch * KV_HEADS * min(chunks, splits) * lanes * 12
        shares = triton.cdiv(rows * HEADS // KV_HEADS, 4 * lanes // HEAD_DIM)
        model += batch * chunks * (rows * HEADS * HEAD_DIM * 4 + KV_HEADS * shares * lanes * 12)
    name = f"attention batch={batch} rows={rows} context={context}{' quadratic' if quadratic else ''}"
    return Case(name, run, "attention", floor, model)


def sampling_case(rows: int, top_p: float, spread: float = 3.0) -> Case:
    logits = bf16(rows, VOCAB) * spread
    logits[:, ::1000] += 4 * spread  # a few likely tokens, as a trained model has them
    ones = torch.ones(rows)
    zeros = torch.zeros(rows, dtype=torch.int32)
    arguments = (logits, zeros, ones, zeros, ones * top_p, ones * 0, torch.arange(rows), VOCAB, -1)

    def run() -> Tensor:
        return sampling.sample_rows(*arguments)

    # The row's seven parameters, once per lane: 28 bytes.
    slices = triton.cdiv(VOCAB, triton.cdiv(VOCAB, perturb.kMaxSlices * perturb.kBlockPerturb) * perturb.kBlockPerturb)
    return Case(
        f"sample_rows rows={rows} top_p={top_p} spread={spread}",
        run,
        "perturb",
        rows * VOCAB * 2,
        rows * slices * 128 * 28,
    )


def rejection_case() -> Case:
    """A quadratic step of one request that rejects its first draft: the residual reads p and q once each."""
    num_spec_tokens, rows = 2, 9
    logits, state = (
        bf16(rows, VOCAB),
        DraftDistributions.empty(1, num_spec_tokens, VOCAB, torch.bfloat16, torch.device("cpu")),
    )
    state.log_norm.fill_(12.4)
    state.cut.fill_(-9.0)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    start = torch.tensor([0, rows], dtype=torch.int32)
    drafts = logits[:1].topk(num_spec_tokens, largest=False).indices
    request = (start, zero + num_spec_tokens, drafts, zero, one, zero, one, one * 0, torch.ones(1).long(), VOCAB, -1)

    def run() -> object:
        return sampling.verify_accept(logits, *request, quadratic=True, rule="rejection", draft_dists=state)

    # What a CTA decides for itself: 55 bytes per lane.
    slice_ids = triton.cdiv(triton.cdiv(VOCAB, perturb.kMaxSlices), perturb.kBlockPerturb) * perturb.kBlockPerturb
    model = triton.cdiv(VOCAB, slice_ids) * 256 * 55
    return Case("verify_accept rejection batch=1", run, "residual", 2 * VOCAB * 2, model)


def rerank_case(batch: int, num_spec_tokens: int = 3, width: int = 256, rejection: bool = False) -> Case:
    """Its floor is that of the first launch, which reads the K logits rows of every request once."""
    logits, hidden = bf16(batch * num_spec_tokens, VOCAB), bf16(batch * num_spec_tokens, HIDDEN)
    first, zeros, ones = torch.arange(batch).int() * num_spec_tokens, torch.zeros(batch).int(), torch.ones(batch)
    request = (first, first.long(), zeros, torch.zeros(batch, num_spec_tokens).long(), zeros + num_spec_tokens)
    parameters = (ones, zeros, ones, ones * 0, first.long())
    table = bf16(1024, HIDDEN).repeat(-(-VOCAB // 1024), 1)  # of the embedding and of the LM head
    head = [bf16(*shape) / 64 for shape in ((width, HIDDEN), (width, HIDDEN), (width, width), (HIDDEN, width))]
    state = (
        DraftDistributions.empty(batch, num_spec_tokens, VOCAB, torch.bfloat16, torch.device("cpu"))
        if rejection
        else None
    )

    def run() -> Tensor:
        return rerank.rerank_drafts(
            logits, hidden, *request, *parameters, table, table, *head, VOCAB, -1, draft_dists=state
        )

    # Which row a CTA reads and how many drafts are wanted: 8 bytes per lane.
    model = batch * num_spec_tokens * triton.cdiv(VOCAB, rerank.kBlockGroups * 256) * 128 * 8
    name = f"rerank_drafts batch={batch} K={num_spec_tokens}{' rejection' if rejection else ''}"
    return Case(name, run, "maxima", batch * num_spec_tokens * VOCAB * 2, model)


def layer_cases(rows: int) -> Iterator[Case]:
    x, residual, weight = bf16(rows, HIDDEN), bf16(rows, HIDDEN), bf16(HIDDEN)
    floor = 2 * rows * HIDDEN * 2
    run = lambda: layers.rms_norm(x, weight, 1e-6, residual=residual)  # noqa: E731
    yield Case(f"rms_norm rows={rows}", run, "rms_norm", floor, rows * HIDDEN * 2)
    wide = bf16(rows, 2 * INTERMEDIATE)
    yield Case(f"silu_and_mul rows={rows}", lambda: layers.silu_and_mul(wide), "silu_and_mul", wide.numel() * 2, 0)
    qkv, table = bf16(rows, LAYERS["qkv"][0]), torch.randn(64, HEAD_DIM)
    cache = [bf16(2, 64, KV_HEADS, HEAD_DIM) for _ in range(2)]
    norm = [bf16(HEAD_DIM) for _ in range(2)]
    where = torch.arange(rows)

    def rope() -> Tensor:
        return layers.qk_norm_rope_append(qkv, where, table, where, *cache, q_weight=norm[0], k_weight=norm[1])

    # Every warp reads the row of the rotary table and both weights: 1 KB.
    warps = rows * -(-(HEADS + 2 * KV_HEADS) // layers.kBlockHeads) * 2
    yield Case(f"qk_norm_rope_append rows={rows}", rope, "qk_norm_rope_append", qkv.numel() * 2, warps * 1024)


def cases() -> Iterator[Case]:
    for rows in (7, 16, 56, 128):
        for name, (n, k) in LAYERS.items():
            yield linear_case(name, rows, n, k)
    for rows in (16, 128):
        yield linear_case("o", rows, *LAYERS["o"], rank=128)
        yield linear_case("qkv", rows, *LAYERS["qkv"], rank=128, output_sizes=(HIDDEN, HIDDEN // 4, HIDDEN // 4))
        yield linear_case("gate_up", rows, *LAYERS["gate_up"], rank=128, output_sizes=(INTERMEDIATE, INTERMEDIATE))
    for batch, rows, context in itertools.product((1, 8), (7, 16), (1024, 4096)):
        yield attention_case(batch, rows, context)
    yield attention_case(1, 320, 1)  # a prefill chunk: chunks of a row tile in one CTA
    yield attention_case(1, 16, 256, quadratic=True)
    yield from layer_cases(7)
    yield sampling_case(7, 1.0)
    yield sampling_case(7, 0.9)
    yield sampling_case(7, 0.9, spread=1.0)
    yield rejection_case()
    yield rerank_case(1)
    yield rerank_case(8, rejection=True)


def measure(case: Case, softgpu: ModuleType) -> list[dict[str, Any]]:
    """One entry per launch of the case; the ratio to the floor for the launch that the floor belongs to."""
    with recorded_launches(softgpu) as launches:
        case.run()
    return [_entry(case, launch, is_main) for launch, is_main in _with_main(launches, case.main)]


def _with_main(launches: list[Launch], main: str) -> list[tuple[Launch, bool]]:
    last = max(i for i, launch in enumerate(launches) if launch.name == main)
    return [(launch, i == last) for i, launch in enumerate(launches)]


def _entry(case: Case, launch: Launch, is_main: bool) -> dict[str, Any]:
    c, used = launch.counters, resources(launch.ptx)
    entry = {
        "case": case.name,
        "kernel": launch.name,
        "ctas": c["ctas"],
        "registers": used.registers,
        "spill_bytes": used.spill_bytes,
        "shared_bytes": launch.shared_bytes,
        "ctas_per_sm": ctas_per_sm(launch.ptx, used.registers, launch.shared_bytes),
        "copies_in_flight": copies_in_flight(launch.ptx),
        "serialised": used.serialised,
        "read_kb": round(c["global_load_bytes"] / 1e3, 1),
        "written_kb": round(c["global_store_bytes"] / 1e3, 1),
        "load_efficiency": c["global_load_efficiency"],
        "store_efficiency": c["global_store_efficiency"],
        "shared_waves_over_ideal": round(launch.shared_waves / max(launch.ideal_shared_waves, 1), 3),
        "warp_instructions": c["warp_instructions"],
    }
    if is_main:
        entry["bytes_over_floor"] = round((c["global_load_bytes"] - case.model_bytes) / case.floor_bytes, 3)
    return entry


def load_softgpu() -> ModuleType:
    """softgpu as Triton's driver."""
    root = Path(os.environ.get("SOFTGPU_DIR") or ROOT.parent / "shared" / "softgpu")
    sys.path.insert(0, str(root / "python"))
    try:
        import softgpu
        import softgpu.triton_driver
    except ImportError as error:
        raise SystemExit(f"bench.counters needs softgpu, which is not usable at {root}: {error}") from error
    softgpu.triton_driver.activate()
    return softgpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the counts as the budget")
    parser.add_argument("--family", choices=("all", "gemm", "attention"), default="all", help="one family alone")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton", help="cuda: the kernels of csrc")
    arguments = parser.parse_args()
    if arguments.backend == "cuda":
        if arguments.family == "all":
            parser.error("--backend cuda counts one family, --family gemm or --family attention")
        (native_gemm if arguments.family == "gemm" else native_attention).main(arguments.write)
        return
    if arguments.write and arguments.family != "all":
        parser.error("--write records all families, wanted --family all")
    torch.manual_seed(0)
    softgpu = load_softgpu()
    columns: list[str] = []
    entries = []
    for case in cases():
        if arguments.family not in ("all", "gemm" if case.main == "linear" else case.main):
            continue
        for entry in measure(case, softgpu):
            if not columns:
                columns = [*entry, "bytes_over_floor"] if "bytes_over_floor" not in entry else list(entry)
                print("\t".join(columns))
            entries.append(entry)
            print("\t".join(str(entry.get(column, "")) for column in columns), flush=True)
    if arguments.write:
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "launches": entries}, indent=1) + "\n")
        print(f"wrote {BUDGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
