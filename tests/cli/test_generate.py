"""`idlm generate` against a stand-in for the generator: what it asks for, what it prints, how it ends."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.generate import DecodeOptions, StepPlan


@dataclasses.dataclass(frozen=True)
class Params:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, wanted a number from 0 up")


class Tokenizer:
    has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class Generator:
    """Decodes `tokens` (plan ar: `ar_tokens`) one by one; `interrupt_at[plan]` is the index of a Ctrl-C."""

    tokens: Sequence[int] = (72, 105, 33)
    ar_tokens: Sequence[int] = (72, 105, 33)
    error_flags = 0
    interrupt_at: Mapping[str, int] = types.MappingProxyType({})
    calls: list[tuple[Any, ...]]
    tokenizer: Tokenizer

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> Generator:
        cls.calls.append(("load", model, options))
        return cls()

    def stream(self, prompt_ids: list[int], params: Params, options: DecodeOptions) -> Stream:
        self.calls.append(("stream", prompt_ids, params, options))
        return Stream(self, prompt_ids, params, options)


class Stream:
    def __init__(
        self,
        generator: Generator,
        prompt_ids: list[int],
        params: Params,
        options: DecodeOptions,
    ) -> None:
        self.generator, self.prompt_ids, self.params, self.plan = generator, prompt_ids, params, options.plan
        self.stride = 4 if options.stride == "auto" else options.stride
        self.suffix_drafts = options.suffix_drafts
        self.done: list[int] = []
        self.finish_reason = "cancelled"

    def __iter__(self) -> Iterator[Any]:
        ids = self.generator.ar_tokens if self.plan == "ar" else self.generator.tokens
        for index, token in enumerate(ids):
            if self.generator.interrupt_at.get(self.plan) == index:
                raise KeyboardInterrupt
            self.done.append(token)
            # An open bracket stands for text that may be the start of a stop string: it is held back.
            yield types.SimpleNamespace(text="" if token == ord("(") else chr(token), token_ids=[token])
        self.finish_reason = "stop"

    @property
    def result(self) -> Any:
        forwards = len(self.done) if self.plan == "ar" else 1
        return types.SimpleNamespace(
            text="".join(map(chr, self.done)),
            token_ids=list(self.done),
            prompt_tokens=len(self.prompt_ids),
            tokens=len(self.done),
            forwards=forwards,
            tpf=len(self.done) / forwards,
            acceptance=[] if self.plan == "ar" else [1.0, 0.5, None],
            tokens_per_second=50.0 if self.plan == "ar" else 150.0,
            finish_reason=self.finish_reason,
            seed=4321 if self.params.seed is None else self.params.seed,
            plan=self.plan,
            stride=self.stride,
            error_flags=self.generator.error_flags,
            error=None,
            acceptance_by_source={"mask": 0.5, "suffix": 0.25} if self.suffix_drafts else {"mask": 0.5},
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Generator]:
    class Fresh(Generator):
        pass

    Fresh.calls, Fresh.tokenizer = [], Tokenizer()
    module: Any = types.ModuleType("idlm_kernels.generate")
    module.Generator, module.SamplingParams, module.StepPlan = Fresh, Params, StepPlan
    module.DecodeOptions = DecodeOptions
    monkeypatch.setitem(sys.modules, "idlm_kernels.generate", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Fresh


Idlm = Callable[..., Result]


@pytest.fixture
def idlm(fake: type[Generator]) -> Idlm:
    def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["generate", *arguments], input=stdin)

    return invoke


def streamed(fake: type[Generator], which: int = 0) -> tuple[Any, ...]:
    return [call for call in fake.calls if call[0] == "stream"][which][1:]


def test_text_goes_to_stdout_and_figures_to_stderr(idlm: Idlm) -> None:
    done = idlm("-p", "hello", "--seed", "7", "--temperature", "1")
    assert done.exit_code == 0
    assert done.stdout == "Hi!\n"
    assert done.stderr == ("3 tokens in 1 forwards, TPF 3.00, acceptance 1.00 0.50 -, 150.0 tokens/s, ended by stop\n")


def test_the_defaults_are_the_documented_ones(idlm: Idlm, fake: type[Generator]) -> None:
    idlm("-p", "x")
    options = {"adapter": "default", "mask_input": None, "mask_token_id": None, "device": "cpu", "dtype": "auto"}
    options |= {"activations": "auto", "backend": None, "random_weights": False}
    assert fake.calls[0] == ("load", "default", {**options, "max_model_len": None, "page_size": 64})
    assert streamed(fake)[1:] == (Params(), DecodeOptions())
    idlm("-p", "x", "--adapter", "none")
    assert fake.calls[2][2]["adapter"] is None


def test_every_flag_reaches_the_generator(idlm: Idlm, fake: type[Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flags = (
        "--prompt x --raw --model m.gguf --adapter folder --mask-input uniform --mask-token-id 9"
        " --stride 6 --plan chain --rule rejection"
        " --temperature 0.8 --top-k 5 --top-p 0.9 --min-p 0.1 --seed 3 --max-tokens 9 --stop A --stop B"
        " --presence-penalty 0.5 --frequency-penalty -0.25 --repetition-penalty 1.5"
        " --max-model-len 99 --page-size 3 --dtype fp16 --device cuda --threads 2 --backend torch"
        " --row-budget 11 --no-rerank --activations int8"
    )
    assert idlm(*flags.split()).exit_code == 0
    options = {"adapter": "folder", "mask_input": "uniform", "mask_token_id": 9}
    options |= {"device": "cuda", "dtype": "fp16", "activations": "int8", "backend": "torch", "random_weights": False}
    assert fake.calls[0] == ("load", "m.gguf", {**options, "max_model_len": 99, "page_size": 3})
    assert streamed(fake) == (
        [1, ord("x")],
        Params(0.8, 5, 0.9, 0.1, 0.5, -0.25, 1.5, seed=3, max_tokens=9, stop=("A", "B")),
        DecodeOptions("chain", 6, "rejection", row_budget=11, rerank=False),
    )
    assert threads == [2]
    assert idlm("-p", "x", "--suffix-drafts").exit_code == 0
    assert streamed(fake, 1)[2] == DecodeOptions(suffix_drafts=True)
    assert idlm("-p", "x", "--history-tokens", "99").exit_code == 0
    assert streamed(fake, 2)[2] == DecodeOptions(history_tokens=99)


@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        ("--verify rejection", "--rule", DecodeOptions(rule="rejection")),
        ("--plan branched", "--plan quadratic", DecodeOptions("quadratic")),
        ("--max-len 77", "--max-model-len", DecodeOptions()),
    ],
)
def test_old_flags_still_work_and_name_the_new_ones(
    idlm: Idlm, fake: type[Generator], old: str, new: str, options: DecodeOptions
) -> None:
    done = idlm("-p", "x", *old.split())
    assert done.exit_code == 0 and done.stdout == "Hi!\n"
    assert done.stderr.startswith(f"idlm: warning: {old.rsplit(maxsplit=1)[0]}") and f" is now {new};" in done.stderr
    assert streamed(fake)[2] == options
    assert fake.calls[0][2]["max_model_len"] == (77 if "77" in old else None)


@pytest.mark.parametrize(
    ("flags", "has_template", "wanted"),
    [
        ([], True, b"<user>x"),
        (["--chat"], True, b"<user>x"),
        (["--system", "s"], True, b"<system>s<user>x"),
        (["--raw"], True, b"\x01x"),
        ([], False, b"\x01x"),
    ],
)
def test_the_prompt_is_wrapped_where_there_is_a_template(
    idlm: Idlm, fake: type[Generator], flags: list[str], has_template: bool, wanted: bytes
) -> None:
    fake.tokenizer.has_chat_template = has_template  # type: ignore[misc]
    assert idlm("-p", "x", *flags).exit_code == 0
    assert bytes(streamed(fake)[0]) == wanted


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_stdin_is_the_prompt_less_its_last_line_end(idlm: Idlm, fake: type[Generator], flags: list[str]) -> None:
    assert idlm("--raw", *flags, stdin="two\nlines ☀\n\n").exit_code == 0
    assert bytes(streamed(fake)[0][1:]).decode() == "two\nlines ☀\n"


def test_json_is_one_object_and_nothing_else(idlm: Idlm) -> None:
    done = idlm("-p", "x", "--json", "--seed", "5")
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {
        "text": "Hi!",
        "token_ids": [72, 105, 33],
        "prompt_tokens": 7,
        "tokens": 3,
        "forwards": 1,
        "tpf": 3.0,
        "acceptance": [1.0, 0.5, None],
        "tokens_per_second": 150.0,
        "finish_reason": "stop",
        "seed": 5,
        "plan": "auto",
        "stride": 4,
    }


def test_a_terminal_that_cannot_show_a_character_is_no_error(fake: type[Generator]) -> None:
    fake.tokens = (72, 0x2600, 33)
    done = CliRunner(charset="ascii").invoke(app, ["generate", "-p", "x"])
    assert done.exit_code == 0 and done.stdout == "H?!\n"


def test_check_decodes_again_in_ar_with_the_seed_that_was_drawn(idlm: Idlm, fake: type[Generator]) -> None:
    done = idlm("-p", "x", "--check", "--temperature", "1")
    assert done.exit_code == 0
    (ids, params, _), (ar_ids, ar_params, ar_options) = streamed(fake, 0), streamed(fake, 1)
    assert params.seed is None and ar_params == dataclasses.replace(params, seed=4321)
    assert ar_ids == ids and ar_options.plan == "ar"
    assert done.stdout == "Hi!\n"
    assert "150.0" in done.stderr and "50.0" in done.stderr and "identical to AR" in done.stderr


@pytest.mark.parametrize(("ar_tokens", "index"), [([72, 106, 33], 1), ([72, 105], 2), ([72, 105, 33, 33], 3)])
def test_check_fails_when_tokens_differ(idlm: Idlm, fake: type[Generator], ar_tokens: list[int], index: int) -> None:
    fake.ar_tokens = ar_tokens
    done = idlm("-p", "x", "--check")
    assert done.exit_code == 1 and f"DIFFERENT from AR, first at index {index}" in done.stderr
    done = idlm("-p", "x", "--check", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 1 and record["identical_to_ar"] is False and record["ar_token_ids"] == ar_tokens


def test_check_in_json(idlm: Idlm) -> None:
    record = json.loads(idlm("-p", "x", "--check", "--json").stdout)
    assert record["identical_to_ar"] is True
    assert record["ar_tokens_per_second"] == 50.0 and record["ar_token_ids"] == record["token_ids"]


@pytest.mark.parametrize(("flags", "shown"), [([], False), (["--temperature", "1"], True)])
def test_a_drawn_seed_is_shown_where_it_matters(idlm: Idlm, flags: list[str], shown: bool) -> None:
    assert ("seed 4321" in idlm("-p", "x", *flags).stderr) is shown


def test_ctrl_c_keeps_the_text_so_far_and_its_figures(idlm: Idlm, fake: type[Generator]) -> None:
    fake.interrupt_at = {"auto": 2}
    done = idlm("-p", "x", "--check")
    assert done.exit_code == 130 and done.stdout == "Hi\n"
    assert done.stderr.startswith("2 tokens in 1 forwards") and "ended by cancelled" in done.stderr
    assert len([call for call in fake.calls if call[0] == "stream"]) == 1


def test_ctrl_c_shows_what_was_held_back_for_a_stop_string(idlm: Idlm, fake: type[Generator]) -> None:
    fake.tokens, fake.interrupt_at = (72, ord("("), 33), {"auto": 2}
    assert idlm("-p", "x").stdout == "H(\n"


def test_logits_that_are_not_finite_are_reported(idlm: Idlm, fake: type[Generator]) -> None:
    fake.error_flags = 1
    done = idlm("-p", "x", "--json")
    assert "not finite" in done.stderr and json.loads(done.stdout)["text"] == "Hi!"


def test_ctrl_c_in_json(idlm: Idlm, fake: type[Generator]) -> None:
    fake.interrupt_at = {"ar": 1}
    done = idlm("-p", "x", "--json", "--check")
    record = json.loads(done.stdout)
    assert done.exit_code == 130 and record["text"] == "Hi!" and record["identical_to_ar"] is None


def test_grammars_are_refused_by_name(idlm: Idlm, fake: type[Generator]) -> None:
    done = idlm("-p", "x", "--grammar", "1.1")
    assert done.exit_code == 2 and done.stdout == "" and not fake.calls
    assert done.stderr == "idlm: error: --grammar is not supported by the CLI yet; the op takes a logit_bias\n"


@pytest.mark.parametrize(
    ("flags", "stdin", "named"),
    [
        (["-p", ""], None, "prompt is empty"),
        ([], "", "prompt is empty"),
        ([], b"\xff", "not UTF-8"),
        (["-p", "\udcff"], None, "not UTF-8"),
        (["-p", "x", "--check", "--rule", "rejection"], None, "--check"),
        (["-p", "x", "--raw", "--system", "s"], None, "--system"),
        (["-p", "x", "--temperature", "-1"], None, "temperature is -1"),
        (["-p", "x", "--stride", "1"], None, "stride is 1"),
        (["-p", "x", "--rule", "rejection", "--suffix-drafts"], None, "rule='match'"),
        (["-p", "x", "--rule", "rejection", "--history-tokens", "9"], None, "rule='match'"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_loaded(
    idlm: Idlm, fake: type[Generator], flags: list[str], stdin: str | bytes | None, named: str
) -> None:
    done = idlm(*flags, stdin=stdin)
    assert done.exit_code == 2 and done.stdout == "" and not fake.calls
    assert done.stderr.startswith("idlm: error: ") and done.stderr.count("\n") == 1 and named in done.stderr


@pytest.mark.parametrize("flags", [["--chat"], ["--system", "s"]])
def test_a_missing_chat_template_is_said(idlm: Idlm, fake: type[Generator], flags: list[str]) -> None:
    fake.tokenizer.has_chat_template = False  # type: ignore[misc]
    done = idlm("-p", "x", *flags)
    assert done.exit_code == 2 and "no chat template" in done.stderr and "--raw" in done.stderr


@pytest.mark.parametrize("flags", [["--plan", "tree"], ["--threads", "0"], ["--stride", "many"], ["--no-such"]])
def test_bad_usage_ends_with_status_2(idlm: Idlm, fake: type[Generator], flags: list[str]) -> None:
    done = idlm("-p", "x", *flags)
    assert done.exit_code == 2 and flags[0] in done.stderr and not fake.calls


def test_a_missing_file_is_one_line_and_a_bug_keeps_its_traceback(
    idlm: Idlm, fake: type[Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def load(model: str, **options: Any) -> Generator:
            raise error

        monkeypatch.setattr(fake, "from_pretrained", load)

    fail(FileNotFoundError("no such\n  folder: m"))
    done = idlm("-p", "x")
    assert done.exit_code == 2 and done.stderr == "idlm: error: no such folder: m\n"
    monkeypatch.setenv("IDLM_TRACEBACK", "1")
    assert isinstance(idlm("-p", "x").exception, FileNotFoundError)
    monkeypatch.delenv("IDLM_TRACEBACK")
    fail(RuntimeError("bug"))
    assert isinstance(idlm("-p", "x").exception, RuntimeError)


def test_json_tells_the_draft_sources_apart(idlm: Idlm) -> None:
    assert "acceptance_by_source" not in json.loads(idlm("-p", "x", "--json").stdout)
    record = json.loads(idlm("-p", "x", "--json", "--suffix-drafts").stdout)
    assert record["acceptance_by_source"] == {"mask": 0.5, "suffix": 0.25}


def test_input_and_output_belong_together(idlm: Idlm, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("")
    for arguments, message in (
        (["--input", str(source)], "--input and --output belong together"),
        (["--output", str(source)], "--input and --output belong together"),
        (["--input", str(source), "--output", "o", "-p", "x"], "goes without --prompt"),
        (["--input", str(source), "--output", "o", "--check"], "goes without --prompt, --json and --check"),
        (["-p", "x", "--check", "--synthetic-acceptance", "0.5"], "they are noise"),
        (["-p", "x", "--ray", "local"], "go with --input and --output"),
        (["--input", str(source), "--output", "o", "--ray-workers", "2"], "--ray-workers needs --ray"),
        (["--input", str(source), "--output", "o", "--ray", "local", "--rule", "rejection"], "on the schedule"),
    ):
        done = idlm(*arguments)
        assert done.exit_code == 2 and message in done.stderr
