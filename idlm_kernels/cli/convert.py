"""`idlm convert`: a model whose MASK token proposes, made from one that only continues; all weights are trained."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idlm_kernels.cli.errors import reported
from idlm_kernels.cli.train_adapter import WORK, continued, figures_of, prompts_of

if TYPE_CHECKING:
    from idlm_kernels.training.convert import ConvertLoss
    from idlm_kernels.training.dense import DenseModel

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


@reported()
def convert(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the new model. A run that was interrupted goes on there.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The base: a Hugging Face folder or hub id.")],
    mask_token_id: Annotated[
        int | None, typer.Option(help="The id of MASK, of a token that no text uses.", show_default="the model's")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own prompts: JSON lines with a prompt or messages each.", show_default="a built-in generator"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many of the built-in prompts.")] = 4000,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts that are kept out of training, to measure by.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=8, help="The longest continuation.")] = 160,
    strides: Annotated[str, typer.Option(help="The curriculum, for --steps steps each.")] = "2,3,4",
    recipe: Annotated[
        Literal["balanced", "paper"],
        typer.Option(help="How the clean half of the loss weighs; paper: as the authors of I-DLM train."),
    ] = "balanced",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each stride.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Continuations per step.")] = 12,
    learning_rate: Annotated[float, typer.Option("--lr", help="The highest.")] = 2e-5,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same model.")] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is a device.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Convert a model into an introspective diffusion model (arXiv 2604.11035): all its weights are trained.

    First the base continues the prompts, then it learns on its own continuations to predict from MASK tokens too. Both
    are written as they go: run the same command again after an interruption. An adapter (`idlm train-adapter`) costs
    far less and leaves the base's text as it is.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from idlm_kernels.model import load_checkpoint
    from idlm_kernels.training import convert as conversion
    from idlm_kernels.training.acceptance import Predictions
    from idlm_kernels.training.data import DataSettings
    from idlm_kernels.training.dense import DenseModel
    from idlm_kernels.training.export import file_sha256
    from idlm_kernels.training.memory import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = conversion.ConvertSettings(
        strides=_strides(strides), steps=steps, batch=batch, learning_rate=learning_rate, recipe=recipe, seed=seed
    )
    checkpoint = load_checkpoint(model)
    if not checkpoint.path.is_dir():
        raise ValueError(f"{checkpoint.path}: wanted a Hugging Face folder or hub id, whose tokenizer's files are kept")
    if output.resolve() == checkpoint.path.resolve():
        raise ValueError(f"{output}: --output is the base's own folder; choose another one")
    if mask_token_id is not None:
        checkpoint.config = dataclasses.replace(checkpoint.config, mask_token_id=mask_token_id)
    if checkpoint.config.mask_token_id is None:
        raise ValueError(f"{checkpoint.path}: the model names no MASK token; give --mask-token-id, of one no text uses")
    base = DenseModel.load(checkpoint, torch.device(device), torch.float32)
    longest = max_tokens + max(settings.strides)
    if longest >= checkpoint.config.max_position_embeddings:
        raise ValueError(f"{longest} tokens do not fit the context of {checkpoint.config.max_position_embeddings}")
    texts = prompts_of(checkpoint.tokenizer, data, prompts, seed)
    if len(texts) <= held_out:
        raise ValueError(f"{len(texts)} prompts, of which {held_out} are held out: nothing is left to train on")
    work = output / WORK
    made = DataSettings(file_sha256(checkpoint.path), max_tokens, min(128, max(8, len(texts) // 8)), seed)
    greedy = dataclasses.replace(made, sampled_share=0.0)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        held = continued(bar, "held-out prompts", base, texts[:held_out], work / "held_out.jsonl", greedy)
        samples = continued(bar, "continuing prompts", base, texts[held_out:], work / "data.jsonl", made)
        total = steps * len(settings.strides)
        task = bar.add_task("converting", total=total, note="")

        def report(trained: DenseModel, step: int, stride: int, loss: ConvertLoss) -> None:
            note = f"N={stride}, masked {float(loss.masked):.3f}, clean {float(loss.clean):.3f}"
            bar.update(task, completed=step, note=note)
            if step % steps == 0:
                figures = figures_of(Predictions.of(trained, None, None, held, stride - 1))
                bar.console.print(f"step {step}: {note}, {figures}", highlight=False, soft_wrap=True)

        saved, every = work / "checkpoint.safetensors", max(1, min(25, total // 10))
        done = conversion.convert(base, samples, settings, saved, save_every=every, report=report)
    conversion.save_checkpoint(output, done)
    for pattern in _TOKENIZER_FILES:
        for file in checkpoint.path.glob(pattern):
            shutil.copyfile(file, output / file.name)
    print(f"done; try: idlm generate --model {output} -p 'Why is the sky blue?'", file=sys.stderr)


def _strides(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--strides is {text!r}, wanted numbers such as 2,3,4") from None
