"""Builds the native module: finds an nvcc, configures CMake and builds. Needs neither torch nor an installed package.

    python csrc/build.py                 # into idlm_kernels/native, objects in build/native; repeats are incremental
    python csrc/build.py --check         # only says what would be used, or what is missing

IDLM_CUDART=shared|static chooses the CUDA runtime: shared (default) is what torch's own wheels load and what an
emulator can stand in for; static is for wheels that are given away. CUDA_HOME chooses the toolkit. Needs the Python
packages pybind11, ninja and cmake (the extra `native-build`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIN_NVCC = (12, 4)


class CannotBuild(RuntimeError):
    """Something that the build needs is missing; the message says what and where it was looked for."""


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    nvcc_version: tuple[int, int]
    cmake: str
    ninja: str
    pybind11_dir: str


def _nvcc_candidates() -> list[Path]:
    found = [Path(os.environ[v]) / "bin" / "nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    # The PyPI packages nvidia-cuda-nvcc and friends.
    for site in dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib")):
        found.extend(sorted(Path(site).glob("nvidia/*/bin/nvcc"), reverse=True))
    return [p for p in found if p.is_file()]


def _nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _tool(name: str) -> str:
    # The interpreter's own scripts first: the versions of the extra, not those that happen to be on PATH.
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise CannotBuild(f"{name} was not found; install the Python packages pybind11, ninja and cmake")
    return found


def find_toolchain() -> Toolchain:
    """What a build would use. Raises CannotBuild with the reason."""
    if os.environ.get("IDLM_SKIP_CUDA_BUILD") == "1":
        raise CannotBuild("IDLM_SKIP_CUDA_BUILD=1 is set")
    too_old = []
    for nvcc in _nvcc_candidates():
        version = _nvcc_version(nvcc)
        if version is not None and version >= MIN_NVCC:
            break
        too_old.append(f"{nvcc} ({'.'.join(map(str, version)) if version else 'does not run'})")
    else:
        why = "looked at CUDA_HOME, PATH, /usr/local/cuda and nvidia-cuda-nvcc"
        if too_old:
            why = f"found only {', '.join(too_old)}"
        raise CannotBuild(f"no nvcc of CUDA {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer: {why}")
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("the Python package pybind11 is missing; install the extra native-build") from None
    return Toolchain(nvcc, version, _tool("cmake"), _tool("ninja"), pybind11.get_cmake_dir())


def build(toolchain: Toolchain, output: Path, build_dir: Path, *, jobs: int = 0, example: bool = False) -> None:
    """Configure and build the module `_native` into `output`. Raises subprocess.CalledProcessError."""
    runtime = os.environ.get("IDLM_CUDART", "shared")
    if runtime not in ("shared", "static"):
        raise CannotBuild(f"IDLM_CUDART is {runtime!r}, wanted shared or static")
    configure = [
        toolchain.cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja}",
        f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={toolchain.pybind11_dir}",
        f"-DIDLM_CUDART={runtime}",
        f"-DIDLM_MODULE_DIR={output}",
        f"-DIDLM_BUILD_EXAMPLE={'ON' if example else 'OFF'}",
    ]  # fmt: skip
    # The PyPI packages hold libcudart.so.N without the link that CMake looks for.
    libraries = toolchain.nvcc.resolve().parents[1] / "lib"
    if not (libraries / "libcudart.so").exists() and (found := sorted(libraries.glob("libcudart.so.*"))):
        configure += [f"-DCUDA_CUDART={found[0]}", f"-DCUDA_cudart_LIBRARY={found[0]}"]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    command = [toolchain.cmake, "--build", str(build_dir)]
    if jobs:
        command += ["-j", str(jobs)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels of idlm_kernels.")
    parser.add_argument("--output", type=Path, default=ROOT / "idlm_kernels" / "native", help="folder of the module")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "native", help="folder of the objects")
    parser.add_argument("--jobs", type=int, default=0, help="compilations at a time; 0: as many as there are cores")
    parser.add_argument("--example", action="store_true", help="build the C++ example too")
    parser.add_argument("--check", action="store_true", help="build nothing, say what would be used")
    args = parser.parse_args()
    try:
        toolchain = find_toolchain()
        if args.check:
            version = ".".join(map(str, toolchain.nvcc_version))
            print(f"nvcc {version} ({toolchain.nvcc}), {toolchain.cmake}, {toolchain.ninja}")
            return 0
        build(toolchain, args.output.resolve(), args.build_dir.resolve(), jobs=args.jobs, example=args.example)
    except CannotBuild as reason:
        print(f"cannot build the native module: {reason}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"the native build failed: {error.cmd[0]} ended with status {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
