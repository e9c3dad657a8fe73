"""What the CUDA linear layers ask of memory at the shapes of Qwen3-8B, counted by softgpu: no GPU, no time.

    SOFTGPU_DIR=... python -m bench.counters --family gemm --backend cuda [--write]

For each launch: CTAs, cluster, stages of the ring and KB of weights that they keep in flight on an SM; bytes of W, A
and B over their floor (each once per 256 rows); bytes of x and h that reach the SMs out of L2, over it; sectors stored
over the floor; shared-memory waves over the conflict-free count; warp instructions. --write records them in
bench/budgets/native_gemm.json, which a test holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.native_counters import ideal_waves

BUDGET = Path(__file__).parent / "budgets" / "native_gemm.json"
NUM_SMS = 132
LAYERS = {  # n, k, output_sizes, with the activation
    "qkv": (6144, 4096, (4096, 1024, 1024), False),
    "o": (4096, 4096, (4096,), False),
    "gate_up": (24576, 4096, (12288, 12288), True),
    "down": (4096, 12288, (4096,), False),
}
SPLITS = {"qkv": 2, "o": 4, "gate_up": 1, "down": 4}  # parts of K


def tile(rows: int, adapter: bool) -> tuple[int, int, int]:
    """Weight rows and tokens of a CTA, in tiles of 64, and how many CTAs an SM has registers for: `Tile` of
    csrc/gemm/heuristics.h."""
    if rows <= 64:
        return 1, 1, 4
    if rows <= 128:
        return (1, 2, 3) if adapter else (2, 2, 2)
    return 2, 4, 1


@dataclass(frozen=True)
class Launch:
    """cluster: CTAs of one. weight_ctas, ctas: those that compute y, and all. resident: how many run at once."""

    cluster: int
    weight_ctas: int
    ctas: int
    resident: int


@dataclass(frozen=True)
class Case:
    """A layer of Qwen3-8B with some rows, of which every third one has an adapter of this rank (0: none)."""

    layer: str
    rows: int
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.layer} rows={self.rows}" + (f" rank={self.rank}" if self.rank else "")

    def call(self) -> Callable[[], object]:
        """One launch. Counts do not depend on values: all are zero."""
        from idlm_kernels.native import gemm

        n, k, output_sizes, activation = LAYERS[self.layer]
        x, weight = torch.zeros(self.rows, k, dtype=torch.bfloat16), torch.zeros(n, k, dtype=torch.bfloat16)
        if not self.rank:
            op = gemm.linear_silu_and_mul if activation else gemm.linear
            return lambda: op(x, weight)
        a = torch.zeros(len(output_sizes) * self.rank, k, dtype=torch.bfloat16)
        b, lora_mask = torch.zeros(n, self.rank, dtype=torch.bfloat16), torch.arange(self.rows) % 3 == 1
        if activation:
            adapter: dict[str, Any] = {"lora_a": a, "lora_b": b, "lora_mask": lora_mask, "output_sizes": output_sizes}
            return lambda: gemm.linear_silu_and_mul(x, weight, **adapter)
        return lambda: gemm.gated_lora_linear(x, weight, a, b, lora_mask, 1.0, output_sizes=output_sizes)

    def launch(self) -> Launch:
        """How csrc/gemm/heuristics.h cuts it."""
        n, _, output_sizes, _ = LAYERS[self.layer]
        row_tiles, token_tiles, most = tile(self.rows, self.rank > 0)
        splits, groups = SPLITS[self.layer], -(-self.rows // (64 * token_tiles))
        cluster = 2 * splits if self.rank or self.rows > 32 else splits
        main = n // (64 * row_tiles) * splits * groups
        h_tiles = -(-self.rank // (64 * row_tiles))
        ctas = main + len(output_sizes) * h_tiles * groups * cluster

        def resident(per_sm: int) -> int:  # GPCs of 16 SMs or more; two SMs side by side are a pair everywhere
            return NUM_SMS * per_sm if cluster <= 2 else 8 * (16 * per_sm // cluster) * cluster

        return Launch(cluster, main, ctas, resident(most))

    def floor(self) -> int:
        """Bytes of W, A and B, each once per 256 rows."""
        n, k, output_sizes, _ = LAYERS[self.layer]
        return -(-self.rows // 256) * 2 * (n * k + self.rank * (len(output_sizes) * k + n))

    def model(self) -> int:
        """Bytes of x and h that reach the SMs: x once per CTA tile of the weight and of A, h once per tile and slice in
        it. Above 32 rows two tiles of the weight share what is read of x."""
        n, k, output_sizes, activation = LAYERS[self.layer]
        tile_rows = 64 * tile(self.rows, self.rank > 0)[0]
        tiles, h_tiles = n // tile_rows, len(output_sizes) * -(-self.rank // tile_rows)
        return 2 * self.rows * ((tiles + h_tiles) * k + tiles * self.rank * (2 if activation else 1))


def cases() -> Iterator[Case]:
    for layer in LAYERS:
        for rows in (1, 7, 16, 64, 128, 224):
            yield Case(layer, rows)
        for rows in (7, 16, 64, 128, 224):
            yield Case(layer, rows, 128)


def waves_without_conflicts(profile: list[tuple[int, int, int, str]]) -> int:
    """As in native_counters, and 4 for the 16 bytes per lane of distributed shared memory."""
    return ideal_waves(profile) + sum(4 * count for _, _, count, line in profile if "ld.shared::cluster.v4" in line)


def measure(case: Case, softgpu: ModuleType) -> dict[str, Any]:
    """The counts of one launch."""
    case.call()()
    c, profile = softgpu.counters(), softgpu.profile()
    n, _, _, activation = LAYERS[case.layer]
    row_tiles, token_tiles, most = tile(case.rows, case.rank > 0)
    stage_bytes = 8192 * (row_tiles + token_tiles)
    stages = c["shared_bytes"] // stage_bytes
    per_sm = min(most, 228 * 1024 // (c["shared_bytes"] + 1024))
    resident = min(c["ctas"], NUM_SMS * per_sm)
    stored = case.rows * n * 2 // (2 if activation else 1)
    entry = {
        "ctas": c["ctas"],
        "cluster": c["cluster"][0],
        "ctas_per_sm": per_sm,
        "stages": stages,
        "weight_kb_in_flight_per_sm": round(resident * stages * row_tiles * 8 / NUM_SMS),
        "weight_bytes_over_floor": round((c["tma_load_bytes"] - case.model()) / case.floor(), 4),
        "activation_bytes_over_weights": round(case.model() / case.floor(), 3),
        "shared_waves_over_ideal": round(
            (c["shared_load_wavefronts"] + c["shared_store_wavefronts"]) / waves_without_conflicts(profile), 3
        ),
        "warp_instructions": c["warp_instructions"],
    }
    if not case.rank:
        entry["stored_sectors_over_floor"] = round(c["global_store_sectors"] * 32 / stored, 3)
    return entry


def main(write: bool) -> None:
    from tests.softgpu_support import load_softgpu

    softgpu = load_softgpu()
    found = {}
    for case in cases():
        found[case.name] = measure(case, softgpu)
        print(case.name, *(f"{key} {value}" for key, value in found[case.name].items()), sep="\t", flush=True)
    if write:
        lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"wrote {BUDGET.name}")
