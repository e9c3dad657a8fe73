"""How long the CUDA linear layers should take on an H100 SXM: a prediction, no measurement, beside measured peers.

    python -m bench.gemm_prediction          # prints the table of docs/gemm.md; a test holds them together

The body of a launch takes the longest of four: bytes of W, A and B from memory; these and x and h read in L2; on the SM
with most CTAs the products of the padded tiles, and shared memory, which TMA writes and both operands of every product
are read from. CTAs that found no room at first end alone, as fast as one SM loads. Before the body come the start and
the first bytes, after it the last parts and the stores. The rates below are assumptions; a run on the hardware replaces
the table.
"""

from __future__ import annotations

import csv
from pathlib import Path

from bench.native_gemm import LAYERS, NUM_SMS, SPLITS, Case, tile

PEERS = Path(__file__).parent / "peers_h100_sxm.csv"
PEER_NAMES = {"qkv": "qwen3-8b qkv", "o": "qwen3-8b o", "gate_up": "qwen3-8b gate or up", "down": "qwen3-8b down"}

MEMORY_TB_PER_S = 3.0  # the peers' largest layers come to 2.9 to 3.1
L2_TB_PER_S = 5.5  # reads in L2, within a quarter
GHZ = 1.6  # under load
FLOP_PER_CLOCK = 4096  # of an SM's tensor cores
SHARED_BYTES_PER_CLOCK = 128  # of an SM
LOADED_BYTES_PER_CLOCK = 64  # from L2 into an SM
PRODUCT_FLOP, PRODUCT_BYTES = 2 * 64 * 64 * 16, 2 * 64 * 16 * 2  # of an instruction: its work, its operands
TFLOP_PER_S = NUM_SMS * FLOP_PER_CLOCK * GHZ / 1e3 * 8 / 11  # of tiles of 128 x 256: 1024 clocks of products in 1408
START_US = 2.0  # launch after launch in a graph, with the first weights asked for ahead of time
END_US = 1.0  # last stage, epilogue, stores
PARTS_US = 0.8  # two cluster barriers and a round trip through distributed shared memory
ADAPTER_US = 1.0  # the blocks of (B, h) behind the main loop


def predicted_us(case: Case) -> float:
    """One launch, from the way it is cut (`Case.launch`)."""
    n, k, output_sizes, _ = LAYERS[case.layer]
    row_tiles, token_tiles, _ = tile(case.rows, case.rank > 0)
    launch = case.launch()
    memory = case.floor() / MEMORY_TB_PER_S / 1e6
    l2 = (case.floor() + case.model() / (2 if case.rows > 32 else 1)) / L2_TB_PER_S / 1e6
    # A CTA of W: its blocks of K, and what the adapter adds to each.
    blocks = -(-k // 64) / SPLITS[case.layer] * (1 + case.rank * (len(output_sizes) / n + 1 / k))
    products = 4 * row_tiles * token_tiles
    stage = 8192 * (row_tiles + token_tiles)
    clocks = max(products * PRODUCT_FLOP / FLOP_PER_CLOCK, (products * PRODUCT_BYTES + stage) / SHARED_BYTES_PER_CLOCK)
    busiest = -(-launch.weight_ctas // NUM_SMS)
    body = max(memory, l2, busiest * blocks * clocks / GHZ / 1e3)
    late = 0.0
    if launch.ctas > launch.resident:  # those of h leave early; the others that found no room start then
        late = 0.5 if launch.weight_ctas <= launch.resident else 1.0
    if launch.weight_ctas <= launch.resident or memory > busiest * blocks * clocks / GHZ / 1e3:
        body += late * blocks * stage / LOADED_BYTES_PER_CLOCK / GHZ / 1e3
    rounds = -(-launch.weight_ctas // launch.resident)  # whose ends nothing hides, where an SM has one CTA
    end = (END_US + PARTS_US * (SPLITS[case.layer] > 1)) * (rounds if token_tiles == 4 else 1)
    return START_US + body + end + ADAPTER_US * (case.rank > 0)


def peers_us(layer: str, rows: int) -> float | None:
    """The fastest of three engines, without an adapter; gate and up are two launches there."""
    with PEERS.open() as file:
        found = [
            float(row["latency_us"])
            for row in csv.DictReader(file)
            if (row["what"], row["m_or_batch"]) == (PEER_NAMES[layer], str(rows))
        ]
    return min(found) * (2 if layer == "gate_up" else 1) if found else None


def table() -> str:
    lines = [
        "| layer | rows | predicted us | with an adapter of rank 128 | fastest peer, measured us | bytes / 3.35 TB/s |",
        "|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        for rows in (1, 7, 16, 64, 128, 224, 448):
            cells = [
                f"{predicted_us(Case(layer, rows, rank)):.1f}" if rows > 1 or not rank else "" for rank in (0, 128)
            ]
            peer = peers_us(layer, rows)
            cells += ["" if peer is None else f"{peer:.1f}", f"{Case(layer, min(rows, 256)).floor() / 3.35e6:.1f}"]
            lines.append(" | ".join(["| " + layer, str(rows), *cells]) + " |")
    return "\n".join(lines)


def prefill() -> str:
    """Of 2048 rows."""
    rows, found, flops, us = 2048, [], 0.0, 0.0
    for layer, (n, k, _, _) in LAYERS.items():
        case = Case(layer, rows)
        flops, us = flops + 2.0 * rows * n * k, us + predicted_us(case)
        found.append(f"{layer} {predicted_us(case):.0f} us ({2e-6 * rows * n * k / predicted_us(case):.0f} TFLOP/s)")
    return f"{', '.join(found)}; all four {flops / us / 1e6:.0f} TFLOP/s"


if __name__ == "__main__":
    print(table())
    print(f"2048 rows: {prefill()}")
