"""The model as differentiable tensor code on padded batches: what training needs and the paged model does not offer.

Three passes share one layer: `clean` runs ordinary rows causally and keeps their K and V, `masked` runs blocks of MASK
rows against them, `decode` continues a batch by one token. The layout of a block is that of a decoding step: after
clean row t come K MASK rows at positions t + 1 .. t + K; row j sees clean tokens 0 .. t and MASK rows 0 .. j of its own
block, and predicts the token at position t + 2 + j.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm_kernels.model.adapter import BLOCK_OF, MODULES
from idlm_kernels.model.checkpoint import Checkpoint
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.training.lora import GatedLora
from python_ref import rotary_table

# (layer, q [B, R, Hq, D], k and v [B, R, Hkv, D]) -> o [B, R, Hq, D]; q and k are rotated
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class CleanPass:
    """Ordinary rows of a batch of right-padded sequences, computed causally.

    hidden [B, T, H]: after the last norm, what the LM head reads. k, v: by layer, [B, Hkv, T, D], k rotated.
    """

    hidden: Tensor
    k: list[Tensor]
    v: list[Tensor]


class DenseModel:
    """A Qwen3, SDAR or Llama decoder on one device; `weights` by their checkpoint names, all of one dtype."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = self.embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self._inv_freq = config.inv_freq().to(self.device)
        self._rotary = rotary_table(self._inv_freq, 0)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DenseModel:
        names = checkpoint.config.tensor_shapes().keys() & set(checkpoint.names())
        return cls(checkpoint.config, {name: checkpoint.tensor(name).to(device, dtype) for name in sorted(names)})

    @property
    def own_mask(self) -> Tensor:
        """[H], the embedding of the model's MASK token. Raises ValueError where it has none."""
        if self.config.mask_token_id is None:
            raise ValueError("the config has no mask_token_id: MASK rows need the embedding of an adapter")
        return self.embedding[self.config.mask_token_id]

    # Passes

    def clean(self, ids: Tensor) -> CleanPass:
        """Ordinary rows ids int64 [B, T]. What stands behind the end of a sequence does not reach its tokens."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        length = ids.shape[1]
        causal = _bias(torch.ones(1, length, length, dtype=torch.bool, device=ids.device).tril(), self.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k.transpose(1, 2).contiguous())
            values.append(v.transpose(1, 2).contiguous())
            return self._attend(q, [keys[-1]], [values[-1]], causal)

        positions = torch.arange(length, device=ids.device).expand(ids.shape)
        hidden = self._run(F.embedding(ids, self.embedding), positions, attend, None)
        return CleanPass(hidden, keys, values)

    def masked(
        self, clean: CleanPass, anchors: Tensor, num_spec_tokens: int, mask_embedding: Tensor, lora: GatedLora | None
    ) -> Tensor:
        """Hidden states [B, A, K, H] of the MASK rows after clean rows `anchors` int64 [B, A], which all embed
        mask_embedding [H], or each its own row of [A * K, H] or [B, A * K, H]."""
        batch, count = anchors.shape
        positions = anchors.unsqueeze(2) + 1 + torch.arange(num_spec_tokens, device=anchors.device)
        bias = _bias(visibility(anchors, clean.hidden.shape[1], num_spec_tokens), self.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own_k, own_v = k.transpose(1, 2), v.transpose(1, 2)
            return self._attend(q, [clean.k[layer], own_k], [clean.v[layer], own_v], bias)

        x = mask_embedding.to(self.dtype).expand(batch, count * num_spec_tokens, -1)
        hidden = self._run(x, positions.flatten(1), attend, lora)
        return hidden.unflatten(1, (count, num_spec_tokens))

    def decode(self, ids: Tensor, lengths: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        """Hidden states [B, H] of one more token each, ids int64 [B] at positions lengths [B].

        k, v: by layer [B, Hkv, T, D], T > max(lengths); the new rows are written there.
        """
        rows = torch.arange(len(ids), device=ids.device)
        seen = torch.arange(k[0].shape[2], device=ids.device) <= lengths[:, None, None]
        bias = _bias(seen, self.dtype)

        def attend(layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
            k[layer][rows, :, lengths] = new_k.squeeze(1)
            v[layer][rows, :, lengths] = new_v.squeeze(1)
            return self._attend(q, [k[layer]], [v[layer]], bias)

        x = F.embedding(ids.unsqueeze(1), self.embedding)
        return self._run(x, lengths.unsqueeze(1), attend, None).squeeze(1)

    # The layer

    def _run(self, x: Tensor, positions: Tensor, attend: Attend, lora: GatedLora | None) -> Tensor:
        config = self.config
        cos, sin = self._cos_sin(positions)
        x = x.float()  # the residual stream
        for i in range(config.num_layers):
            prefix = f"model.layers.{i}"
            h = self._norm(x, f"{prefix}.input_layernorm.weight")
            q, k, v = (self._linear(h, i, module, lora).unflatten(2, (-1, config.head_dim)) for module in MODULES[:3])
            if config.qk_norm:
                q = self._norm(q, f"{prefix}.self_attn.q_norm.weight")
                k = self._norm(k, f"{prefix}.self_attn.k_norm.weight")
            o = attend(i, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + self._linear(o.flatten(2), i, "o_proj", lora)
            h = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate, up = (self._linear(h, i, module, lora) for module in ("gate_proj", "up_proj"))
            x = x + self._linear(F.silu(gate) * up, i, "down_proj", lora)
        return self._norm(x, "model.norm.weight")

    def _attend(self, q: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor) -> Tensor:
        """o [B, R, Hq, D] of q [B, R, Hq, D] over the keys [B, Hkv, S_i, D] of all parts; bias [B, 1, 1, R, sum S_i].

        Plain products, since here they are several times faster on a CPU than the fused attention of torch. The parts
        are not joined, since those without a gradient must not get one.
        """
        groups = self.config.num_heads // self.config.num_kv_heads
        # The query heads of a group share their keys, so they are rows of one product: [B, Hkv, G * R, D].
        q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3) * self.config.head_dim**-0.5
        scores = torch.cat([q @ k.transpose(2, 3) for k in keys], dim=3)
        p = (scores.unflatten(2, (groups, -1)) + bias).softmax(-1).flatten(2, 3)
        parts = zip(p.split([v.shape[2] for v in values], dim=3), values, strict=True)
        o = functools.reduce(torch.add, (part @ v for part, v in parts))
        return o.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.rms_norm_eps).to(self.dtype)

    def _linear(self, x: Tensor, layer: int, module: str, lora: GatedLora | None) -> Tensor:
        block = BLOCK_OF[module]
        name = f"model.layers.{layer}.{block}.{module}"
        y = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        return y if lora is None or (layer, module) not in lora.pairs else y + lora.delta(x, layer, module)

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each [B, R, 1, D / 2], in the dtype of the model."""
        if (need := int(positions.max()) + 1) > self._rotary.shape[0]:
            self._rotary = rotary_table(self._inv_freq, 2 * need)
        cos, sin = self._rotary[positions].to(self.dtype).unsqueeze(2).chunk(2, dim=-1)
        return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen` [B, R, S], -inf elsewhere: [B, 1, 1, R, S]."""
    return torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None, None]


def visibility(anchors: Tensor, length: int, num_spec_tokens: int) -> Tensor:
    """What the MASK rows after clean rows `anchors` [B, A] see: bool [B, A * K, T + A * K].

    The first T = length columns are the clean rows of the sequence, the rest its MASK rows.
    """
    count = anchors.shape[1]
    clean = torch.arange(length, device=anchors.device) <= anchors.unsqueeze(2)
    rows = torch.arange(count * num_spec_tokens, device=anchors.device)
    own = (rows // num_spec_tokens == rows.unsqueeze(1) // num_spec_tokens) & (rows <= rows.unsqueeze(1))
    return torch.cat([clean.repeat_interleave(num_spec_tokens, dim=1), own.expand(len(anchors), -1, -1)], dim=2)
