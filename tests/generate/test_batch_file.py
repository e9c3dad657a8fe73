"""Files of prompts: the same bytes however often the run is interrupted, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idlm_kernels.generate import Engine, EngineOptions, Generator, PlanPolicy, SamplingParams, StepPlan
from idlm_kernels.generate import batch_file as module
from idlm_kernels.generate import engine as engine_module
from idlm_kernels.generate.batch_file import Progress, longest_request, run_file

MakeGenerator = Callable[..., Generator]
PARAMS = SamplingParams(temperature=1.0, max_tokens=7, seed=5)


def encode(record: dict[str, Any]) -> list[int]:
    if not record.get("prompt"):
        raise ValueError("no prompt")
    return [ord(c) % 60 for c in record["prompt"]]


def engine_of(generator: Generator) -> Engine:
    policy = PlanPolicy.fixed(StepPlan("chain", 3))
    return Engine(generator.model, None, policy, EngineOptions(max_num_seqs=3, max_model_len=60, page_size=4))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"n{i}", "prompt": "abc" * (1 + i % 5), "max_tokens": 1 + i % 9}) for i in range(30)]
    lines[4] = json.dumps({"id": "no"})
    lines[9] = "not json"
    lines[11] = json.dumps({"id": "x", "prompt": "a", "temperture": 1})
    lines[12] = json.dumps({"id": "long", "prompt": "z" * 99})
    lines[13] = json.dumps({"id": "own", "prompt": "abc", "seed": 77, "temperature": 0.5})
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*lines[:20], "", *lines[20:]]))
    return path


def run(generator: Generator, source: Path, target: Path, **more: Any) -> Progress:
    return run_file(engine_of(generator), source, target, PARAMS, encode, {"model": "tiny"}, **more)


def test_every_line_is_answered_in_order(source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    progress = run(generator, source, target)
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["index"] for answer in answers] == list(range(30))
    assert (progress.lines, progress.total, progress.failed) == (30, 30, 4)
    assert [a["index"] for a in answers if "error" in a] == [4, 9, 11, 12]
    assert "temperture" in answers[11]["error"] and "context is 60" in answers[12]["error"]
    assert not (tmp_path / "out.jsonl.run.json").exists()
    assert answers[13]["seed"] == 77 and answers[0]["seed"] == 5 and answers[1]["seed"] != 5
    for answer in (answers[0], answers[8], answers[13]):
        prompt = encode({"prompt": "abc" * (1 + answer["index"] % 5) if answer["id"] != "own" else "abc"})
        temperature = 0.5 if answer["id"] == "own" else 1.0
        params = SamplingParams(temperature=temperature, seed=answer["seed"], max_tokens=answer["tokens"])
        assert answer["token_ids"] == generator.generate([prompt], params, plan="ar")[0].token_ids


def test_the_longest_request_is_found_and_lines_that_fail_do_not_count(source: Path) -> None:
    assert longest_request(source, PARAMS, encode, 1000) == 99 + 7  # line 12
    assert longest_request(source, PARAMS, encode, 60) == 60
    source.write_text('{"id": "no"}\n[]\n{"prompt": "ab", "temperature": -1}\n')
    assert longest_request(source, PARAMS, encode, 1000) == 2
    source.write_text('{"prompt": "abc"}\n{"prompt": "a", "max_tokens": 20}\n')
    assert longest_request(source, PARAMS, encode, 1000) == 21


class Killed(BaseException):
    pass


@pytest.mark.parametrize("every", [1, 2, 7])
def test_an_interrupted_run_goes_on_where_it_was(
    every: int, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")
    interruptions = 0

    def report(progress: Progress) -> None:
        if done + every <= progress.lines < 30:
            raise Killed

    for _ in range(100):
        done = target.read_bytes().count(b"\n") if target.exists() else 0
        try:
            run(generator, source, target, report=report)
            break
        except Killed:
            interruptions += 1
            with target.open("ab") as file:  # a power cut in the middle of a line
                file.write(b'{"index": 99, "id": "ha')
    assert interruptions >= 2
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_drawn_seed_survives_an_interruption(source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    drawn = SamplingParams(temperature=1.0, max_tokens=5)

    def stop(progress: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_file(engine_of(generator), source, target, drawn, encode, {}, stop)
    base = json.loads((tmp_path / "out.jsonl.run.json").read_text())["base_seed"]
    run_file(engine_of(generator), source, target, drawn, encode, {})
    assert json.loads(target.read_text().splitlines()[0])["seed"] == base


def test_a_full_disk_loses_nothing(
    source: Path, tmp_path: Path, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="make room and run the same again"):
        run(generator, source, target)
    assert all(json.loads(line) for line in target.read_text().splitlines())
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_is_not_mixed_with_another(source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    target.write_text("precious\n")
    with pytest.raises(ValueError, match="exists and is not an interrupted run"):
        run(generator, source, target)
    assert target.read_text() == "precious\n"
    target.unlink()

    def stop(progress: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(generator, source, target, report=stop)
    with pytest.raises(ValueError, match="started with another model"):
        run_file(engine_of(generator), source, target, PARAMS, encode, {"model": "other"})
    source.write_text(source.read_text() + "\n" + json.dumps({"prompt": "new"}))
    with pytest.raises(ValueError, match="another input_sha256"):
        run(generator, source, target)


def test_memory_stays_bounded(tmp_path: Path, make_generator: MakeGenerator) -> None:
    """Lines are read as they are needed: no more than a window of them is known to the engine at a time."""
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "ab"}) for _ in range(300)))
    engine = engine_of(make_generator())
    most = 0

    def report(progress: Progress) -> None:
        nonlocal most
        most = max(most, engine._arrivals - progress.lines)

    run_file(engine, source, tmp_path / "out.jsonl", SamplingParams(max_tokens=2), encode, {}, report)
    assert 0 < most <= 4 * engine.options.max_num_seqs
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 300


def whole_lines(target: Path) -> list[dict[str, Any]]:
    data = target.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("room", [1, 700, 1500, 2900])
def test_a_disk_that_is_full_in_the_middle_of_a_line(
    room: int, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    """A real write that stops short, then fails: by the largest size that a file may have."""
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")
    (tmp_path / "out.jsonl").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, 700), hard))  # run.json takes some 300 bytes
    try:
        with pytest.raises(OSError, match="make room and run the same again"):
            run(generator, source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before = whole_lines(target)
    assert [line["index"] for line in before] == list(range(len(before)))
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("left", [b"hello\n", b'"x"\n', b"[]\n", b'{"index": 77}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_line_that_no_run_has_written_is_cut(
    left: bytes, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")
    with pytest.raises(Killed):
        run(generator, source, target, report=stop_at_once)
    with target.open("ab") as file:
        file.write(left + b'{"index": 3}\n')
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def stop_at_once(progress: Progress) -> None:
    raise Killed


def test_a_fault_of_the_machine_is_no_answer(
    source: Path, tmp_path: Path, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")
    real, calls = engine_module.decode_step, 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise MemoryError
        return real(*args)

    policy = PlanPolicy.fixed(StepPlan("chain", 3))
    options = EngineOptions(max_num_seqs=3, max_model_len=60, page_size=4)
    engine = Engine(generator.model, None, policy, options, step=failing)
    with pytest.raises(module.RunStopped, match="MemoryError.*run the same again") as stopped:
        run_file(engine, source, target, PARAMS, encode, {"model": "tiny"})
    assert isinstance(stopped.value.__cause__, MemoryError)
    assert not any("MemoryError" in str(line.get("error")) for line in whole_lines(target))
    assert (tmp_path / "out.jsonl.run.json").exists()
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_prompt_that_the_machine_cannot_make_stops_the_run_and_is_no_answer(
    source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    """A chat template is rendered by a process, and there may be no process left."""
    target = tmp_path / "out.jsonl"

    def failing(record: dict[str, Any]) -> list[int]:
        if record.get("id") == "n7":
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return encode(record)

    generator = make_generator()
    with pytest.raises(module.RunStopped, match="line 7: .*unavailable; run the same again"):
        run_file(engine_of(generator), source, target, PARAMS, failing, {"model": "tiny"})
    run(generator, source, target)
    run(generator, source, tmp_path / "whole.jsonl")
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("fault", [AttributeError("numpy"), MemoryError(), RuntimeError("CUDA")])
def test_an_encoder_that_fails_by_no_fault_of_the_line_stops_the_run(
    fault: Exception, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    def failing(record: dict[str, Any]) -> list[int]:
        raise fault

    target = tmp_path / "out.jsonl"
    with pytest.raises(type(fault)):
        run_file(engine_of(make_generator()), source, target, PARAMS, failing, {"model": "tiny"})
    assert target.read_bytes() == b"" and (tmp_path / "out.jsonl.run.json").exists()


def test_two_runs_do_not_write_one_output(source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"

    def second(progress: Progress) -> None:
        with pytest.raises(ValueError, match=rf"written by another process \({os.getpid()}\)"):
            run(generator, source, target)

    run(generator, source, target, report=second)
    assert len(whole_lines(target)) == 30


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_an_output_that_goes_away_while_it_is_written(
    what: str, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")

    def away(progress: Progress) -> None:
        if progress.lines == 30:
            target.unlink()
            if what == "replaced":
                target.touch()

    with pytest.raises(ValueError, match=f"was {what} while"):
        run(generator, source, target, report=away)
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_that_json_or_utf8_cannot_hold_is_answered_and_no_more(
    tmp_path: Path, make_generator: MakeGenerator
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    deep = "[" * 200_000
    lines = [
        '{"id": "s\\ud83d", "prompt": "x"}',
        deep,
        '{"id": ' + "[" * 900 + "]" * 900 + ', "prompt": "x"}',
        '{"id": NaN, "prompt": "x"}',
        '{"id": 1e999, "prompt": "x"}',
        '{"id": "a", "prompt": "x", "temperature": 1e39}',
        '{"id": "b", "prompt": "x", "temperature": 1' + "0" * 400 + "}",
        '{"id": "c", "prompt": "x", "max_tokens": 1' + "0" * 5000 + "}",
        '{"id": "\\udc00", "what\\udc00": 1}',
        '{"id": "last", "prompt": "x"}',
    ]
    source.write_text("\n".join(lines))
    progress = run(make_generator(), source, target)
    answers = whole_lines(target)
    assert [a["index"] for a in answers] == list(range(len(lines))) and progress.lines == len(lines)
    assert answers[0]["id"] == "s\ud83d" and answers[0]["tokens"] > 0
    assert all("error" in answers[i] for i in (1, 3, 4, 5, 6, 7, 8))
    assert "nested too deeply" in answers[1]["error"] and "temperature" in answers[5]["error"]
    assert answers[9]["tokens"] > 0
    assert "NaN" not in target.read_text().replace("NaN is not JSON", "") and "Infinity" not in target.read_text()


DAMAGED = ["", "{}", "[]", "null", '{"base_seed": "x"}', '{"base_seed": 1', "[" * 100_000, "\x00" * 50]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_run_json_is_named(text: str, source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(generator, source, target, report=stop_at_once)
    kept = target.read_bytes()
    (tmp_path / "out.jsonl.run.json").write_text(text)
    with pytest.raises(ValueError, match=r"out\.jsonl\.run\.json is damaged.*start again"):
        run(generator, source, target)
    assert target.read_bytes() == kept


def test_an_output_that_is_no_file_is_refused(source: Path, tmp_path: Path, make_generator: MakeGenerator) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        run(make_generator(), source, tmp_path / "pipe")


def test_an_input_that_is_a_pipe_is_refused(tmp_path: Path, make_generator: MakeGenerator) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file.*read twice"):
        run(make_generator(), tmp_path / "pipe", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_are_counted_as_they_are_read(tmp_path: Path) -> None:
    """Blank ones, carriage returns, no line end at the end; blocks of a MB that end anywhere."""
    for text in (
        b"",
        b"\n",
        b"a",
        b"a\n",
        b" \r\n\na\r\nb",
        b"x" * (1 << 20) + b"\n" + b"y" * (1 << 21),
        b"\n" * (1 << 21),
    ):
        path = tmp_path / "in.jsonl"
        path.write_bytes(text)
        with module._Input(path) as lines:
            assert lines.total == len(list(lines.lines(0))) == sum(bool(x.strip()) for x in text.split(b"\n"))


@pytest.mark.parametrize("how", ["touched", "edited", "replaced"])
def test_an_input_that_changes_while_it_is_answered(
    how: str, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target, text = make_generator(), tmp_path / "out.jsonl", source.read_text()
    run(generator, source, tmp_path / "whole.jsonl")

    def change(progress: Progress) -> None:
        if progress.lines == 0 or not first:
            return
        first.clear()
        if how == "replaced":  # what is open is still the old one
            (tmp_path / "new").write_text(json.dumps({"prompt": "b"}))
            (tmp_path / "new").rename(source)
        else:
            source.write_text(text.replace("abc", "bcd") if how == "edited" else text)
            os.utime(source, ns=(1, 1))

    first = [True]
    if how == "edited":
        with pytest.raises(ValueError, match="changed while its lines were being answered"):
            run(generator, source, target, report=change)
        done = whole_lines(target)
        assert done == whole_lines(tmp_path / "whole.jsonl")[: len(done)], "an answer to another line"
        source.write_text(text)
    run(generator, source, target, report=change)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("how", ["cut", "appended to"])
def test_an_output_that_others_change_while_it_is_written(
    how: str, source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    run(generator, source, tmp_path / "whole.jsonl")

    def change(progress: Progress) -> None:
        if progress.lines:
            os.truncate(target, 10) if how == "cut" else target.open("a").write("{}\n")

    with pytest.raises(ValueError, match="was changed while"):
        run(generator, source, target, report=change)
    run(generator, source, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_of_someone_else_beside_a_kept_run_json_is_not_cut(
    source: Path, tmp_path: Path, make_generator: MakeGenerator
) -> None:
    generator, target = make_generator(), tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(generator, source, target, report=stop_at_once)
    for text in ('{"name": "mine"}\n', "notes\n"):
        target.write_text(text)
        with pytest.raises(ValueError, match="is not the interrupted run that out.jsonl.run.json tells of"):
            run(generator, source, target)
        assert target.read_text() == text
    for left in (b"", b'{"ind', b'{"index": 0, "id": "n0"', b"\0" * 100, b'{"index"\0\0\0'):  # a power cut
        target.write_bytes(left)
        with pytest.raises(Killed):
            run(generator, source, target, report=stop_at_once)


def test_a_file_system_without_locks(
    source: Path, tmp_path: Path, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    generator, target = make_generator(), tmp_path / "out.jsonl"
    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="out.jsonl: its file system has no locks"):
        run(generator, source, target)
    assert len(whole_lines(target)) == 30
