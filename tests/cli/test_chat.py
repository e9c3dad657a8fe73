"""`idlm chat`, through a pipe and in a terminal, with a tiny model over bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.cli.chat import has_colours
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.output import RequestOutput
from idlm_kernels.generate.params import mixed_seed
from idlm_kernels.model import Tokenizer
from tests.tiny import save_tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('refused') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(folder: Path, stdin: str | bytes, *flags: str) -> Result:
    arguments = ["chat", "--model", str(folder), "--max-tokens", "12", "--plan", "chain", "--stride", "3", *flags]
    return CliRunner().invoke(app, arguments, input=stdin)


class Replies:
    """What each message of a conversation has to get: lone AR runs of the whole conversation so far."""

    def __init__(self, folder: Path, **params: float):
        self.generator, self.params, self.text, self.count = Generator.from_pretrained(folder), params, "", 0

    def to(self, message: str) -> str:
        self.text += f"user: {message}\nassistant: "
        params = SamplingParams(max_tokens=12, seed=mixed_seed(7, self.count), **self.params)
        assert self.generator.tokenizer is not None
        answer = self.generator.generate([self.generator.tokenizer.encode(self.text)], [params], plan="ar")[0].text
        self.text, self.count = self.text + answer + "\n", self.count + 1
        return answer + "\n"


def test_each_answer_is_a_lone_ar_run_of_the_conversation_so_far(folder: Path) -> None:
    done = chat(folder, "one\n\n  two \n", "--seed", "7", "--temperature", "1")
    replies = Replies(folder, temperature=1.0)
    assert done.exit_code == 0 and done.stdout == replies.to("one") + replies.to("two")
    assert done.stderr == "idlm: the answer ended at its limit of tokens\n" * 2


def test_reset_forgets_what_was_said_and_a_system_message_comes_first(folder: Path) -> None:
    done = chat(folder, "one\n/reset\n/system be brief\ntwo\n", "--seed", "7", "--system", "x")
    replies = Replies(folder)
    replies.text = "system: x\n"
    first = replies.to("one")
    replies.text, replies.count = "system: be brief\n", 0
    assert done.stdout == first + replies.to("two")


def test_stats_are_of_the_last_answer_and_of_all(folder: Path) -> None:
    said = chat(folder, "/stats\none\ntwo\n/stats\n").stderr
    assert said.startswith("nothing is answered yet\n")
    assert re.search(r"^last answer: 12 tokens in \d+ forwards, TPF \d\.\d\d, acceptance .*tokens/s", said, re.M)
    assert re.search(r"^2 answers: 24 tokens in \d+ forwards, TPF", said, re.M)


def test_the_oldest_messages_make_room(folder: Path) -> None:
    """A message goes with its answer, even where the message alone would be enough."""
    replies = Replies(folder)
    shown = replies.to("one") + replies.to("two")
    all_of_it = len(f"{replies.text}user: three\nassistant: ".encode())
    done = chat(folder, "one\ntwo\nthree\n", "--max-model-len", str(all_of_it + 11), "--seed", "7")
    replies.text = replies.text[replies.text.index("user: two") :]
    assert done.stdout == shown + replies.to("three")
    assert done.stderr.count("oldest messages are left out") == 1


@pytest.mark.parametrize(
    ("stdin", "named"), [("x" * 100, "the context is 80"), ("/foo", "'/foo'"), ("bad", "refused"), (b"\xff", "UTF-8")]
)
def test_a_pipe_ends_with_status_2_at_what_cannot_be_answered(folder: Path, stdin: str | bytes, named: str) -> None:
    done = chat(folder, stdin, "--max-model-len", "80")
    assert done.exit_code == 2 and done.stdout == "" and named in done.stderr and done.stderr.count("\n") == 1


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    done = chat(save_tiny_model(tmp_path), "one\n")
    assert done.exit_code == 2 and "no chat template" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--show-drafts",)])
def test_a_pipe_gets_no_colours(folder: Path, flags: tuple[str, ...]) -> None:
    done = chat(folder, "one\n", *flags)
    assert "\x1b" not in done.stdout and ("no terminal with colours" in done.stderr) is bool(flags)


@pytest.mark.parametrize(("environment", "wanted"), [("", False), ("TERM=xterm", True), ("TERM=dumb", False)])
def test_a_terminal_gets_colours_unless_it_has_none_or_nobody_wants_them(environment: str, wanted: bool) -> None:
    settings = dict(pair.split("=") for pair in environment.split())
    assert has_colours(settings) is wanted
    assert has_colours({**settings, "NO_COLOR": ""}) is wanted and not has_colours({**settings, "NO_COLOR": "1"})


def test_an_event_tells_what_of_its_text_was_drafted(folder: Path) -> None:
    tokenizer = Generator.from_pretrained(folder).tokenizer
    assert isinstance(tokenizer, Tokenizer)
    output = RequestOutput(1, SamplingParams(stop=("xyz",)), 0, tokenizer, 5)
    events = [
        output.take(tokenizer.encode("ab☀c"), 5, 4, 0),  # the last byte of ☀, and c, after four accepted bytes
        output.take(tokenizer.encode("dx"), 2, 1, 0),  # x may begin the stop string
        output.take(tokenizer.encode("qr"), 3, 3, 2),  # the limit cut the step within its drafts
    ]
    assert [(e.text, e.num_drafted, e.drafted_chars) for e in events] == [("ab☀c", 4, 2), ("d", 1, 1), ("xqr", 2, 3)]


def _become_foreground() -> None:
    """In the new process: the terminal's Ctrl-C is a signal, which a run of the tests in the background ignores."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str, **settings: str):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", "from idlm_kernels.cli import main; main()", "chat", *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(
            command,
            **streams,
            env={**environment, "TERM": "xterm", **settings},
            start_new_session=True,
            preexec_fn=_become_foreground,
        )
        os.close(theirs)
        self._fd, self.shown = ours, ""

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to a match, which it takes."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.shown!r}"
            self.shown += os.read(self._fd, 4096).decode("utf-8", "replace")
        taken, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return taken


    def interrupt(self, pattern: str) -> None:
        """Ctrl-C at the prompt. One that comes before readline listens is noticed with the next key."""
        for _ in range(12):
            self.write("\x03")
            with contextlib.suppress(AssertionError):
                self.until(pattern, 5)
                return
        raise AssertionError(f"no {pattern!r} in {self.shown!r}")


def test_in_a_terminal_ctrl_c_stops_the_answer_and_drafts_have_a_colour(folder: Path) -> None:
    window = Terminal("--model", str(folder), "--show-drafts", "--plan", "chain", "--stride", "3", "--suffix-drafts")
    window.until("/help lists.*\n> ")
    window.write("once\n")
    window.until("\x1b\\[36m[^\x1b]+\x1b\\[0m")
    window.write("\x03")
    window.until("stopped\r\n> ")
    window.interrupt("Ctrl-D or /exit ends the chat.*\n> ")
    window.write("bad\n")
    window.until("idlm: .*refused.*\n> ")
    window.write("/stats\n")
    assert "ended by cancelled" in window.until("1 answers: .*\n> ")
    window.write("\x04")
    assert window.process.wait(20) == 0
