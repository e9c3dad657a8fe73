"""What the compiler made of attention: matrix products side by side, the order of what CTAs tell each other, and what
it asks of memory."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from bench.native_attention import BUDGET, Case, cases, measure
from tests.native.support import Toolkit

RECORDED = json.loads(BUDGET.read_text())


@pytest.fixture(scope="module")
def kernels(module: ModuleType, toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX by kernel."""
    command = [toolkit.tool("cuobjdump"), "-ptx", str(module.__file__)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pieces = re.split(r"\.entry (\S+?)\(", text)[1:]
    found = {name: body for name, body in zip(pieces[::2], pieces[1::2], strict=True) if "attention_kernel" in name}
    assert len(found) == 6
    return found


def test_products_run_side_by_side(module: ModuleType, toolkit: Toolkit, tmp_path: Path) -> None:
    """ptxas says where it makes wgmma wait for every single product (C7510 and others): nowhere here. Nothing is
    spilled, and 8 warps find their registers."""
    command = [toolkit.tool("cuobjdump"), "-xptx", "all", str(module.__file__)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    files = [file for file in tmp_path.glob("*.ptx") if "attention_kernel" in file.read_text()]
    assert len(files) == 2
    for file in files:
        command = [toolkit.tool("ptxas"), "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        assert not re.search(r"C75\d\d", report), report
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
        assert all(int(count) <= 255 for count in re.findall(r"Used (\d+) registers", report))


def test_every_shape_runs_one_matrix_instruction(kernels: dict[str, str]) -> None:
    """The bits of a row rest on it: whatever the rows, the same instruction over the same slots."""
    for name, text in kernels.items():
        found = set(re.findall(r"wgmma\.mma_async[\w.]*", text))
        dtype = "bf16" if "bfloat16" in name else "f16"
        assert found == {f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{dtype}.{dtype}"}
        assert "mma.sync" not in text


def check_overlap(text: str) -> None:
    """A tile's scores are waited for while the update of the tile before is left running; copies go many at a time."""
    order = re.findall(r"wgmma\.(commit_group|wait_group)\.sync\.aligned(?: (\d))?", text)
    assert ("wait_group", "1") in order, "the softmax waits for the update"
    pairs = [a[0] for a in order]
    first = order.index(("wait_group", "1"))
    assert pairs[first - 2 : first] == ["commit_group", "commit_group"]


def check_meeting(text: str) -> None:
    """All threads are past a barrier when one announces the CTA's part, with release; who comes last acquires, passes
    a barrier, and reads the parts of other SMs out of L2."""
    code = [line.strip() for line in text.splitlines()]
    code = [line for line in code if line and not line.startswith((".loc", "//", "$L", "{", "}"))]

    def places(start: str) -> list[int]:
        return [i for i, line in enumerate(code) if start in line]

    (meeting,) = places("atom.acq_rel.gpu.global.add.s32")
    barriers = places("bar.sync")
    before = max(i for i in barriers if i < meeting)
    assert meeting - before < 40 and not any("st.global" in line for line in code[before:meeting])
    after = min(i for i in barriers if i > meeting)
    parts = places("ld.global.cg")
    assert parts and all(i > after for i in parts), "parts are read before the news of them"


def test_the_softmax_runs_beside_products(kernels: dict[str, str]) -> None:
    for name, text in kernels.items():
        if "Li256E" not in name:  # where registers are short, and they take turns
            check_overlap(text)


def test_parts_are_handed_over_in_order(kernels: dict[str, str]) -> None:
    for text in kernels.values():
        check_meeting(text)


FAULTS = {
    "the softmax waits for all products": (check_overlap, r"wait_group\.sync\.aligned 1", "wait_group.sync.aligned 0"),
    "the news is not a release": (check_meeting, r"atom\.acq_rel", "atom.relaxed"),
    "the news comes before all threads have stored": (
        check_meeting,
        r"bar\.sync\s+1, 128;(?=(?:(?!bar\.sync).)*atom\.acq_rel)",
        "",
    ),
    "parts are read out of L1": (check_meeting, r"ld\.global\.cg", "ld.global"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_order_are_seen(name: str, kernels: dict[str, str]) -> None:
    check, old, new = FAULTS[name]
    for kernel, text in kernels.items():
        if "Li256E" in kernel and check is check_overlap:
            continue
        changed, count = re.subn(old, new, text, flags=re.S)
        assert count
        with pytest.raises((AssertionError, ValueError)):
            check(changed)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_memory_traffic(case: Case, softgpu: ModuleType, module: ModuleType) -> None:
    """K and V are read once, sectors are full, shared memory has no conflicts; the rest is as recorded."""
    found, recorded = measure(case, softgpu), RECORDED[case.name]
    assert found["kv_bytes_over_floor"] <= 1.02
    assert found["load_sector_efficiency"] >= 0.95
    numbers = 4 * case.head_dim  # bytes of a row of a part, beside which m and t are 8 bytes of a sector
    assert found["stored_sectors_over_floor"] <= 1.023 * (numbers + 32) / (numbers + 8)
    assert found["shared_waves_over_ideal"] <= 1.05
    assert found["flops_over_tiles"] <= 1.05 * next(n for n in (64, 128, 256) if n >= case.head_dim) / case.head_dim
    assert found["ctas"] == recorded["ctas"]
    for key in ("warp_instructions", "other_mb_read", "mb_written"):
        assert found[key] <= 1.02 * recorded[key], key
