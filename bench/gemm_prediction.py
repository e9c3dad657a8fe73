"""How long the CUDA linear layers should take on an H100 SXM: a prediction, no measurement, beside measured peers.

    python -m bench.gemm_prediction          # prints the table of docs/gemm.md; a test holds them together

The body of a launch takes the longest of three: bytes of W, A and B from memory; these and x and h from L2 to the SMs;
the products of the padded tile. Before it come the start and the first bytes, after it the last parts and the stores.
The rates below are assumptions; a run on the hardware replaces the table.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from bench.native_gemm import BUDGET, LAYERS, NUM_SMS, Case

PEERS = Path(__file__).parent / "peers_h100_sxm.csv"
PEER_NAMES = {"qkv": "qwen3-8b qkv", "o": "qwen3-8b o", "gate_up": "qwen3-8b gate or up", "down": "qwen3-8b down"}

MEMORY_TB_PER_S = 3.0  # the peers' largest layers come to 2.9 to 3.1
L2_TB_PER_S = 5.5  # from L2 to the SMs, within a quarter
TFLOP_PER_S = 495.0  # half the peak: 64 x 64 x 16 with both operands in shared memory is bound by reading them
START_US = 2.0  # launch after launch in a graph, with the first weights asked for ahead of time
END_US = 1.0  # last stage, epilogue, stores
PARTS_US = 0.8  # two cluster barriers and a round trip through distributed shared memory
ADAPTER_US = 1.0  # the blocks of (B, h) behind the main loop


def predicted_us(case: Case, ctas: int, per_sm: int, split: bool) -> float:
    """ctas of a launch, per_sm of them at a time on an SM."""
    n, k, slices, _ = LAYERS[case.layer]
    tokens = 64 if case.rows <= 64 else 128 if case.rows <= 128 else -(-case.rows // 256) * 256
    flops = 2.0 * tokens * (n * k + case.rank * (len(slices) * k + n))
    memory = case.floor() / MEMORY_TB_PER_S / 1e6
    l2 = (case.floor() + case.model()) / L2_TB_PER_S / 1e6
    body = max(memory, l2, flops / TFLOP_PER_S / 1e6)
    waves = ctas / (NUM_SMS * per_sm)
    if waves > 1:  # the last wave takes as long as a full one
        body *= -(-ctas // (NUM_SMS * per_sm)) / waves
    return START_US + body + END_US + PARTS_US * split + ADAPTER_US * (case.rank > 0)


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
    budget = json.loads(BUDGET.read_text())
    lines = [
        "| layer | rows | predicted us | with an adapter of rank 128 | fastest peer, measured us | bytes / 3.35 TB/s |",
        "|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        for rows in (1, 7, 16, 64, 128, 224):
            cells = []
            for rank in (0, 128):
                case = Case(layer, rows, rank)
                if case.name in budget:
                    entry = budget[case.name]
                    us = predicted_us(case, entry["ctas"], entry["ctas_per_sm"], entry["cluster"] > 1)
                    cells.append(f"{us:.1f}")
                else:
                    cells.append("")
            peer = peers_us(layer, rows)
            cells += ["" if peer is None else f"{peer:.1f}", f"{Case(layer, rows).floor() / 3.35e6:.1f}"]
            lines.append(" | ".join(["| " + layer, str(rows), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
