"""`idlm serve`: a server with OpenAI's interface."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idlm_kernels.cli.errors import EXIT_STOPPED, reported
from idlm_kernels.cli.generate import PlanName, Rule, stride_of

if TYPE_CHECKING:
    from idlm_kernels.generate import Engine, EngineOptions, Generator

_KEY_VARIABLE = "IDLM_API_KEY"
_MEBIBYTE = 1 << 20


@reported()
def serve(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A Hugging Face folder or hub id, a .gguf file, or `default`."),
    ] = "default",
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the name given with --model")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Folder of a LoRA adapter for the MASK rows, or `none`.",
            show_default="the default model's, or the folder `adapter` inside the model's",
        ),
    ] = None,
    mask_input: Annotated[
        Literal["vector", "token", "mean", "uniform"] | None,
        typer.Option(help="What MASK rows embed; uniform: random ids, as Uno.", show_default="what the adapter says"),
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="The MASK id for it.", show_default="the model's")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"What clients have to know. Other users of the machine see it; {_KEY_VARIABLE} is hidden."),
    ] = None,
    stride: Annotated[
        str,
        typer.Option(
            "--stride", "-n", metavar="N", help="Tokens that one forward may commit; auto: what the adapter can."
        ),
    ] = "auto",
    plan: Annotated[
        PlanName,
        typer.Option(
            metavar="[ar|chain|quadratic|auto]",
            help="Which rows a forward has; auto: what pays on this machine, up to --stride.",
        ),
    ] = "auto",
    rerank: Annotated[bool, typer.Option(help="Let the adapter's re-ranking head choose the drafts.")] = True,
    row_budget: Annotated[int | None, typer.Option(help="The most rows per request in a forward.")] = None,
    suffix_drafts: Annotated[
        bool, typer.Option("--suffix-drafts", help="Draft from repetitions in the text too.")
    ] = False,
    rule: Annotated[
        Rule,
        typer.Option(help="How drafts are verified; match: the tokens of AR sampling; rejection: their distribution."),
    ] = "match",
    logprobs: Annotated[bool, typer.Option(help="Compute those of the tokens, for requests that ask.")] = True,
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded together.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Texts that may wait besides; beyond, clients are told to come again (429).")
    ] = 64,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and text together.", show_default="what the model has")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens per page of the KV cache.")] = 64,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="The most of the free memory that the KV cache takes.")
    ] = 0.5,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 4,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="After SIGTERM or Ctrl-C, the longest that running requests may take.")
    ] = 60,
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="Type of the weights.")] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is a device.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    backend: Annotated[str | None, typer.Option(help="Backend of the ops; `idlm doctor` lists them.")] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line on stderr for each request.")] = False,
) -> None:
    """Serve a model with OpenAI's interface: /v1/completions, /v1/chat/completions and what belongs to them."""
    key = api_key if api_key is not None else os.environ.get(_KEY_VARIABLE)
    if key is not None and not (key.strip() and key.isascii()):
        where = "--api-key" if api_key is not None else _KEY_VARIABLE
        raise ValueError(f"{where} is empty or not ASCII: give a key, or leave it out to serve whoever asks")
    try:
        from idlm_kernels.serve import run
        from idlm_kernels.serve.app import Server
    except ModuleNotFoundError as error:
        raise ValueError(f"idlm serve needs the package {error.name}: pip install 'idlm_kernels[serve]'") from None

    listening = run.bound_socket(host, port)

    import torch

    from idlm_kernels.generate import EngineOptions, Generator

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = EngineOptions(
        plan="quadratic" if plan == "branched" else plan,
        stride=stride_of(stride),
        rule=rule,
        row_budget=row_budget,
        rerank=rerank,
        suffix_drafts=suffix_drafts,
        logprobs=logprobs,
        max_num_seqs=max_num_seqs,
        page_size=page_size,
    )
    generator = Generator.from_pretrained(
        model,
        adapter={None: "default", "none": None}.get(adapter, adapter),
        mask_input=mask_input,
        mask_token_id=mask_token_id,
        device=device,
        dtype=dtype,
        backend=backend,
        max_model_len=max_model_len,
    )
    engine = _engine(generator, options, gpu_memory_utilization)
    name = served_model_name or model
    server = Server(engine, name, max_waiting=max_waiting, max_body_size=max_body * _MEBIBYTE, api_key=key)
    bound_host, bound_port = listening.getsockname()[:2]

    def say() -> None:
        print(_words(engine, name, bound_host, bound_port, key is not None), file=sys.stderr, flush=True)

    try:
        run.serve(server, listening, drain_seconds, say, log_requests)
    except run.MachineFailed as failed:
        print(f"idlm: stopped: the machine failed: {failed}", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from failed


def _engine(generator: Generator, options: EngineOptions, memory_fraction: float) -> Engine:
    from idlm_kernels.generate import Engine, PlanPolicy
    from idlm_kernels.generate.memory import pages_in_memory

    options = dataclasses.replace(options, max_model_len=generator.max_model_len)
    policy = PlanPolicy.of(generator.model, options)
    pages = pages_in_memory(generator.model, options, policy, memory_fraction)
    return Engine(generator.model, generator.tokenizer, policy, dataclasses.replace(options, num_pages=pages))


def _words(engine: Engine, name: str, host: str, port: int, has_key: bool) -> str:
    """What is loaded, where it listens, and a first request."""
    model, options, tokenizer = engine.model, engine.options, engine.tokenizer
    reachable = ipaddress.ip_address(host)
    shown = "127.0.0.1" if reachable.is_unspecified and reachable.version == 4 else host
    shown = "::1" if reachable.is_unspecified and reachable.version == 6 else shown
    base = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    plan = "auto" if len(engine.policy.plans) > 1 else engine.policy.plans[0].kind
    stride = max(plan.stride for plan in engine.policy.plans)
    tokens = engine.pool.num_pages * engine.pool.page_size
    lines = [
        f"idlm: {name}: {str(model.dtype).removeprefix('torch.')} on {model.device}, "
        f"{'an adapter' if model.has_adapter else 'no adapter'}, plan {plan} up to {stride} tokens per forward",
        f"idlm: {options.max_num_seqs} texts together, {options.max_model_len} tokens each at most, "
        f"{tokens} in the KV cache",
        f"idlm: listening on {host} port {port}, {'with' if has_key else 'without'} an API key; Ctrl-C ends it",
    ]
    if not reachable.is_loopback and not has_key:
        lines.append(f"idlm: warning: whoever reaches this machine may use it; {_KEY_VARIABLE} sets a key")
    text = "Why is the sky blue?"
    if tokenizer is not None and tokenizer.has_chat_template:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 64}
    else:
        path, asked = "completions", {"prompt": "The sky is blue because", "max_tokens": 32}
    key = f' -H "Authorization: Bearer ${_KEY_VARIABLE}"' if has_key else ""
    lines += [
        "try:",
        f"  curl {base}/v1/{path}{key} -H 'Content-Type: application/json' \\",
        f"    -d '{json.dumps(asked)}'",
    ]
    return "\n".join(lines)
