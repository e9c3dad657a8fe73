"""`idlm learn`: an adapter that goes on learning from the traces of the texts it has drafted."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from idlm_kernels.cli.errors import reported

if TYPE_CHECKING:
    from rich.progress import Progress

    from idlm_kernels.learning.learner import Learner, Round


@reported()
def learn(
    traces: Annotated[Path, typer.Option(help="What `idlm serve --traces DIR` keeps there.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the versions, v000001 and so on; goes on from the last.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The base that was served: a folder, a .gguf file, or `default`.")
    ] = "default",
    adapter: Annotated[
        Path | None,
        typer.Option(help="The first adapter, which the versions come after.", show_default="the default model's"),
    ] = None,
    mask_token_id: Annotated[
        int | None,
        typer.Option(
            help="Of an adapter whose MASK rows embed random ids, as Uno's: the id below which they are drawn.",
            show_default="what the adapter says",
        ),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Go on for ever, and look for new traces so often.",
            show_default="one round",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a round.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 8,
    learning_rate: Annotated[float, typer.Option("--lr", help="The highest.")] = 1e-3,
    rejected: Annotated[
        float, typer.Option(min=0, help="Weight of a token at which a draft was refused; the others weigh 1.")
    ] = 2.0,
    share_of_older: Annotated[
        float, typer.Option(min=0, max=0.95, help="Of the texts of a round: so that older traffic is not forgotten.")
    ] = 0.4,
    max_tokens: Annotated[int, typer.Option(min=16, help="Of a text that is learned from, prompt included.")] = 192,
    min_new: Annotated[int, typer.Option(min=1, help="New texts that make a round.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and traces give the same versions.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; serving needs some too.")] = 1,
    nice: Annotated[int, typer.Option(min=0, max=19, help="How far to step back behind other processes.")] = 10,
) -> None:
    """Learn from live traffic: an adapter that drafts better what is asked now, with unchanged texts.

    In one terminal the model is served and leaves traces; in another the learner reads them, and writes a version
    wherever held-out texts of the traffic say that it is better; the server takes it while requests run:

        idlm serve --traces traces --adapters adapters --watch-adapters 10
        idlm learn --traces traces -o adapters --watch 10

    No version can change a text: what is drafted is verified, whoever drafts.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from idlm_kernels.learning.learner import Learner, LearnSettings, versions
    from idlm_kernels.learning.traces import TraceReader
    from idlm_kernels.model import identity, load_checkpoint
    from idlm_kernels.model.adapter import DEFAULT_ADAPTER
    from idlm_kernels.training.dense import DenseModel
    from idlm_kernels.training.export import file_sha256
    from idlm_kernels.training.memory import keep_freed_memory

    if adapter is None and model != "default":
        raise ValueError("--adapter names the adapter to start from; only the default model brings one")
    settings = LearnSettings(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        rejected=rejected,
        share_of_older=share_of_older,
        max_tokens=max_tokens,
        min_new=min_new,
        seed=seed,
    )
    keep_freed_memory()
    torch.set_num_threads(threads)
    if hasattr(os, "nice"):
        os.nice(nice)
    checkpoint = load_checkpoint(model)
    reader = TraceReader(traces, identity(checkpoint), checkpoint.config.vocab_size)
    weights = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    learner = Learner(
        DenseModel.load(checkpoint, torch.device("cpu"), weights),
        reader,
        DEFAULT_ADAPTER if adapter is None else adapter,
        output,
        settings,
        base_name=checkpoint.name,
        base_sha256=file_sha256(checkpoint.path),
        noise_below=mask_token_id,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        while True:
            new = learner.look()
            done = _round(learner, bar, steps)
            if done is not None:
                bar.console.print(words(done), highlight=False, soft_wrap=True)
            if watch is None:
                break
            if done is None:
                time.sleep(watch)
    if done is None:
        raise ValueError(
            f"{traces}: {new} new texts, wanted {min_new} and a held-out one among them: serve some more, or lower"
            " --min-new"
        )
    if newest := max(versions(output), default=None):
        print(f"the newest version; try: idlm generate --adapter {output / newest} -p '...'", file=sys.stderr)


def _round(learner: Learner, bar: Progress, steps: int) -> Round | None:
    task = bar.add_task("learning", total=steps, note="", visible=False)

    def report(step: int, loss: float) -> None:
        bar.update(task, completed=step, note=f"loss {loss:.3f}", visible=True)

    try:
        return learner.round(report)
    finally:
        bar.remove_task(task)


def words(done: Round) -> str:
    """A round in a line."""
    before, after = done.tpf
    said = f"round {done.number}: {done.lessons} new texts, tokens per forward {before:.2f} -> {after:.2f}"
    if done.older is not None:
        said += f", on older ones {done.older[0]:.2f} -> {done.older[1]:.2f} (the first adapter {done.older[2]:.2f})"
    return f"{said}: {f'{done.version} is written' if done.version else f'not better than {done.parent}'}"
