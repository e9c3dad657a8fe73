"""`idlm chat`: a conversation in the terminal, or through a pipe, one message per line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from idlm_kernels.cli.errors import EXIT_INTERRUPTED, reported
from idlm_kernels.cli.generate import figures, text_of_stdin
from idlm_kernels.cli.options import DraftOptions, ModelOptions, SamplingOptions, with_groups

if TYPE_CHECKING:
    from idlm_kernels.cli.conversation import Conversation
    from idlm_kernels.generate import StreamEvent

_CONTEXT = 8192  # tokens, where nobody says how many: a model may have room for far more than a chat needs
_DRAFT, _PLAIN = "\x1b[36m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal
_HELP = """\
/system TEXT  the system message from now on; alone, show it
/reset        forget what was said
/stats        tokens per forward, acceptance and tokens/s, of the last answer and of all
/drafts       show accepted drafts in another colour, or no longer
/help         this
/exit         end, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with / is sent with a space before it."""


@reported()
@with_groups
def chat(
    *,
    models: ModelOptions,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    drafts: DraftOptions,
    sampling: SamplingOptions,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of an answer.", show_default="what the context holds")
    ] = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Show accepted drafts in another colour: what a forward gave besides.")
    ] = False,
) -> None:
    """Talk with a model: no server is needed. Without a terminal each line of stdin is a message."""
    params, decoding = sampling.params(max_tokens), drafts.checked()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a character it cannot show is no reason to stop

    from idlm_kernels.cli.conversation import Conversation
    from idlm_kernels.generate import EngineOptions

    generator = models.load()
    tokenizer = generator.tokenizer
    assert tokenizer is not None  # from_pretrained brings one
    if not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template, which a chat needs; `idlm generate --raw` continues a text")
    context = generator.max_model_len if models.max_model_len is not None else min(generator.max_model_len, _CONTEXT)
    sizes = {"max_num_seqs": 1, "max_model_len": context, "page_size": models.page_size}
    engine = generator.engine(EngineOptions.of(decoding, **sizes))
    _Terminal(Conversation(engine, tokenizer, params, system), show_drafts).run()


class _Terminal:
    """Reads messages and commands, and shows answers. Text goes to stdout; all else to stderr."""

    def __init__(self, conversation: Conversation, show_drafts: bool):
        self._conversation, self._show_drafts = conversation, show_drafts
        self._asks = sys.stdin.isatty()
        self._is_terminal = sys.stdout.isatty()
        self._has_colours = self._is_terminal and has_colours(os.environ)

    def run(self) -> None:
        if self._asks:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() editing and the earlier lines
            _say("Write a message. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat.")
        if self._show_drafts:
            self._warn_of_colours()
        for line in self._lines():
            try:
                if line.startswith("/"):
                    if not self._command(*line.split(maxsplit=1)):
                        return
                elif line.strip():
                    self._answer(line.strip())
            except ValueError as error:
                if not self._asks:
                    raise
                _say(f"idlm: {' '.join(str(error).split())}")
            except KeyboardInterrupt:  # between an answer and the next prompt
                if not self._asks:
                    raise

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                if self._asks and self._is_terminal:
                    yield input("> ")
                    continue
                if self._asks:
                    print("> ", end="", file=sys.stderr, flush=True)
                line = text_of_stdin(sys.stdin.buffer.readline())
                if not line:
                    return
                yield line.rstrip("\r\n")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not self._asks:
                    raise
                _say("\nCtrl-D or /exit ends the chat.")

    def _command(self, name: str, text: str = "") -> bool:
        """Whether to go on after it."""
        conversation = self._conversation
        if name == "/exit":
            return False
        if name == "/reset":
            conversation.reset()
            _say("forgotten")
        elif name == "/system":
            if text.strip():
                conversation.system = text.strip()
            _say(conversation.system or "there is no system message")
        elif name == "/stats":
            self._show_stats()
        elif name == "/drafts":
            self._show_drafts = not self._show_drafts
            _say(f"accepted drafts are shown {'in another colour' if self._show_drafts else 'as any text'}")
            if self._show_drafts:
                self._warn_of_colours()
        elif name == "/help":
            _say(_HELP)
        else:
            raise ValueError(f"there is no command {name!r}; /help lists them, and a space before it sends it")
        return True

    def _answer(self, message: str) -> None:
        conversation = self._conversation
        before = conversation.dropped
        with _until_ctrl_c() as stopped:
            conversation.ask(message)
            if conversation.dropped > before:
                _say("idlm: the context is full: the oldest messages are left out from here on")
            for event in conversation.steps():
                if event is not None:
                    self._show(event)
                if stopped:
                    break
            rest = conversation.finish()
        print(self._safe(rest), flush=True)
        last = conversation.last
        assert last is not None
        if last.error is not None:
            _say(f"idlm: the answer ended early: {last.error}")
        elif stopped:
            _say("stopped")
            if not self._asks:  # a script that is stopped ends
                raise KeyboardInterrupt
        elif last.finish_reason == "length":
            _say("idlm: the answer ended at its limit of tokens")

    def _show(self, event: StreamEvent) -> None:
        drafted, rest = event.text[: event.drafted_chars], event.text[event.drafted_chars :]
        if drafted and self._show_drafts and self._has_colours:
            print(_DRAFT + self._safe(drafted) + _PLAIN, end="")
        else:
            print(self._safe(drafted), end="")
        print(self._safe(rest), end="", flush=True)

    def _safe(self, text: str) -> str:
        return _CONTROL.sub("\ufffd", text) if self._is_terminal else text

    def _show_stats(self) -> None:
        last, totals, params = self._conversation.last, self._conversation.totals, self._conversation.params
        if last is None:
            _say("nothing is answered yet")
            return
        _say(f"last answer: {figures(last, seed_drawn=params.seed is None and params.temperature > 0)}")
        if totals.forwards and totals.seconds:
            _say(
                f"{totals.answers} answers: {totals.tokens} tokens in {totals.forwards} forwards, "
                f"TPF {totals.tokens / totals.forwards:.2f}, {totals.tokens / totals.seconds:.1f} tokens/s"
            )

    def _warn_of_colours(self) -> None:
        if not self._has_colours:
            _say("idlm: stdout is no terminal with colours, so accepted drafts look like any text")


def has_colours(environment: Mapping[str, str]) -> bool:
    """Whether a terminal is to get colours (https://no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _until_ctrl_c() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C was pressed. A second Ctrl-C ends the program."""
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        if stopped:
            sys.exit(EXIT_INTERRUPTED)
        stopped.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
