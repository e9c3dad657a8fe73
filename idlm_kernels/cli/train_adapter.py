"""`idlm train-adapter`: prompts, the base model's continuations of them, and an adapter that foresees them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idlm_kernels.cli.errors import reported

if TYPE_CHECKING:
    from rich.progress import Progress

    from idlm_kernels.model import Tokenizer
    from idlm_kernels.model.adapter import Adapter
    from idlm_kernels.model.config import ModelConfig
    from idlm_kernels.training.acceptance import Predictions
    from idlm_kernels.training.data import DataSettings, Sample
    from idlm_kernels.training.dense import DenseModel

WORK = "training"  # of the output folder: what a run needs to go on


@reported()
def train_adapter(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the adapter. A run that was interrupted goes on there.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The base: a Hugging Face folder, a .gguf file, or `default`.")
    ] = "default",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own prompts: JSON lines with a prompt or messages each.", show_default="a built-in generator"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many of the built-in prompts.")] = 4000,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts that are kept out of training, to measure by.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=8, help="The longest continuation.")] = 160,
    stride: Annotated[int, typer.Option("--stride", "-n", min=2, max=32, help="N: drafts reach N - 1 tokens.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA pairs.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(min=1e-3, help="The pairs are scaled by alpha / rank.", show_default="the rank")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="An adapter to start from; it decides rank, alpha and the head.", show_default="none"
        ),
    ] = None,
    loss: Annotated[
        Literal["ce", "tv", "ce-tv"],
        typer.Option(
            help="Cross-entropy; total variation, what acceptance falls by, which wants a start that knows some; or"
            " one after the other, from nothing."
        ),
    ] = "ce",
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL divergence beside total variation.")] = 0.01,
    curriculum: Annotated[bool, typer.Option(help="Train strides 2, 4, 8 .. N one after the other.")] = False,
    mask_input: Annotated[
        Literal["vector", "uniform"] | None,
        typer.Option(
            help="What MASK rows embed: a vector that is learned too, or random ids, as Uno.",
            show_default="vector, or what --from was trained on",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps; the learning rate falls to the end.")] = 1000,
    until: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many of the --steps; a later call may go on.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Continuations per step.")] = 12,
    learning_rate: Annotated[float, typer.Option("--lr", help="The highest.")] = 2e-3,
    rerank: Annotated[bool, typer.Option(help="Train a re-ranking head too.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same adapter.")] = 0,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Of the frozen weights; auto: bf16 where it is fast.")
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is a device.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Train a LoRA adapter for MASK rows, so that the base model decodes faster with unchanged output.

    First the base model continues the prompts (self-distillation), then the adapter learns to foresee the
    continuations. Both are written as they go: run the same command again after an interruption. The folder is loaded
    by `idlm generate --adapter` and, as it has PEFT's layout, by peft. Two minutes on a laptop show that it works:

        idlm train-adapter -o quick --prompts 150 --max-tokens 48 --steps 25 --held-out 6
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from idlm_kernels.model import load_checkpoint
    from idlm_kernels.model.adapter import load_adapter
    from idlm_kernels.model.download import DEFAULT_MODEL_HUB_ID
    from idlm_kernels.training.acceptance import Predictions
    from idlm_kernels.training.data import DataSettings
    from idlm_kernels.training.dense import DenseModel
    from idlm_kernels.training.export import Provenance, export, file_sha256
    from idlm_kernels.training.memory import keep_freed_memory
    from idlm_kernels.training.train import Trainee, TrainSettings, train

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = load_checkpoint(model)
    begun = load_adapter(start, checkpoint.config) if start is not None else None
    if begun is not None:
        rank, alpha = begun.rank, begun.scale * begun.rank
    settings = TrainSettings(
        stride=stride,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        loss=loss,
        kl=0.0 if loss == "ce" else kl,
        curriculum=curriculum,
        rerank_width=_width_of(begun) if rerank else 0,
        noise_below=_noise_bound(checkpoint.config, begun, mask_input),
        seed=seed,
        start="" if start is None else file_sha256(start),
    )
    weights = torch.float32 if dtype == "fp32" or (dtype == "auto" and not _fast_bf16(device)) else torch.bfloat16
    base = DenseModel.load(checkpoint, torch.device(device), weights)
    if (longest := max_tokens + stride) >= checkpoint.config.max_position_embeddings:
        raise ValueError(f"{longest} tokens do not fit the context of {checkpoint.config.max_position_embeddings}")
    texts = prompts_of(checkpoint.tokenizer, data, prompts, seed)
    if len(texts) <= held_out:
        raise ValueError(f"{len(texts)} prompts, of which {held_out} are held out: nothing is left to train on")
    sha256 = file_sha256(checkpoint.path)
    work = output / WORK
    made = DataSettings(sha256, max_tokens, min(128, max(8, len(texts) // 8)), seed)
    greedy = dataclasses.replace(made, sampled_share=0.0)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        held = continued(bar, "held-out prompts", base, texts[:held_out], work / "held_out.jsonl", greedy)
        samples = continued(bar, "continuing prompts", base, texts[held_out:], work / "data.jsonl", made)
        name = DEFAULT_MODEL_HUB_ID if model == "default" else checkpoint.name
        provenance = Provenance(name, sha256, len(samples), sum(len(s.answer) for s in samples))
        task = bar.add_task("training", total=steps, note="")
        figures = ""

        def report(trainee: Trainee, step: int, loss: float, predictions: Predictions | None) -> None:
            nonlocal figures
            if predictions is not None:
                export(output, trainee, settings, provenance, step, predictions)
                figures = figures_of(predictions)
                bar.console.print(f"step {step}: loss {loss:.3f}, {figures}", highlight=False, soft_wrap=True)
            bar.update(task, completed=step, note=f"loss {loss:.3f} {figures}")

        saved = work / "checkpoint.safetensors"
        if not saved.exists():
            untrained = Trainee.new(base, settings, begun)
            before = Predictions.of(
                base, untrained.lora, untrained.rerank, held, settings.num_spec_tokens, settings.noise_below
            )
            bar.console.print(f"step 0: {figures_of(before)}", highlight=False, soft_wrap=True)
        train(
            base,
            samples,
            held,
            settings,
            saved,
            start=begun,
            until=until,
            evaluate_every=max(1, min(50, steps // 4)),
            save_every=max(1, min(25, steps // 10)),
            report=report,
        )
    print(f"done; try: idlm generate --adapter {output} -p 'Why is the sky blue?'", file=sys.stderr)


def _width_of(start: Adapter | None) -> int:
    """Of the re-ranking head: that of the adapter to start from, where it has one."""
    return 256 if start is None or start.rerank_head is None else len(start.rerank_head.from_hidden)


def _noise_bound(config: ModelConfig, start: Adapter | None, wanted: str | None) -> int:
    """0 where MASK rows embed a vector. Else ids are drawn below the bound that the start was trained with, or the MASK
    token; a model without one has only ids of texts."""
    said = None if start is None else start.mask_input
    bound = said.mask_token_id if said is not None and said.kind == "uniform" else None
    if wanted == "vector" or (wanted is None and (said is None or said.kind != "uniform")):
        return 0
    return bound or config.mask_token_id or config.vocab_size


def prompts_of(tokenizer: Tokenizer, data: Path | None, count: int, seed: int) -> list[tuple[list[int], str]]:
    """Prompt ids, wrapped in the chat template where there is one, and their domains."""
    from idlm_kernels.generate.batch_file import encoder
    from idlm_kernels.training.prompts import prompts

    encode = encoder(tokenizer, tokenizer.has_chat_template, None)
    if data is None:
        return [(encode({"prompt": p.text}), p.domain) for p in prompts(count, seed)]
    found = []
    with data.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"wanted an object, got {type(record).__name__}")
                found.append((encode(record), str(record.get("domain", ""))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{data}, line {number}: {error}") from None
    return found


def continued(
    bar: Progress,
    title: str,
    base: DenseModel,
    texts: list[tuple[list[int], str]],
    path: Path,
    settings: DataSettings,
) -> list[Sample]:
    """The base model's continuations, from `path` as far as they are there."""
    from idlm_kernels.training.data import generate_samples, read_samples

    task = bar.add_task(title, total=len(texts), note="")

    def report(samples: int, tokens: int) -> None:
        elapsed = bar.tasks[task].elapsed or 0.0
        bar.update(task, completed=samples, note=f"{tokens / elapsed:.0f} tokens/s" if elapsed else "")

    generate_samples(base, texts, path, settings, report=report)
    bar.update(task, completed=len(texts))
    return read_samples(path)


def figures_of(predictions: Predictions) -> str:
    shares = "/".join(f"{share:.2f}" for share in predictions.acceptance())
    again = "/".join(f"{share:.2f}" for share in predictions.acceptance(reranked=True))
    tpf = predictions.tpf(quadratic=True, reranked=True)
    return f"acceptance {shares}, re-ranked {again}, TPF {tpf:.2f}"


def _fast_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 faster than fp32."""
    import torch

    return device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
