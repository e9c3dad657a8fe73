"""Which adapter goes with a model, and what its MASK rows embed."""

from __future__ import annotations

import logging
from pathlib import Path

from .adapter import DEFAULT_ADAPTER, Adapter, load_adapter
from .checkpoint import Checkpoint
from .mask_input import MaskInput, MaskInputKind

logger = logging.getLogger(__name__)

BUNDLED = "adapter"  # the folder of a bundle, inside that of its base model, that holds its adapter


def adapter_folder(source: str | Path, path: Path) -> Path | None:
    """The adapter that goes with a model unless another one is asked for: that of the default model, or the one inside
    the model's folder `path` (the layout of Uno's bundles)."""
    if source == "default":
        return DEFAULT_ADAPTER
    inside = path / BUNDLED
    return inside if inside.is_dir() else None


def load_with_input(
    checkpoint: Checkpoint,
    folder: str | Path | None,
    kind: MaskInputKind | None = None,
    mask_token_id: int | None = None,
) -> tuple[Adapter | None, MaskInput]:
    """The adapter in `folder`, and what MASK rows embed: what is asked for, else what the adapter says, else what fits.

    An adapter inside a base's folder that says nothing is taken for one of Uno's, which were all trained on uniform
    ids. Any other gets the model's MASK token or, without one, the mean embedding. Raises CheckpointError and
    FileNotFoundError as `load_adapter` does, ValueError where what is asked for does not fit adapter and model.
    """
    config = checkpoint.config
    adapter = None if folder is None else load_adapter(folder, config)
    is_asked = kind is not None or mask_token_id is not None
    if adapter is None and config.mask_token_id is None and is_asked:
        raise ValueError(
            f"{checkpoint.path}: mask_input and mask_token_id need an adapter, or a model with a MASK token: there is"
            f" no folder {BUNDLED!r} with one inside the model's own, and no other (--adapter) was given"
        )
    said = adapter.mask_input if adapter is not None else None
    if said is None and folder is not None and Path(folder).expanduser() == checkpoint.path / BUNDLED:
        said = MaskInput("uniform")
    if said is None:
        said = MaskInput("mean" if config.mask_token_id is None else "token")
    if is_asked:
        own = said.mask_token_id if mask_token_id is None and kind == said.kind else mask_token_id
        said = MaskInput(kind or said.kind, own)
    chosen = said.within(config, "" if is_asked or folder is None else f"{folder}: ")
    if adapter is not None:
        logger.info("MASK rows of %s embed: %s", adapter.name, chosen)
    return adapter, chosen
