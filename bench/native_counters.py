"""What the CUDA sampling kernels do to memory, counted by softgpu: the stand-in for a profiler where there is no GPU.

    SOFTGPU_DIR=... python bench/native_counters.py [--json] [--full]

For each case, for each launch and for all launches of the op together: bytes loaded against the floor (each logits row
that decides something, once; the distribution of a draft once where a residual is sampled), bytes stored against the
floor (the distributions that `rejection` keeps), 32-byte sectors against bytes for the accesses of 8 bytes and more,
shared-memory waves against the conflict-free count, and warp instructions per id. Says nothing about time.

The batch of 64 requests (448 rows) has a quarter of the vocabulary, with the cluster size of the full one: the emulator
needs minutes for more. What a row costs beyond its own bytes does not depend on the vocabulary, so for these cases the
ratio to the floor is that of a full row with this excess. --full takes the full vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


def one_lane_requests(profile: list[tuple[int, int, int, str]]) -> int:
    """Requests of the scalar loads: all but a few of one lane, so of one sector."""
    return sum(n for _, _, n, text in profile if re.search(r"\bld\.global(?!\S*\.v[24])", text))


class Launches:
    """The counters of what is launched while this is open, one entry per launch."""

    def __enter__(self) -> Launches:
        self._path = Path(os.environ[FILE])
        self._before = len(self._read())
        return self

    def __exit__(self, *_: object) -> None:
        self.found = [json.loads(line) for line in self._read()[self._before :]]

    def _read(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []


def figures(
    counts: list[dict[str, Any]], profiles: list[Any], loads: int, stores: int, ids: int, full: float
) -> dict[str, float]:
    """Ratios of the sums over some launches. loads, stores: floors in bytes; full: a full row over a measured one."""
    total = {key: sum(c[key] for c in counts) for key, value in counts[0].items() if isinstance(value, int)}
    narrow = sum(one_lane_requests(profile) for profile in profiles)
    waves = total["shared_load_wavefronts"] + total["shared_store_wavefronts"]
    found = {
        "bytes_over_floor": 1 + (total["global_load_bytes"] / loads - 1) / full,
        "sector_efficiency": loads / 32 / (total["global_load_sectors"] - narrow),
        "shared_waves_over_ideal": waves / sum(ideal_waves(profile) for profile in profiles),
        "warp_instructions_per_id": total["warp_instructions"] * 32 / ids,
    }
    if stores:
        found["stored_bytes_over_floor"] = 1 + (total["global_store_bytes"] / stores - 1) / full
        found["stored_sectors_over_floor"] = total["global_store_sectors"] / (stores / 32)
    return found


def measure(
    run: Callable[[], object],
    softgpu: Any,
    loads: list[int],
    ids: list[int],
    stores: int = 0,
    full: float = 1.0,
    up_to_first: Callable[[], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Figures by launch, and of all. loads, ids: per launch; stores: of the last.

    softgpu has a profile of what was launched last. `up_to_first` does the same as `run`, but its second launch fails:
    that leaves the profile of the first.
    """
    profiles = []
    if up_to_first is not None:
        with contextlib.suppress(RuntimeError):
            up_to_first()
            raise AssertionError("the second launch has not failed")
        profiles.append(softgpu.profile())
        softgpu.reset()
    with Launches() as launches:
        run()
    counts = launches.found
    profiles.append(softgpu.profile())
    assert len(counts) == len(profiles) == len(loads) == len(ids), f"{len(counts)} launches, wanted {len(loads)}"
    found = {}
    if len(counts) > 1:
        for i, count in enumerate(counts):
            last = stores if i + 1 == len(counts) else 0
            found[f"launch {i}"] = figures([count], [profiles[i]], loads[i], last, ids[i], full)
    found["all"] = figures(counts, profiles, sum(loads), stores, sum(ids), full)
    return found


