"""A folder of adapters that a running engine takes, and the rule by which it sends one back."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from idlm_kernels.model.adapter import load_adapter
from idlm_kernels.model.errors import CheckpointError, short

if TYPE_CHECKING:
    from idlm_kernels.generate.engine import Engine
    from idlm_kernels.model.transformer import PreparedAdapter

logger = logging.getLogger(__name__)

MIN_DRAFTS = 256  # verified, of each of the two: before, nobody is judged
MARGIN = 0.02  # of acceptance: so much less is no reason to change back
ERRORS = 3.0  # standard errors: so much may be chance
TRIAL = 8 * MIN_DRAFTS  # verified drafts after which an adapter stays


@dataclass
class DraftCounts:
    """Drafts by their index, since an adapter was taken: verified, and accepted given that all before them were."""

    verified: list[int]
    accepted: list[int]

    @classmethod
    def none(cls, num_drafts: int) -> DraftCounts:
        return cls([0] * num_drafts, [0] * num_drafts)

    def add(self, verified: Sequence[int], accepted: Sequence[int]) -> None:
        for j, (seen, kept) in enumerate(zip(verified, accepted, strict=True)):
            self.verified[j] += seen
            self.accepted[j] += kept


@dataclass(frozen=True)
class Replaced:
    """The adapter that was in use before another was taken, and what became of its drafts."""

    adapter: PreparedAdapter
    counts: DraftCounts


def is_worse(new: DraftCounts, old: DraftCounts) -> bool:
    """Whether a smaller share of the new drafts was accepted, by more than a margin and more than chance."""
    seen, before = sum(new.verified), sum(old.verified)
    if min(seen, before) < MIN_DRAFTS:
        return False
    share, share_before = sum(new.accepted) / seen, sum(old.accepted) / before
    both = (sum(new.accepted) + sum(old.accepted)) / (seen + before)
    chance = ERRORS * math.sqrt(both * (1 - both) * (1 / seen + 1 / before))
    return share_before - share > max(MARGIN, chance)


class AdapterFolder:
    """Folders of adapters side by side, as `idlm learn` writes them: by name, the last is the newest.

    A version that is worse than the one before it, on the traffic that each has seen, is sent back and not taken again
    by itself. That costs speed while it lasts and nothing else: no adapter changes a text.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; wanted one with a folder for each adapter")
        self.path = path
        self._asked: str | None = None  # the latest that was taken; in use from the engine's next window on
        self._on_trial = False
        self._newest: str | None = None  # that was looked at
        self.refused: dict[str, str] = {}  # why, by name

    def names(self) -> list[str]:
        """The adapters that are there, oldest first. One that is being written has a name that begins with a dot."""
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if not entry.name.startswith(".") and (entry / "adapter_config.json").is_file()
        )

    def take(self, engine: Engine, name: str) -> None:
        """Have the engine use an adapter of the folder from its next window on, on trial.

        Raises KeyError where there is none of the name, CheckpointError or ValueError where it cannot be used.
        """
        if name not in self.names():
            raise KeyError(name)
        engine.swap_adapter(load_adapter(self.path / name, engine.model.config))
        self._asked, self._on_trial = name, True
        self.refused.pop(name, None)
        logger.info("adapter %s is taken", name)

    def look(self, engine: Engine, *, take_newest: bool = False) -> None:
        """What is done every few seconds: send back an adapter that does worse than the one before, or take the newest
        where there is one that was not looked at yet."""
        if self._asked is not None and engine.adapter_name != self._asked:
            return  # its first window is yet to come
        if self._on_trial and engine.replaced is not None:
            if is_worse(engine.draft_counts, engine.replaced.counts):
                self._send_back(engine, engine.replaced)
                return
            self._on_trial = sum(engine.draft_counts.verified) < TRIAL
        newest = max(self.names(), default=None)
        if take_newest and newest not in (None, self._newest, engine.adapter_name, *self.refused):
            assert newest is not None
            self._newest = newest
            try:
                self.take(engine, newest)
            except (CheckpointError, ValueError, OSError) as error:
                self.refused[newest] = short(str(error))
                logger.error("adapter %s is not taken: %s", newest, error)

    def _send_back(self, engine: Engine, before: Replaced) -> None:
        new, old = (
            f"{sum(counts.accepted)} of {sum(counts.verified)}" for counts in (engine.draft_counts, before.counts)
        )
        name = engine.adapter_name or ""
        self.refused[name] = f"{new} drafts accepted, and {old} of {before.adapter.name}"
        engine.swap_adapter(before.adapter)
        self._asked, self._on_trial = before.adapter.name, False
        logger.warning("adapter %s is sent back: %s", name, self.refused[name])
