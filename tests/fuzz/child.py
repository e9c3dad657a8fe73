"""The process in which strangers' files are read: with little memory, and watched by the one that started it.

    python -m tests.fuzz.child TARGET SEED [COUNT]     repeats what a failing test has named

Without arguments it takes orders from standard input: a line of JSON [target, first seed, end] each. It answers with
lines of JSON: the seed that it is at, and for each seed whose outcome is a fault, what that was.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random

from idlm_kernels.model.errors import CheckpointError

from . import targets

MEMORY_BYTES = 1 << 30  # besides what the libraries take
MAX_MESSAGE = 4000


def main(arguments: list[str]) -> None:
    limit_memory()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        folder.mkdir()
        if arguments:
            name, first = arguments[0], int(arguments[1])
            for seed in range(first, first + int(arguments[2]) if arguments[2:] else first + 1):
                print(seed, outcome(name, seed, folder))
            return
        for line in sys.stdin:
            name, first, end = json.loads(line)
            for seed in range(first, end):
                tell({"seed": seed})
                tell({"seed": seed, "outcome": outcome(name, seed, folder)})


def tell(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


def limit_memory() -> None:
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def outcome(name: str, seed: int, folder: Path) -> str:
    """ "accepted", "refused", or what is wrong."""
    target = targets.TARGETS[name]
    good = target.files()
    for old in folder.iterdir():
        if old.name not in good:
            old.unlink()
    for file, data in good.items():
        if not (folder / file).exists():
            (folder / file).write_bytes(data)
    spoiled, data = target.spoil(Random(f"{name}:{seed}"), good)
    (folder / spoiled).unlink()  # and not written over: an earlier reader may have it mapped
    (folder / spoiled).write_bytes(data)
    try:
        target.read(folder)
    except (CheckpointError, FileNotFoundError) as error:
        if f"{folder}{os.sep}" not in str(error):
            return f"the error does not name the file: {type(error).__name__}: {str(error)[:MAX_MESSAGE]}"
        if len(str(error)) > MAX_MESSAGE:
            return f"the error has {len(str(error))} characters: {str(error)[:300]}"
        return "refused"
    except BaseException:
        return "raised something else:\n" + traceback.format_exc()[-MAX_MESSAGE:]
    finally:
        (folder / spoiled).unlink()
    return "accepted"


if __name__ == "__main__":
    os.environ["RUST_BACKTRACE"] = "0"
    main(sys.argv[1:])
