"""What MASK rows embed. A property of how a model, or its adapter, was trained: with any other input its drafts fail.

`vector`: a learned vector that lies beside the adapter. `token`: the embedding of a MASK token. `mean`: the mean of all
embeddings, for adapters that say nothing. `uniform`: the embeddings of ids drawn anew for each row from
[1, mask_token_id), as Uno (arXiv 2609.04010) and I-DLM's block sampler do; docs/step.md says from which noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .config import ModelConfig
from .errors import CheckpointError, short

MaskInputKind = Literal["vector", "token", "mean", "uniform"]
KINDS: tuple[str, ...] = get_args(MaskInputKind)


@dataclass(frozen=True)
class MaskInput:
    """kind: see this module. mask_token_id: of `token`, the id; of `uniform`, the one below which ids are drawn.

    Raises ValueError for a kind that does not exist, or an id that goes with none.
    """

    kind: MaskInputKind
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask_input is {short(self.kind)}, wanted one of {', '.join(KINDS)}")
        token = self.mask_token_id
        if token is None:
            return
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"mask_token_id must be an int, got {type(token).__name__}")
        if self.kind in ("vector", "mean"):
            raise ValueError(f"mask_token_id is {short(token)}, but mask_input {self.kind!r} has no use for one")

    @property
    def row_id(self) -> int:
        """The id that MASK rows carry: what they embed, or one of no meaning where that is a vector or noise."""
        return self.mask_token_id or 0 if self.kind == "token" else 0

    @property
    def noise_below(self) -> int:
        """MASK rows embed ids drawn from 1 .. noise_below - 1; 0: they do not."""
        return self.mask_token_id or 0 if self.kind == "uniform" else 0

    def within(self, config: ModelConfig, where: str = "") -> MaskInput:
        """This, with the model's own MASK id where none is given. Raises ValueError where it does not fit the model."""
        if self.kind not in ("token", "uniform"):
            return self
        token = config.mask_token_id if self.mask_token_id is None else self.mask_token_id
        if token is None:
            raise ValueError(
                f"{where}mask_input {self.kind!r} needs the id of the MASK token, and the model names none:"
                " give mask_token_id (--mask-token-id; 151669 for Qwen3)"
            )
        # The ids below the bound are drawn, never the bound itself: it may be the size of the vocabulary.
        low, high = (2, config.vocab_size) if self.kind == "uniform" else (0, config.vocab_size - 1)
        if not low <= token <= high:
            raise ValueError(
                f"{where}mask_token_id is {short(token)}, wanted {low} to {high} for mask_input {self.kind!r} of a"
                f" model with {config.vocab_size} ids"
            )
        return MaskInput(self.kind, token)

    @classmethod
    def read(cls, record: object, file: Path) -> MaskInput | None:
        """Of an adapter's record of its training; None where that says nothing. CheckpointError names the file."""
        if record is None:
            return None
        if not isinstance(record, Mapping) or set(record) - {"kind", "mask_token_id"}:
            raise CheckpointError(f"{file}: mask_input is {short(record)}, wanted kind and mask_token_id")
        try:
            return cls(record.get("kind"), record.get("mask_token_id"))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from None

    def record(self) -> dict[str, Any]:
        """What `read` reads."""
        return {"kind": self.kind} | ({} if self.mask_token_id is None else {"mask_token_id": self.mask_token_id})
