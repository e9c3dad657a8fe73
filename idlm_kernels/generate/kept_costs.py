"""Costs of plans that one process has learned and the next one on the same machine begins with."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from idlm_kernels.cpu import native
from idlm_kernels.generate.costs import LearnedCosts
from idlm_kernels.model.download import cache_dir
from idlm_kernels.model.transformer import Transformer

FILE_NAME = "costs.json"
MOST_KEYS = 64  # machines and models in the file, the latest ones
MOST_BYTES = 1 << 20  # a larger file is none of ours
LARGEST_RATIO = 1000.0


class KeptCosts(LearnedCosts):
    """Learned costs that are written to the user's cache when the process ends.

    A file that cannot be read or written, or that holds something else, costs the first request a few trial steps and
    is no error. IDLM_COSTS=0 reads and writes none.
    """

    def __init__(self, path: Path, key: str):
        super().__init__()
        self._path, self._key = path, key
        self.begin_with(_entries(_read(path).get(key, ())))
        self._found = self.table()

    def keep(self) -> None:
        """Write what is known, if it is more than was read."""
        if (table := self.table()) == self._found:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            known = {key: value for key, value in _read(self._path).items() if key != self._key}
            known[self._key] = [[batch, rows, round(ratio, 4)] for batch, rows, ratio in table]
            latest = dict(list(known.items())[-MOST_KEYS:])
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
                try:
                    json.dump(latest, file)
                    file.close()
                    os.replace(file.name, self._path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            self._found = table


def costs_of(model: Transformer) -> LearnedCosts:
    """Costs of this model on this machine, with the kernels and the number of threads in use."""
    if os.environ.get("IDLM_COSTS") == "0":
        return LearnedCosts()
    threads = torch.get_num_threads()
    parts = (_processor(), os.cpu_count(), threads, native.status(), repr(model.config), repr(model.acceptance))
    costs = KeptCosts(cache_dir() / FILE_NAME, hashlib.sha256(repr(parts).encode()).hexdigest()[:16])
    atexit.register(costs.keep)
    return costs


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES or not path.is_file():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _entries(found: Any) -> Iterable[tuple[int, int, float]]:
    """Those entries of a stranger's list that can be costs."""
    for entry in found if isinstance(found, list) else ():
        if not isinstance(entry, list) or len(entry) != 3 or any(isinstance(x, bool) for x in entry):
            continue
        batch, rows, ratio = entry
        if not isinstance(batch, int) or not isinstance(rows, int) or not isinstance(ratio, (int, float)):
            continue
        if 1 <= batch <= 1 << 20 and 2 <= rows <= 1 << 20 and 0 < ratio <= LARGEST_RATIO:  # NaN is not, nor 10**400
            yield batch, rows, float(ratio)


def _processor() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()