def cases(full_vocabulary: bool) -> dict[str, dict[str, dict[str, float]]]:
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.softgpu_support import load_softgpu

    softgpu = load_softgpu()
    from idlm_kernels.native import backend
    from idlm_kernels.testing.decided import Mix, Rows

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
            results[label] = measure(lambda rows=rows: rows.run(backend), softgpu, [floor], [4 * VOCAB])  # type: ignore[misc]
    for batch in (1, 64):
        for rule in ("match", "rejection"):
            vocab_size = VOCAB if batch == 1 or full_vocabulary else VOCAB // 4
            label = f"verify_accept {rule} bfloat16 B={batch}"
            results[label] = measure_step(batch, rule, vocab_size, generator, softgpu)
    return results


def measure_step(batch: int, rule: str, vocab_size: int, generator: Any, softgpu: Any) -> dict[str, dict[str, float]]:
    """A chain plan of stride 4: 7 rows per request, of which 4 are clean."""
    import torch

    from idlm_kernels import native
    from idlm_kernels.native import backend
    from idlm_kernels.testing.decided import Mix, Step

    num_spec_tokens = 3
    # Drafts that all stand in `match`, so that all MASK rows are sampled; some that do not in `rejection`. There all
    # ids are kept: of a truncated row a residual reads less of the distribution.
    match = rule == "match"
    mixes = (Mix(), Mix(0.8, top_k=50), Mix(top_p=0.95), Mix(0.7, min_p=0.05)) if match and batch > 1 else (Mix(),)
    step = Step.make(
        batch, num_spec_tokens, vocab_size, torch.bfloat16, generator, quadratic=False, rule=rule, mixes=mixes,
        kinds=(2,), closeness=0.0 if match else 0.3, num_drafts=num_spec_tokens,
    )  # fmt: skip
    backend.cluster_size = native.load().choose_cluster_size(batch * (num_spec_tokens + 1), 2 * VOCAB)
    workspaces = []
    allocate = backend._empty

    def remember(*args: Any) -> Any:
        workspaces.append(allocate(*args))
        return workspaces[-1]

    backend._empty = remember
    outcome = step.run(backend)
    backend._empty = allocate
    # Row i of the workspace is -1 where its draft is accepted; where it is not, the row's distribution is read.
    refused = 0 if match else int((workspaces[-1][:, :num_spec_tokens] >= 0).sum())
    masks = int(outcome.next_num_drafts.sum())
    nowhere = SimpleNamespace(data_ptr=lambda: 64)  # an address that no launch can write to

    class FirstLaunch:
        @staticmethod
        def verify_accept(*args: Any, **options: Any) -> Any:
            results = [torch.empty_like(x) for x in (outcome.tokens, outcome.next_drafts, outcome.next_num_drafts)]
            return backend.verify_accept(*args, **options, out=(nowhere, *results))  # type: ignore[arg-type]

    row = 2 * step.id_limit
    found = measure(
        lambda: step.run(backend),
        softgpu,
        loads=[(batch * (num_spec_tokens + 1) + refused) * row, masks * row],
        ids=[batch * (num_spec_tokens + 1) * vocab_size, masks * vocab_size],
        stores=0 if match else masks * 2 * vocab_size,
        full=VOCAB / vocab_size,
        up_to_first=lambda: step.run(FirstLaunch),  # type: ignore[arg-type]
    )
    backend.cluster_size = 0
    return found


def collect(*options: str) -> dict[str, dict[str, dict[str, float]]]:
    """The figures, by case and launch, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, FILE: str(Path(folder) / "counters.jsonl")}
        command = [sys.executable, str(Path(__file__).resolve()), "--json", "--here", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        found: dict[str, dict[str, dict[str, float]]] = json.loads(done.stdout)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole vocabulary for the large batch too: minutes")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = cases(args.full) if args.here else collect(*["--full"] * args.full)
    if args.json:
        print(json.dumps(results))
        return
    for name, launches in results.items():
        for launch, found in launches.items():
            print(f"{name}, {launch}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
