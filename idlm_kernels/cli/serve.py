"""`idlm serve`: a server with OpenAI's interface."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from idlm_kernels.cli.errors import EXIT_STOPPED, reported
from idlm_kernels.cli.options import DraftOptions, ModelOptions, with_groups

if TYPE_CHECKING:
    from idlm_kernels.generate import Engine

_KEY_VARIABLE = "IDLM_API_KEY"
_MEBIBYTE = 1 << 20


@reported()
@with_groups
def serve(
    *,
    models: ModelOptions,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the name given with --model")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"What clients have to know. Other users of the machine see it; {_KEY_VARIABLE} is hidden."),
    ] = None,
    drafts: DraftOptions,
    logprobs: Annotated[bool, typer.Option(help="Compute those of the tokens, for requests that ask.")] = True,
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded together.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Texts that may wait besides; beyond, clients are told to come again (429).")
    ] = 64,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="The most of the free memory that the KV cache takes.")
    ] = 0.5,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 4,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="After SIGTERM or Ctrl-C, the longest that running requests may take.")
    ] = 60,
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

    from idlm_kernels.generate import EngineOptions

    decoding = drafts.checked().changed(logprobs=logprobs)
    generator = models.load(gpu_memory_utilization=gpu_memory_utilization)
    sizes = {"max_num_seqs": max_num_seqs, "max_model_len": generator.max_model_len, "page_size": models.page_size}
    engine = generator.engine(EngineOptions.of(decoding, **sizes))
    name = served_model_name or models.model
    server = Server(engine, name, max_waiting=max_waiting, max_body_size=max_body * _MEBIBYTE, api_key=key)
    bound_host, bound_port = listening.getsockname()[:2]

    def say() -> None:
        print(_words(engine, name, bound_host, bound_port, key is not None), file=sys.stderr, flush=True)

    try:
        run.serve(server, listening, drain_seconds, say, log_requests)
    except run.MachineFailed as failed:
        print(f"idlm: stopped: the machine failed: {failed}", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from failed


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
        f"idlm: a page to talk with it: {base}/",
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
