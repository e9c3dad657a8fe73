"""Build entry point. What can be declared stands in pyproject.toml; what has to be computed belongs here: whether there
is a CUDA compiler to build the native module with, what else that takes, and whether there is a C++ compiler for the
CPU kernels. Without them the package installs all the same, and `idlm doctor` says what is missing.
IDLM_SKIP_CUDA_BUILD=1 and IDLM_SKIP_CPU_BUILD=1 leave them out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cpu  # noqa: E402
from build import CannotBuild, build, build_requirements, find_toolchain  # noqa: E402

NATIVE, CPU = "idlm_kernels.native._native", "idlm_kernels.cpu.libidlm_cpu"


class BuildNative(build_ext):
    """Builds what there are compilers for. An editable install leaves that to `make native` and `make native-cpu`."""

    def build_extension(self, extension: Extension) -> None:
        if self.editable_mode:
            return
        if extension.name == CPU:  # a plain library, not a Python module: no suffix of an interpreter
            try:
                build_cpu.build(Path(self.get_ext_fullpath(extension.name)).resolve().parent)
            except build_cpu.CannotBuild as reason:
                print(f"idlm_kernels: no CPU kernels: {reason}", file=sys.stderr)
            return
        os.environ.setdefault("IDLM_CUDART", "static")  # a wheel must not depend on what else is installed
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build(find_toolchain(), target, Path(self.build_temp).resolve() / "native")

    def copy_extensions_to_source(self) -> None:
        if not self.editable_mode:
            super().copy_extensions_to_source()


def extensions() -> list[Extension]:
    found = []
    try:
        find_toolchain()
        found.append(Extension(NATIVE, sources=[]))
    except CannotBuild as reason:
        print(f"idlm_kernels: no native module: {reason}", file=sys.stderr)
    try:
        if os.environ.get("IDLM_SKIP_CPU_BUILD") == "1":
            raise build_cpu.CannotBuild("IDLM_SKIP_CPU_BUILD=1 is set")
        build_cpu.find_compiler()
        found.append(Extension(CPU, sources=[]))
    except build_cpu.CannotBuild as reason:
        print(f"idlm_kernels: no CPU kernels: {reason}", file=sys.stderr)
    return found


# Reported to the installer, which puts them into the environment of an isolated build; nothing is fetched from here.
setup(ext_modules=extensions(), setup_requires=build_requirements(), cmdclass={"build_ext": BuildNative})
