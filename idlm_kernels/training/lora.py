"""The trainable adapter: LoRA pairs on the seven linears of every layer and the MASK embedding, kept in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm_kernels.model.adapter import BLOCK_OF, MODULES, Adapter
from idlm_kernels.model.config import ModelConfig


class GatedLora:
    """Pairs A [r, in], B [out, r] by (layer, module); a MASK row adds scale * (x A^T) B^T. B starts at zero."""

    def __init__(self, config: ModelConfig, rank: int, alpha: float, mask_embedding: Tensor, seed: int = 0):
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        device = mask_embedding.device
        self.mask_embedding = mask_embedding.detach().float().clone().requires_grad_()
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        shapes = config.tensor_shapes()
        for layer in range(config.num_layers):
            for module in MODULES:
                block = BLOCK_OF[module]
                size_out, size_in = shapes[f"model.layers.{layer}.{block}.{module}.weight"]
                a = (torch.rand(rank, size_in, generator=generator) * 2 - 1) / math.sqrt(size_in)
                a, b = a.to(device), torch.zeros(size_out, rank, device=device)
                self.pairs[layer, module] = a.requires_grad_(), b.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.mask_embedding, *(half for pair in self.pairs.values() for half in pair)]

    def delta(self, x: Tensor, layer: int, module: str) -> Tensor:
        """What the adapter adds to a linear of a layer for the rows x [..., in], in the dtype of x."""
        a, b = self.pairs[layer, module]
        return F.linear(F.linear(x, a.to(x.dtype)), (b * self.scale).to(x.dtype))

    def copy_(self, adapter: Adapter) -> None:
        """Take the values of an adapter of the same rank, scale and linears. Raises ValueError for another one."""
        if adapter.pairs.keys() != self.pairs.keys() or adapter.scale != self.scale:
            raise ValueError(
                f"{adapter.name} has {len(adapter.pairs)} pairs of scale {adapter.scale:g}, wanted {len(self.pairs)}"
                f" of scale {self.scale:g} to start from"
            )
        if adapter.mask_embedding is not None:
            copy_all(f"{adapter.name}: its MASK embedding", [self.mask_embedding], [adapter.mask_embedding])
        for key, pair in self.pairs.items():
            copy_all(f"{adapter.name}: its pair of {key[1]} in layer {key[0]}", pair, adapter.pairs[key])

    @classmethod
    def from_adapter(cls, adapter: Adapter, own_mask: Tensor | None = None) -> GatedLora:
        """A loaded adapter, frozen; own_mask [H]: what MASK rows embed where the adapter does not say."""
        mask_embedding = own_mask if adapter.mask_embedding is None else adapter.mask_embedding
        if mask_embedding is None:
            raise ValueError(f"{adapter.name} has no MASK embedding, and the model has no MASK token")
        lora = cls.__new__(cls)
        lora.rank, lora.alpha, lora.scale = adapter.rank, adapter.scale * adapter.rank, adapter.scale
        lora.mask_embedding = mask_embedding.float()
        lora.pairs = {key: (a.float(), b.float()) for key, (a, b) in adapter.pairs.items()}
        return lora


def copy_all(name: str, tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Take the values. Raises ValueError, with `name`, where the shapes differ."""
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, wanted {list(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(value)
