"""Adapters of one form that draft differently, and a model that takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from idlm_kernels.model import Adapter, ModelConfig, Transformer
from idlm_kernels.model.adapter import MODULES
from idlm_kernels.model.rerank import RerankHead
from tests.tiny import MemoryCheckpoint, tiny_config

RANK, WIDTH = 3, 4


def make_adapter(config: ModelConfig, seed: int, size: float = 0.4, *, head: bool = False, rank: int = RANK) -> Adapter:
    """Random pairs on all linears, a MASK vector, and a re-ranking head where it is asked for."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * size

    pairs = {}
    for name, shape in config.tensor_shapes().items():
        module = name.split(".")[-2]
        if module in MODULES:
            pairs[int(name.split(".")[2]), module] = values(rank, shape[1]), values(shape[0], rank)
    hidden = config.hidden_size
    rerank = RerankHead(values(WIDTH, hidden), values(WIDTH, hidden), values(WIDTH, WIDTH), values(hidden, WIDTH))
    return Adapter(f"seed {seed}", rank, 0.5, values(hidden), pairs, rerank if head else None, [0.5, 0.4, 0.3])


@pytest.fixture(params=["ops", "compiled"])
def make_model(request: pytest.FixtureRequest) -> Callable[..., Transformer]:
    """make_model(adapter seed, head=False): a tiny model with that adapter, of ops or of the compiled CPU kernels."""
    from idlm_kernels.cpu import native

    changes: dict[str, object] = {}
    if request.param == "compiled":
        if native.library() is None:
            pytest.skip(native.status())
        changes = {"head_dim": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1}

    def make(seed: int | None = 1, *, head: bool = False) -> Transformer:
        config = tiny_config(**changes)
        adapter = None if seed is None else make_adapter(config, seed, head=head)
        model = Transformer(MemoryCheckpoint(config), adapter=adapter)  # type: ignore[arg-type]
        assert (model.stack is not None) == (request.param == "compiled")
        return model

    return make
