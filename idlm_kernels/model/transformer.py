"""The transformer: Qwen3, SDAR and Llama as one stack of ops, with an optional LoRA adapter on MASK rows.

A forward takes packed rows of any mixture of requests, writes their K and V to the paged cache and returns logits.
It owns no arithmetic: everything is an op of `idlm_kernels.ops`, so each backend computes the whole model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.cpu import native
from idlm_kernels.model.adapter import BLOCK_OF, MODULES, Adapter
from idlm_kernels.model.checkpoint import Checkpoint, identity
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.cpu_stack import CpuCache, CpuStack, PackedLora, slots_of_keys, unsupported
from idlm_kernels.model.errors import CheckpointError, short
from idlm_kernels.model.mask_input import MaskInput
from idlm_kernels.model.rerank import RerankHead
from idlm_kernels.model.rows import Rows
from python_ref import rotary_table

logger = logging.getLogger(__name__)

_FORM = ("linears", "ranks", "scale", "width of the re-ranking head")
_LINEARS = (MODULES[:3], MODULES[3:4], MODULES[4:6], MODULES[6:])  # computed as one each


class KVCache:
    """Paged keys and values of every layer: views [num_pages, page_size, Hkv, D].

    On a CPU the memory is head-major, since there a request's pages are gathered per head; on a GPU the tokens of a
    page lie together, as in other engines.
    """

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        self.page_size = page_size
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        if device.type == "cpu":
            storage = torch.zeros(2, layers, heads, num_pages, page_size, dim, dtype=dtype, device=device)
            storage = storage.permute(0, 1, 3, 4, 2, 5)
        else:
            storage = torch.zeros(2, layers, num_pages, page_size, heads, dim, dtype=dtype, device=device)
        self.k: list[Tensor] = list(storage[0])
        self.v: list[Tensor] = list(storage[1])


@dataclass
class Projection:
    """A linear layer, possibly several packed side by side (`widths`), possibly with an adapter for MASK rows."""

    weight: Tensor  # [N, K], prepared for the backend
    bias: Tensor | None
    widths: list[int]
    lora: tuple[Tensor, Tensor] | None  # A [S * r, K], B [N, r]
    scale: float

    def __call__(self, x: Tensor, lora_mask: Tensor | None) -> Tensor:
        """lora_mask bool [T]: the rows that take the adapter; None: none does."""
        if self.lora is None or lora_mask is None:
            return ops.linear(x, self.weight, bias=self.bias)
        a, b = self.lora
        return ops.gated_lora_linear(
            x, self.weight, a, b, lora_mask, self.scale, bias=self.bias, output_sizes=self.widths
        )

    def silu_and_mul(self, x: Tensor, lora_mask: Tensor | None) -> Tensor:
        """The gated activation of this layer's result (gate and up, packed side by side)."""
        if self.lora is None or lora_mask is None:
            return ops.linear_silu_and_mul(x, self.weight, bias=self.bias)
        a, b = self.lora
        return ops.linear_silu_and_mul(
            x,
            self.weight,
            bias=self.bias,
            lora_a=a,
            lora_b=b,
            lora_mask=lora_mask,
            scale=self.scale,
            output_sizes=self.widths,
        )


