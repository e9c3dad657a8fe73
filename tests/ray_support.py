"""What the tests with Ray share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'idlm_kernels[ray]'")


def actors(of_class: str, ancestor: int) -> list[int]:
    """The processes of the actors of a class that a process has started, through Ray's own processes."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:  # it has ended
                continue

    def is_descendant(pid: int) -> bool:
        while pid in parents:
            if pid == ancestor:
                return True
            pid = parents[pid]
        return False

    return [pid for pid, name in names.items() if name.startswith("ray::") and of_class in name and is_descendant(pid)]
