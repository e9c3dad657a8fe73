"""`idlm serve`: a server with OpenAI's interface."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idlm_kernels.cli.batch import RayOptions, with_whole_paths
from idlm_kernels.cli.errors import EXIT_STOPPED, reported
from idlm_kernels.cli.options import DraftOptions, ModelOptions, TraceOptions, with_groups

if TYPE_CHECKING:
    from idlm_kernels.generate import Engine, EngineOptions

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
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="As replicas on a Ray cluster; `auto`: that of this machine; `local`: one started here.",
        ),
    ] = None,
    ray_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: one per GPU, or per --threads CPUs.", show_default="as the load has it"),
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line on stderr for each request.")] = False,
    traces: TraceOptions,
    adapters: Annotated[
        Path | None,
        typer.Option(help="A folder of adapters, as `idlm learn` fills it: clients may choose one at /v1/adapters."),
    ] = None,
    watch_adapters: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Take the newest of --adapters, looked for so often."),
    ] = None,
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

    if ray is None and ray_replicas is not None:
        raise ValueError("--ray-replicas needs --ray ADDRESS")
    if ray is not None and log_requests:
        raise ValueError("--log-requests is of a server without --ray: Ray keeps the logs of its replicas")
    from idlm_kernels.learning.adapters import AdapterFolder

    traces.check()
    if watch_adapters is not None and adapters is None:
        raise ValueError("--watch-adapters looks at a folder: name it with --adapters")
    if ray is not None and (traces.traces is not None or adapters is not None):
        raise ValueError("--traces and --adapters are of a server without --ray: replicas would not agree")
    folder = None if adapters is None else AdapterFolder(adapters)
    listening = run.bound_socket(host, port)

    from idlm_kernels.generate import EngineOptions

    decoding = drafts.checked().changed(logprobs=logprobs)
    sizes: dict[str, Any] = {"max_num_seqs": max_num_seqs, "page_size": models.page_size}
    if ray is not None:
        of_server = {"model_name": served_model_name or models.model, "max_waiting": max_waiting, "api_key": key}
        of_server["max_body_size"] = max_body * _MEBIBYTE
        address = listening.getsockname()[:2]
        listening.close()  # for Ray's proxy; that it could be had is known now
        load = models.arguments(gpu_memory_utilization=gpu_memory_utilization)
        on = RayOptions(ray, ray_replicas, models.threads)
        _serve_on_ray(load, EngineOptions.of(decoding, **sizes), of_server, on, address, drain_seconds)
        return
    generator = models.load(gpu_memory_utilization=gpu_memory_utilization)
    engine = generator.engine(EngineOptions.of(decoding, max_model_len=generator.max_model_len, **sizes))
    name = served_model_name or models.model
    server = Server(
        engine,
        name,
        max_waiting=max_waiting,
        max_body_size=max_body * _MEBIBYTE,
        api_key=key,
        adapters=folder,
        watch_seconds=watch_adapters,
    )
    bound_host, bound_port = listening.getsockname()[:2]

    def say() -> None:
        print(_words(engine, name, bound_host, bound_port, key is not None), file=sys.stderr, flush=True)

    _log_to_stderr()
    try:
        with traces.of(engine):
            run.serve(server, listening, drain_seconds, say, log_requests)
    except run.MachineFailed as failed:
        print(f"idlm: stopped: the machine failed: {failed}", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from failed


def _log_to_stderr() -> None:
    """What the library says while a server runs: adapters that come and go, traces that are lost."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("idlm: %(message)s"))
    log = logging.getLogger("idlm_kernels")
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _serve_on_ray(
    load: dict[str, Any],
    sizes: EngineOptions,
    of_server: dict[str, Any],
    on: RayOptions,
    address: tuple[str, int],
    drain_seconds: int,
) -> None:
    try:
        from idlm_kernels.generate import ray_cluster
        from idlm_kernels.serve import ray_app
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs the package {error.name}: pip install 'idlm_kernels[ray,serve]'") from None
    ray_cluster.connect(on.address)
    load["device"], threads, most = ray_cluster.room(load["device"], on.threads, on.workers)
    replica = ray_app.Replica(with_whole_paths(load), sizes, threads=threads, **of_server)

    def say() -> None:
        count = f"{most} replicas" if on.workers else f"1 to {most} replicas, by load"
        where = f"listening on {address[0]} port {address[1]}"
        print(f"idlm: {of_server['model_name']}: {count} on Ray, {where}; Ctrl-C ends it", file=sys.stderr, flush=True)

    try:
        ray_app.run(ray_app.deployment(replica, on.workers, most, drain_seconds), *address, say)
    except RuntimeError as error:
        print(f"idlm: stopped: no replica came up: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from error


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
