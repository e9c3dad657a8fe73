"""What the CUDA sampling kernels do to memory, counted by softgpu: the stand-in for a profiler where there is no GPU.

    SOFTGPU_DIR=... python bench/native_counters.py [--json]

For each case, per launch: bytes requested against the floor (each logits row that decides something, once; draft laws
once where a residual is sampled), 32-byte sectors against bytes for the accesses of 16 bytes and more, shared-memory
waves against the conflict-free count, and warp instructions per id. Says nothing about time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = "SOFTGPU_COUNTERS_FILE"  # read by softgpu at the first launch, so it has to be set before Python starts
VOCAB = 151_936


def shared_width_bytes(ptx: str) -> int:
    """Bytes per lane of a shared-memory access."""
    match = re.search(r"(?:ld|st)\.(?:volatile\.)?shared\S*?(\.v2|\.v4)?\.[a-z](\d+)", ptx)
    assert match, ptx
    return int(match[2]) // 8 * {None: 1, ".v2": 2, ".v4": 4}[match[1]]


def ideal_waves(profile: list[tuple[int, int, int, str]]) -> int:
    """Waves of the profiled shared-memory accesses without any conflict, as if all lanes were active."""
    total = 0
    for _, _, count, text in profile:
        if re.search(r"\b(ld|st)\.(volatile\.)?shared\b(?!::cluster)", text):
            total += count * max(1, shared_width_bytes(text) // 4)
    return total


def wide_requests(profile: list[tuple[int, int, int, str]]) -> int:
    return sum(n for _, _, n, text in profile if re.search(r"\bld\.global\S*\.v4\.[bu]32", text))


def measure(case: Callable[[], object], floor_bytes: list[int], softgpu: Any, ids: int) -> list[dict[str, Any]]:
    """One entry per launch of `case`; profile-based figures for the last launch only."""
    path = Path(os.environ[FILE])
    before = len(path.read_text().splitlines()) if path.exists() else 0
    case()
    launches = [json.loads(line) for line in path.read_text().splitlines()[before:]]
    assert len(launches) == len(floor_bytes), f"{len(launches)} launches, wanted {len(floor_bytes)}"
    found = []
    for c, floor in zip(launches, floor_bytes, strict=True):
        entry = {
            "grid": c["grid"][0],
            "cluster": c["cluster"][0],
            "bytes_over_floor": c["global_load_bytes"] / floor,
            "warp_instructions_per_id": c["warp_instructions"] * 32 / ids,
        }
        found.append(entry)
    profile, last = softgpu.profile(), launches[-1]
    # All other loads are of one lane each and touch one sector.
    narrow = last["global_load_requests"] - wide_requests(profile)
    found[-1]["wide_sector_efficiency"] = floor_bytes[-1] / 32 / (last["global_load_sectors"] - narrow)
    waves = last["shared_load_wavefronts"] + last["shared_store_wavefronts"]
    found[-1]["shared_waves_over_ideal"] = waves / ideal_waves(profile)
    return found


def cases() -> dict[str, list[dict[str, Any]]]:
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.softgpu_support import load_softgpu

    softgpu = load_softgpu()
    from idlm_kernels.native import backend
    from tests.native.support import Mix, Rows, Step

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    results = {}
    mixes = {"plain": Mix(), "top-k": Mix(0.8, top_k=50), "top-p": Mix(top_p=0.95), "greedy": Mix(0.0)}
    for name, mix in mixes.items():
        for dtype in (torch.bfloat16, torch.float32):
            rows = Rows.make(4, VOCAB, dtype, generator, mixes=(mix,), id_limit=VOCAB, mask_id=-1, spread=2.5)
            rows.logits[:, ::997] += 9
            floor = 4 * VOCAB * rows.logits.element_size()
            label = f"sample_rows {name} {str(dtype).removeprefix('torch.')}"
            results[label] = measure(lambda rows=rows: rows.run(backend), [floor], softgpu, 4 * VOCAB)  # type: ignore[misc]
    for mode in ("match", "rejection"):
        step = Step.make(
            1, 3, VOCAB, torch.bfloat16, generator, branched=True, mode=mode, mixes=(Mix(),), kinds=(2,), closeness=0.02
        )
        # All rows but those of branches that were not taken; a refused draft reads its law once, by the kept ids.
        clean = int(step.num_drafts[0]) + 1
        row = 2 * step.id_limit
        accepted = int(step.run(backend).num_accepted[0])
        refused = clean - 1 - accepted if mode == "rejection" else 0
        floors = [(clean + refused) * row, 3 * row]
        results[f"verify_accept {mode} bfloat16"] = measure(
            lambda step=step: step.run(backend),
            floors,
            softgpu,
            3 * VOCAB,  # type: ignore[misc]
        )
    return results


def collect() -> dict[str, list[dict[str, Any]]]:
    """The figures, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, FILE: str(Path(folder) / "counters.jsonl")}
        command = [sys.executable, str(Path(__file__).resolve()), "--json", "--here"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = cases() if args.here else collect()
    if args.json:
        print(json.dumps(results))
        return
    for name, launches in results.items():
        for i, launch in enumerate(launches):
            figures = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in launch.items())
            print(f"{name} [{i}]: {figures}")


if __name__ == "__main__":
    main()
