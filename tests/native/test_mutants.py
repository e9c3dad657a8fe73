"""Planted faults: each must be caught by the same checks that the kernels pass.

A mutant is the fp32 kernels compiled from a changed copy of the sources (PTX only), linked with the objects of the
build.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.native import backend
from idlm_kernels.testing.decided import Mix, Rows, Step, Tally, check_rows, check_step
from tests.native.support import ROOT, Toolkit

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("ties of the k-th are cut", "threshold.cuh", "t = lowest_equal(search<false>(t,", "t = (search<false>(t,"),
    Mutant(
        "greedy ties go to a higher id",
        "row.cuh",
        "for (int e = kVector - 1; e >= 0; --e)",
        "for (int e = 0; e < kVector; ++e)",
    ),
    Mutant("top-p of the whole row", "threshold.cuh", "search<true>(t, 0, top_p)", "search<true>(lowest(), 0, top_p)"),
    Mutant("candidates are left out too early", "sampler.cuh", "bias = (1e-3f - score_of", "bias = (-2.0f - score_of"),
    Mutant(
        "mail is read before it is there",
        "cluster_reduce.cuh",
        "cluster_arrive();\n    cluster_wait();",
        "__syncthreads();",
    ),
    Mutant(
        "drafts of the wrong branch",
        "kernel.cuh",
        "(p.quadratic ? accepted * p.num_spec_tokens : 0)",
        "(p.quadratic ? r.num_drafts * p.num_spec_tokens : 0)",
    ),
    Mutant(
        "q is left out of the residual",
        "sampler.cuh",
        "- probability_if_kept(q_logit[e], q_cut, q_log_norm)",
        "- 0 * q_logit[e]",
    ),
    Mutant(
        "the number of accepted drafts is read before it is there",
        "kernel.cuh",
        "    __syncthreads();\n    const int32_t accepted = sAccepted;",
        "    const int32_t accepted = sAccepted;",
    ),
    Mutant("vectors reach beyond the row", "row.cuh", "if (aligned && valid >= kCount)", "if (aligned)"),
)


def battery(softgpu: ModuleType) -> None:
    """Raises if anything is wrong."""
    generator = torch.Generator().manual_seed(3)
    tally = Tally()
    rows = Rows.make(200, 60, torch.float32, generator, mixes=(Mix(3.0, top_k=3), Mix(0.0), Mix(top_k=9, top_p=0.6)))
    rows.logits = torch.randint(-3, 3, rows.logits.shape, generator=generator).float()
    ladder = torch.nextafter(torch.tensor(14.0), torch.tensor(15.0)) - 14.0
    steps = torch.randint(0, 100, (67, 1), generator=generator) + torch.randint(0, 6, (67, 60), generator=generator)
    rows.logits[::3] = 14.0 + ladder * steps
    check_rows(rows, backend, CPU, tally, "ties")
    for vocab_size in (300, 20_000):
        check_rows(Rows.make(30, vocab_size, torch.float32, generator), backend, CPU, tally, "mixes")
    with softgpu.configured(sched="random", seed=5, quantum=40):
        check_rows(Rows.make(10, 40_000, torch.float32, generator), backend, CPU, tally, "schedule")
    for rule in ("match", "rejection"):
        kinds = {"mixes": (Mix(), Mix(0.7)), "kinds": (2,), "closeness": 1.0}
        step = Step.make(60, 3, 100, torch.float32, generator, quadratic=True, rule=rule, **kinds)
        check_step(step, backend, CPU, tally, rule)
        with softgpu.configured(sched="random", seed=6, quantum=20):
            check_step(step.requests(0, 10), backend, CPU, tally, f"{rule}, schedule")
    tally.hold()

    rows = Rows.make(1, 61, torch.float32, generator, mixes=(Mix(),))
    tensors = [x for x in vars(rows).values() if isinstance(x, torch.Tensor)]
    ids, error_flags = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    with softgpu.configured(strict=1):
        for x in (*tensors, ids, error_flags):
            softgpu.register(x)
        args, options = rows.arguments()
        backend.sample_rows(*args, **options, error_flags=error_flags, out=ids)
        for x in (*tensors, ids, error_flags):
            softgpu.unregister(x)
    assert torch.equal(ids, python_ref.sample_rows(*args, **options))


@pytest.fixture
def build_mutant(module: ModuleType, toolkit: Toolkit, tmp_path: Path) -> Callable[[Mutant], ModuleType]:
    def build(mutant: Mutant) -> ModuleType:
        sources = tmp_path / "csrc"
        shutil.copytree(ROOT / "csrc", sources)
        changed = sources / "sampling" / mutant.file
        text = changed.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}"
        changed.write_text(text.replace(mutant.old, mutant.new))
        kernels = tmp_path / "rows_fp32.o"
        flags = ["-std=c++17", f"-I{sources}", f"-I{sources / 'include'}", "-Xcompiler=-fPIC", "-c", "-o", str(kernels)]
        flags += ["-gencode", "arch=compute_90a,code=compute_90a", str(sources / "sampling" / "rows_fp32.cu")]
        done = subprocess.run([str(toolkit.toolchain.nvcc), *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        built = ROOT / "build" / "native"
        library = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        # The mutant comes before the archive that holds the original.
        objects = [str(kernels), str(built / "CMakeFiles/_native.dir/csrc/bindings.cpp.o"), str(built / "libidlm.a")]
        link = [str(toolkit.toolchain.nvcc), "-shared", "-cudart", "shared", *objects, "-o", str(library)]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # A name of its own: Python keeps one module per name.
        spec = importlib.util.spec_from_file_location(f"{tmp_path.name}._native", library)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return build


def test_the_kernels_pass(module: ModuleType, softgpu: ModuleType) -> None:
    battery(softgpu)


@pytest.mark.usefixtures("clean_runtime")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(
    mutant: Mutant,
    build_mutant: Callable[[Mutant], ModuleType],
    softgpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = build_mutant(mutant)
    monkeypatch.setattr(backend, "load", lambda: changed)
    with pytest.raises((AssertionError, RuntimeError)):
        battery(softgpu)
