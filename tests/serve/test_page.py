"""The page at `/`, and what it asks for: a chunk per forward, and a decode without drafts. A real Chromium shows it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from idlm_kernels.generate import Engine, Generator
from idlm_kernels.generate.step import decode_step
from tests.serve.conftest import Running, running
from tests.serve.test_answers import AS_TEXT, HELLO, lone


def chunks(served: Running, **asked: Any) -> list[Any]:
    asked = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 40, "stream": True, **asked}
    further = {"stream_options": {"include_forwards": True, "include_usage": True}, **asked.pop("extra_body", {})}
    return list(served.client().chat.completions.create(**asked, extra_body=further))


def test_a_chunk_per_forward_tells_its_tokens_and_drafts(served: Running, generator: Generator) -> None:
    first, *others, last = chunks(served)
    forwards = [chunk.model_extra["forward"] for chunk in others]
    wanted = lone(generator, AS_TEXT, seed=3, max_tokens=40)
    assert [token for f in forwards for token in f["token_ids"]] == wanted.token_ids
    assert "".join(chunk.choices[0].delta.content or "" for chunk in others) == wanted.text
    assert "forward" not in first.model_extra and len(forwards) == last.usage.model_extra["forwards"]
    for f in forwards[:-1]:
        assert f["drafted_tokens"] == len(f["token_ids"]) - 1
    assert "forward" not in served.web.post("/v1/completions", json={"prompt": "a", "stream": True}).text


def test_a_request_may_ask_for_ordinary_decoding(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine(suffix_drafts=True)) as served:
        asked = {"temperature": 0, "max_tokens": 120}  # greedy, a tiny model repeats itself
        strided, ar = chunks(served, **asked), chunks(served, **asked, extra_body={"plan": "ar"})
        ids = [[token for c in run[1:-1] for token in c.model_extra["forward"]["token_ids"]] for run in (strided, ar)]
        assert ids[0] == ids[1] and len(strided) < len(ar)
        assert ar[-1].usage.model_extra["tokens_per_forward"] == 1
        wrong = served.web.post("/v1/completions", json={"prompt": "a", "plan": "chain"})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "plan"


def test_the_page_needs_no_key_and_nothing_from_elsewhere(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine(), api_key="k3y") as served:
        page = served.web.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert served.web.get("/v1/models").status_code == 401
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?:|//[\w.]+/|innerHTML|<\w+[^>]* (?:style|on\w+)=", page.text)


# In a browser


class Browser:
    """Chromium, by the WebDriver protocol (W3C): the few calls that are needed here."""

    def __init__(self, profile: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.web = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.web.get("/status")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline and self.driver.poll() is None
                time.sleep(0.05)
        flags = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
            "disable-component-update disable-sync disable-dev-shm-usage window-size=1280,860"
        )
        options = {"args": [*(f"--{flag}" for flag in flags.split()), f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = "/session"
        self.session += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = self.session + path
        answer = self.web.get(url) if body is None else self.web.post(url, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def until(self, script: str) -> Any:
        """The value of an expression, once it is one that counts as true."""
        deadline = time.monotonic() + 30
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText"), self.complaints())
            time.sleep(0.02)
        return value

    def fill(self, name: str, text: str) -> None:
        self.run(f"document.getElementById({name!r}).value = {json.dumps(text)}")

    def click(self, name: str) -> None:
        self.run(f"document.getElementById({name!r}).click()")

    def complaints(self) -> list[str]:
        """Errors that the console has shown since the last look."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def screenshot(self, target: Path) -> None:
        target.write_bytes(base64.b64decode(self.call("/screenshot")))

    def close(self) -> None:
        self.web.delete(self.session)
        self.web.close()
        self.driver.terminate()
        self.driver.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver here (Debian: the packages chromium and chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def open_page(browser: Browser, served: Running, **settings: str) -> None:
    browser.call("/url", {"url": served.url + "/"})
    for name, value in {"seed": "3", "temperature": "1", "tokens": "40", **settings}.items():
        browser.fill(name, value)


@pytest.mark.browser
def test_a_conversation_in_a_browser(browser: Browser, served: Running, generator: Generator) -> None:
    open_page(browser, served)
    browser.until("document.getElementById('model').textContent.startsWith('tiny, 256 tokens')")
    browser.fill("text", "héllo")
    browser.click("send")
    browser.until("messages.length == 2 && !running")
    wanted = lone(generator, AS_TEXT, seed=3, max_tokens=40)
    assert browser.run("document.querySelector('.assistant').textContent") == wanted.text
    assert browser.run("messages[1].content") == wanted.text
    browser.until(f"document.getElementById('f-tokens').textContent == '{wanted.tokens}'")
    tokens = int(browser.run("document.getElementById('f-forwards').textContent"))
    assert tokens < wanted.tokens and browser.run("document.querySelectorAll('.forward').length") <= tokens
    assert browser.run("document.querySelectorAll('.forward mark').length") > 0, "accepted drafts are marked"
    painted = "[...document.getElementById('{}').getContext('2d').getImageData(40, 0, 200, 100).data].some(x => x)"
    assert browser.run(painted.format("strides")) and browser.run(painted.format("rates"))
    assert browser.complaints() == []


@pytest.mark.browser
def test_ar_beside_strided_in_a_browser(browser: Browser, served: Running) -> None:
    open_page(browser, served)
    browser.fill("text", "héllo")
    browser.click("compare")
    verdict = browser.until("document.querySelector('.verdict.good, .verdict.bad')?.textContent")
    assert re.fullmatch(r"identical: all \d+ tokens", verdict)
    strided, ar = browser.run("[...document.querySelectorAll('.pair .soft')].slice(0, 2).map(x => x.textContent)")
    assert re.match(r"strided: \d+ tokens in \d+ forwards", strided)
    assert re.match(r"AR: (\d+) tokens in \1 forwards", ar)
    assert browser.run("document.querySelectorAll('.side')[1].querySelector('mark')") is None
    assert browser.complaints() == []


@pytest.mark.browser
def test_stop_errors_and_a_key_in_a_browser(browser: Browser, make_engine: Callable[..., Engine]) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return decode_step(*arguments)

    with running(make_engine(slow), api_key="k3y") as served:
        open_page(browser, served, tokens="200")
        browser.until("!document.getElementById('locked').hidden")
        browser.fill("key", "k3y")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.until("document.getElementById('model').textContent.startsWith('tiny')")
        browser.fill("text", "héllo")
        browser.click("send")
        browser.until("document.querySelectorAll('.forward').length > 3")
        browser.click("stop")
        browser.until("!running")
        served.wait_until_idle()
        assert browser.run("messages.length") == 2 and browser.run("document.querySelector('.fault')") is None
        browser.fill("text", "again " * 60)
        browser.click("send")
        assert "the context is 256" in browser.until("document.querySelector('.fault')?.textContent")
        assert browser.run("messages.length") == 2, "a message that was refused is not part of the conversation"
