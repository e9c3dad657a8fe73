"""What is refused, and how; who may ask; and what happens when a client, the server or the machine goes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from idlm_kernels.cli import app as cli
from idlm_kernels.generate import Engine
from idlm_kernels.generate.step import decode_step
from idlm_kernels.serve import answers, run
from idlm_kernels.serve.app import Server
from idlm_kernels.serve.protocol import NOT_SUPPORTED
from python_ref.step import OUTCOME
from tests.serve.conftest import Running, running

USER = [{"role": "user", "content": "a"}]
LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 240, "extra_body": {"ignore_eos": True}}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return dict(error)


ASKS = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "parallel_tool_calls": 2,
    "response_format": {"type": "json_object"},
    "modalities": ["audio"],
    "skip_special_tokens": False,
    "reasoning_effort": "low",
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_by_name_and_taken_where_it_asks_for_nothing(
    served: Running, name: str
) -> None:
    url, asked = "/v1/chat/completions", {"messages": USER, "max_tokens": 1}
    error = error_of(served.web.post(url, json={**asked, name: ASKS.get(name, 17)}), 400)
    assert error["param"] == name and name in error["message"]
    nothing = dict.fromkeys(NOT_SUPPORTED) | {name: NOT_SUPPORTED[name][-1]}
    assert served.web.post(url, json={**asked, **nothing}).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"no_such_field": 1}, "no_such_field"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": True}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"256": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": "a" * 300}, None),
        ({"prompt": ["a"] * 65, "n": 2}, None),
        ({"messages": USER}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(served: Running, changes: dict[str, Any], param: str | None, stream: bool) -> None:
    """Before a stream begins too: its status is still to be had then."""
    body = {"prompt": "a", "stream": stream, **changes}
    response = served.web.post(
        "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert (error["param"] or "").split("[")[0] == (param or "")
    assert error["code"] == ("context_length_exceeded" if changes.get("prompt") == "a" * 300 else None)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "a"}], "role"),
        ([{"role": "tool", "content": "a", "tool_call_id": "1"}], "tools"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tools"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "half a pair \ud800", "text": "a"}]}], ""),
        ([{"role": "user", "content": "a", "half a pair \ud800": 1}], "unicode"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": "a", "colour": "red"}], "colour"),
        (["hello"], "messages"),
        ("hello", "messages"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_messages_that_are_none(served: Running, messages: Any, said: str) -> None:
    body = json.dumps({"messages": messages}).encode()
    response = served.web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert said in error["message"] and error["param"].startswith("messages")


BODIES = {
    "nothing": b"",
    "half": b'{"prompt": "a"',
    "no object": b"[1, 2]",
    "a number": b"7",
    "deep": b'{"prompt": "a", "chat_template_kwargs": ' + b"[" * 100 + b"]" * 100 + b"}",
    "deeper than the stack": b"[" * 200_000,
    "an object per level": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "half a surrogate pair": rb'{"prompt": "\ud800"}',
    "half a surrogate pair as a name": rb'{"prompt": "a", "\ud800": 1}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "a long number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "NUL": b"\0" * 100,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_none(served: Running, path: str, name: str) -> None:
    error_of(served.web.post(path, content=BODIES[name], headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("depth", [20, 40])
def test_what_a_template_may_read_is_nested_so_deep_and_no_deeper(served: Running, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    asked = {"messages": USER, "max_tokens": 1, "chat_template_kwargs": {"x": value}}
    response = served.web.post("/v1/chat/completions", json=asked)
    if depth > 32:
        assert "nested deeper than 32" in error_of(response, 400)["message"]
    else:
        assert response.status_code == 200


def test_a_body_of_another_type_is_refused(served: Running) -> None:
    """Which a page of another site could send from a browser, without asking first."""
    response = served.web.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert "application/json" in error_of(response, 400)["message"]


def test_other_paths_methods_and_models(served: Running) -> None:
    error_of(served.web.get("/v2"), 404)
    error_of(served.web.get("/v1/completions"), 405)
    for response in (
        served.web.get("/v1/models/other/one"),
        served.web.post("/v1/completions", json={"model": "other", "prompt": "a"}),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found" and "tiny" in error["message"]


def test_bodies_have_a_largest_size(make_engine: Callable[..., Engine]) -> None:
    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    with running(make_engine(), max_body_size=2000) as server:
        url, kind = "/v1/completions", {"Content-Type": "application/json"}
        assert "2000" in error_of(server.web.post(url, content=b" " * 2001, headers=kind), 413)["message"]
        error_of(server.web.post(url, content=chunks(), headers=kind), 413)
        assert server.web.post(url, json={"prompt": "a"}).status_code == 200


def test_without_the_key_nothing_is_told(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine(), api_key="sésame") as server:
        key = "sésame".encode()
        assert server.web.get("/health").status_code == 200
        paths = ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere")
        for path in paths:
            for wrong in (
                None,
                b"Bearer",
                b"Bearer " + key + b"e",
                b"Basic " + key,
                b"Bearer " + key[:-1],
                b"Bearer \xff",
            ):
                headers = {} if wrong is None else {"Authorization": wrong}
                response = server.web.get(path, headers=headers)  # type: ignore[arg-type]
                assert error_of(response, 401)["code"] == "invalid_api_key"
        error_of(server.web.post("/v1/completions", content=b"[" * 10**7), 401)
        right: Any = {"Authorization": b"Bearer " + key}
        assert [server.web.get(path, headers=right).status_code for path in paths] == [200] * 4 + [404]


def test_more_than_the_server_takes_is_told_to_come_again(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine(max_num_seqs=1, window_steps=1), max_waiting=1) as server:
        client = server.client()
        streams = [client.completions.create(**LONG, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**LONG)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        error_of(refused.value.response, 429)
        with pytest.raises(openai.BadRequestError, match="takes 2"):
            client.completions.create(**LONG, n=3)
        for stream in streams:
            stream.close()
        server.wait_until_idle()
        assert server.client(max_retries=0).completions.create(model="tiny", prompt="a").choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_cancels(make_engine: Callable[..., Engine], stream: bool) -> None:
    """Endless steps: the server would not come to rest if the request went on."""
    hold = threading.Event()

    def slow_step(*arguments: Any) -> Any:
        hold.wait(0.01)
        return decode_step(*arguments)

    with running(make_engine(slow_step, max_model_len=100_000)) as server:
        client = server.client(timeout=0.3)
        asked = {**LONG, "max_tokens": 90_000, "n": 2}
        if stream:
            with client.completions.create(**asked, stream=True) as answer:
                next(iter(answer))
                assert server.server.worker.open_requests == 2
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**asked)
        hold.set()
        server.wait_until_idle()
        text = server.web.get("/metrics").text
        assert 'idlm_texts_total{finish_reason="cancelled"} 2.0' in text


def test_a_slow_reader_costs_nobody_else(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine()) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(http_request({"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True}))
        for _ in range(5):
            assert server.client().completions.create(model="tiny", prompt="a").choices
        received = b""
        while part := slow.recv(4096):
            received += part
        assert b"data: [DONE]" in received


def test_who_reads_nothing_is_dropped(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_SEND_SECONDS", 0.2)
    with running(make_engine(), send_buffer=4096) as server, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", server.port))
        asked = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True, "logprobs": 0, "n": 4}
        silent.sendall(http_request(asked))
        assert silent.recv(4) == b"HTTP"
        server.wait_until_idle()
        deadline = time.monotonic() + 10
        while server.http.server_state.tasks or server.server.worker._open:
            assert time.monotonic() < deadline, "the answer is still there"
            time.sleep(0.01)
        assert server.web.get("/health").status_code == 200


def http_request(asked: dict[str, Any]) -> bytes:
    body = json.dumps(asked)
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def test_nan_is_the_fault_of_its_request_alone(make_engine: Callable[..., Engine]) -> None:
    from idlm_kernels.generate.state import FAILED

    def step(decoder: Any, state: Any) -> Any:
        outcome = decode_step(decoder, state)
        outcome[state.seed == 13, OUTCOME.index("finish_reason")] = FAILED
        return outcome

    with running(make_engine(step)) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError, match="NaN"):
            client.completions.create(**LONG, seed=13)
        with pytest.raises(openai.APIError, match="NaN"):
            list(client.completions.create(**LONG, seed=13, stream=True))
        assert client.completions.create(**LONG, seed=14).choices[0].finish_reason == "length"


def test_a_fault_of_the_machine_ends_the_server_and_is_no_answer(
    make_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    broken = threading.Event()

    def step(*arguments: Any) -> Any:
        if broken.is_set():
            raise MemoryError("no memory is left")
        return decode_step(*arguments)

    seen: list[Any] = []

    def clients(port: int) -> None:
        client = client_of(port)
        stream = iter(client.completions.create(**LONG, stream=True))
        seen.append(next(stream).choices[0].text)
        broken.set()
        try:
            seen.append([chunk.choices[0].finish_reason for chunk in stream])
        except openai.APIError as error:
            seen.append(error)
        with suppress(openai.APIError):
            seen.append(client.completions.create(**LONG))

    with pytest.raises(run.MachineFailed, match="MemoryError: no memory is left"):
        serve_here(Server(make_engine(step, window_steps=2), "tiny"), clients)
    assert len(seen) == 2 and "the machine has failed" in str(seen[1])
    (record,) = (record for record in caplog.records if record.levelname == "CRITICAL")
    assert record.exc_info is not None and "no memory is left" in str(record.exc_info[1])


def test_a_template_that_the_machine_cannot_run_ends_the_server(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    assert engine.tokenizer is not None

    def render(*arguments: Any, **names: Any) -> str:
        raise OSError("no process is left")

    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", render)
    seen: list[openai.APIStatusError] = []

    def clients(port: int) -> None:
        with pytest.raises(openai.InternalServerError) as failed:
            client_of(port).chat.completions.create(model="tiny", messages=USER)
        seen.append(failed.value)

    with pytest.raises(run.MachineFailed, match="no process is left"):
        serve_here(Server(engine, "tiny"), clients)
    assert seen[0].status_code == 503 and seen[0].code == "server_stops"


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=5)


def serve_here(server: Server, clients: Callable[[int], None]) -> None:
    """Serve in this thread, which alone gets signals, with `clients` in another one."""
    listening = run.bound_socket("127.0.0.1", 0)
    before, ended, hung = signal.getsignal(signal.SIGTERM), threading.Event(), threading.Event()

    def ask() -> None:
        try:
            clients(listening.getsockname()[1])
        finally:
            if not ended.wait(10):
                hung.set()
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    try:
        run.serve(server, listening, 20, thread.start, False)
    finally:
        ended.set()
        assert not hung.is_set(), "the server did not end by itself"
        signal.signal(signal.SIGTERM, before)
        thread.join(20)


def test_sigterm_lets_running_requests_end(make_engine: Callable[..., Engine]) -> None:
    seen: list[Any] = []

    def clients(port: int) -> None:
        client = client_of(port)
        asked = {**LONG, "max_tokens": 120, "stream": True, "stream_options": {"include_usage": True}}
        stream = iter(client.completions.create(**asked))
        next(stream)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(openai.APIConnectionError):
            client_of(port).completions.create(**LONG)
        seen.extend(stream)

    def step(*arguments: Any) -> Any:
        time.sleep(0.005)
        return decode_step(*arguments)

    server = Server(make_engine(step, plan="ar", stride=1), "tiny")
    serve_here(server, clients)
    assert seen[-1].usage.completion_tokens == 120
    assert not server.worker.is_alive and not server.worker._thread.is_alive()


def idlm_serve(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from idlm_kernels.cli import main; main()", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings})


def test_the_command_says_what_it_serves_and_how_to_ask(folder: Path) -> None:
    process = idlm_serve("--model", str(folder), "--port", "0", "--max-model-len", "64", IDLM_API_KEY="k3y")
    with process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(7)]
        said = "".join(lines)
        assert str(folder) in said and "64 tokens each" in said and "127.0.0.1" in said and "with an API key" in said
        page, url = (word for word in said.split() if word.startswith("http://"))
        assert httpx.get(page).status_code == 200
        body = lines[-1].split("'")[1]
        kind = {"Content-Type": "application/json"}
        assert httpx.post(url, content=body, headers=kind).status_code == 401
        answer = httpx.post(url, content=body, headers={**kind, "Authorization": "Bearer k3y"})
        assert answer.status_code == 200 and answer.json()["model"] == str(folder), answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [("--api-key", " "), ("--host", "no.such.host.invalid"), ("--stride", "x")])
def test_what_the_command_refuses(arguments: tuple[str, str]) -> None:
    said = refused(*arguments, "--port", "0")
    assert arguments[0] in said


def refused(*arguments: str, **settings: str) -> str:
    """What the command says before it ends with status 2."""
    done = CliRunner().invoke(cli, ["serve", *arguments], env=settings)
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_an_empty_key_in_the_environment_does_not_open_the_server() -> None:
    assert "IDLM_API_KEY" in refused(IDLM_API_KEY="")


def test_a_port_that_is_taken_is_said_before_a_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("--port", port, "--model", "no/such/model")
