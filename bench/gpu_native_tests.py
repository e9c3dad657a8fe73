"""pytest plugin: tests/triton on a GPU instead of the emulator; tests/native without building once per worker.

    python3 -m pytest -p gpu_native_tests tests/triton tests/native      # with this file's folder on PYTHONPATH

Tensors that the tests make land on the card, since it is the default device. What looks at the emulator (its counters,
schedules, PTX), plants faults (a mutant may hang the card or leave a CUDA error behind), or makes its tensors on the
CPU by name is left out. A stop-gap until the tests take a device themselves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tests.softgpu_support as support

REHEARSAL = os.environ.get("GPU_TESTS_REHEARSE") == "1"  # the same on the emulator, to see that the plugin itself works
GPU = torch.cuda.is_available() or REHEARSAL
CARD = "cpu" if REHEARSAL else "cuda"
LEFT_OUT = ("test_budget", "test_gpu_report", "test_interpreter", "test_self_check", "test_compiled", "test_cutlass")


class Nothing(types.ModuleType):
    """Stands where the tests want softgpu."""

    def configured(self, **options: Any) -> Any:
        return contextlib.nullcontext()


if GPU:
    nothing = Nothing("softgpu")
    if not REHEARSAL:
        support.activate_triton = lambda: nothing
    import idlm_kernels.model.transformer as transformer
    import python_ref
    import tests.tiny as tiny

    empty, init, memory = python_ref.QState.empty, transformer.Transformer.__init__, tiny.MemoryCheckpoint.__init__

    def on_card(batch: int, num_k: int, vocab: int, dtype: torch.dtype, device: Any = None) -> Any:
        return empty(batch, num_k, vocab, dtype, torch.device(CARD) if in_triton else device)

    def model(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **({"device": CARD, **options} if in_triton else options))

    def checkpoint(self: Any, *args: Any, **options: Any) -> None:
        with torch.device("cpu"):  # from a generator of the CPU
            memory(self, *args, **options)
        if in_triton:
            self.tensors = {name: x.to(CARD) for name, x in self.tensors.items()}

    def built(command: Any, *args: Any, **options: Any) -> Any:
        """tests/native builds before it loads; what was carried without its build folder would be built again."""
        if (
            isinstance(command, list)
            and len(command) == 2
            and str(command[1]).endswith(os.path.join("csrc", "build.py"))
        ):
            from idlm_kernels import native

            with contextlib.suppress(native.NativeUnavailable):
                native.load()
                return subprocess.CompletedProcess(command, 0, "", "")
        return run(command, *args, **options)

    run, subprocess.run = subprocess.run, built  # type: ignore[assignment]
    in_triton = False
    python_ref.QState.empty = on_card  # type: ignore[method-assign]
    transformer.Transformer.__init__ = model  # type: ignore[method-assign]
    tiny.MemoryCheckpoint.__init__ = checkpoint  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    global in_triton
    in_triton = GPU and "tests/triton" in str(request.path)
    with torch.device(CARD) if in_triton else contextlib.nullcontext():
        yield
    if in_triton and not REHEARSAL:
        torch.cuda.synchronize()  # whose error it is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        return
    for item in items:
        path = str(item.path)
        why = None
        if any(name in path for name in LEFT_OUT):
            why = "about the emulator, a build or the CPU"
        elif "tests/triton" in path and "softgpu" in getattr(item, "fixturenames", ()):
            why = "looks at the emulator"
        elif "mutant" in item.name:
            why = "a planted fault may hang the card"
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    bad = [
        report.nodeid.split("::", 1)[-1]
        for name in ("failed", "error")
        for report in terminalreporter.stats.get(name, ())
    ]
    word = "ok" if not bad else "FAILED"
    print(f"\nVERDICT: {word}, {', '.join(f'{n} {name}' for name, n in counts.items())}; {' '.join(bad)[:600]}")
