"""The server as a Ray Serve deployment: the same application, whichever replica answers, also when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from idlm_kernels.generate import Generator, SamplingParams
from tests.ray_support import actors, needs_ray
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[int, str]]:
    """The process of `idlm serve --ray` and its address."""
    command = [sys.executable, "-m", "idlm_kernels", "serve", "--model", str(folder), "--max-model-len", "200"]
    command += ["--ray", "local", "--ray-replicas", "2", "--threads", "1", "--port", "0", "--served-model-name", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "IDLM_API_KEY": "secret"})
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "listening on" in line:
            break
    else:
        pytest.fail("the server did not start: " + "".join(said))
    assert "2 replicas on Ray" in line
    yield process.pid, f"http://127.0.0.1:{line.split(' port ')[1].split(';')[0]}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def ask(address: str, seed: int, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"prompt {seed}", "max_tokens": 12, "temperature": 1.0, "seed": seed, **more}
    key = {"Authorization": "Bearer secret"}
    return httpx.post(f"{address}/v1/completions", json=body, headers=key, timeout=60)


def alone(folder: Path, seeds: range) -> list[str]:
    generator = Generator.from_pretrained(folder)
    assert generator.tokenizer is not None
    texts = []
    for seed in seeds:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12)
        texts.append(generator.generate([generator.tokenizer.encode(f"prompt {seed}")], [params], plan="ar")[0].text)
    return texts


@needs_ray
def test_replicas_answer_as_one_server(server: tuple[int, str], folder: Path) -> None:
    _, address = server
    assert httpx.get(f"{address}/v1/models").status_code == 401, "the key is asked for here too"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(address, seed), range(16)))
    assert [a.json()["choices"][0]["text"] for a in answers] == alone(folder, range(16))
    streamed = ask(address, 3, stream=True).text
    pieces = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone(folder, range(3, 4))[0]
    assert streamed.rstrip().endswith("[DONE]")
    refused = ask(address, 0, best_of=3)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of"


@needs_ray
def test_a_killed_replica_is_replaced(server: tuple[int, str], folder: Path) -> None:
    pid, address = server
    before = set(actors("ServeReplica:idlm", pid))
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        now = set(actors("ServeReplica:idlm", pid))
        if len(now) == 2 and min(before) not in now:
            break
        time.sleep(0.2)
    else:
        pytest.fail("no replica took the place of the one that was killed")
    expected, good = alone(folder, range(4)), 0
    while good < 4 and time.monotonic() < deadline:  # until Ray knows, it may route to the dead one
        answer = ask(address, good)
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected[good]
            good += 1
        else:
            time.sleep(0.5)
    assert good == 4