@dataclass
class Layer:
    attention_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter as a model computes with it: what `Transformer.install_adapter` takes. loras: of each layer's four
    projections in turn, None where there is no pair."""

    name: str
    acceptance: list[float] | None
    loras: PackedLora | list[tuple[Tensor, Tensor] | None]
    mask_embedding: Tensor | None
    rerank_head: RerankHead | None


class Transformer:
    """A causal transformer on one device.

    Arguments: dtype of the weights: auto, fp32, fp16, bf16 or a torch.dtype. activations "int8" lets clean rows enter
    quantised matrices with 8 bits instead of 16, on a CPU: faster, and coarser (docs/cpu.md). mask_input: what MASK
    rows embed; what the adapter says, or what is left (`MaskInput`), when None.

    Attributes: config; identity: a hash that tells its checkpoint from others; device; dtype: of activations, logits
    and KV; weight_dtype; max_positions: rows of the rotary table; has_adapter; adapter: the one in use; mask_input:
    what MASK rows embed; acceptance: of drafts, as the adapter tells; rerank_head, and with one head_rows [V, H], the
    rows of the LM head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: str | torch.dtype = "auto",
        activations: str = "auto",
        adapter: Adapter | None = None,
        mask_input: MaskInput | None = None,
    ):
        if activations not in ("auto", "int8"):
            raise ValueError(f"activations is {activations!r}, wanted auto or int8")
        self.config = config = checkpoint.config
        self.device = torch.device(device)
        self.weight_dtype = _weight_dtype(dtype, checkpoint, self.device)
        # A CPU keeps activations in fp32: half precision would save nothing there and cost accuracy.
        self.dtype = torch.float32 if self.device.type == "cpu" else self.weight_dtype
        self.identity = identity(checkpoint)
        self.has_adapter = adapter is not None
        self.acceptance = None if adapter is None else adapter.acceptance
        self._checkpoint, self._adapter = checkpoint, adapter
        self._inv_freq = config.inv_freq().to(self.device)
        self.rotary = rotary_table(self._inv_freq, 1024)

        self.stack = self._cpu_stack(checkpoint, adapter, dtype, activations == "int8")
        if activations == "int8" and (self.stack is None or not self.stack.is_quantised):
            raise ValueError(
                "activations='int8' is for weights that are stored in blocks of 4 or 8 bits (GGUF Q4_0, Q4_1, Q8_0), "
                "with dtype='auto' and the compiled CPU kernels (`idlm doctor` names them); use 'auto'"
            )
        if self.stack is None:
            self.embedding = self._load("model.embed_tokens.weight").to(self.weight_dtype).to(self.device)
            head = self.embedding
            if not config.tie_word_embeddings:
                head = self._load("lm_head.weight").to(self.weight_dtype).to(self.device)
            # A CPU backend may keep the head's weight in a form of its own, whose rows cannot be picked.
            self.head_rows = head
            self.layers = [self._layer(i) for i in range(config.num_layers)]
            self.norm = self._vector("model.norm.weight")
            self.head = ops.prepare_weight(head)
        self.mask_input, self.mask_embedding = self._mask_input(mask_input)
        self.rerank_head = None if adapter is None else self._rerank_head(adapter)
        if self.rerank_head is None and self.stack is None:
            del self.head_rows
        self._form = None if adapter is None else _form(adapter)
        self._said = None if adapter is None else _said(adapter)
        self.adapter = None if adapter is None else self._in_use(adapter)
        del self._checkpoint, self._adapter

    # Loading

    def _load(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def _vector(self, name: str) -> Tensor:
        return self._load(name).to(device=self.device, dtype=self.dtype)

    def _layer(self, index: int) -> Layer:
        config, prefix = self.config, f"model.layers.{index}"
        norm = config.qk_norm
        return Layer(
            attention_norm=self._vector(f"{prefix}.input_layernorm.weight"),
            qkv=self._projection(index, "self_attn", ("q_proj", "k_proj", "v_proj"), config.attention_bias),
            q_norm=self._vector(f"{prefix}.self_attn.q_norm.weight") if norm else None,
            k_norm=self._vector(f"{prefix}.self_attn.k_norm.weight") if norm else None,
            o=self._projection(index, "self_attn", ("o_proj",), config.attention_bias),
            mlp_norm=self._vector(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._projection(index, "mlp", ("gate_proj", "up_proj"), config.mlp_bias),
            down=self._projection(index, "mlp", ("down_proj",), config.mlp_bias),
        )

    def _projection(self, index: int, block: str, modules: tuple[str, ...], has_bias: bool) -> Projection:
        names = [f"model.layers.{index}.{block}.{module}" for module in modules]
        parts = [self._load(f"{name}.weight").to(self.weight_dtype) for name in names]
        widths = [part.shape[0] for part in parts]
        bias = torch.cat([self._vector(f"{name}.bias") for name in names]) if has_bias else None
        weight = ops.prepare_weight(torch.cat(parts).to(self.device))
        lora, scale = None, 1.0
        if self._adapter is not None:
            lora, scale = self._lora(self._adapter, index, modules), self._adapter.scale
        return Projection(weight, bias, widths, lora, scale)

    def _lora(self, adapter: Adapter, index: int, modules: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """The pairs of modules that are computed as one: A [S * r, K], B [N, r]. Those of a lower rank than the largest
        are padded with zeros."""
        pairs = [adapter.pair(index, module) for module in modules]
        rank = max((len(pair[0]) for pair in pairs if pair is not None), default=0)
        if not rank:
            return None
        names = [f"model.layers.{index}.{BLOCK_OF[module]}.{module}" for module in modules]
        shapes = self.config.tensor_shapes()
        widths = [shapes[f"{name}.weight"][0] for name in names]
        a = torch.zeros(len(modules), rank, shapes[f"{names[0]}.weight"][1])
        b = torch.zeros(sum(widths), rank)
        for name, part, rows, pair in zip(names, a, b.split(widths), pairs, strict=True):
            if pair is not None:
                self._require_fits(adapter, f"lora_A of {name}", pair[0])
                self._require_fits(adapter, f"lora_B of {name}", pair[1])
                part[: len(pair[0])], rows[:, : len(pair[0])] = pair
        return a.flatten(0, 1).to(self.device, self.dtype), b.to(self.device, self.dtype)

    def _rerank_head(self, adapter: Adapter) -> RerankHead | None:
        if adapter.rerank_head is None:
            return None
        for tensor in adapter.rerank_head.parameters():
            self._require_fits(adapter, "the re-ranking head", tensor)
        return adapter.rerank_head.to(self.device, self.dtype)

    def _require_fits(self, adapter: Adapter, what: str, tensor: Tensor) -> None:
        """Refuses a finite tensor of an adapter that the dtype of the activations would make infinite."""
        if self.dtype != torch.float32 and not tensor.to(self.dtype).isfinite().all():
            raise CheckpointError(
                f"{adapter.name}: {what} holds numbers up to {float(tensor.abs().max()):g}, which {self.dtype}"
                " does not; choose another --dtype"
            )

    def _cpu_stack(
        self, checkpoint: Checkpoint, adapter: Adapter | None, dtype: str | torch.dtype, int8_activations: bool
    ) -> CpuStack | None:
        """The layers in the compiled CPU kernels; None where there are none, or they do not take this model."""
        if self.device.type != "cpu" or native.library() is None or ops.current_backend() not in ("auto", "cpu"):
            return None
        if why := unsupported(self.config):
            logger.info("the native CPU kernels do not take %s: %s", checkpoint.name, why)
            return None
        return CpuStack(
            checkpoint,
            adapter,
            None if dtype == "auto" else self.weight_dtype,
            self.rotary,
            threads=torch.get_num_threads(),
            int8_activations=int8_activations,
        )

    @cached_property
    def embedding(self) -> Tensor:
        """The embedding [V, H]; beside the one that the compiled kernels have packed, made when it is first wanted."""
        assert self.stack is not None
        return self.stack.table(self.stack.embedding, self.weight_dtype)

    @cached_property
    def head_rows(self) -> Tensor:
        """The rows of the LM head [V, H], in the same way."""
        assert self.stack is not None
        if self.config.tie_word_embeddings:
            return self.embedding
        return self.stack.table(self.stack.head, self.weight_dtype)

    def _mask_input(self, wanted: MaskInput | None) -> tuple[MaskInput, Tensor | None]:
        """What MASK rows embed, and the vector for it; None where they embed the ids that they carry."""
        adapter = self._adapter
        if wanted is None and adapter is not None:
            wanted = MaskInput("vector") if adapter.mask_embedding is not None else adapter.mask_input
        if wanted is None:
            wanted = MaskInput("mean" if self.config.mask_token_id is None else "token")
        wanted = wanted.within(self.config)
        if wanted.kind == "vector":
            if adapter is None or adapter.mask_embedding is None:
                raise ValueError("mask_input 'vector' needs an adapter with a mask_embedding.safetensors")
            return wanted, self._mask_vector(adapter, adapter.mask_embedding)
        return wanted, self.embedding.float().mean(0).to(self.dtype) if wanted.kind == "mean" else None

    def _mask_vector(self, adapter: Adapter, vector: Tensor) -> Tensor:
        self._require_fits(adapter, "the MASK embedding", vector)
        return vector.to(self.device, self.dtype)

    # Another adapter

    @property
    def _projections(self) -> list[Projection]:
        return [projection for layer in self.layers for projection in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    def _in_use(self, adapter: Adapter) -> PreparedAdapter:
        """What the model computes with now."""
        loras = self.stack.lora if self.stack is not None else [projection.lora for projection in self._projections]
        assert loras is not None
        vector = self.mask_embedding if self.mask_input.kind == "vector" else None
        return PreparedAdapter(adapter.name, adapter.acceptance, loras, vector, self.rerank_head)

    def prepare_adapter(self, adapter: Adapter) -> PreparedAdapter:
        """Another adapter of the same form, ready for `install_adapter`. Any thread may ask; nothing takes it yet.

        Raises ValueError where its form is not that of the adapter that the model was loaded with (linears, ranks,
        scale, MASK input, width of the re-ranking head), or there was none: CheckpointError where its numbers do not
        fit the dtype.
        """
        if self._form is None:
            raise ValueError(f"{adapter.name}: the model was loaded without an adapter, so it takes no other one")
        for name, wanted, found in zip(_FORM, self._form, _form(adapter), strict=True):
            if found != wanted:
                raise ValueError(
                    f"{adapter.name}: its {name} {'are' if name.endswith('s') else 'is'} {short(found)}, wanted"
                    f" {short(wanted)}: an adapter is exchanged for one of the same form"
                )
        said = _said(adapter)
        if said != self._said and (said is None or said != self.mask_input):
            raise ValueError(
                f"{adapter.name}: its MASK rows embed {_words(said)}, wanted {_words(self._said)}: an adapter is"
                " exchanged for one of the same form"
            )
        loras: PackedLora | list[tuple[Tensor, Tensor] | None]
        if self.stack is not None:
            loras = self.stack.packed_lora(adapter, 1)
        else:
            loras = [self._lora(adapter, i, modules) for i in range(self.config.num_layers) for modules in _LINEARS]
        # Where the model was told to embed something else, it goes on with that.
        vector = adapter.mask_embedding if self.mask_input.kind == "vector" else None
        return PreparedAdapter(
            adapter.name,
            adapter.acceptance,
            loras,
            None if vector is None else self._mask_vector(adapter, vector),
            self._rerank_head(adapter),
        )

    def install_adapter(self, prepared: PreparedAdapter) -> PreparedAdapter:
        """Use an adapter from the next forward on; returns the one that was in use, which may come back.

        Not to be called while a forward runs. On a GPU the numbers are copied to where recorded steps find them.
        """
        assert self.adapter is not None
        before = self.adapter
        if self.stack is not None:
            assert isinstance(prepared.loras, PackedLora)
            self.stack.set_lora(prepared.loras)
            if self.mask_input.kind == "vector":
                self.mask_embedding = prepared.mask_embedding
            self.rerank_head = prepared.rerank_head
        else:
            before = dataclasses.replace(
                before,
                loras=[None if p.lora is None else (p.lora[0].clone(), p.lora[1].clone()) for p in self._projections],
                mask_embedding=None if before.mask_embedding is None else before.mask_embedding.clone(),
                rerank_head=None
                if before.rerank_head is None
                else RerankHead(*(tensor.clone() for tensor in before.rerank_head.parameters())),
            )
            assert isinstance(prepared.loras, list)
            for projection, pair in zip(self._projections, prepared.loras, strict=True):
                _copy(projection.lora, pair)
            if self.mask_input.kind == "vector":
                _copy((self.mask_embedding,), (prepared.mask_embedding,))
            if self.rerank_head is not None and prepared.rerank_head is not None:
                _copy(self.rerank_head.parameters(), prepared.rerank_head.parameters())
        self.adapter, self.acceptance = prepared, prepared.acceptance
        return before

    def reserve_positions(self, count: int) -> None:
        """Let the rotary table cover positions 0 .. count - 1. Not to be called while a graph refers to it."""
        if count > self.rotary.shape[0]:
            self.rotary = rotary_table(self._inv_freq, count)
            if self.stack is not None:
                self.stack.set_rotary(self.rotary)

    # Running

    def new_cache(self, num_pages: int, page_size: int) -> KVCache | CpuCache:
        if self.stack is not None:
            return CpuCache(self.config, num_pages, page_size)
        return KVCache(self.config, num_pages, page_size, self.dtype, self.device)

    def page_bytes(self, page_size: int) -> int:
        """Memory that a page of `new_cache` takes."""
        slots = 2 * page_size if self.stack is None else page_size + slots_of_keys(page_size)
        config = self.config
        return config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize * slots

    def forward(
        self, rows: Rows, cache: KVCache | CpuCache, logits_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, V] of the rows and what the LM head made them from, [T, H].

        logits_rows int64 [R]: only of these rows. K and V of all rows are written.
        """
        if self.stack is not None:
            assert isinstance(cache, CpuCache)
            x = self.stack.embedding.rows(rows.ids)
            if self.mask_embedding is not None:
                x = torch.where(rows.is_mask.unsqueeze(1), self.mask_embedding, x)
            return self.stack.forward(x, rows, cache, logits_rows)
        assert isinstance(cache, KVCache)
        eps, lora_mask = self.config.rms_norm_eps, rows.is_mask if rows.has_masks else None
        residual = ops.embed(
            rows.ids, self.embedding, is_mask=rows.is_mask, mask_embedding=self.mask_embedding, dtype=self.dtype
        )
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(x, lora_mask)
            q = ops.qk_norm_rope_append(
                qkv,
                rows.positions,
                self.rotary,
                rows.slot_mapping,
                cache.k[i],
                cache.v[i],
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=eps,
            )
            o = ops.strided_attention(
                q,
                cache.k[i],
                cache.v[i],
                rows.page_table,
                rows.seq_lens,
                rows.query_start_loc,
                tree_mask=rows.tree_mask,
                max_query_len=rows.max_query_len,
            )
            x = layer.o(o.flatten(1), lora_mask)
            x = ops.rms_norm(x, layer.mlp_norm, eps, residual=residual)
            x = layer.down(layer.gate_up.silu_and_mul(x, lora_mask), lora_mask)
            next_norm = self.layers[i + 1].attention_norm if i + 1 < len(self.layers) else self.norm
            x = ops.rms_norm(x, next_norm, eps, residual=residual)
        if logits_rows is not None:
            x, lora_mask = x[logits_rows], None if lora_mask is None else lora_mask[logits_rows]
        # Finite weights of an adapter may still overflow: that spoils a proposal and nothing else.
        if self.has_adapter and lora_mask is not None:
            x = torch.where(lora_mask.unsqueeze(1), x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), x)
        return ops.linear(x, self.head), x


def _form(adapter: Adapter) -> tuple[object, ...]:
    """What two adapters have to share to be exchanged; named by _FORM."""
    head = adapter.rerank_head
    return (
        len(adapter.pairs),
        sorted((*key, len(pair[0])) for key, pair in adapter.pairs.items()),
        adapter.scale,
        0 if head is None else len(head.from_hidden),
    )


def _said(adapter: Adapter) -> MaskInput | None:
    """What its MASK rows embed, as far as it says so."""
    return MaskInput("vector") if adapter.mask_embedding is not None else adapter.mask_input


def _words(said: MaskInput | None) -> str:
    return "what it does not say" if said is None else str(said.record())


def _copy(targets: Iterable[Tensor | None] | None, values: Iterable[Tensor | None] | None) -> None:
    """Numbers to where others lie."""
    for target, value in zip(targets or (), values or (), strict=True):
        assert target is not None and value is not None
        target.copy_(value)


def _weight_dtype(wanted: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if isinstance(wanted, torch.dtype):
        if wanted not in names.values():
            raise ValueError(f"dtype is {wanted}, wanted float32, float16 or bfloat16")
        return wanted
    if wanted in names:
        return names[wanted]
    if wanted != "auto":
        raise ValueError(f"dtype is {wanted!r}, wanted one of auto, {', '.join(names)}")
    if checkpoint.path.suffix == ".gguf":  # quantised weights: any 16 bits hold what is left of them
        return torch.float16 if device.type == "cpu" else torch.bfloat16
    stored = checkpoint.tensor("model.norm.weight").dtype
    if stored not in names.values():
        raise CheckpointError(f"{checkpoint.name}: weights are stored as {stored}; choose --dtype fp32, fp16 or bf16")
    return stored
