"""`idlm warm`: every Triton kernel of a model compiled before it is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from idlm_kernels.cli.errors import EXIT_MISMATCH, reported

if TYPE_CHECKING:
    from rich.progress import Progress


@reported()
def warm(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A Hugging Face folder or hub id, a .gguf file, qwen3-8b, or `default`."),
    ] = "default",
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder of the adapter, or `none`.", show_default="the one of the default model"),
    ] = None,
    plan: Annotated[
        Literal["auto", "ar", "chain", "quadratic"], typer.Option(help="The plans that will be served; auto: all.")
    ] = "auto",
    stride: Annotated[int, typer.Option("--stride", "-n", min=2, max=32, help="N, up to which.")] = 4,
    rule: Annotated[Literal["match", "rejection"], typer.Option(help="The rule of verification.")] = "match",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="The most requests that are decoded together.")] = 8,
    max_model_len: Annotated[
        list[int] | None,
        typer.Option(min=2, help="EngineOptions.max_model_len of an engine that will serve; may be repeated."),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page of the KV cache.")] = 64,
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="Type of the weights.")] = "auto",
    target: Annotated[
        str | None,
        typer.Option(help="Compile for another machine: cuda:90 is an H100.", show_default="the GPU of this one"),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers side by side.", show_default="the cores")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile beforehand what a model launches, so that no request waits for a compiler.

    What is compiled lies in Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache). It serves the same version of
    Triton and of this package, the plans and sizes named here, and, with --target, a machine where the cache has the
    same path. Prompts of other sizes than those tried may still compile a kernel. Exit status 1: some did not compile.
    """
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed here, so there is nothing to compile")
    if target is None:
        if not torch.cuda.is_available():
            raise ValueError(
                "torch sees no GPU here to compile for; name one with --target cuda:90 (an H100), and take Triton's "
                "cache along to where it is"
            )
        target = "cuda:{}{}".format(*torch.cuda.get_device_capability())
    from idlm_kernels.generate.warm import gpu_target
    from idlm_kernels.model.bundle import adapter_folder

    gpu_target(target)
    folder = None if adapter == "none" else adapter
    if adapter is None and (own := adapter_folder(model, Path(model).expanduser())):
        folder = str(own)
    wanted: dict[str, Any] = {
        "model": model,
        "adapter": folder,
        "plan": plan,
        "stride": stride,
        "rule": rule,
        "max_num_seqs": max_num_seqs,
        "max_model_lens": max_model_len or [2048],
        "page_size": page_size,
        "dtype": dtype,
        "target": target,
    }
    # Before there are many processes: what is wrong with the model is said once.
    from idlm_kernels.generate import warm as dry

    dry.load(dry.Wanted(**wanted))
    found = _compile(wanted, jobs or os.cpu_count() or 1, quiet=as_json)
    if as_json:
        print(json.dumps(found))
    else:
        print(
            f"{found['compiled']} kernels compiled, {found['cached']} were there, {found['seconds']:.0f} s of compilers"
        )
        for line in found["failed"]:
            print(f"failed: {line}", file=sys.stderr)
    if found["failed"]:
        raise typer.Exit(EXIT_MISMATCH)


def _compile(wanted: dict[str, Any], jobs: int, quiet: bool) -> dict[str, Any]:
    """Workers side by side, and one that counts what there is to do."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    found: dict[str, Any] = {"target": wanted["target"], "compiled": 0, "cached": 0, "seconds": 0.0, "failed": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as claims,
        Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True) as progress,
    ):
        task = progress.add_task("kernels", total=None)
        lock = threading.Lock()
        threads = [
            threading.Thread(target=_follow, args=({**wanted, "claims": claims}, found, lock, progress, task))
            for _ in range(jobs)
        ]
        threads.append(
            threading.Thread(target=_follow, args=({**wanted, "listing": True}, found, lock, progress, task))
        )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found["failed"] = sorted(set(found["failed"]))
    return found


def worker(wanted: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "idlm_kernels.generate.warm", json.dumps(wanted)]


def _follow(wanted: dict[str, Any], found: dict[str, Any], lock: Any, progress: Progress, task: Any) -> None:
    """Run a worker and take down what it tells."""
    # It compiles and shall not open a context on the GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = worker(wanted)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
    reader.start()
    ended, forms = False, 0
    try:
        for line in process.stdout or ():
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            with lock:
                if "end" in told:
                    ended = True
                elif "failed" in told:
                    found["failed"].append(told["failed"])
                elif "form" in told:
                    forms += 1
                else:
                    found["cached" if told["cached"] else "compiled"] += 1
                    found["seconds"] += told["seconds"]
                    progress.advance(task)
    finally:
        if process.poll() is None and not ended:
            process.kill()
    process.wait()
    reader.join()
    with lock:
        if wanted.get("listing") and ended:
            progress.update(task, total=forms)
        if not ended:
            last = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
            found["failed"].append(f"a compiler ended with status {process.returncode}: {last}")
