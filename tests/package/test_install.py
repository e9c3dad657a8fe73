"""What is shipped, what importing it touches, and what the Makefile hands on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("idlm_kernels", "python_ref")


def run(*command: str, **settings: str) -> str:
    """Run a command in the checkout, with `settings` added to its environment, and return its stdout."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy: nothing stale in the checkout can get in."""
    source = tmp_path_factory.mktemp("source") / "idlm_kernels"
    junk = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=junk)
    out = tmp_path_factory.mktemp("dist")
    build = (
        f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    )
    pure = {**os.environ, "IDLM_SKIP_CUDA_BUILD": "1", "IDLM_SKIP_CPU_BUILD": "1"}
    done = subprocess.run([sys.executable, "-c", build], cwd=source, env=pure, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_two_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    package = ROOT / "idlm_kernels"
    data = [*package.glob("training/*.json"), *package.glob("adapters/*/*"), *package.glob("serve/*.html")]
    assert any(path.suffix == ".safetensors" for path in data)
    assert shipped == sources | {"idlm_kernels/py.typed"} | {str(path.relative_to(ROOT)) for path in data}
    assert wheel.stat().st_size < 12e6


def test_the_wheel_carries_licence_notice_and_the_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert {"licenses/LICENSE", "licenses/NOTICE"} <= info.keys()
        assert "idlm = idlm_kernels.cli:main" in archive.read(info["entry_points.txt"]).decode()
        assert "Requires-Python: >=3.10" in archive.read(info["METADATA"]).decode()


def test_a_wheel_built_where_there_is_a_cpp_compiler_brings_the_cpu_kernels(tmp_path: Path) -> None:
    """The compiler is a stand-in that writes what it is asked to; that it can also fail is seen in the log alone."""
    source = tmp_path / "source"
    junk = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results", "tests", "*.so")
    shutil.copytree(ROOT, source, ignore=junk)
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n')
    compiler.chmod(0o755)
    build = f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})"
    environ = {**os.environ, "IDLM_SKIP_CUDA_BUILD": "1", "CXX": str(compiler)}
    done = subprocess.run([sys.executable, "-c", build], cwd=source, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not wheel.name.endswith("-none-any.whl"), "a wheel with machine code is not for every machine"
    held = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert held == ["idlm_kernels/cpu/libidlm_cpu.so"]


def test_the_sdist_can_be_tested_and_built_again(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "CMakeLists.txt",
        "LICENSE",
        "NOTICE",
        "csrc/build.py",
        "csrc/cmake/FindCUTLASS.cmake",
        "idlm_kernels/training/forms.json",
        "idlm_kernels/adapters/smollm2-135m-instruct/adapter_model.safetensors",
        "csrc/include/idlm/sampling.h",
        "tests/native/cutlass_probe.cu",
    }
    assert wanted | {"tests/package/test_install.py", "idlm_kernels/_version.py"} <= held


@pytest.mark.parametrize(("skip", "wanted"), [("0", {"pybind11", "ninja", "cmake"}), ("1", set())])
def test_an_isolated_build_brings_what_the_native_module_needs(skip: str, wanted: set[str], tmp_path: Path) -> None:
    """Where there is an nvcc, the installer is told of the packages that a build with it takes; elsewhere of none."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = tmp_path / "idlm_kernels"
    package.mkdir()
    shutil.copy(ROOT / "idlm_kernels" / "__init__.py", package)
    shutil.copy(ROOT / "idlm_kernels" / "_version.py", package)
    program = "from setuptools import build_meta as b; print('REQUIRES', *b.get_requires_for_build_wheel())"
    environ = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "IDLM_SKIP_CUDA_BUILD": skip}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("REQUIRES"))
    assert {Requirement(one).name for one in line.split()[1:]} == wanted


def test_every_dependency_is_pinned_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(line)
        for line in project["dependencies"] + extras["test"] + extras["bench"] + extras["dev"] + extras["serve"]
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for python in ("3.10", "3.11", "3.13"):
        pins: dict[str, str] = {}
        for line in lines:
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
                pins[pin.name] = str(pin.specifier).removeprefix("==")
        for requirement in wanted:
            if requirement.name != project["name"]:
                name = requirement.name.lower().replace("_", "-")
                assert requirement.specifier.contains(pins[name]), (
                    f"{requirement} against {name}=={pins[name]}"
                )


def test_importing_touches_no_device_and_needs_neither_triton_nor_nvcc() -> None:
    """Every way to a device is made to fail, so that the test says the same with and without a GPU."""
    program = """
import sys
import torch
def refuse(*args, **kwargs):
    raise AssertionError("a device was touched")
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
sys.modules["triton"] = None
import idlm_kernels, idlm_kernels.cli, idlm_kernels.generate
heavy = {"transformers", "huggingface_hub", "peft", "matplotlib", "pytest"} & set(sys.modules)
assert not heavy, heavy
"""
    run(sys.executable, "-c", program, PATH=os.path.dirname(sys.executable))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
class TestMakefile:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        """A checkout whose environment counts as installed and whose `idlm` prints its arguments."""
        for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        bin_folder = tmp_path / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder / "idlm").write_text(f"#!{sys.executable}\nimport sys\nprint(ascii(sys.argv[1:]))\n")
        (bin_folder / "idlm").chmod(0o755)
        for stamp in (".created", ".torch", ".installed"):
            (tmp_path / ".venv" / stamp).touch()
        return tmp_path

    def make(self, tree: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        # The tests may themselves run under make, which hands its variables down.
        ours = ("MAKE", "MFLAGS", "ARGS", "PROMPT", "PYTHON", "IDLM_TORCH_INDEX")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return subprocess.run(
            ["make", *arguments], cwd=tree, env={**env, **settings}, capture_output=True, text=True
        )

    PROMPT = """it's "quoted" $HOME ${HOME} $$ $(shell touch made) `touch made` \\ # % ;ü
second line"""

    def test_the_prompt_arrives_as_it_was_written(self, tree: Path) -> None:
        done = self.make(tree, "generate", f"PROMPT={self.PROMPT}", "ARGS=--stop 'a b'")
        assert done.stdout == ascii(["generate", f"--prompt={self.PROMPT}", "--stop", "a b"]) + "\n", (
            done.stderr
        )
        assert not (tree / "made").exists()

    def test_the_prompt_may_come_from_the_environment(self, tree: Path) -> None:
        done = self.make(tree, "generate", PROMPT=self.PROMPT)
        assert done.stdout == ascii(["generate", f"--prompt={self.PROMPT}"]) + "\n", done.stderr

    def test_no_prompt_is_an_error_that_shows_how(self, tree: Path) -> None:
        done = self.make(tree, "generate", PROMPT="")
        assert done.returncode == 2 and 'PROMPT="' in done.stderr and done.stdout == ""

    @pytest.mark.parametrize(
        ("interpreter", "message"),
        [
            ("#!/bin/sh\nexit 1\n", "Python 3.10 or newer is needed"),
            (
                '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n',
                "without the venv and ensurepip modules",
            ),
        ],
    )
    def test_an_unfit_python_is_named(self, tree: Path, interpreter: str, message: str) -> None:
        shutil.rmtree(tree / ".venv")
        python = tree / "python"
        python.write_text(interpreter)
        python.chmod(0o755)
        done = self.make(tree, "generate", "PROMPT=x", f"PYTHON={python}")
        assert done.returncode == 2 and message in done.stderr and str(python) in done.stderr

    def test_help_lists_every_target(self, tree: Path) -> None:
        listed = set(re.findall(r"make ([\w-]+) ", self.make(tree).stdout))
        (phony,) = re.findall(r"^\.PHONY: (.*)$", (tree / "Makefile").read_text(), re.MULTILINE)
        assert listed >= set(phony.split())
