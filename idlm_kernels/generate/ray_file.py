"""A file of prompts on a Ray cluster: Ray Data maps blocks of lines over actors, each with a Generator of its own.

The driver reads the lines and writes the answers; what happens in between may be lost and is done again by Ray. An
answer is a function of the model, the line, the parameters and the seed of its number, so that the output holds the
very bytes of a run without Ray, and either run goes on where the other was interrupted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from idlm_kernels.generate.batch_file import Answer, LineFailed, Lines, Progress, RunStopped, answered, encoder
from idlm_kernels.generate.generator import Generator
from idlm_kernels.generate.options import EngineOptions
from idlm_kernels.generate.params import SamplingParams

_RETRIES = 3  # of a block whose worker died; then the block is taken for the cause
_BLOCKS_PER_WORKER = 4  # at least, where there are lines enough: the last ones of a file are then spread evenly
_SEQUENCES_PER_BLOCK = 8  # times max_num_seqs: an engine is not full at the end of a block


@dataclass(frozen=True)
class Job:
    """What a worker needs to answer lines.

    load: the arguments of Generator.from_pretrained. threads: of a worker on CPUs, and the CPUs that it takes from the
    cluster; on a GPU it takes that GPU. chat, system: as in `encoder`.
    """

    load: dict[str, Any]
    sizes: EngineOptions
    params: SamplingParams
    chat: bool
    system: str | None
    threads: int
    base_seed: int = 0


class Answerer:
    """A worker: loads the model once and answers blocks of lines."""

    def __init__(self, job: Job):
        if job.load["device"] == "cpu":
            torch.set_num_threads(job.threads)
        generator = Generator.from_pretrained(**job.load)
        assert generator.tokenizer is not None  # from_pretrained brings one
        self._job, self._engine = job, generator.new_engine(job.sizes)
        self._encode = encoder(generator.tokenizer, job.chat, job.system)

    def __call__(self, block: pa.Table) -> pa.Table:
        """block: columns number, line. Returns the fields of Answer as columns."""
        lines = zip(block["number"].to_pylist(), block["line"].to_pylist(), strict=True)
        job = self._job
        blocks = list(answered(self._engine, lines, job.params, job.base_seed, self._encode))
        return pa.Table.from_pylist([answer._asdict() for answers in blocks for answer in answers])


def answer_on_ray(job: Job, lines: Lines, progress: Progress, workers: int) -> Iterator[list[Answer]]:
    """The answers to lines, in order. Raises RunStopped where a line or its workers failed."""
    most = _SEQUENCES_PER_BLOCK * job.sizes.max_num_seqs
    size = max(1, min(most, (progress.total - progress.lines) // (_BLOCKS_PER_WORKER * workers)))
    blocks = []
    while some := list(islice(lines, size)):
        blocks.append(ray.put(pa.table({"number": [n for n, _ in some], "line": [line for _, line in some]})))
    if not blocks:
        return
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    on_gpu = job.load["device"] == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # retries have no other argument yet, which is why later versions are shut out
        answers = ray.data.from_arrow_refs(blocks).map_batches(
            Answerer,
            fn_constructor_args=(job,),
            batch_size=size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=None if on_gpu else job.threads,
            num_gpus=1 if on_gpu else None,
            max_restarts=-1,
            max_task_retries=_RETRIES,
            udf_modifying_row_count=False,
        )
    finished = iter(answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    expected = progress.lines
    while (block := _next_of(finished)) is not None:
        rows = [Answer(**row) for row in block.to_pylist()]
        if [answer.number for answer in rows] != list(range(expected, expected + len(rows))):
            raise AssertionError(f"Ray gave lines out of order after line {expected - 1}")
        expected += len(rows)
        progress.tokens += sum(answer.tokens for answer in rows)
        yield rows


def _next_of(finished: Iterator[pa.Table]) -> pa.Table | None:
    """The next block; None after the last. Whatever Ray raises is a worker's fault, or that of the cluster."""
    try:
        return next(finished, None)
    except Exception as error:
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, LineFailed):
                raise cause from error
        told = next((text for cause in reversed(chain) if (text := _in_short(cause))), type(error).__name__)
        raise RunStopped(f"Ray gave up: {told}; run the same again for the lines that are not answered") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, as Python and as Ray keep it; the innermost last."""
    while isinstance(error, BaseException):
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _in_short(error: BaseException) -> str:
    """The first and the last line of an error: Ray has a worker's traceback in between."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " .. ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else ""
