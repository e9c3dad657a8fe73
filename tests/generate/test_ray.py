"""Scale-out on Ray: two workers on this machine write the bytes of one, also when one of them is killed.

Ray brings half a gigabyte along, so it is in no other extra: without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from idlm_kernels.cli.batch import RayOptions, generate_file_on_ray
from idlm_kernels.generate import DecodeOptions, EngineOptions, Generator, SamplingParams
from idlm_kernels.generate.batch_file import encoder, run_file
from tests.ray_support import HAS_RAY, actors, needs_ray
from tests.tiny import save_tiny_model

PARAMS = SamplingParams(temperature=0.9, max_tokens=12, seed=11)
OPTIONS = DecodeOptions("quadratic", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def prompts(path: Path, count: int) -> Path:
    lines = [{"id": i, "prompt": f"line {i} " + "x" * (i % 7)} for i in range(count)]
    lines[3] = {"id": 3, "prompt": "alone with its seed", "seed": 5, "max_tokens": 40}  # type: ignore[dict-item]
    lines[4] = {"id": 4, "promt": "misspelled"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n{not JSON\n")
    return path


def on_one_machine(folder: Path, source: Path, target: Path) -> bytes:
    generator = Generator.from_pretrained(folder)
    assert generator.tokenizer is not None
    engine = generator.new_engine(EngineOptions(plan="ar", max_num_seqs=3, max_model_len=100))
    run_file(engine, source, target, PARAMS, encoder(generator.tokenizer, False, None), {})
    return target.read_bytes()


def load(folder: Path) -> dict[str, Any]:
    names = ("adapter", "backend", "max_model_len")
    return dict.fromkeys(names) | {
        "source": str(folder),
        "device": "auto",
        "dtype": "auto",
        "page_size": 16,
        "random_weights": False,
    }


def on_ray(folder: Path, source: Path, target: Path, **other: Any) -> Any:
    on = RayOptions("local", 2, 1)
    return generate_file_on_ray(
        load(folder) | other, source, target, PARAMS, on, options=OPTIONS, chat=False, system=None, max_num_seqs=2
    )


@needs_ray
def test_two_workers_write_the_bytes_of_one(cluster: Any, folder: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", 60)
    progress = on_ray(folder, source, tmp_path / "ray.jsonl")
    assert (progress.lines, progress.total, progress.failed) == (61, 61, 2) and progress.tokens > 600
    assert (tmp_path / "ray.jsonl").read_bytes() == on_one_machine(folder, source, tmp_path / "one.jsonl")
    assert not (tmp_path / "ray.jsonl.run.json").exists()


@needs_ray
def test_a_killed_worker_costs_only_time(cluster: Any, folder: Path, tmp_path: Path) -> None:
    source, target = prompts(tmp_path / "in.jsonl", 400), tmp_path / "ray.jsonl"
    killed: list[int] = []

    def kill_once_answers_are_there() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if target.exists() and target.stat().st_size and (pids := actors("Answerer", os.getpid())):
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
            time.sleep(0.01)

    killer = threading.Thread(target=kill_once_answers_are_there)
    killer.start()
    progress = on_ray(folder, source, target)
    killer.join()
    assert killed and progress.lines == 401
    assert target.read_bytes() == on_one_machine(folder, source, tmp_path / "one.jsonl")


@needs_ray
def test_a_run_goes_on_with_and_without_ray(cluster: Any, folder: Path, tmp_path: Path) -> None:
    """Begun on one machine and interrupted, ended on Ray: the settings of both are the same."""
    source, target = prompts(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    program = (
        "import sys; from idlm_kernels.generate import batch_file; real, calls = batch_file._write_answers, []\n"
        "def some(*a):\n"
        "    if len(calls) == 3: raise KeyboardInterrupt\n"
        "    calls.append(real(*a))\n"
        "batch_file._write_answers = some\n"
        "from idlm_kernels.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "generate", "--model", str(folder), "--raw", "--input", str(source)]
    command += ["--output", str(target), "--temperature", "0.9", "--max-tokens", "12", "--seed", "11"]
    command += ["--max-num-seqs", "2", "--max-model-len", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    begun = target.read_bytes()
    assert begun.count(b"\n") > 0 and (tmp_path / "out.jsonl.run.json").exists()
    assert json.loads((tmp_path / "out.jsonl.run.json").read_bytes())["model"] == str(folder)
    progress = on_ray(folder, source, target)
    assert progress.lines == 41
    assert target.read_bytes() == on_one_machine(folder, source, tmp_path / "one.jsonl")
    assert target.read_bytes().startswith(begun)


@needs_ray
def test_a_fault_of_a_worker_stops_the_run_and_loses_nothing(
    cluster: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that cannot load the model gives no answers, and the run does not try for good."""
    source, target = prompts(tmp_path / "in.jsonl", 10), tmp_path / "out.jsonl"
    with pytest.raises(typer.Exit) as ended:
        on_ray(folder, source, target, backend="nowhere")
    assert ended.value.exit_code == 3
    told = capsys.readouterr().err
    assert "idlm: stopped: Ray gave up: " in told and "'nowhere'" in told and "run the same again" in told
    assert target.read_bytes() == b"" and (tmp_path / "out.jsonl.run.json").exists()
    assert on_ray(folder, source, target).lines == 11, "and goes on once that is mended"


@needs_ray
def test_a_block_that_kills_its_workers_ends_the_run(
    cluster: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from idlm_kernels.generate import ray_file

    class Killer:
        def __init__(self, job: Any):
            pass

        def __call__(self, block: Any) -> Any:
            os._exit(1)

    monkeypatch.setattr(ray_file, "Answerer", Killer)
    source, target = prompts(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    with pytest.raises(typer.Exit) as ended:
        on_ray(folder, source, target)
    assert ended.value.exit_code == 3 and "Ray gave up" in capsys.readouterr().err
    assert target.read_bytes() == b""


@needs_ray
def test_more_workers_than_fit_are_refused(cluster: Any, folder: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", 10)
    on = RayOptions("local", 3, 1)
    how = {"options": OPTIONS, "chat": False, "system": None, "max_num_seqs": 2}
    with pytest.raises(ValueError, match="3 models on 1 CPUs each are wanted, but the Ray cluster has room for 2"):
        generate_file_on_ray(load(folder), source, tmp_path / "out.jsonl", PARAMS, on, **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depends on the schedule"):
        how["options"] = DecodeOptions(rule="rejection")
        generate_file_on_ray(load(folder), source, tmp_path / "out.jsonl", PARAMS, on, **how)  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_command_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", 5)
    command = [sys.executable, "-m", "idlm_kernels", "generate", "--model", str(folder), "--input", str(source)]
    done = subprocess.run([*command, "--output", str(tmp_path / "o"), "--ray", "local"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"needs the package \w+: pip install 'idlm_kernels\[ray\]'", done.stderr)
