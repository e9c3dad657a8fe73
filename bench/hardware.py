"""What has been seen on which card: keeps what a GPU day found, and makes docs/hardware.md and a piece of README of it.

    python -m bench.hardware keep gpu-day-out    # into bench/results/<date>-<card>/, then write
    python -m bench.hardware write               # docs/hardware.md and README's paragraph, from bench/results

A claim counts as seen where the phase that shows it ended with status 0, on that card with those versions alone: bits
are equal within one compiler only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By the phase of bench/gpu_day.sh that shows it. Beside it how README names what has not been seen.
CLAIMS = {
    "selfcheck": ("every kernel passes its self-check against the references", "the self-checks of the kernels"),
    "rows": (
        "a row keeps its bits: alone, among others, in AR, chain, quadratic and prefill, on any pages, with an adapter",
        "the bits of rows on real tensor cores",
    ),
    "tiny": (
        "strided decoding is AR token for token, greedy and sampled, eager and recorded, on tiny models",
        "strided decoding of tiny models",
    ),
    "decoding": (
        "strided decoding is AR token for token at the shapes of Qwen3-8B, in CUDA graphs; the time of its steps",
        "strided decoding at the shapes of Qwen3-8B under CUDA graphs",
    ),
    "kernels": (
        "every kernel is right at the shapes of Qwen3-8B; its time beside the floor and the peers",
        "the time of kernels",
    ),
    "tests": ("the tests of the Triton and CUDA kernels pass on the card", "the tests of the Triton and CUDA kernels"),
    "sanitizer": ("memcheck and racecheck find nothing on small shapes", "memcheck and racecheck"),
}
PROBE = """## What the probe decides

`bench/gpu_probe.py` asks the card what no emulator can say: is an output of a matrix product the same, bit for bit,
when it is computed by a wgmma of another width (m64n16 to m64n256), with swapped operands, or by mma.sync m16n8k16?
Until it has answered, design section 4 holds: one instruction for every row count. What each answer would allow:

- **All widths of wgmma agree.** A linear layer, whose rows lie along N, may take tiles of 16 or 32 rows for a step and
  of 128 or 256 for a prefill: less padding in the one, fewer reads of the weights in the other, the same bits.
- **Swapped operands agree.** Rows may lie along M in a prefill and along N in a step. Then attention, whose rows lie
  along M, need not fill 64 of them either.
- **mma.sync agrees too.** Steps of few rows may leave wgmma and its 64 rows. It says nothing about other cards.
- **Something differs.** Tiles stay as they are, for a kernel that mixed the two would break `match`; the probe's line
  says which pair differs, so that the others may still be used.

