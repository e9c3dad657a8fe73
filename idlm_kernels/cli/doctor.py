"""`idlm doctor`: what is installed here, which backend computes each op, and what that promises."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

from idlm_kernels._version import __version__
from idlm_kernels.cli.errors import reported

if TYPE_CHECKING:
    import torch


@reported()
def doctor() -> None:
    """Show versions, devices, the backend of each op and whether its rows keep their bits."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import idlm_kernels
    import idlm_kernels.native

    facts = Table(show_header=False, box=None)
    facts.add_row("idlm_kernels", __version__)
    facts.add_row("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})")
    facts.add_row("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})")
    facts.add_row("triton", _version("triton"))
    facts.add_row("native", idlm_kernels.native.status())
    facts.add_row("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    device_types = ["cpu"]
    if torch.cuda.is_available():
        device_types.append("cuda")
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            facts.add_row(f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}")
    else:
        facts.add_row("cuda", "no device")

    chosen = {device_type: idlm_kernels.backends(device_type) for device_type in device_types}
    ops = Table("op", *device_types)
    for op in chosen["cpu"]:
        ops.add_row(op, *(chosen[device_type][op] for device_type in device_types))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept = (_rows_keep_their_bits(device_type, dtype) for device_type in device_types)
        name = str(dtype).removeprefix("torch.")
        ops.add_row(f"rows of a {name} linear", *("keep their bits" if k else "depend on other rows" for k in kept))

    console = Console()
    console.print(facts)
    console.print("Backend of each op:")
    console.print(ops)
    if "cuda" in device_types:
        console.print("The torch backend promises no equal bits on CUDA: --check may find differences there.")


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
