"""What nvcc made of the kernels: resources, instructions, and the order around programmatic dependent launch."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from bench.native_counters import collect
from tests.native.support import ROOT, Toolkit

BUDGET = json.loads((ROOT / "bench" / "budgets" / "native.json").read_text())


@pytest.fixture(scope="module")
def library(module: ModuleType) -> Path:
    return Path(str(module.__file__))


@pytest.fixture(scope="module")
def kernels(library: Path, toolkit: Toolkit) -> dict[str, str]:
    """PTX by kernel."""
    command = [toolkit.tool("cuobjdump"), "-ptx", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pieces = re.split(r"\.entry (\S+?)\(", text)[1:]
    found = dict(zip(pieces[::2], pieces[1::2], strict=True))
    assert found, "the module holds no PTX"
    return found


def test_resources(library: Path, toolkit: Toolkit) -> None:
    command = [toolkit.tool("cuobjdump"), "-res-usage", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert {name for name, *_ in usage} == set(BUDGET["kernels"])
    for name, registers, stack, shared, local in usage:
        budget = BUDGET["kernels"][name]
        assert int(registers) <= budget["registers"], name
        assert int(shared) <= budget["static_shared_bytes"], name
        assert int(stack) == int(local) == 0, f"{name} spills"


def test_instructions(kernels: dict[str, str]) -> None:
    assert set(kernels) == set(BUDGET["kernels"])
    for name, text in kernels.items():
        (family,) = (family for family in BUDGET["instructions"] if family in name)
        for wanted in BUDGET["instructions"][family]:
            assert wanted in text, f"{name}: no {wanted}"
        for unwanted in BUDGET["forbidden_instructions"]:
            assert unwanted not in text, f"{name}: {unwanted}"


# By state space, or generic.
GLOBAL_ACCESS = re.compile(r"\b(?:ld|st|atom|red|cp)\.(?:\w+\.)*global\b|\b(?:ld|st)\.(?:v\d\.)?[bsuf]\d+\b")
BRANCH = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:bra|ret|exit)\b|^\$L", re.M)


def test_nothing_is_touched_before_the_previous_kernel_has_ended(kernels: dict[str, str]) -> None:
    """griddepcontrol.wait stands in the straight line from the entry, before any access to global memory and before any
    branch: all paths, those that leave early too, pass it first. (softgpu runs launches one after the other, so this is
    not checked dynamically.)"""
    for name, text in kernels.items():
        if "linear_kernel" in name:  # reads weights before; test_gemm_compiled.py
            continue
        before, wait, after = text.partition("griddepcontrol.wait;")
        assert wait and "griddepcontrol.wait" not in after, name
        assert not GLOBAL_ACCESS.search(before), f"{name}: memory is accessed before the wait"
        assert not BRANCH.search(before), f"{name}: a branch comes first"
        assert GLOBAL_ACCESS.search(after), f"{name}: the pattern matches nothing"


def test_the_next_kernel_is_let_in_after_the_row_is_read(kernels: dict[str, str]) -> None:
    for name in (name for name in kernels if "rows_kernel" in name):
        text = kernels[name]
        assert text.index("ld.global.L1::no_allocate") < text.index("griddepcontrol.launch_dependents"), name


def test_memory_traffic(softgpu: ModuleType, module: ModuleType) -> None:
    """Every launch, and all launches of an op together, keep to the floor: one request and 64, both rules."""
    limits = BUDGET["counters"]
    cases = collect()
    assert set(cases) == set(limits["warp_instructions_per_id"])
    for name, launches in cases.items():
        assert launches["all"]["warp_instructions_per_id"] <= limits["warp_instructions_per_id"][name], (name, launches)
        for launch, found in launches.items():
            for key, value in found.items():
                if key == "sector_efficiency":
                    assert value >= limits[key], (name, launch, found)
                elif key != "warp_instructions_per_id":
                    assert value <= limits[key], (name, launch, found)
    steps = [launches for name, launches in cases.items() if name.startswith("verify_accept")]
    assert len(steps) == 4 and all(set(launches) == {"launch 0", "launch 1", "all"} for launches in steps)


def test_cluster_sizes(module: ModuleType) -> None:
    choose = module.choose_cluster_size
    row = 2 * 151_936  # bytes, bf16
    assert choose(7, row) == 8  # batch 1: as much of the chip as a row can use
    assert choose(448, row) == 4  # batch 64: two CTAs per SM, one loads while the other computes
    assert choose(448, 2 * row) == 8
    # The boundary: as long as clusters of 8 all run at once on 132 SMs.
    assert [choose(rows, row) for rows in (15, 16, 17, 18)] == [8, 8, 4, 4]
    # Parts of a row start at cache lines: 4 CTAs hold 512 B in lines of 128, one of 513 in two lines.
    assert [module.bytes_per_cta(n, 4) for n in (2, 512, 513)] == [128, 128, 256]
    assert choose(10_000, 16) == 1 and choose(1, 16) == 1
    assert choose(1, 4 * 262_144) == 8
    assert choose(1, 8 * 230 * 1024) == 0  # does not fit
    for rows in (1, 8, 64, 4096):
        for vocab_size in (1, 1000, 32_000, 151_936, 262_144):
            for width in (2, 4):
                size = choose(rows, width * vocab_size)
                assert size in (1, 2, 4, 8) and width * vocab_size / size <= 223 * 1024
