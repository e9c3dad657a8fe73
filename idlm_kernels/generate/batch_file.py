"""Prompts from a JSON-lines file, results to another: any number of them in constant memory, resumable.

A line of input is an object with "prompt" (text) or "messages" (a chat), optionally "id" and any SamplingParams field.
A line of output answers the line of input of the same number and holds only what does not depend on the schedule, so
that an interrupted and resumed run writes the same bytes as an undisturbed one. Lines are written whole and in order;
they are on disk (fsync) at the edges of epochs. OUTPUT.run.json beside the output remembers how it was started, and
goes when all is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from idlm_kernels.generate.engine import Engine, Request
from idlm_kernels.generate.params import SamplingParams, draw_seed, mixed_seed
from idlm_kernels.model.tokenizer import Tokenizer

_PARAMETERS = {f.name for f in dataclasses.fields(SamplingParams)}
_KEYS = _PARAMETERS | {"id", "prompt", "messages"}


@dataclasses.dataclass
class Progress:
    """lines: answered so far, of total; failed: of them with an error; tokens: generated in this run."""

    lines: int
    total: int
    failed: int
    tokens: int


def run_file(
    engine: Engine,
    source: Path,
    target: Path,
    params: SamplingParams,
    encode: Callable[[dict[str, Any]], list[int]],
    settings: dict[str, Any],
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer every line of `source` in `target`, from where an earlier run left off.

    params: for lines that do not say otherwise; its seed is mixed with the line's number. encode: a line -> prompt ids.
    settings: what the output depends on besides; a run is resumed only with the settings that it was started with.

    Raises: ValueError if the target belongs to something else; OSError if it cannot be written (what is there stays
    whole, and the run can be resumed). A line that cannot run is answered with an "error", and the others go on.
    """
    digest, total = _digest(source)
    base_seed, done, failed = _open_run(target, {**settings, "input_sha256": digest}, params.seed)
    waiting: dict[int, Request | dict[str, Any]] = {}  # by line number: running, or answered with an error
    window = 4 * engine.options.max_batch  # lines between the oldest unanswered one and the last one read
    progress = Progress(done, total, failed, 0)
    lines = _lines(source, skip=done)
    exhausted = False
    with target.open("ab") as file:
        while not exhausted or waiting:
            while not exhausted and len(waiting) < window:
                number, line = next(lines, (-1, b""))
                if number < 0:
                    exhausted = True
                else:
                    waiting[number] = _submit(engine, number, line, params, base_seed, encode)
            for _, event in engine.epoch():
                progress.tokens += len(event.token_ids)
            _write_answers(file, waiting, progress)
            report(progress)
    _run_path(target).unlink()
    return progress


def _submit(
    engine: Engine,
    number: int,
    line: bytes,
    params: SamplingParams,
    base_seed: int,
    encode: Callable[[dict[str, Any]], list[int]],
) -> Request | dict[str, Any]:
    record: Any = None
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"a line must be an object, got {type(record).__name__}")
        if unknown := sorted(set(record) - _KEYS):
            raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
        own = dataclasses.replace(params, **{k: v for k, v in record.items() if k in _PARAMETERS})
        seed = own.seed if record.get("seed") is not None and own.seed is not None else mixed_seed(base_seed, number)
        request = engine.submit(encode(record), own, seed)
        request.tag = record.get("id")
        return request
    except (ValueError, TypeError) as error:
        return {"id": record.get("id") if isinstance(record, dict) else None, "error": str(error)}


def _write_answers(file: BinaryIO, waiting: dict[int, Request | dict[str, Any]], progress: Progress) -> None:
    """Write the answers at the head of the queue, whole lines only, and see them to the disk."""
    start = file.tell()
    try:
        while waiting:
            number = min(waiting)
            request = waiting[number]
            answer = _answer(request) if isinstance(request, Request) else request
            if answer is None:
                break
            file.write(json.dumps({"index": number, **answer}, ensure_ascii=False).encode() + b"\n")
            del waiting[number]
            progress.lines += 1
            progress.failed += "error" in answer
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        _cut(file, start)
        raise OSError(
            error.errno,
            f"{error.strerror}; {progress.lines} lines are safe or will be repeated: make room and run the same again",
            str(file.name),
        ) from None


def _cut(file: BinaryIO, size: int) -> None:
    """Leave no half line behind a failed write, as far as the disk lets us; a resumed run cuts one off as well."""
    try:
        os.ftruncate(file.fileno(), size)
    except OSError:
        return


def _answer(request: Request) -> dict[str, Any] | None:
    if not request.ended:
        return None
    output = request.output
    answer: dict[str, Any] = {"id": request.tag}
    if output.error is not None:
        answer["error"] = output.error
    result = output.result("", 0)
    answer |= {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
    }
    return answer


def _lines(source: Path, skip: int) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as file:
        number = 0
        for line in file:
            if line.strip():
                if number >= skip:
                    yield number, line
                number += 1


def _digest(source: Path) -> tuple[str, int]:
    """sha256 and the number of lines that are not blank."""
    digest, count = hashlib.sha256(), 0
    with source.open("rb") as file:
        for line in file:
            digest.update(line)
            count += bool(line.strip())
    return digest.hexdigest(), count


def _run_path(target: Path) -> Path:
    return target.with_name(target.name + ".run.json")


def _open_run(target: Path, settings: dict[str, Any], seed: int | None) -> tuple[int, int, int]:
    """Start or resume: (base seed, lines that are answered, those of them with an error)."""
    path = _run_path(target)
    if not path.exists():
        if target.exists() and target.stat().st_size:
            raise ValueError(f"{target} exists and is not an interrupted run; remove it or write elsewhere")
        base_seed = draw_seed() if seed is None else seed
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps({"base_seed": base_seed, **settings}))
        os.replace(partial, path)
        target.touch()
        return base_seed, 0, 0
    started = json.loads(path.read_text())
    base_seed = started.pop("base_seed")
    changed = sorted(k for k in {*started, *settings} if started.get(k) != settings.get(k))
    if changed or seed not in (None, base_seed):
        what = ", ".join(changed) or "seed"
        raise ValueError(f"{target} was started with another {what}; finish it as it was, or remove it and {path.name}")
    lines = failed = whole = 0
    target.touch()
    with target.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            lines += 1
            failed += "error" in json.loads(line)
    os.truncate(target, whole)
    return base_seed, lines, failed


def encoder(tokenizer: Tokenizer, chat: bool, system: str | None) -> Callable[[dict[str, Any]], list[int]]:
    """Prompt ids of a line: "messages" through the chat template, "prompt" as a user message or, raw, as it is."""

    def encode(record: dict[str, Any]) -> list[int]:
        if ("prompt" in record) == ("messages" in record):
            raise ValueError('a line needs "prompt" or "messages", one of the two')
        messages = record.get("messages")
        if messages is None:
            prompt = record["prompt"]
            if not isinstance(prompt, str) or not prompt:
                raise ValueError('"prompt" must be text that is not empty')
            if not chat:
                return tokenizer.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)

    return encode
