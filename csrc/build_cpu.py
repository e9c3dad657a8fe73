"""Builds the CPU kernels, a library with a C interface: any C++17 compiler of GCC's or Clang's kind, nothing else.

    python csrc/build_cpu.py             # into idlm_kernels/cpu, where the package looks for it

CXX chooses the compiler (default: the first of c++, g++, clang++). One object per instruction set, all in one library,
which chooses at run time; -march=native is never used. No fast-math: no result depends on what order a compiler likes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "libidlm_cpu.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
QUIET = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
SETS = {"plain": [], "avx2": AVX2, "avx512": [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni"))]}


class CannotBuild(RuntimeError):
    """There is no compiler, or it failed; the message says which and how."""


def sources() -> list[Path]:
    """Everything that the library is made of; idlm_kernels/cpu/native.py hashes the same."""
    csrc = ROOT / "csrc"
    return sorted([*csrc.glob("cpu/*.h"), *csrc.glob("cpu/*.cpp"), *csrc.glob("include/idlm/cpu.h")])


def source_hash() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()[:16]


def built_from(library: Path) -> str | None:
    """The hash of the sources that a library was built from; None where there is none that loads."""
    try:
        function = ctypes.CDLL(str(library)).idlm_cpu_source_hash
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_char_p
    found: bytes = function()
    return found.decode()


def find_compiler() -> list[str]:
    """The command of the C++ compiler. Raises CannotBuild."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if not shutil.which(command[0]):
            raise CannotBuild(f"CXX is {chosen}, which was not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise CannotBuild("no C++ compiler was found (c++, g++, clang++; CXX names another)")


def build(output: Path) -> Path:
    """Compile and link into the folder `output`; the library appears in one piece. Raises CannotBuild."""
    compiler = find_compiler()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    jobs = {path: [] for path in sources() if path.suffix == ".cpp" and not path.name.startswith("isa_")}
    for name, flags in SETS.items():
        if is_x86 or name == "plain":
            jobs[ROOT / "csrc" / "cpu" / f"isa_{name}.cpp"] = flags
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output) as folder:

            def compiled(job: tuple[Path, list[str]]) -> str:
                path, flags = job
                target = str(Path(folder) / f"{path.stem}.o")
                defines = [f'-DIDLM_CPU_SOURCE_HASH="{source_hash()}"', f"-I{ROOT / 'csrc' / 'include'}"]
                _run([*compiler, *FLAGS, *QUIET, *defines, *flags, "-c", str(path), "-o", target])
                return target

            # The long ones first.
            order = sorted(jobs.items(), key=lambda job: not job[0].name.startswith("isa_"))
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = list(pool.map(compiled, order))
            linked = Path(folder) / LIBRARY
            _run([*compiler, "-shared", "-pthread", *objects, "-o", str(linked)])
            os.replace(linked, output / LIBRARY)
    except OSError as error:  # a folder that cannot be written, a disk that is full
        raise CannotBuild(f"cannot build into {output}: {error}") from None
    return output / LIBRARY


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CPU kernels of idlm_kernels.")
    parser.add_argument("--output", type=Path, default=ROOT / "idlm_kernels" / "cpu", help="folder of the library")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where it is built from these sources")
    args = parser.parse_args()
    if args.if_needed and built_from(args.output.resolve() / LIBRARY) == source_hash():
        return 0
    start = time.monotonic()
    print("building the CPU kernels ...", file=sys.stderr, flush=True)
    try:
        path = build(args.output.resolve())
    except CannotBuild as reason:
        print(f"no CPU kernels: {reason}\ndecoding on a CPU goes on without, several times slower", file=sys.stderr)
        return 2
    print(f"built {path} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
