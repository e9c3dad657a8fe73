"""What attention in CUDA asks of memory at the shapes of Qwen3-8B, counted by softgpu: no GPU, no time.

    SOFTGPU_DIR=... python -m bench.counters --family attention --backend cuda [--write]

For each launch: CTAs; bytes of K and V over their floor (each visible slot once per 64 packed rows); MB of other reads
(q, page table, lengths, parts of tiles: out of L1 and L2) and of writes; bytes over those of the sectors that are
read, and sectors written over those that the bytes need; shared-memory waves over the conflict-free count; products
over those of 64-row tiles, whose columns may be filled up; warp instructions. --write records them in
bench/budgets/native_attention.json, which a test holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.native_counters import ideal_waves

BUDGET = Path(__file__).parent / "budgets" / "native_attention.json"
HEADS, KV_HEADS = 32, 8  # Qwen3-8B, whose head_dim is 128


@dataclass(frozen=True)
class Case:
    """A step of some plan over contexts of these lengths, the step's rows included; `rows` of each request."""

    plan: str
    rows: int
    lengths: tuple[int, ...]
    head_dim: int = 128

    @property
    def name(self) -> str:
        name = f"{self.plan} rows={self.rows} lengths={','.join(map(str, self.lengths))}"
        return name if self.head_dim == 128 else f"{name} head_dim={self.head_dim}"

    def call(self) -> Any:
        from idlm_kernels.testing import StridedAttention

        return StridedAttention(
            lengths=self.lengths,
            rows=(self.rows,) * len(self.lengths),
            heads=(HEADS, KV_HEADS, self.head_dim),
            page_size=64,
            padding=0,
            tail="quadratic" if self.plan == "quadratic" else None,
        ).call()

    def floor(self) -> int:
        """Bytes of K and V, once per 64 packed rows."""
        tiles = -(-self.rows * HEADS // KV_HEADS // 64)
        return sum(self.lengths) * tiles * KV_HEADS * self.head_dim * 2 * 2


def cases() -> Iterator[Case]:
    for length in (1024, 4096):
        yield Case("ar", 1, (length,))
        yield Case("chain", 7, (length,))
        yield Case("quadratic", 16, (length,))
    yield Case("quadratic", 16, (1024,) * 8)
    yield Case("chain", 7, (8192, 256, 256, 256))
    for head_dim in (64, 80, 96, 112, 256):
        yield Case("chain", 7, (1024,), head_dim)


def measure(case: Case, softgpu: ModuleType) -> dict[str, Any]:
    """The counts of one launch."""
    from idlm_kernels.native import attention

    call = case.call()
    attention.strided_attention(**call.arguments)
    c, profile = softgpu.counters(), softgpu.profile()
    return {
        "ctas": c["ctas"],
        "kv_bytes_over_floor": round(c["cp_async_bytes"] / case.floor(), 4),
        "other_mb_read": round((c["global_load_bytes"] - c["cp_async_bytes"]) / 1e6, 3),
        "mb_written": round(c["global_store_bytes"] / 1e6, 3),
        "load_sector_efficiency": round(c["global_load_efficiency"], 3),
        "stored_sectors_over_floor": round(c["global_store_sectors"] * 32 / c["global_store_bytes"], 3),
        "shared_waves_over_ideal": round(
            (c["shared_load_wavefronts"] + c["shared_store_wavefronts"]) / ideal_waves(profile), 3
        ),
        "flops_over_tiles": round(c["wgmma_flops"] / (case.floor() * 64), 3),
        "warp_instructions": c["warp_instructions"],
    }


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
