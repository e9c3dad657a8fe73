"""The re-ranking head: lets a draft know the token before it, without another forward or LM head.

A MASK row proposes the token two places on without knowing the one in between, which verification has just chosen (or
the draft before it). From the row's hidden state, that token's embedding and a small state carried from draft to
draft, the head makes a query; each of the row's best candidates gains the product of the query and its LM-head row.
Drafts may come from anywhere, so this is as lossless as no re-ranking.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from python_ref.rerank import next_state, unit

from ._files import SafetensorsFile, is_there, require_finite, require_float
from .config import ModelConfig
from .errors import CheckpointError, short

FILE = "rerank_head.safetensors"


@dataclass
class RerankHead:
    """from_hidden [W, H], from_previous [W, H], from_state [W, W], to_query [H, W]: W is the head's own width."""

    from_hidden: Tensor
    from_previous: Tensor
    from_state: Tensor
    to_query: Tensor

    def query(self, hidden: Tensor, previous: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(query [..., H], next state [..., W]).

        hidden [..., H]: of the MASK row, after the last norm; previous [..., H]: embedding of the token before the
        draft; state [..., W]: as the draft before left it, None for the first.
        """
        row_part = F.linear(unit(hidden), self.from_hidden)
        state = next_state(row_part, previous, state, self.from_previous, self.from_state)
        return F.linear(state, self.to_query), state

    def to(self, device: torch.device, dtype: torch.dtype) -> RerankHead:
        return RerankHead(*(tensor.to(device, dtype) for tensor in self.parameters()))

    def parameters(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def load_rerank_head(path: str | Path, config: ModelConfig) -> RerankHead | None:
    """The head in an adapter folder, or None where there is none. Raises CheckpointError where it does not fit."""
    location = Path(path).expanduser() / FILE
    if not is_there(location):
        return None
    file = SafetensorsFile(location)
    names = {field.name for field in fields(RerankHead)}
    if file.names != names:
        raise CheckpointError(f"{location}: holds {short(sorted(file.names))}, wanted {', '.join(sorted(names))}")
    shape = file.shape("from_hidden")
    width = shape[0] if shape else 0
    hidden = config.hidden_size
    wanted = {
        "from_hidden": (width, hidden),
        "from_previous": (width, hidden),
        "from_state": (width, width),
        "to_query": (hidden, width),
    }
    tensors = {}
    for name in sorted(names):
        require_float(location, name, file.dtype(name))
        if file.shape(name) != wanted[name] or width < 1:
            raise CheckpointError(f"{location}: {name} has shape {list(file.shape(name))}, wanted {list(wanted[name])}")
        tensors[name] = file.tensor(name)
        require_finite(location, name, tensors[name])
    return RerankHead(**tensors)
