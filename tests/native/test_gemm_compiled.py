"""What the compiler made of the linear layers: occupancy, matrix products side by side, and the order of what CTAs and
launches tell each other, which softgpu cannot show."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from bench import gemm_prediction
from bench.native_gemm import LAYERS, SPLITS, Case, cases, measure
from tests.native.support import ROOT, Toolkit

BUDGET = json.loads((ROOT / "bench" / "budgets" / "native_gemm.json").read_text())

EVICT_FIRST = 0x12F0000000000000  # kEvictFirst of csrc/common/hopper.cuh: how weights are loaded


@pytest.fixture(scope="module")
def kernels(module: ModuleType, toolkit: Toolkit) -> dict[str, str]:
    """PTX by kernel."""
    command = [toolkit.tool("cuobjdump"), "-ptx", str(module.__file__)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pieces = re.split(r"\.entry (\S+?)\(", text)[1:]
    found = {name: body for name, body in zip(pieces[::2], pieces[1::2], strict=True) if "linear_kernel" in name}
    assert len(found) == 12
    return found


def with_adapter(kernels: dict[str, str]) -> dict[str, str]:
    found = {name: text for name, text in kernels.items() if "ELb1E" in name}
    assert len(found) == 6
    return found


def test_products_run_side_by_side(module: ModuleType, toolkit: Toolkit, tmp_path: Path) -> None:
    """ptxas says where it makes wgmma wait for every single product (C7508, C7510, C7515): nowhere here. Nothing is
    spilled, and the registers leave room for the CTAs per SM that the heuristics count on."""
    subprocess.run(
        [toolkit.tool("cuobjdump"), "-xptx", "all", str(module.__file__)], check=True, capture_output=True, cwd=tmp_path
    )
    files = [file for file in tmp_path.glob("*.ptx") if "linear_kernel" in file.read_text()]
    assert len(files) == 2
    for file in files:
        command = [toolkit.tool("ptxas"), "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        assert not re.search(r"C75\d\d|wgmma", report), report
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
        kernel = r"Compiling entry function '\S+Li(\d)ELb(\d)\S+'.*?Used (\d+) registers"
        registers = re.findall(kernel, report, re.S)
        assert len(registers) == 6
        for token_tiles, adapter, count in registers:
            warps, ctas = {"10": (5, 4), "11": (5, 4), "20": (9, 2), "21": (5, 3)}.get(token_tiles + adapter, (12, 1))
            per_quarter = -(-warps * ctas // 4)
            assert -(-int(count) // 8) * 8 * per_quarter <= 512, (token_tiles, adapter, count)


def before_wait(text: str) -> list[str]:
    """The instructions that some path reaches without having passed griddepcontrol.wait."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
    reached: set[int] = set()
    todo = [0]
    while todo:
        i = todo.pop()
        while i < len(lines) and i not in reached:
            reached.add(i)
            line = lines[i]
            if line.startswith("griddepcontrol.wait"):
                break
            if jump := re.match(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L\w+)", line):
                todo.append(labels[jump[2]])
                if not jump[1]:
                    break
            elif re.match(r"(ret|exit);", line):
                break
            i += 1
    return [lines[i] for i in sorted(reached)]


