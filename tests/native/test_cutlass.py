"""CUTLASS headers: how they are found, and that this nvcc makes a wgmma kernel of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.native.support import ROOT, Toolkit


def fake_cutlass(folder: Path, version: tuple[int, int, int]) -> Path:
    """A folder of headers that says to be of this version."""
    headers = folder / "cutlass"
    headers.mkdir(parents=True)
    (headers / "cutlass.h").touch()
    lines = [f"#define CUTLASS_{part} {n}\n" for part, n in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)]
    (headers / "version.h").write_text("#pragma once\n" + "".join(lines))
    return folder


@pytest.fixture
def no_package(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python package nvidia-cutlass is not installed, CUTLASS_PATH not set."""
    find_spec = toolkit.build.importlib.util.find_spec
    monkeypatch.setattr(
        toolkit.build.importlib.util, "find_spec", lambda name: None if name == "cutlass_library" else find_spec(name)
    )
    monkeypatch.delenv("CUTLASS_PATH", raising=False)


@pytest.fixture
def user_of_cutlass(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source in csrc that includes CuTe."""
    (tmp_path / "csrc" / "gemm").mkdir(parents=True)
    (tmp_path / "csrc" / "gemm" / "kernel.cu").write_text("#include <cstdint>\n# include <cute/tensor.hpp>\n")
    monkeypatch.setattr(toolkit.build, "ROOT", tmp_path)


@pytest.mark.parametrize("below", [".", "include"])
def test_cutlass_path_comes_first(
    below: str, toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = fake_cutlass(tmp_path / below, (5, 0, 1))
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    found = toolkit.build.find_toolchain().cutlass
    assert found.include.samefile(include) and found.version == (5, 0, 1)
    assert "CUTLASS headers 5.0.1" in str(toolkit.build.find_toolchain())


def test_a_wrong_cutlass_path_is_named(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(toolkit.build.CannotBuild, match=f"{tmp_path}, where there is no include/cutlass/version.h"):
        toolkit.build.find_toolchain()
    fake_cutlass(tmp_path / "include", (3, 9, 0))
    with pytest.raises(toolkit.build.CannotBuild, match="whose version is 3.9.0; wanted 4.2 or newer"):
        toolkit.build.find_toolchain()


@pytest.mark.usefixtures("no_package")
def test_without_headers_sources_that_need_none_are_built(toolkit: Toolkit) -> None:
    assert not toolkit.build.sources_with_cutlass()
    toolchain = toolkit.build.find_toolchain()
    assert toolchain.cutlass is None and "no CUTLASS headers (no source needs them)" in str(toolchain)


@pytest.mark.usefixtures("no_package", "user_of_cutlass")
def test_missing_headers_are_named_where_a_source_needs_them(toolkit: Toolkit) -> None:
    wanted = r"csrc/gemm/kernel\.cu needs .* 4\.2 .* nvidia-cutlass.*CUTLASS_PATH"
    with pytest.raises(toolkit.build.CannotBuild, match=wanted):
        toolkit.build.find_toolchain()


@pytest.mark.usefixtures("user_of_cutlass")
def test_an_isolated_build_asks_for_what_its_sources_need(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolkit.build.build_requirements() == ["pybind11>=2.13", "ninja", "cmake>=3.24", "nvidia-cutlass>=4.2"]
    monkeypatch.setenv("CUTLASS_PATH", "/given")
    assert "nvidia-cutlass>=4.2" not in toolkit.build.build_requirements()
    monkeypatch.setenv("IDLM_SKIP_CUDA_BUILD", "1")
    assert toolkit.build.build_requirements() == []


def test_cmake_finds_them_too(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FindCUTLASS.cmake, for builds that do not come through csrc/build.py."""
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    fake_cutlass(tmp_path / "given" / "include", (4, 9, 2))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(engine LANGUAGES CXX)\n"
        f"list(APPEND CMAKE_MODULE_PATH {ROOT / 'csrc' / 'cmake'})\n"
        "find_package(CUTLASS 4.2 REQUIRED)\nmessage(STATUS \"found ${CUTLASS_VERSION} ${CUTLASS_INCLUDE_DIR}.\")\n"
    )

    def configure(name: str, *options: str) -> str:
        toolchain = toolkit.toolchain
        command = [toolchain.cmake, "-S", str(tmp_path), "-B", str(tmp_path / name), "-G", "Ninja", *options]
        command.append(f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja}")
        done = subprocess.run(command, capture_output=True, text=True)
        return " ".join((done.stdout + done.stderr).split())

    given = tmp_path / "given"
    assert f"found 4.9.2 {given / 'include'}." in configure("variable", f"-DCUTLASS_PATH={given}")
    monkeypatch.setenv("CUTLASS_PATH", str(given))
    assert f"found 4.9.2 {given / 'include'}." in configure("environment")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "nowhere"))
    assert "install the Python package nvidia-cutlass, or set CUTLASS_PATH" in configure("missing")


def test_cmake_names_the_source_that_needs_them(
    toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "idlm_kernels").mkdir()
    shutil.copy(ROOT / "idlm_kernels" / "_version.py", tmp_path / "idlm_kernels")
    (tmp_path / "csrc" / "gemm.cu").write_text("#include <cute/tensor.hpp>\n")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "nowhere"))
    toolchain = toolkit.toolchain
    command = [toolchain.cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja}", f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}"]
    done = subprocess.run([*command, "-DIDLM_BUILD_PYTHON=OFF"], capture_output=True, text=True)
    assert done.returncode != 0
    wanted = "csrc/gemm.cu needs the headers of CUTLASS 4.2 or newer, which were not found"
    assert wanted in " ".join(done.stderr.split())


def test_wgmma_through_cute(module: ModuleType, softgpu: ModuleType, toolkit: Toolkit) -> None:
    """A real use: cutlass_probe.cu, built by the CMake project, computes one wgmma tile."""
    if toolkit.toolchain.cutlass is None:
        pytest.skip("no CUTLASS headers (the Python package nvidia-cutlass, or CUTLASS_PATH)")
    build = ROOT / "build" / "native"
    command = [toolkit.toolchain.cmake, "--build", str(build), "--target", "cutlass_probe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (ptx,) = build.rglob("cutlass_probe.ptx")
    assert "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16" in ptx.read_text()
    assert ".".join(map(str, toolkit.toolchain.cutlass.version)) == module.CUTLASS_VERSION
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (64, 16), generator=generator).bfloat16()
    b = torch.randint(-4, 5, (8, 16), generator=generator).bfloat16()
    d = torch.full((64, 8), float("nan"))
    probe = softgpu.PtxModule(str(ptx))
    with softgpu.configured(strict=1, race=1, uninit=1, proxy=1):
        probe.launch("wgmma_tile", 1, 128, [a, b, d])
    assert torch.equal(d, a.float() @ b.float().T)
