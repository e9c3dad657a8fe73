"""`idlm generate --input prompts.jsonl --output out.jsonl`: a file of prompts of any length, resumable."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from idlm_kernels.cli.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from idlm_kernels.generate import DecodeOptions, Generator, PlanPolicy, SamplingParams
    from idlm_kernels.generate.batch_file import Progress

_MAX_LEN_UNSEEN = 8192  # tokens that are reserved for each request without a look at what the prompts need


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
) -> Progress:
    """Answer every line of `source` in `target`, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from idlm_kernels.generate import Engine, EngineOptions
    from idlm_kernels.generate.batch_file import RunStopped, encoder, longest_request, run_file
    from idlm_kernels.generate.memory import pages_in_memory

    tokenizer = generator.tokenizer
    assert tokenizer is not None  # from_pretrained brings one
    chat = tokenizer.has_chat_template if chat is None else chat
    if (chat or system is not None) and not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template, which --chat and --system need; use --raw")
    encode = encoder(tokenizer, chat, system)
    max_model_len = generator.max_model_len
    if max_model_len == generator.config.max_position_embeddings > _MAX_LEN_UNSEEN:  # not chosen by the user
        print(f"idlm: reading {source} for its longest prompt (--max-model-len saves that)", file=sys.stderr)
        max_model_len = longest_request(source, params, encode, max_model_len)
    sizes = EngineOptions.of(
        options,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        page_size=generator.page_size,
    )
    pages = pages_in_memory(generator.model, sizes, policy, gpu_memory_utilization)
    engine = Engine(generator.model, tokenizer, policy, dataclasses.replace(sizes, num_pages=pages))
    settings: dict[str, Any] = {"model": model_name, "chat": chat, "system": system, "rule": options.rule}
    settings |= {k: v for k, v in dataclasses.asdict(params).items() if k not in ("seed", "logprobs")}
    settings |= {"stop": list(params.stop), "stop_token_ids": list(params.stop_token_ids)}
    if options.synthetic_acceptance is not None:
        settings["synthetic_acceptance"] = options.synthetic_acceptance
    if options.rule == "rejection":  # in `match` the plan has no effect on the output
        settings["plans"] = [f"{plan.kind} {plan.stride}" for plan in policy.plans]
        settings["rerank"] = options.rerank and generator.model.rerank_head is not None

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")

        def report(progress: Progress) -> None:
            seconds = bar.tasks[0].elapsed or 0.0
            rate = f"{progress.tokens / seconds:.1f} tokens/s" if seconds else ""
            bar.update(task, total=progress.total, completed=progress.lines, rate=rate)

        try:
            return run_file(engine, source, target, params, encode, settings, report)
        except RunStopped as stopped:
            bar.stop()
            print(f"idlm: stopped: {stopped}", file=sys.stderr)
            raise typer.Exit(EXIT_STOPPED) from stopped
