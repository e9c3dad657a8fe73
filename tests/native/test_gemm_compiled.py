"""What the compiler made of the linear layers: occupancy, matrix products side by side, and the order of what CTAs and
launches tell each other, which softgpu cannot show."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.native.support import Toolkit

EVICT_FIRST = 0x12F0000000000000  # kEvictFirst of csrc/common/hopper.cuh: how weights are loaded


@pytest.fixture(scope="module")
def kernels(module: ModuleType, toolkit: Toolkit) -> dict[str, str]:
    """PTX by kernel."""
    command = [toolkit.tool("cuobjdump"), "-ptx", str(module.__file__)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pieces = re.split(r"\.entry (\S+?)\(", text)[1:]
    found = {name: body for name, body in zip(pieces[::2], pieces[1::2], strict=True) if "linear_kernel" in name}
    assert len(found) == 8
    return found


def with_adapter(kernels: dict[str, str]) -> dict[str, str]:
    found = {name: text for name, text in kernels.items() if "ELb1E" in name}
    assert len(found) == 4
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
        registers = re.findall(r"Compiling entry function '\S+Li(\d)ELb\d\S+'.*?Used (\d+) registers", report, re.S)
        assert len(registers) == 4
        for token_tiles, count in registers:
            ctas = {"1": 4, "2": 2}[token_tiles]
            assert -(-int(count) // 8) * 8 * 160 * ctas <= 65536, (token_tiles, count)


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


def test_only_weights_are_touched_before_the_previous_kernel_has_ended(kernels: dict[str, str]) -> None:
    for name, text in kernels.items():
        early = before_wait(text)
        assert 50 < len(early) < len(text.splitlines()) - 50, name
        assert not [line for line in early if GLOBAL.search(line)], name
        loads = [line for line in early if "cp.async.bulk.tensor" in line]
        policies = {re.search(r"(%rd\d+);$", line)[1] for line in loads}  # type: ignore[index]
        assert loads
        for policy in policies:
            values = re.findall(rf"mov\.[bu]64\s+{policy}, (\S+);", text)
            assert values and {int(v, 0) for v in values} == {EVICT_FIRST}, (name, policy, values)


def test_h_is_handed_over_in_order(kernels: dict[str, str]) -> None:
    """Who stores h fences it for TMA, meets the other threads and releases; who loads it acquires and fences. The words
    are set back by whoever acquired last."""
    for name, text in with_adapter(kernels).items():
        code = [line.strip() for line in text.splitlines()]
        code = [line for line in code if line and not line.startswith((".loc", "//", "$L", "{", "}"))]
        (release,) = (i for i, line in enumerate(code) if line.startswith("red.release.gpu.global.add"))
        barrier = max(i for i in range(release) if code[i].startswith(("bar.sync", "barrier.sync")))
        fences = [i for i, line in enumerate(code) if line.startswith("fence.proxy.async.global")]
        stores = [i for i in range(barrier) if code[i].startswith("st.global")]
        assert any(max(stores) < fence < barrier for fence in fences), name
        acquires = [i for i, line in enumerate(code) if line.startswith("ld.acquire.gpu.global")]
        assert acquires, name
        for acquire in acquires:
            following = code[acquire : acquire + 40]
            fence = next(i for i, line in enumerate(following) if line.startswith("fence.proxy.async.global"))
            assert not [line for line in following[:fence] if "cp.async.bulk" in line], name
        assert len([line for line in code if line.startswith("atom.acq_rel.gpu.global.add")]) == 1, name
    for name, text in kernels.items():
        if name not in with_adapter(kernels):
            assert not re.search(r"\b(red|atom|ld\.acquire)\.", text), f"{name} has flags"