GLOBAL = re.compile(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*global\b|\b(?:ld|st)\.(?:v\d\.)?[bsuf]\d+\b")


def check_start(text: str) -> None:
    """Before the previous kernel has ended no path touches anything but weights, and these by TMA."""
    early = before_wait(text)
    assert 50 < len(early) < len(text.splitlines()) - 50
    assert not [line for line in early if GLOBAL.search(line)]
    loads = [line for line in early if "cp.async.bulk.tensor" in line]
    policies = {re.search(r"(%rd\d+);$", line)[1] for line in loads}  # type: ignore[index]
    assert loads
    for policy in policies:
        found = re.findall(rf"mov\.[bu]64\s+{policy}, (\S+);", text)
        assert found and {int(v, 0) for v in found} == {EVICT_FIRST}


def check_handover(text: str) -> None:
    """Who stores h fences it for TMA, meets the other threads and releases; who loads it acquires and fences. The words
    are set back by whoever comes last, which it learns with acquire and release."""
    code = [line.strip() for line in text.splitlines()]
    code = [line for line in code if line and not line.startswith((".loc", "//", "$L", "{", "}"))]

    def places(start: str) -> list[int]:
        return [i for i, line in enumerate(code) if line.startswith(start)]

    (release,) = places("red.release.gpu.global.add")
    barrier = max(i for i in places("bar") if i < release)
    last_store = max(i for i in places("st.global") if i < barrier)
    fences = places("fence.proxy.async.global")
    assert any(last_store < fence < barrier for fence in fences), "no fence between h and its news"
    assert not any(code[i].startswith("st.global") for i in range(barrier, release))
    assert release - barrier < 20, "no barrier before the news"
    acquires, loads = places("ld.acquire.gpu.global"), places("cp.async.bulk")
    assert acquires
    for acquire in acquires:
        fence = min((i for i in fences if i > acquire), default=len(code))
        assert fence < min(i for i in loads if i > acquire), "no fence between the news and h"
    assert len(places("atom.acq_rel.gpu.global.add")) == 1


def test_only_weights_are_touched_before_the_previous_kernel_has_ended(kernels: dict[str, str]) -> None:
    for text in kernels.values():
        check_start(text)


def test_h_is_handed_over_in_order(kernels: dict[str, str]) -> None:
    handing = with_adapter(kernels)
    for name, text in kernels.items():
        if name in handing:
            check_handover(text)
        else:
            assert not re.search(r"\b(red|atom|ld\.acquire)\.", text), f"{name} has flags"


FAULTS = {
    "h is stored without a fence": (check_handover, r"fence\.proxy\.async\.global;(?=[^;]*bar)", ""),
    "h is loaded without a fence": (check_handover, r"(ld\.acquire.*?)fence\.proxy\.async\.global;", r"\1"),
    "h is announced before all threads have stored it": (
        check_handover,
        r"bar\.sync 1, \d+;(?=.{0,400}red\.release)",
        "",
    ),
    "the news is not a release": (check_handover, r"red\.release", "red.relaxed"),
    "the news is not acquired": (check_handover, r"ld\.acquire", "ld.relaxed"),
    "x is loaded before the wait": (check_start, r"griddepcontrol\.wait;", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_order_are_seen(name: str, kernels: dict[str, str]) -> None:
    check, old, new = FAULTS[name]
    for text in with_adapter(kernels).values():
        changed, count = re.subn(old, new, text, flags=re.S)
        assert count
        with pytest.raises((AssertionError, ValueError)):
            check(changed)


COUNTED = [Case("o", 7), Case("o", 7, 128), Case("qkv", 16, 128), Case("o", 128), Case("o", 128, 128)]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_memory_traffic(case: Case, softgpu: ModuleType, module: ModuleType) -> None:
    """Weights are loaded once, stores fill their sectors, shared memory has no conflicts; the rest is as recorded."""
    found = measure(case, softgpu)
    assert found["weight_bytes_over_floor"] <= 1.01
    assert found["shared_waves_over_ideal"] <= 1.05
    assert found.get("stored_sectors_over_floor", 1) <= 1.05
    assert found["weight_kb_in_flight_per_sm"] >= (64 if case.rows <= 64 else 48)
    launch = case.launch()
    assert (found["ctas"], found["cluster"]) == (launch.ctas, launch.cluster)
    recorded = BUDGET[case.name]
    for key in ("ctas", "cluster", "stages", "activation_bytes_over_weights"):
        assert found[key] == recorded[key], key
    assert found["warp_instructions"] <= 1.02 * recorded["warp_instructions"]


def test_the_document_has_the_prediction_of_these_counts() -> None:
    text = (ROOT / "docs" / "gemm.md").read_text()
    assert gemm_prediction.table() in text
    assert gemm_prediction.prefill() in text.replace("\n", " ")


def test_launches_are_cut_as_the_prediction_counts_them(module: ModuleType) -> None:
    for layer, (n, k, _, _) in LAYERS.items():
        assert module.gemm_shape(n, k) == (SPLITS[layer], 2 * SPLITS[layer])
    for case in cases():
        assert (BUDGET[case.name]["ctas"], BUDGET[case.name]["cluster"]) == (case.launch().ctas, case.launch().cluster)
