"""Modules with a fault planted."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from tests.native.support import ROOT, Toolkit


def mutant(
    changed: str, old: str, new: str, source: str, softgpu: ModuleType, toolkit: Toolkit, folder: Path
) -> ModuleType:
    """The native module with `new` in place of `old` in a file of csrc.

    source: CUDA C++ that includes the file and defines what is to come from it. It is compiled (PTX only) and linked
    with the objects of the build.
    """
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / changed).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    (sources / changed).write_text(text.replace(old, new))
    (folder / "mutant.cu").write_text(source)
    flags = ["-std=c++17", f"-I{sources}", f"-I{sources / 'include'}", "-Xcompiler=-fPIC", "-c", "-gencode"]
    flags += ["arch=compute_90a,code=compute_90a", str(folder / "mutant.cu"), "-o", str(folder / "mutant.o")]
    done = subprocess.run([str(toolkit.toolchain.nvcc), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = ROOT / "build" / "native"
    library = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    # The mutant comes before the archive that holds the original.
    objects = [folder / "mutant.o", built / "CMakeFiles/_native.dir/csrc/bindings.cpp.o", built / "libidlm.a"]
    link = ["c++", "-shared", *map(str, objects), str(softgpu.library_path()), "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A name of its own: Python keeps one module per name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._native", library)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
