"""Many clients at once, some of which leave, dawdle or talk nonsense: every finished text is its lone AR run."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from idlm_kernels.generate import Engine, Generator, SamplingParams
from idlm_kernels.generate.params import mixed_seed
from tests.serve.conftest import Running, running


@dataclass
class Text:
    """A text that came to its end."""

    prompt: str
    params: dict[str, Any]
    seed: int
    text: str


def request(chance: random.Random) -> dict[str, Any]:
    prompt = "".join(chance.choice("abc ü😀") for _ in range(chance.randint(1, 40)))
    return {
        "prompt": chance.choice(["a page that many requests share: ", ""]) + prompt,
        "max_tokens": chance.randint(1, 40),
        "temperature": chance.choice([0, 0.5, 1.0, 2.0]),
        "top_p": chance.choice([1.0, 0.9]),
        "stop": chance.choice([[], ["a", "é"], ["~~"]]),
    }


async def client(port: int, seed: int, least: float, texts: list[Text], counts: dict[str, int]) -> None:
    """Ten requests, and more until `least`, a time of the clock."""
    chance = random.Random(seed)
    api = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=40)
    async with api, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as web:
        number = 0
        while (number := number + 1) <= 10 or time.monotonic() < least:
            kind = chance.choice(["whole", "stream", "n", "leaves", "gives up", "dawdles", "nonsense"])
            counts[kind] = counts.get(kind, 0) + 1
            params, seed = request(chance), chance.getrandbits(64)
            asked: dict[str, Any] = {"model": "tiny", **params, "seed": seed}
            if kind in ("whole", "n"):
                n = 3 if kind == "n" else 1
                answer = await api.completions.create(**asked, n=n)
                assert len(answer.choices) == n
                for choice in answer.choices:
                    texts.append(Text(params["prompt"], params, mixed_seed(seed, choice.index), choice.text))
            elif kind == "stream":
                parts = [chunk.choices[0].text async for chunk in await api.completions.create(**asked, stream=True)]
                texts.append(Text(params["prompt"], params, seed, "".join(parts)))
            elif kind == "leaves":
                stream = await api.completions.create(**{**asked, "max_tokens": 200}, stream=True)
                for _ in range(chance.randint(0, 3)):
                    await anext(aiter(stream), None)
                await stream.close()
            elif kind == "gives up":
                asking = asyncio.ensure_future(api.completions.create(**{**asked, "max_tokens": 200}))
                await asyncio.sleep(chance.random() / 20)
                asking.cancel()
                await asyncio.wait([asking])
            elif kind == "dawdles":
                texts.append(Text(params["prompt"], params, seed, await dawdle(port, asked, chance)))
            else:
                body = chance.choice(
                    [b"", b"{", b"[" * 5000, b'{"prompt": 1}', b'{"prompt": "a", "tools": [1]}', b"\xff"]
                )
                answered = await web.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
                assert answered.status_code == 400 and answered.json()["error"]["message"]


async def dawdle(port: int, asked: dict[str, Any], chance: random.Random) -> str:
    """A stream that is read a few bytes at a time; where there is no room, the request is made again."""
    body = json.dumps({**asked, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body[:10])
        await asyncio.sleep(chance.random() / 50)
        writer.write(body[10:])
        received = b""
        while part := await reader.read(chance.choice([7, 200, 2000])):
            received += part
            await asyncio.sleep(0 if chance.random() < 0.9 else 0.01)
        writer.close()
        await writer.wait_closed()
        status = int(received.split()[1])
        if status == 200:
            break
        assert status == 429
        await asyncio.sleep(0.2)
    lines = received.decode().split("\r\n\r\n", 1)[1].splitlines()
    assert lines[-2] == "data: [DONE]"
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2] if line)


@pytest.mark.parametrize(
    ("number_of_clients", "seconds"), [(16, 0), pytest.param(32, 60, marks=pytest.mark.slow)], ids=["16", "32"]
)
def test_every_finished_text_is_its_lone_run_and_nothing_is_left(
    make_engine: Callable[..., Engine], generator: Generator, number_of_clients: int, seconds: float
) -> None:
    """Few pages and few places, so that requests wait, are refused, and are preempted."""
    threads = set(threading.enumerate())
    texts: list[Text] = []
    counts: dict[str, int] = {}
    with running(make_engine(max_num_seqs=5, num_pages=60, max_num_batched_tokens=24), max_waiting=6) as server:
        tasks = number_of_tasks(server)

        async def clients(first_seed: int, least: float) -> None:
            seeds = range(first_seed, first_seed + number_of_clients)
            await asyncio.gather(*(client(server.port, seed, least, texts, counts) for seed in seeds))

        asyncio.run(asyncio.wait_for(clients(0, 0), 120))
        if seconds:  # the first round has filled what is filled once
            server.wait_until_idle()
            before = resident_bytes()
            asyncio.run(asyncio.wait_for(clients(1000, time.monotonic() + seconds), seconds + 120))
            assert resident_bytes() - before < 64 << 20
        server.wait_until_idle()
        assert number_of_tasks(server) == tasks
        worker = server.server.worker
        assert not worker._open and not worker._running and not worker._outbox
        assert worker.is_alive
    assert {t for t in set(threading.enumerate()) - threads if not t.daemon} == set()
    assert not worker._thread.is_alive()
    assert min(counts.values()) >= 10 and len(counts) == 7 and len(texts) > 80
    for one in texts:
        assert one.text == alone(generator, one)


def alone(generator: Generator, one: Text) -> str:
    assert generator.tokenizer is not None
    params = SamplingParams(**{k: v for k, v in one.params.items() if k != "prompt"}, seed=one.seed)
    return generator.generate([generator.tokenizer.encode(one.prompt)], [params], plan="ar")[0].text


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def number_of_tasks(server: Running) -> int:
    """Of the server's event loop, once idle connections are as they were."""

    async def count() -> int:
        for _ in range(200):
            if not server.http.server_state.connections and not server.http.server_state.tasks:
                break
            await asyncio.sleep(0.01)
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), server.server.worker._loop).result(10)
