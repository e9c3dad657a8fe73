"""`idlm doctor`: what is installed here, which backend computes each op, whether it is right, and what it promises."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from idlm_kernels._version import __version__
from idlm_kernels.cli.errors import EXIT_MISMATCH, reported

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from idlm_kernels.ops import Backend


@dataclass(frozen=True)
class Check:
    """An op of a device backend on a model of device. reason: why it is not to be trusted, None if it passed."""

    backend: str
    op: str
    model: str
    reason: str | None
    has_check: bool

    @property
    def word(self) -> str:
        return "ok" if self.reason is None else "wrong" if self.has_check else "not checked"


@reported()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, devices, the backend of each op and whether its rows keep their bits.

    Where there is a GPU, every kernel for it is first compared with the references on small problems, as `auto` does at
    first use. It takes some seconds, longer the first time, when the kernels are compiled. Exit status 1: a kernel that
    `auto` would have used is wrong here.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    import idlm_kernels
    import idlm_kernels.cpu.native
    import idlm_kernels.native

    facts = {
        "idlm_kernels": __version__,
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        "triton": _version("triton"),
        "native": idlm_kernels.native.status(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cpu kernels": idlm_kernels.cpu.native.status(),
    }
    device_types = ["cpu"]
    if torch.cuda.is_available():
        device_types.append("cuda")
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            facts[f"cuda:{index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory}"
    else:
        facts["cuda"] = "no device"

    console = Console(quiet=as_json)
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(name, fact)
    console.print(table)
    places = _places(device_types)
    checks = _checks([(backend, model, device) for backend, model, device, unusable in places if unusable is None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that failed: they are shown below
        chosen = {device_type: idlm_kernels.backends(device_type) for device_type in device_types}
    ops = Table("op", *device_types)
    for op in chosen["cpu"]:
        ops.add_row(op, *(chosen[device_type][op] for device_type in device_types))
    kept = {
        str(dtype).removeprefix("torch."): {kind: _rows_keep_their_bits(kind, dtype) for kind in device_types}
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    for name, by_device in kept.items():
        words = ("keep their bits" if k else "depend on other rows" for k in by_device.values())
        ops.add_row(f"rows of a {name} linear", *words)

    console.print("Backend of each op:")
    console.print(ops)
    if "torch" in chosen.get("cuda", {}).values():
        console.print("The torch backend promises no equal bits on CUDA: --check may find differences there.")
    for backend, model, _, unusable in places:
        if unusable is not None:
            console.print(f"Backend {backend.name} is not usable on {model}: {unusable}.", markup=False)
    _show(checks, console)
    limits = {b.name: getattr(b.load(), "LIMITS", {}) for b, _, _, unusable in places if unusable is None}
    for name, by_op in limits.items():
        for op, limit in by_op.items():
            console.print(f"{op} of {name} takes {limit}; the next backend in line computes the rest.", markup=False)
    if as_json:
        record = {
            "facts": facts,
            "ops": chosen,
            "rows_keep_their_bits": kept,
            "unusable": {f"{b.name} on {model}": why for b, model, _, why in places if why is not None},
            "limits": limits,
            "checks": [{"verdict": check.word, **dataclasses.asdict(check)} for check in checks],
        }
        print(json.dumps(record), flush=True)
    if any(check.word == "wrong" for check in checks):
        raise typer.Exit(EXIT_MISMATCH)


def _places(device_types: list[str]) -> list[tuple[Backend, str, torch.device, str | None]]:
    """Backends that `auto` takes only where they pass a check, with a model of device, and why it cannot run there."""
    from idlm_kernels.ops import _dispatch

    return [
        (backend, model, device, backend.unusable(device))
        for device_type in device_types
        for model, device in _dispatch.models(device_type).items()
        for backend in _dispatch.checked_backends(device)
    ]


def _checks(places: list[tuple[Backend, str, torch.device]]) -> list[Check]:
    """The self-checks of backends, with a bar that shows how far they are."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from idlm_kernels.ops import OPS, _dispatch
    from idlm_kernels.ops.self_check import CHECKS

    wanted = [(b, op, model, device) for b, model, device in places for op in OPS if hasattr(b.load(), op)]
    checks = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("self-check", total=len(wanted))
        for backend, op, model, device in wanted:
            progress.update(task, description=f"{backend.name} {op}")
            reason = _dispatch.verdict(backend, op, model, device)
            checks.append(Check(backend.name, op, model, reason, op in CHECKS))
            progress.advance(task)
    return checks


def _show(checks: list[Check], console: Console) -> None:
    from rich.table import Table

    if not checks:
        console.print("Self-check: there is no GPU kernel to check here.")
        return
    console.print("Self-check, against the references:")
    places = list(dict.fromkeys((check.backend, check.model) for check in checks))
    words = {(check.op, check.backend, check.model): check.word for check in checks}
    table = Table("op", *(f"{backend}, {model}" for backend, model in places))
    for op in dict.fromkeys(check.op for check in checks):
        table.add_row(op, *(words.get((op, *place), "") for place in places))
    console.print(table)
    for check in checks:
        if check.reason is not None:
            console.print(f"{check.op} of {check.backend} on {check.model}: {check.reason}.", markup=False)


def _rows_keep_their_bits(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a row gets the same bits among 1 to 64 rows from the backend in use; exactness rests on it."""
    import torch

    import idlm_kernels

    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 512, generator=random).to(device_type, dtype) for n in (64, 1024))
    weight = idlm_kernels.prepare_weight(weight)
    whole = idlm_kernels.linear(x, weight)
    return all(torch.equal(idlm_kernels.linear(x[:rows], weight), whole[:rows]) for rows in range(1, 64))


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
