"""What HTTP costs: clients of the server beside the same engine without it.

    python -m bench.serve [--clients 1 4 16] [--tokens 128] [--rounds 5] [--threads 1] [--plan ar] [--json]

Each round asks for one text per client, all at once, of equal length: of an engine itself, and then over HTTP of its
twin, streamed on loopback to a process of its own, which reads every chunk. The two share the model. A figure is the
median over rounds; `of the engine` is the median of the rounds' own ratios, since what else the machine does slows
both. AR has the most chunks per token, and so the dearest HTTP. Time to the first token is the mean over the clients of
a round. The clients' process needs a core of its own. Figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import threading
import time
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cpu import prompts_of
from idlm_kernels.generate import Engine, EngineOptions, Generator, SamplingParams
from idlm_kernels.serve.app import Server
from idlm_kernels.serve.run import HttpServer, bound_socket

Prompts = list[list[int]]
Figures = tuple[float, float]  # mean seconds to the first token; tokens per second of all together


def of_engine(engine: Engine, prompts: Prompts, tokens: int) -> Figures:
    start = time.perf_counter()
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [engine.submit(prompt, params, 0) for prompt in prompts]
    first: dict[int, float] = {}
    for request, _ in engine.events():
        first.setdefault(request.arrival, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    assert all(len(request.output.token_ids) == tokens for request in requests)
    return mean(first.values()), len(prompts) * tokens / seconds


async def of_clients(port: int, prompts: Prompts, tokens: int) -> Figures:
    """As little of a client as there can be: what it costs is not the server's."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in prompts]
    start = time.perf_counter()

    async def first_token(prompt: list[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0, "ignore_eos": True}
        asked |= {"stream": True, "stream_options": {"include_usage": True, "include_forwards": True}}
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length:"
        writer.write(f"{head} {len(body)}\r\n\r\n".encode() + body)
        read, first = b"", None
        while not read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = await reader.read(1 << 16)
            assert piece, read
            read += piece
            if first is None and b"data: " in read:
                first = time.perf_counter() - start
        assert first is not None and read.startswith(b"HTTP/1.1 200 ") and b'"completion_tokens":%d,' % tokens in read
        writer.close()
        return first

    firsts = await asyncio.gather(*(first_token(p, *c) for p, c in zip(prompts, connections, strict=True)))
    return mean(firsts), len(prompts) * tokens / (time.perf_counter() - start)


def clients() -> None:
    """The clients' process: a line of JSON in, a line of JSON out."""
    for line in sys.stdin:
        print(json.dumps(asyncio.run(of_clients(*json.loads(line)))), flush=True)


def measure(generator: Generator, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    most = max(arguments.clients)
    prompts = prompts_of(generator, most)
    stride = arguments.stride if arguments.stride == "auto" else int(arguments.stride)
    options = EngineOptions(
        plan=arguments.plan,
        stride=stride,
        max_num_seqs=most,
        max_model_len=max(map(len, prompts)) + arguments.tokens,
    )
    engine, twin = generator.engine(options), generator.engine(options)
    http = HttpServer(Server(twin, "default"), drain_seconds=10)
    listening = bound_socket("127.0.0.1", 0)
    port, started = listening.getsockname()[1], threading.Event()
    http.on_start = started.set
    thread = threading.Thread(target=http.run, args=([listening],))
    thread.start()
    started.wait()
    command = [sys.executable, "-m", "bench.serve", "--as-clients"]
    records = []
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None and other.stdout is not None

            def over_http(batch: Prompts) -> Figures:
                print(json.dumps([port, batch, arguments.tokens]), file=other.stdin, flush=True)
                first, rate = json.loads(other.stdout.readline())
                return first, rate

            for count in arguments.clients:
                batch = [prompts[i % len(prompts)] for i in range(count)]
                rounds = []
                for number in range(arguments.rounds + 1):
                    pair = of_engine(engine, batch, arguments.tokens), over_http(batch)
                    if number:  # the first one warms up
                        rounds.append(pair)
                records.append(
                    {
                        "clients": count,
                        "engine_first_token_ms": median(e[0] for e, _ in rounds) * 1e3,
                        "http_first_token_ms": median(h[0] for _, h in rounds) * 1e3,
                        "engine_tokens_per_second": median(e[1] for e, _ in rounds),
                        "http_tokens_per_second": median(h[1] for _, h in rounds),
                        "of_the_engine": median(h[1] / e[1] for e, h in rounds),
                    }
                )
            other.stdin.close()
    finally:
        http.end()
        thread.join()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", default="ar")
    parser.add_argument("--stride", default="auto")
    parser.add_argument("--model", default="default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-clients", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_clients:
        return clients()
    torch.set_num_threads(arguments.threads)
    records = measure(Generator.from_pretrained(arguments.model), arguments)
    if arguments.json:
        return print(json.dumps(records))
    console = Console()
    console.print(f"{platform.machine()}, {arguments.threads} threads, {arguments.plan}, {arguments.tokens} tokens")
    table = Table("clients", "first token, engine", "and HTTP", "tokens/s, engine", "and HTTP", "of the engine")
    for r in records:
        table.add_row(
            str(r["clients"]),
            *(f"{r[name]:.0f} ms" for name in ("engine_first_token_ms", "http_first_token_ms")),
            *(f"{r[name]:.1f}" for name in ("engine_tokens_per_second", "http_tokens_per_second")),
            f"{r['of_the_engine']:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
