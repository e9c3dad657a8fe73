"""Options that several commands have: which model, how it drafts, how it samples. Each group is a struct."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from idlm_kernels.generate import DecodeOptions, Engine, Generator, SamplingParams
    from idlm_kernels.generate.options import Plan

_T = TypeVar("_T")
PlanName = Literal["ar", "chain", "quadratic", "branched", "auto"]
Rule = Literal["match", "rejection"]


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: a parameter whose type is a struct of this module stands for one option per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        kinds = get_type_hints(groups[parameter.name], include_extras=True)
        for field in fields(groups[parameter.name]):
            assert field.default is not MISSING, f"{field.name} needs a default"
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
                )
            )

    @wraps(command)
    def flat(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        command(**options)

    plain = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    flat.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]  # what typer reads
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in plain}
    return flat


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where and how it runs."""

    model: Annotated[
        str, typer.Option("--model", "-m", help="A Hugging Face folder or hub id, a .gguf file, or `default`.")
    ] = "default"
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Folder of a LoRA adapter for the MASK rows, or `none`.",
            show_default="the default model's, or the folder `adapter` inside the model's",
        ),
    ] = None
    mask_input: Annotated[
        Literal["vector", "token", "mean", "uniform"] | None,
        typer.Option(help="What MASK rows embed; uniform: random ids, as Uno.", show_default="what the adapter says"),
    ] = None
    mask_token_id: Annotated[int | None, typer.Option(help="The MASK id for it.", show_default="the model's")] = None
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and text together.", show_default="what the model has")
    ] = None
    page_size: Annotated[int, typer.Option(help="Tokens per page of the KV cache.")] = 64
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="Type of the weights.")] = "auto"
    activations: Annotated[
        Literal["auto", "int8"],
        typer.Option(help="int8: coarser and faster, with quantised weights on a CPU."),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is a device.")
    ] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    backend: Annotated[str | None, typer.Option(help="Backend of the ops; `idlm doctor` lists them.")] = None

    def arguments(self, **further: Any) -> dict[str, Any]:
        """Those of Generator.from_pretrained, but that device may be "auto"."""
        return {
            "source": self.model,
            "adapter": {None: "default", "none": None}.get(self.adapter, self.adapter),
            "mask_input": self.mask_input,
            "mask_token_id": self.mask_token_id,
            "device": self.device,
            "dtype": self.dtype,
            "activations": self.activations,
            "backend": self.backend,
            "max_model_len": self.max_model_len,
            "page_size": self.page_size,
            **further,
        }

    def load(self, **further: Any) -> Generator:
        """The model. Sets the number of threads, and the backend, of the process. further: for from_pretrained."""
        import torch

        from idlm_kernels.generate import Generator

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        arguments = self.arguments(**further)
        if self.device == "auto":
            arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return Generator.from_pretrained(arguments.pop("source"), **arguments)


@dataclass(frozen=True)
class DraftOptions:
    """How tokens are drafted and verified."""

    stride: Annotated[
        str,
        typer.Option(
            "--stride", "-n", metavar="N", help="Tokens that one forward may commit; auto: what the adapter can."
        ),
    ] = "auto"
    plan: Annotated[
        PlanName,
        typer.Option(
            metavar="[ar|chain|quadratic|auto]",
            help="Which rows a forward has; auto: what pays on this machine, up to --stride.",
        ),
    ] = "auto"
    rerank: Annotated[bool, typer.Option(help="Let the adapter's re-ranking head choose the drafts.")] = True
    row_budget: Annotated[int | None, typer.Option(help="The most rows per request in a forward.")] = None
    suffix_drafts: Annotated[
        bool, typer.Option("--suffix-drafts", help="Draft from repetitions in the text too.")
    ] = False
    history_tokens: Annotated[
        int,
        typer.Option(min=0, help="Draft from finished outputs too, of which so many tokens are kept; 0: from none."),
    ] = 0
    rule: Annotated[
        Rule,
        typer.Option(help="How drafts are verified; match: the tokens of AR sampling; rejection: their distribution."),
    ] = "match"

    def checked(self, synthetic_acceptance: float | None = None) -> DecodeOptions:
        """What the library takes. ValueError for what cannot be, before a model is read."""
        from idlm_kernels.generate import DecodeOptions, StepPlan

        plan: Plan = "quadratic" if self.plan == "branched" else self.plan
        if self.plan == "branched":
            renamed("--plan branched", plan, "--plan quadratic", plan)
        options = DecodeOptions(
            plan,
            _stride(self.stride),
            self.rule,
            row_budget=self.row_budget,
            rerank=self.rerank,
            suffix_drafts=self.suffix_drafts,
            history_tokens=self.history_tokens,
            synthetic_acceptance=synthetic_acceptance,
        )
        if options.stride != "auto":
            StepPlan("chain" if options.plan == "auto" else options.plan, options.stride)
        return options


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled."""

    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of what is in the text; 0 is off.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="The same for each time that it is; 0 is off.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Divides that of prompt and text; 1 is off.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="64 bits; drawn and shown where not given.")] = None

    def params(self, max_tokens: int | None, stop: tuple[str, ...] = ()) -> SamplingParams:
        """What the library takes. ValueError for what is out of range."""
        from idlm_kernels.generate import SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_tokens=max_tokens,  # type: ignore[arg-type]  # None is taken
            stop=stop,
        )


@dataclass(frozen=True)
class TraceOptions:
    """Whether finished requests leave traces to learn from."""

    traces: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the token ids and drafts of finished requests there, for `idlm learn`.",
            show_default="nothing is kept",
        ),
    ] = None
    traces_redact: Annotated[bool, typer.Option("--traces-redact", help="Keep ids of answers only.")] = False

    def check(self) -> None:
        """ValueError for what cannot be, before a model is read."""
        if self.traces_redact and self.traces is None:
            raise ValueError("--traces-redact says what --traces keeps: name a folder with --traces")

    @contextmanager
    def of(self, engine: Engine) -> Iterator[None]:
        """Keep those of an engine, and say so."""
        if self.traces is None:
            yield
            return
        from idlm_kernels.learning.traces import TraceWriter

        model = engine.model
        with TraceWriter(self.traces, model.identity, model.config.vocab_size, redact=self.traces_redact) as writer:
            engine.on_trace = lambda request: writer.write(request.trace())
            what = "answers (ids)" if self.traces_redact else "prompts and answers (ids)"
            print(f"idlm: traces: {what} of finished requests are kept in {self.traces}", file=sys.stderr, flush=True)
            try:
                yield
            finally:
                engine.on_trace = None


def renamed(old: str, given: _T | None, new: str, value: _T) -> _T:
    """The value of a flag that has an old name too, for one release."""
    if given is None:
        return value
    print(f"idlm: warning: {old} is now {new}; the old name goes with the next release", file=sys.stderr)
    return given


def _stride(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--stride is {text!r}, wanted a number of tokens or auto") from None
