"""What the compiled Triton kernels cost, without a GPU: registers and spills from ptxas, counts from softgpu."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One launch under softgpu: the kernel's name, its PTX, dynamic shared memory in bytes, softgpu's counters, and
    the waves that its shared-memory accesses would take without bank conflicts."""

    name: str
    ptx: str
    shared_bytes: int
    counters: dict[str, Any]
    ideal_shared_waves: int

    @property
    def shared_waves(self) -> int:
        return self.counters["shared_load_wavefronts"] + self.counters["shared_store_wavefronts"]


def _waves(line: str) -> int:
    """Waves of one warp's shared-memory access without conflicts: 1, 2, 4 for 4, 8, 16 bytes per lane."""
    if matrix := re.search(r"\b(?:ld|st)matrix\S*\.x([124])\b", line):
        return int(matrix[1])
    if access := re.search(r"\b(?:ld|st)\.(?:volatile\.)?shared(?:::cta)?(?:\.v([24]))?\.[a-z](\d+)", line):
        return max(int(access[1] or 1) * int(access[2]) // 32, 1)
    return 0


@contextmanager
def recorded_launches(softgpu: ModuleType) -> Iterator[list[Launch]]:
    """Every Triton launch inside the with block, in order."""
    launches: list[Launch] = []
    run = JITFunction.run

    def recorded(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        ptx = kernel.asm["ptx"]
        text = ptx if isinstance(ptx, str) else ptx.decode()
        ideal = sum(count * _waves(line) for _, _, count, line in softgpu.profile())
        launches.append(Launch(name, text, kernel.metadata.shared, softgpu.counters(), ideal))
        return kernel

    JITFunction.run = recorded
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, bytes of spill stores and loads, bytes of stack; how many instructions of the innermost
    loops around matrix instructions are spills; of how many functions ptxas says that it makes wgmma wait for every
    single product (C7508, C7510, C7515)."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    spills_in_loops: int
    serialised: int


def resources(ptx: str) -> Resources:
    """What ptxas says of a kernel compiled as Triton compiles it for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(90).path,
            "-v",
            "--fmad=false",
            "--gpu-name=sm_90a",
            str(source),
            "-o",
            f"{source}.cubin",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        report = result.stdout + result.stderr
        disassemble = [str(Path(get_ptxas(90).path).with_name("nvdisasm")), "-c", f"{source}.cubin"]
        sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, report))

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    in_loops = sum(bool(re.search(r"\b(LDL|STL)", i)) for loop in _sass_loops(sass) for i in loop)
    return Resources(
        number(r"Used (\d+) registers"),
        spills,
        number(r"(\d+) bytes stack frame"),
        in_loops,
        len(re.findall(r"C7508|C7510|C7515", report)),
    )


def ctas_per_sm(ptx: str, registers: int, shared_bytes: int) -> int:
    """How many CTAs of a kernel an SM of an H100 holds at once: 64 warps, 65536 registers, 228 KB of shared memory, of
    which each CTA takes 1 KB more than it asks for."""
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    assert threads is not None, "the kernel does not say how many threads it has"
    warps = int(threads[1]) // 32
    registers_per_warp = -(-registers // 8) * 8 * 32
    return min(64 // warps, 65536 // registers_per_warp // warps, 228 * 1024 // (shared_bytes + 1024), 32)


def copies_in_flight(ptx: str) -> list[int]:
    """Of each innermost loop around matrix instructions: how many groups of cp.async may still be under way where it
    waits for the operands of a product. 0 says that loads and products take turns."""
    waits = [re.findall(r"cp\.async\.wait_group\s+(\d+)", "\n".join(loop)) for loop in _ptx_loops(ptx)]
    return [min(map(int, found)) for found in waits if found]


def _ptx_loops(ptx: str) -> list[list[str]]:
    return _matrix_loops(ptx, r"\s*(\$L\w+):", r"\s*([@a-z].*?);", r"\bbra\S*\s+(\$L\w+)", "wgmma.mma")


def _sass_loops(sass: str) -> list[list[str]]:
    instruction = r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);"
    return _matrix_loops(sass, r"\s*(\.L_\w+):", instruction, r"\bBRA\S*\s.*`\((\.L_\w+)\)", "HGMMA")


def _matrix_loops(text: str, label: str, instruction: str, jump: str, matrix: str) -> list[list[str]]:
    """The instructions of the innermost loops that hold a matrix instruction; patterns of the assembly language."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(code)
        elif found := re.match(instruction, line):
            code.append(found[1])
    loops = []
    for end, line in enumerate(code):
        target = re.search(jump, line)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append((labels[target[1]], end))
    loops = [(a, b) for a, b in loops if any(matrix in i for i in code[a : b + 1])]
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return [code[a : b + 1] for a, b in innermost]


def opcodes(ptx: str, prefix: str) -> set[str]:
    """The distinct opcodes of a kernel that begin with `prefix`."""
    return {found for found in re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", ptx, re.M) if found.startswith(prefix)}
