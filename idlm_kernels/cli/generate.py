"""`idlm generate`: decode one prompt, show the text as it comes and then one line of figures."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from idlm_kernels.cli.batch import RayOptions, generate_file, generate_file_on_ray
from idlm_kernels.cli.errors import EXIT_INTERRUPTED, EXIT_MISMATCH, reported
from idlm_kernels.cli.options import (
    DraftOptions,
    ModelOptions,
    Rule,
    SamplingOptions,
    TraceOptions,
    renamed,
    with_groups,
)

if TYPE_CHECKING:
    from idlm_kernels.generate import DecodeOptions, GenerationResult, Generator, SamplingParams
    from idlm_kernels.generate.batch_file import Progress
    from idlm_kernels.model import Tokenizer

Unsupported = Annotated[str | None, typer.Option(hidden=True)]


@reported()
@with_groups
def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The prompt; without it, or with -, it is read from stdin."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Wrap the prompt in the model's chat template, or continue it as it is.",
            show_default="--chat where the model has a template",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    models: ModelOptions,
    drafts: DraftOptions,
    sampling: SamplingOptions,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="JSON lines with a prompt or messages each; resumable. Needs --output."),
    ] = None,
    target: Annotated[Path | None, typer.Option("--output", help="Where --input is answered, line by line.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="With --input: prompts that are decoded together.")] = 8,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="With --input: the most of the free memory that the KV cache takes.")
    ] = 0.5,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="With --input: on the workers of a Ray cluster; `auto`: of this machine; `local`: one started here.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: one per GPU, or per --threads CPUs.", show_default="as many as fit"),
    ] = None,
    traces: TraceOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Decode in AR mode too and compare; status 1 if tokens differ.")
    ] = False,
    dummy_weights: Annotated[
        bool,
        typer.Option("--dummy-weights", help="Random weights in the shape of --model (also qwen3-8b, qwen3-32b)."),
    ] = False,
    synthetic_acceptance: Annotated[
        float | None, typer.Option(help="Accept each draft with this probability, to measure speed; the text is noise.")
    ] = None,
    grammar: Unsupported = None,
    verify: Annotated[Rule | None, typer.Option(hidden=True)] = None,
    max_len: Annotated[int | None, typer.Option(hidden=True)] = None,
    max_batch: Annotated[int | None, typer.Option(hidden=True)] = None,
    memory_fraction: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Decode one prompt and stream the text to stdout; figures go to stderr."""
    drafts = dataclasses.replace(drafts, rule=renamed("--verify", verify, "--rule", drafts.rule))
    longest = renamed("--max-len", max_len, "--max-model-len", models.max_model_len)
    models = dataclasses.replace(models, max_model_len=longest)
    max_num_seqs = renamed("--max-batch", max_batch, "--max-num-seqs", max_num_seqs)
    gpu_memory_utilization = renamed(
        "--memory-fraction", memory_fraction, "--gpu-memory-utilization", gpu_memory_utilization
    )
    if grammar is not None:
        raise ValueError("--grammar is not supported by the CLI yet; the op takes a logit_bias")
    if check and drafts.rule == "rejection":
        raise ValueError("--check compares tokens, but --rule rejection is exact in distribution only")
    if check and synthetic_acceptance is not None:
        raise ValueError("--check compares tokens, but with --synthetic-acceptance they are noise")
    if system is not None and chat is False:
        raise ValueError("--system needs a chat template: leave out --raw")
    if (source is None) != (target is None):
        raise ValueError("--input and --output belong together")
    if source is not None and (prompt is not None or as_json or check):
        raise ValueError("--input answers a file: it goes without --prompt, --json and --check")
    traces.check()
    if traces.traces is not None and (source is None or ray is not None or synthetic_acceptance is not None):
        raise ValueError("--traces keeps those of a file: it goes with --input, without --ray and synthetic drafts")
    if source is None and (ray is not None or ray_workers is not None):
        raise ValueError("--ray and --ray-workers answer a file: they go with --input and --output")
    if ray is None and ray_workers is not None:
        raise ValueError("--ray-workers needs --ray ADDRESS")
    text = "" if source is not None else _prompt_text(prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop

    params = sampling.params(max_tokens, tuple(stop or ()))
    options = drafts.checked(synthetic_acceptance)
    if source is not None and target is not None and ray is not None:
        answers = generate_file_on_ray(
            models.arguments(gpu_memory_utilization=gpu_memory_utilization, random_weights=dummy_weights),
            source,
            target,
            params,
            RayOptions(ray, ray_workers, models.threads),
            options=options,
            chat=chat,
            system=system,
            max_num_seqs=max_num_seqs,
        )
        _end_of_file(answers, target)
    generator = models.load(random_weights=dummy_weights)
    assert generator.tokenizer is not None  # from_pretrained brings one
    if source is not None and target is not None:
        progress = generate_file(
            generator,
            source,
            target,
            params,
            generator.policy(options.plan, options.stride, options.row_budget),
            options=options,
            chat=chat,
            system=system,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            model_name=models.model,
            traces=traces,
        )
        _end_of_file(progress, target)
    prompt_ids = _prompt_ids(generator.tokenizer, text, chat=chat, system=system)
    _answer(generator, prompt_ids, params, options, as_json=as_json, check=check)


def _end_of_file(progress: Progress, target: Path) -> NoReturn:
    print(f"{progress.lines} lines answered in {target}, {progress.failed} with an error", file=sys.stderr)
    raise typer.Exit(EXIT_MISMATCH if progress.failed else 0)


def _answer(
    generator: Generator,
    prompt_ids: list[int],
    params: SamplingParams,
    options: DecodeOptions,
    *,
    as_json: bool,
    check: bool,
) -> None:
    """Decode one prompt, show text and figures; with check, decode it in AR too and compare."""
    from idlm_kernels.generate import DecodeOptions

    show = _ignore if as_json else _show
    result, interrupted = _decode(generator, prompt_ids, params, options, show)
    ar: GenerationResult | None = None
    if not as_json:
        print(flush=True)
        print(figures(result, seed_drawn=params.seed is None and params.temperature > 0), file=sys.stderr)
    if result.error is not None:
        print(f"idlm: the decode ended early: {result.error}", file=sys.stderr)
    elif result.error_flags:
        print(f"idlm: warning: some logits were not finite (error_flags {result.error_flags})", file=sys.stderr)
    if check and not interrupted:
        same_seed = dataclasses.replace(params, seed=result.seed)
        ar, interrupted = _decode(generator, prompt_ids, same_seed, DecodeOptions("ar"), _ignore)
        if interrupted:
            ar = None
    if as_json:
        print(json.dumps(_record(result, ar, check)), flush=True)
    elif ar is not None:
        print(_comparison(result, ar), file=sys.stderr)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if ar is not None and ar.token_ids != result.token_ids:
        raise typer.Exit(EXIT_MISMATCH)


def _prompt_text(prompt: str | None) -> str:
    """The prompt as given, or stdin without its last line end."""
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            print("idlm: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        prompt = text_of_stdin(sys.stdin.buffer.read()).removesuffix("\n")
    elif any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("the prompt given to --prompt is not UTF-8")
    if not prompt:
        raise ValueError("the prompt is empty; give --prompt TEXT or write it to stdin")
    return prompt


def text_of_stdin(given: bytes) -> str:
    try:
        return given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None


def _prompt_ids(tokenizer: Tokenizer, text: str, *, chat: bool | None, system: str | None) -> list[int]:
    if chat is None:
        chat = tokenizer.has_chat_template or system is not None
    if not chat:
        return tokenizer.encode(text)
    if not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template, which --chat and --system need; use --raw")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


def _decode(
    generator: Generator,
    prompt_ids: list[int],
    params: SamplingParams,
    options: DecodeOptions,
    show: Callable[[str], None],
) -> tuple[GenerationResult, bool]:
    """Decode to the end or to Ctrl-C; returns the result so far and whether it was interrupted."""
    stream = generator.stream(prompt_ids, params, options)
    shown, interrupted = 0, False
    try:
        for event in stream:
            show(event.text)
            shown += len(event.text)
    except KeyboardInterrupt:
        interrupted = True
    result = stream.result
    show(result.text[shown:])  # what was held back as the possible start of a stop string
    return result, interrupted


def figures(result: GenerationResult, *, seed_drawn: bool) -> str:
    """A decode in a line; with its seed where that was drawn."""
    acceptance = " ".join("-" if share is None else f"{share:.2f}" for share in result.acceptance)
    return ", ".join(
        [
            f"{result.tokens} tokens in {result.forwards} forwards",
            f"TPF {result.tpf:.2f}",
            *([f"acceptance {acceptance}"] if acceptance else []),
            f"{result.tokens_per_second:.1f} tokens/s",
            f"ended by {result.finish_reason}",
            *([f"seed {result.seed}"] if seed_drawn else []),
        ]
    )


def _comparison(result: GenerationResult, ar: GenerationResult) -> str:
    rows = [
        f"{name:<16} {row.tokens:>7} {row.forwards:>9} {row.tpf:>6.2f} {row.tokens_per_second:>9.1f}"
        for name, row in ((f"{result.plan}, N={result.stride}", result), ("ar", ar))
    ]
    if result.token_ids == ar.token_ids:
        verdict = "token ids: identical to AR"
    else:
        pairs = zip(result.token_ids, ar.token_ids, strict=False)
        shorter = min(len(result.token_ids), len(ar.token_ids))
        at = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), shorter)
        verdict = f"token ids: DIFFERENT from AR, first at index {at}"
    return "\n".join([f"{'':<16}  tokens  forwards    TPF  tokens/s", *rows, verdict])


def _record(result: GenerationResult, ar: GenerationResult | None, check: bool) -> dict[str, Any]:
    """What --json prints. The three AR fields come with --check, and are null where Ctrl-C came first."""
    names = [
        "text",
        "token_ids",
        "prompt_tokens",
        "tokens",
        "forwards",
        "tpf",
        "acceptance",
        "tokens_per_second",
        "finish_reason",
        "seed",
        "plan",
        "stride",
    ]
    record = {name: getattr(result, name) for name in names}
    if result.acceptance_by_source.keys() - {"mask"}:
        record["acceptance_by_source"] = result.acceptance_by_source
    if check:
        record["identical_to_ar"] = ar and ar.token_ids == result.token_ids
        record["ar_tokens_per_second"] = ar and ar.tokens_per_second
        record["ar_token_ids"] = ar and ar.token_ids
    return record
