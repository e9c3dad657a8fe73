"""`idlm generate --input prompts.jsonl --output out.jsonl`: a file of prompts of any length, resumable."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from idlm_kernels.cli.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from idlm_kernels.cli.options import TraceOptions
    from idlm_kernels.generate import DecodeOptions, Generator, PlanPolicy, SamplingParams
    from idlm_kernels.generate.batch_file import Answer, Progress
    from idlm_kernels.model import ModelConfig, Tokenizer

_MAX_LEN_UNSEEN = 8192  # tokens that are reserved for each request without a look at what the prompts need


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """address: of a cluster, "auto" or "local". workers: as many as fit when None. threads: of a worker on CPUs."""

    address: str
    workers: int | None
    threads: int | None


def generate_file(
    generator: Generator,
    source: Path,
    target: Path,
    params: SamplingParams,
    policy: PlanPolicy,
    *,
    options: DecodeOptions,
    chat: bool | None,
    system: str | None,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    model_name: str,
    traces: TraceOptions,
) -> Progress:
    """Answer every line of `source` in `target`, with a progress bar on stderr."""
    from idlm_kernels.generate import Engine, EngineOptions
    from idlm_kernels.generate.batch_file import encoder, run_file
    from idlm_kernels.generate.memory import pages_in_memory

    tokenizer = generator.tokenizer
    assert tokenizer is not None  # from_pretrained brings one
    chat = _chat(tokenizer, chat, system)
    encode = encoder(tokenizer, chat, system)
    sizes = EngineOptions.of(
        options,
        max_num_seqs=max_num_seqs,
        max_model_len=_longest(generator.max_model_len, generator.config, source, params, encode),
        page_size=generator.page_size,
    )
    pages = pages_in_memory(generator.model, sizes, policy, gpu_memory_utilization)
    engine = Engine(generator.model, tokenizer, policy, dataclasses.replace(sizes, num_pages=pages))
    settings = _settings(model_name, chat, system, params, options)
    if options.rule == "rejection":  # in `match` the plan has no effect on the output
        settings["plans"] = [f"{plan.kind} {plan.stride}" for plan in policy.plans]
        settings["rerank"] = options.rerank and generator.model.rerank_head is not None
    with traces.of(engine):
        return _shown(lambda report: run_file(engine, source, target, params, encode, settings, report))


def generate_file_on_ray(
    load: dict[str, Any],
    source: Path,
    target: Path,
    params: SamplingParams,
    on: RayOptions,
    *,
    options: DecodeOptions,
    chat: bool | None,
    system: str | None,
    max_num_seqs: int,
) -> Progress:
    """`generate_file` on the workers of a Ray cluster. load: the arguments of Generator.from_pretrained."""
    if options.rule == "rejection" or options.synthetic_acceptance is not None:
        raise ValueError("--ray writes what one machine would; with --rule rejection that depends on the schedule")
    try:
        from idlm_kernels.generate import ray_cluster, ray_file
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs the package {error.name}: pip install 'idlm_kernels[ray]'") from None
    from idlm_kernels.generate import EngineOptions
    from idlm_kernels.generate.batch_file import Lines, answer_file, encoder
    from idlm_kernels.model.checkpoint import load_checkpoint
    from idlm_kernels.model.random_weights import RandomCheckpoint

    model_name = str(load["source"])
    checkpoint = RandomCheckpoint.of(model_name) if load["random_weights"] else load_checkpoint(model_name)
    tokenizer = checkpoint.tokenizer
    chat = _chat(tokenizer, chat, system)
    limit = load["max_model_len"] or checkpoint.config.max_position_embeddings
    encode = encoder(tokenizer, chat, system)
    sizes = EngineOptions.of(
        options,
        max_num_seqs=max_num_seqs,
        max_model_len=_longest(limit, checkpoint.config, source, params, encode),
        page_size=load["page_size"],
    )
    ray_cluster.connect(on.address)
    load["device"], threads, count = ray_cluster.room(load["device"], on.threads, on.workers)
    job = ray_file.Job(with_whole_paths(load), sizes, params, chat, system, threads)
    print(f"idlm: {count} workers on Ray", file=sys.stderr)

    def answering(lines: Lines, base_seed: int, progress: Progress) -> Iterator[list[Answer]]:
        return ray_file.answer_on_ray(dataclasses.replace(job, base_seed=base_seed), lines, progress, count)

    settings = _settings(model_name, chat, system, params, options)
    return _shown(lambda report: answer_file(source, target, params.seed, settings, answering, report))


def with_whole_paths(load: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Generator.from_pretrained for processes that start in folders of their own."""
    named = {k: load[k] for k in ("source", "adapter") if load[k] not in (None, "default")}
    return load | {k: str(Path(path).resolve()) for k, path in named.items() if Path(path).exists()}


def _chat(tokenizer: Tokenizer, chat: bool | None, system: str | None) -> bool:
    """Whether prompts are messages; ValueError where the model knows none."""
    chat = tokenizer.has_chat_template if chat is None else chat
    if (chat or system is not None) and not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template, which --chat and --system need; use --raw")
    return chat


def _longest(
    limit: int,
    config: ModelConfig,
    source: Path,
    params: SamplingParams,
    encode: Callable[[dict[str, Any]], list[int]],
) -> int:
    """The most tokens that a request may have."""
    from idlm_kernels.generate.batch_file import longest_request

    if limit != config.max_position_embeddings or limit <= _MAX_LEN_UNSEEN:  # chosen by the user, or small
        return limit
    print(f"idlm: reading {source} for its longest prompt (--max-model-len saves that)", file=sys.stderr)
    return longest_request(source, params, encode, limit)


def _settings(
    model_name: str, chat: bool, system: str | None, params: SamplingParams, options: DecodeOptions
) -> dict[str, Any]:
    """What the output depends on: an interrupted run is resumed with the same alone."""
    settings: dict[str, Any] = {"model": model_name, "chat": chat, "system": system, "rule": options.rule}
    settings |= {k: v for k, v in dataclasses.asdict(params).items() if k not in ("seed", "logprobs")}
    settings |= {"stop": list(params.stop), "stop_token_ids": list(params.stop_token_ids)}
    if options.synthetic_acceptance is not None:
        settings["synthetic_acceptance"] = options.synthetic_acceptance
    return settings


def _shown(run: Callable[[Callable[[Progress], None]], Progress]) -> Progress:
    """Run with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from idlm_kernels.generate.batch_file import RunStopped

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")

        def report(progress: Progress) -> None:
            seconds = bar.tasks[0].elapsed or 0.0
            rate = f"{progress.tokens / seconds:.1f} tokens/s" if seconds else ""
            bar.update(task, total=progress.total, completed=progress.lines, rate=rate)

        try:
            return run(report)
        except RunStopped as stopped:
            bar.stop()
            print(f"idlm: stopped: {stopped}", file=sys.stderr)
            raise typer.Exit(EXIT_STOPPED) from stopped
