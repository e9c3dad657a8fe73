"""A server in a thread of this process, on a free port, with a tiny model over bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from idlm_kernels.generate import Engine, EngineOptions, Generator
from idlm_kernels.serve.app import Server
from idlm_kernels.serve.run import HttpServer, bound_socket
from tests.tiny import save_tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


class Running:
    """A server that listens. `engine` is for looking at: its thread is the server's."""

    def __init__(self, server: Server, http: HttpServer, port: int):
        self.server, self.engine, self.http = server, server.engine, http
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.web = httpx.Client(base_url=self.url, timeout=20)

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, "timeout": 20, **settings}
        )

    def wait_until_idle(self) -> None:
        """Until nothing is decoded, and every page is free."""
        deadline = time.monotonic() + 10
        while self.server.worker.open_requests or self.engine.pool.free_pages != self.engine.pool.num_pages:
            assert time.monotonic() < deadline, "requests or pages are left"
            time.sleep(0.01)


@contextmanager
def running(engine: Engine, send_buffer: int | None = None, **settings: Any) -> Iterator[Running]:
    server = Server(engine, "tiny", **settings)
    listening = bound_socket("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # of its connections too
    http = HttpServer(server, drain_seconds=10)
    thread = threading.Thread(target=http.run, args=([listening],))
    port = listening.getsockname()[1]
    started = threading.Event()
    http.on_start = started.set
    thread.start()
    try:
        assert started.wait(20)
        server_for_tests = Running(server, http, port)
        with server_for_tests.web:
            yield server_for_tests
    finally:
        http.end()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="package", autouse=True)
def one_cpu_thread() -> Iterator[None]:
    """A tiny model has no work for more, and where others use the cores they would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a chat template, and "~" as its end token."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "~"}))
    return folder


@pytest.fixture(scope="session")
def generator(folder: Path) -> Generator:
    """The model by itself, for what a text has to be."""
    return Generator.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_engine(folder: Path) -> Callable[..., Engine]:
    loaded = Generator.from_pretrained(folder)

    def make(step: Any = None, **changes: Any) -> Engine:
        sizes: dict[str, Any] = {"plan": "chain", "stride": 3, "max_num_seqs": 4, "max_model_len": 256, "page_size": 8}
        options = EngineOptions(**{**sizes, "logprobs": True, "window_steps": 4, **changes})
        more = {} if step is None else {"step": step}
        return Engine(loaded.model, loaded.tokenizer, options=options, **more)

    return make


@pytest.fixture(scope="module")
def served(make_engine: Callable[..., Engine]) -> Iterator[Running]:
    with running(make_engine()) as server:
        yield server
        server.wait_until_idle()
