"""/v1/adapters and traces of a server: adapters come and go under load, and every text is its lone AR run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from idlm_kernels.generate import Engine, EngineOptions, Generator, SamplingParams
from idlm_kernels.generate.params import mixed_seed
from idlm_kernels.learning.adapters import AdapterFolder
from idlm_kernels.learning.traces import TraceReader, TraceWriter
from tests.serve.conftest import Running, running
from tests.tiny import save_tiny_adapter, save_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def folder(tmp_path: Path, bundle: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    config = Generator.from_pretrained(bundle, adapter=None).config
    for i in range(1, 5):
        save_tiny_adapter(folder / f"v{i}", config, seed=i)
    return folder


def make_engine(bundle: Path, **changes: Any) -> Engine:
    loaded = Generator.from_pretrained(bundle, mask_token_id=250)
    sizes: dict[str, Any] = {"plan": "chain", "stride": 3, "max_num_seqs": 4, "max_model_len": 128, "page_size": 8}
    return Engine(loaded.model, loaded.tokenizer, options=EngineOptions(**{**sizes, "window_steps": 4, **changes}))


@pytest.fixture
def served(bundle: Path, folder: Path) -> Iterator[Running]:
    with running(make_engine(bundle), adapters=AdapterFolder(folder)) as server:
        yield server
        server.wait_until_idle()


def in_use(server: Running) -> str:
    """The adapter of the next window; a request makes one."""
    server.client().completions.create(model="tiny", prompt="a", max_tokens=2)
    return str(server.web.get("/v1/adapters").json()["in_use"]["id"])


def test_an_adapter_is_chosen_by_name(served: Running) -> None:
    listed = served.web.get("/v1/adapters").json()
    assert [entry["id"] for entry in listed["data"]] == ["v1", "v2", "v3", "v4"]
    assert listed["in_use"] == {"id": "adapter", "verified": [0, 0], "accepted": [0, 0]} and listed["replaced"] is None
    answer = served.web.post("/v1/adapters", json={"adapter": "v2"})
    assert answer.status_code == 200 and in_use(served) == "v2"
    listed = served.web.get("/v1/adapters").json()
    assert listed["replaced"]["id"] == "adapter"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"adapter": "v9"}, 404, "there is no adapter 'v9' in adapters"),
        ({"adapter": "../adapters/v1"}, 404, "there is no adapter"),
        ({"adapter": 3}, 400, "adapter"),
        ({}, 400, "adapter"),
        ({"adapter": "v1", "path": "/"}, 400, "path is not supported"),
    ],
)
def test_what_cannot_be_chosen_is_refused(served: Running, body: dict[str, Any], status: int, named: str) -> None:
    answer = served.web.post("/v1/adapters", json=body)
    assert answer.status_code == status and named in answer.json()["error"]["message"]
    assert in_use(served) == "adapter"


def test_a_damaged_adapter_is_refused(served: Running, folder: Path) -> None:
    (folder / "v3" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    answer = served.web.post("/v1/adapters", json={"adapter": "v3"})
    assert answer.status_code == 400 and "cannot be used" in answer.json()["error"]["message"]
    assert in_use(served) == "adapter"


def test_there_is_no_route_without_a_folder(bundle: Path) -> None:
    with running(make_engine(bundle)) as server:
        assert server.web.get("/v1/adapters").status_code == 404
        assert "/v1/adapters" not in server.web.get("/openapi.json").json()["paths"]


def test_a_model_without_an_adapter_takes_none(bundle: Path, folder: Path) -> None:
    from idlm_kernels.serve.app import Server

    loaded = Generator.from_pretrained(bundle, adapter=None)
    with pytest.raises(ValueError, match="has no adapter"):
        Server(Engine(loaded.model, loaded.tokenizer), "tiny", adapters=AdapterFolder(folder))


def test_the_newest_of_a_watched_folder_is_taken(bundle: Path, folder: Path) -> None:
    engine = make_engine(bundle)
    with running(engine, adapters=AdapterFolder(folder), watch_seconds=0.02) as server:
        wait_until(lambda: in_use(server) == "v4")
        save_tiny_adapter(folder / ".v5", engine.model.config, seed=5).rename(folder / "v5")
        wait_until(lambda: in_use(server) == "v5")
        folder.rename(folder.parent / "away")  # and a folder that is gone for a while is waited for
        time.sleep(0.1)
        (folder.parent / "away").rename(folder)
        save_tiny_adapter(folder / ".v6", engine.model.config, seed=6).rename(folder / "v6")
        wait_until(lambda: in_use(server) == "v6")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_swaps_under_load_and_what_the_traces_tell(bundle: Path, folder: Path, tmp_path: Path) -> None:
    """Clients ask and adapters are exchanged at the same time; each text is AR's, and each is in the traces."""
    engine, plain = make_engine(bundle), Generator.from_pretrained(bundle, adapter=None)
    model, size = engine.model.identity, engine.model.config.vocab_size
    texts: list[tuple[str, SamplingParams, str]] = []

    def client(server: Running, number: int) -> None:
        chance, api = random.Random(number), server.client()
        for _ in range(8):
            prompt = "a page that is shared: " + "".join(chance.choice("abcde") for _ in range(chance.randint(1, 20)))
            temperature, seed = chance.choice((0.0, 0.9)), chance.getrandbits(40)
            length = chance.randint(5, 60)
            answer = api.completions.create(
                model="tiny", prompt=prompt, max_tokens=length, temperature=temperature, seed=seed
            )
            params = SamplingParams(temperature=temperature, max_tokens=length, seed=mixed_seed(seed, 0))
            texts.append((prompt, params, answer.choices[0].text))

    with (
        TraceWriter(tmp_path / "traces", model, size) as writer,
        running(engine, adapters=AdapterFolder(folder)) as server,
    ):
        engine.on_trace = lambda request: writer.write(request.trace())
        clients = [threading.Thread(target=client, args=(server, i)) for i in range(4)]
        for thread in clients:
            thread.start()
        chance = random.Random(1)
        while any(thread.is_alive() for thread in clients):
            answer = server.web.post("/v1/adapters", json={"adapter": f"v{chance.randint(1, 4)}"})
            assert answer.status_code == 200
        server.wait_until_idle()
    assert len(texts) == 32 and engine.replaced is not None
    wanted = set()
    assert plain.tokenizer is not None
    for prompt, params, text in texts:
        ids = plain.tokenizer.encode(prompt)
        (alone,) = plain.generate([ids], [params], plan="ar")
        assert text == alone.text
        wanted.add((tuple(ids), tuple(alone.token_ids)))
    traces = TraceReader(tmp_path / "traces", model, size).new()
    assert {(trace.prompt, trace.answer) for trace in traces} == wanted and writer.dropped == 0
    assert len({name for trace in traces for name in trace.adapters}) > 1