An answer holds for the card, the driver and the compiler that gave it: with others the probe is asked again before a
kernel may rest on it, as part of its self-check.
"""
MARKS = ("<!-- from bench/results, by bench/hardware.py -->\n", "<!-- end -->\n")
REST = """The emulator sees neither time nor caches, rounds tensor-core sums in its own way, overlaps
two launches at most, keeps memory in order: that what CTAs tell each other is ordered by acquire and release is read
off the PTX, not checked dynamically. What has been seen on which card: [docs/hardware.md](docs/hardware.md).
"""


@dataclass(frozen=True)
class Phase:
    """What a phase found. status: None where it did not begin."""

    status: int | None
    verdict: str

    @property
    def word(self) -> str:
        return "seen" if self.status == 0 else "not seen" if self.status is None else "NOT SO"


@dataclass(frozen=True)
class Run:
    """One GPU day. name: of its folder."""

    name: str
    environment: dict[str, str]
    phases: dict[str, Phase]

    @property
    def card(self) -> str:
        return self.environment.get("card", "an unknown card")


def read_run(folder: Path) -> Run:
    environment = folder / "environment.json"
    facts = json.loads(environment.read_text()) if environment.is_file() else {}
    phases = {}
    for line in (folder / "verdicts.txt").read_text().splitlines():
        if found := re.match(r"\[\d+ s\] (\w+) \(\d+ s, status (\d+)\): (.*)", line):
            phases[found[1]] = Phase(int(found[2]), found[3])
        elif found := re.match(r"\[\d+ s\] (\w+): (.*)", line):
            phases[found[1]] = Phase(None, found[2])
    return Run(folder.name, facts, phases)


def read_runs(root: Path = ROOT) -> list[Run]:
    folders = sorted(path.parent for path in (root / "bench" / "results").glob("*/verdicts.txt"))
    return [read_run(folder) for folder in folders]


def page(runs: list[Run]) -> str:
    """docs/hardware.md"""
    lines = ["# What has been seen on hardware", ""]
    lines += ["Made by `python -m bench.hardware write` from `bench/results`, which `make gpu-day` fills; not by hand."]
    lines += ["A claim is seen where its phase ended well, on that card with those versions alone.", ""]
    if not runs:
        lines += ["**No run on a GPU has been kept: none of this has been seen on any card.**", ""]
    lines += ["| claim | phase | " + " | ".join([run.name for run in runs] or ["seen on"]) + " |"]
    lines += ["|---|---|" + "---|" * max(len(runs), 1)]
    for phase, (claim, _) in CLAIMS.items():
        words = [run.phases[phase].word if phase in run.phases else "not seen" for run in runs] or ["no card"]
        lines.append(f"| {claim} | `{phase}` | {' | '.join(words)} |")
    for run in runs:
        lines += ["", f"## {run.name}", "", f"[All of it](../bench/results/{run.name}).", ""]
        lines += ["| | |", "|---|---|"] + [f"| {name} | {fact} |" for name, fact in run.environment.items()]
        lines += ["", "| phase | verdict |", "|---|---|"]
        for name, phase in run.phases.items():
            status = "" if phase.status is None else f"status {phase.status}: "
            lines.append(f"| {name} | {status}{phase.verdict.replace('|', ';')} |")
    return "\n".join(lines) + "\n\n" + PROBE


def readme_paragraph(runs: list[Run]) -> str:
    """README's words on what has not been run, between its two marks."""
    if not runs:
        return (
            "Not yet run on hardware: anything on a GPU, be it the `torch` backend on CUDA tensors, a Triton or CUDA\n"
            "kernel, the recording of steps as CUDA graphs, or the clock of `make gpu-report`. No speed, and no\n"
            f"result of a real tensor core, is claimed. {REST}"
        )
    missing = [
        words
        for phase, (_, words) in CLAIMS.items()
        if not any(phase in run.phases and run.phases[phase].status == 0 for run in runs)
    ]
    first = f"Not yet run on hardware, or not with success: {', '.join(missing)}.\n" if missing else ""
    return first + REST


def with_paragraph(readme: str, runs: list[Run]) -> str:
    start, end = (readme.index(mark) for mark in MARKS)
    return readme[: start + len(MARKS[0])] + readme_paragraph(runs) + readme[end:]


def write(root: Path = ROOT) -> None:
    runs = read_runs(root)
    (root / "docs" / "hardware.md").write_text(page(runs))
    readme = root / "README.md"
    readme.write_text(with_paragraph(readme.read_text(), runs))


def keep(out: Path, root: Path = ROOT) -> Path:
    """Copy verdicts, tables and environment; a second run of the same day and card replaces the first."""
    run = read_run(out)
    if not run.environment:
        raise SystemExit(f"{out}: there is no environment.json, so the card is not known (did the phase `facts` fail?)")
    card = re.sub(r"[^a-z0-9]+", "-", run.card.lower()).strip("-")
    folder = root / "bench" / "results" / f"{run.environment.get('date', 'undated')}-{card}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*out.glob("*.md"), *out.glob("*.json"), out / "verdicts.txt"):
        shutil.copy(path, folder / path.name)
    write(root)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "write"))
    parser.add_argument("out", nargs="?", type=Path, help="of keep: the folder that bench/gpu_day.sh filled")
    arguments = parser.parse_args()
    if arguments.what == "write":
        write()
    elif arguments.out is None:
        parser.error("keep: name the folder that bench/gpu_day.sh filled")
    else:
        print(f"kept in {keep(arguments.out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
