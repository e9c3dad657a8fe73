"""The layers of a transformer on a CPU as one call of the compiled kernels, on weights as they are stored.

Between embedding and logits a forward is some 300 ops on small tensors, whose calls cost more than their work. Here it
is one (csrc/cpu/forward.cpp): row-invariant in the same sense, with bits of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.cpu import native
from idlm_kernels.cpu.native import Blocks, PackedWeight
from idlm_kernels.model.adapter import BLOCK_OF, Adapter
from idlm_kernels.model.checkpoint import Checkpoint
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.rows import Rows

_LANES = 16
_ROWS_AT_ONCE = 4096


def unsupported(config: ModelConfig) -> str | None:
    """Why the kernels do not take a model; None if they do."""
    if config.head_dim % 32 or config.head_dim > 256:
        return f"its head_dim is {config.head_dim}, wanted a multiple of 32 up to 256"
    if config.hidden_size % 16 or config.intermediate_size % 16:
        return f"its widths {config.hidden_size} and {config.intermediate_size} are no multiples of 16"
    return None


def slots_of_keys(page_size: int) -> int:
    """Slots that the keys of a page have room for: whole tiles."""
    return -(-page_size // _LANES) * _LANES


class CpuCache:
    """Paged keys and values of every layer, in the layout of the kernels: keys lie transposed in tiles of 16 slots."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int):
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.page_size, self.num_pages = page_size, num_pages
        self.k = torch.zeros(layers, num_pages, heads, slots_of_keys(page_size) // _LANES, dim, _LANES)
        self.v = torch.zeros(layers, num_pages, heads, page_size, dim)
        self.struct = native.Cache(self.k.data_ptr(), self.v.data_ptr(), num_pages, page_size)


@dataclass(frozen=True, eq=False)
class _Linear:
    """A packed linear layer, as an adapter has to fit it. field: of native.Layer; part uint8 [n / 16]: which of the
    modules each group of 16 outputs belongs to."""

    field: str
    modules: tuple[str, ...]
    struct: native.Linear
    part: Tensor


@dataclass(frozen=True, eq=False)
class PackedLora:
    """The pairs of an adapter in the layout of the kernels. linears: of each layer, the fields that have some; kept:
    the memory that they point to."""

    linears: list[dict[str, native.Linear]]
    kept: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Running:
    """What a forward reads. It is replaced as a whole, so one that runs in another thread keeps its own."""

    model: native.Model
    layers: Any  # an array of native.Layer
    rotary: Tensor
    lora: PackedLora | None


class CpuStack:
    """The packed weights of a model and the call that runs them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter | None,
        dtype: torch.dtype | None,
        rotary: Tensor,
        *,
        threads: int,
        int8_activations: bool,
    ):
        """dtype: of the weights; as they are stored when None. int8_activations: of clean rows too, not of MASK rows
        alone, where they meet quantised weights."""
        library = native.library()
        assert library is not None
        self._library, self._config = library, checkpoint.config
        self._checkpoint, self._dtype = checkpoint, dtype
        self._kept: list[Any] = []  # what the structs point to
        config = self._config
        self._linears: list[list[_Linear]] = [[] for _ in range(config.num_layers)]
        layers = (native.Layer * config.num_layers)()
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for i, layer in enumerate(pool.map(self._layer, range(config.num_layers))):
                layers[i] = layer
        self.embedding = self._packed([("model.embed_tokens.weight", 0, 1)])
        self.head = head = self.embedding
        if not config.tie_word_embeddings:
            self.head = head = self._packed([("lm_head.weight", 0, 1)])
        model = native.Model(
            layers=layers,
            norm=self._vector("model.norm.weight"),
            head=native.Linear(weight=head.address, kind=head.kind, n=head.n, k=head.k),
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            int8_activations=int8_activations,
        )
        self._kept += [self.embedding, head]
        self._running = _Running(model, layers, rotary, None)
        self.set_rotary(rotary)
        if adapter is not None:
            self.set_lora(self.packed_lora(adapter, threads))
        del self._checkpoint

    @property
    def is_quantised(self) -> bool:
        """Whether a matrix is stored in blocks of 4 or 8 bits."""
        return any(kept.kind in (native.Q4, native.Q8) for kept in self._kept if isinstance(kept, PackedWeight))

    @property
    def lora(self) -> PackedLora | None:
        """The pairs in use."""
        return self._running.lora

    def set_rotary(self, rotary: Tensor) -> None:
        """Another table from the next forward on."""
        now, rotary = self._running, rotary.contiguous()
        model = native.Model.from_buffer_copy(now.model)
        model.rotary = rotary.data_ptr()
        self._running = _Running(model, now.layers, rotary, now.lora)

    def set_lora(self, lora: PackedLora) -> None:
        """The pairs of an adapter from the next forward on."""
        now = self._running
        layers = type(now.layers).from_buffer_copy(now.layers)
        for layer, linears in zip(layers, lora.linears, strict=True):
            for field, linear in linears.items():
                setattr(layer, field, linear)
        model = native.Model.from_buffer_copy(now.model)
        model.layers, model.has_adapter = layers, True
        self._running = _Running(model, layers, now.rotary, lora)

    def packed_lora(self, adapter: Adapter, threads: int) -> PackedLora:
        """An adapter in the layout of these weights, for `set_lora`. Any thread may ask."""
        kept: list[Tensor] = []

        def of_layer(index: int) -> dict[str, native.Linear]:
            return {linear.field: _with_lora(linear, adapter, index, kept) for linear in self._linears[index]}

        with ThreadPoolExecutor(max(1, threads)) as pool:
            return PackedLora(list(pool.map(of_layer, range(self._config.num_layers))), kept)

    # Loading

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()

    def _vector(self, name: str) -> int:
        return self._keep(self._checkpoint.tensor(name).float().contiguous())

    def _stored(self, name: str) -> Tensor | Blocks:
        """A weight in the form that is packed: GGUF blocks, a tensor as it is stored (fp32 of other blocks, which no
        16 bits hold), or one of the dtype that was asked for."""
        if self._dtype is None:
            blocks = self._checkpoint.blocks(name)
            return self._checkpoint.tensor(name) if blocks is None else blocks
        tensor = self._checkpoint.tensor(name).to(self._dtype)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self._checkpoint.path}: {name} holds numbers that {self._dtype} does not")
        return tensor

    def _packed(self, parts: Sequence[tuple[str, int, int]]) -> PackedWeight:
        """Weights packed side by side: (name, first group, step of the groups)."""
        stored = [self._stored(name) for name, _, _ in parts]
        kinds = {native.GGUF_BLOCKS[w.kind][1] if isinstance(w, Blocks) else native.DTYPES[w.dtype] for w in stored}
        if len(kinds) > 1:  # stored in different ways: all in fp32
            stored = [self._checkpoint.tensor(name).float() for name, _, _ in parts]
            kinds = {native.F32}
        packed = PackedWeight(kinds.pop(), sum(w.shape[0] for w in stored), stored[0].shape[1])
        for weight, (name, first, step) in zip(stored, parts, strict=True):
            try:
                packed.put(weight, first, step)
            except ValueError as error:
                raise CheckpointError(f"{self._checkpoint.path}: {name}: {error}") from None
            self._checkpoint.forget(name)
        return packed

    @staticmethod
    def table(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """A packed weight as a tensor [n, k], for those who pick rows of it; rounded to a dtype."""
        table = torch.empty(weight.n, weight.k, dtype=dtype)
        for start in range(0, len(table), _ROWS_AT_ONCE):
            part = table[start : start + _ROWS_AT_ONCE]
            part.copy_(weight.rows(torch.arange(start, start + len(part))))
        return table

    def _layer(self, index: int) -> native.Layer:
        config, prefix = self._config, f"model.layers.{index}"
        q, kv = (heads * config.head_dim // _LANES for heads in (config.num_heads, config.num_kv_heads))
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        if config.qk_norm:
            norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        self._linears[index] = [
            self._linear(index, "qkv", [("q_proj", 0, 1), ("k_proj", q, 1), ("v_proj", q + kv, 1)]),
            self._linear(index, "o", [("o_proj", 0, 1)]),
            self._linear(index, "gate_up", [("gate_proj", 0, 2), ("up_proj", 1, 2)]),
            self._linear(index, "down", [("down_proj", 0, 1)]),
        ]
        return native.Layer(
            **{linear.field: linear.struct for linear in self._linears[index]},
            **{field: self._vector(f"{prefix}.{name}.weight") for field, name in norms.items()},
        )

    def _linear(self, index: int, field: str, modules: Sequence[tuple[str, int, int]]) -> _Linear:
        block = BLOCK_OF[modules[0][0]]
        names = [f"model.layers.{index}.{block}.{module}" for module, _, _ in modules]
        packed = self._packed(
            [(f"{name}.weight", first, step) for name, (_, first, step) in zip(names, modules, strict=True)]
        )
        self._kept.append(packed)
        linear = native.Linear(weight=packed.address, kind=packed.kind, n=packed.n, k=packed.k)
        # Which module each group of 16 outputs belongs to, and which 16 of its outputs they are.
        shapes = self._config.tensor_shapes()
        part = torch.empty(packed.n // _LANES, dtype=torch.uint8)
        for i, (name, (_, first, step)) in enumerate(zip(names, modules, strict=True)):
            part[first : first + shapes[f"{name}.weight"][0] // _LANES * step : step] = i
        if self._config.mlp_bias if block == "mlp" else self._config.attention_bias:
            biases = [self._checkpoint.tensor(f"{name}.bias").float().view(-1, _LANES) for name in names]
            linear.bias = self._keep(_in_groups(biases, part))
        return _Linear(field, tuple(module for module, _, _ in modules), linear, part)

    # Running

    def forward(self, x: Tensor, rows: Rows, cache: CpuCache, logits_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and what the LM head made them from [R, H], of the rows of x fp32 [T, H], which is overwritten.

        R: the wanted rows, or all up to query_start_loc[B]; where that is none, a row of zeros.
        Raises ValueError for rows that lie outside of the cache.
        """
        config, (positions, slots, is_mask) = self._config, (rows.positions, rows.slot_mapping, rows.is_mask)
        running = self._running
        query_start_loc = rows.query_start_loc.contiguous()
        wanted = int(query_start_loc[-1]) if logits_rows is None else len(logits_rows)
        make = torch.empty if wanted else torch.zeros
        hidden, logits = (make(max(1, wanted), width) for width in (config.hidden_size, config.vocab_size))
        seq_lens, tree_mask, page_table = rows.seq_lens.contiguous(), rows.tree_mask, rows.page_table
        count, batch = x.shape[0], seq_lens.shape[0]
        for name, given, dtype, size in (
            ("positions", positions, torch.int64, count),
            ("slot_mapping", slots, torch.int64, count),
            ("is_mask", is_mask, torch.bool, count),
            ("page_table", page_table, torch.int32, batch),
            ("seq_lens", seq_lens, torch.int32, batch),
            ("query_start_loc", query_start_loc, torch.int32, batch + 1),
            ("tree_mask", tree_mask, torch.int64, count),
            ("logits_rows", logits_rows, torch.int64, wanted),
        ):
            if given is None:
                continue
            if given.dtype != dtype or (given.stride(-1) != 1 and given.shape[-1] > 1):
                raise TypeError(
                    f"forward: {name} is {given.dtype} with strides {given.stride()}, wanted {dtype} without gaps"
                )
            if given.shape[0] < size:
                raise ValueError(f"forward: {name} has {given.shape[0]} entries, wanted {size}")
        struct = native.Rows(
            positions.data_ptr(),
            slots.data_ptr(),
            is_mask.data_ptr(),
            page_table.data_ptr(),
            seq_lens.data_ptr(),
            query_start_loc.data_ptr(),
            None if tree_mask is None else tree_mask.data_ptr(),
            None if logits_rows is None else logits_rows.data_ptr(),
            x.data_ptr(),
            hidden.data_ptr(),
            logits.data_ptr(),
            page_table.stride(0),
            len(running.rotary),
            count,
            batch,
            wanted,
        )
        fault = self._library.idlm_cpu_forward(
            ctypes.byref(running.model), ctypes.byref(cache.struct), ctypes.byref(struct), torch.get_num_threads()
        )
        if fault is not None:
            raise ValueError(f"forward: {fault.decode()}")
        return logits, hidden


def _with_lora(linear: _Linear, adapter: Adapter, index: int, kept: list[Tensor]) -> native.Linear:
    """The struct of a linear layer with the pairs of an adapter, or without any where it has none for it."""
    struct, part = native.Linear.from_buffer_copy(linear.struct), linear.part
    pairs = [adapter.pair(index, module) for module in linear.modules]
    dtypes = {x.dtype for pair in pairs if pair is not None for x in pair}
    if not dtypes:
        return struct

    def keep(x: Tensor) -> int:
        kept.append(x)
        return x.data_ptr()

    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = dtype if dtype in native.DTYPES else torch.float32
    # Where MASK rows have 8 bits, so has what they alone meet: half the bytes.
    in_bytes = struct.kind in (native.Q4, native.Q8)
    step = 32 if in_bytes else _LANES
    rank = -(-adapter.rank // step) * step
    a = torch.zeros(len(pairs), rank, struct.k, dtype=dtype)
    b = []
    for i, pair in enumerate(pairs):
        width = int((part == i).sum()) * _LANES
        padded = torch.zeros(width, rank, dtype=dtype)
        if pair is not None:
            a[i, : pair[0].shape[0]] = pair[0]
            padded[:, : pair[1].shape[1]] = pair[1]
        b.append(padded.view(-1, _LANES, rank))
    packed_b, kind = _in_groups(b, part), native.DTYPES[dtype]
    if in_bytes:
        a, a_scale = _in_bytes(a)
        packed_b, b_scale = _in_bytes(packed_b)
        struct.lora_a_scale, struct.lora_b_scale, kind = keep(a_scale), keep(b_scale), native.I8
        a = a.view(-1, 2, _LANES, struct.k // 32, 8, 4).permute(0, 3, 1, 4, 2, 5)
        packed_b = packed_b.unflatten(2, (-1, 4))
    else:
        a = a.view(-1, _LANES, struct.k).transpose(1, 2)
    struct.lora_a, struct.lora_b = (keep(_in_room(x)) for x in (a, packed_b.transpose(1, 2)))
    struct.part = keep(part)
    struct.lora_kind, struct.rank, struct.parts = kind, rank, len(pairs)
    struct.scale = adapter.scale
    return struct


def _in_room(x: Tensor) -> Tensor:
    """A copy without gaps where the weights lie."""
    return native.room(x.numel() * x.element_size()).view(x.dtype).view(x.shape).copy_(x)


def _in_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers as int8 and the scale of each row (of the last dimension), fp32."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale.clamp(min=1e-30)).round().to(torch.int8), scale.contiguous()


def _in_groups(parts: Sequence[Tensor], part: Tensor) -> Tensor:
    """Groups of several modules [groups, 16, ...] in the order in which they are packed."""
    out = parts[0].new_empty(len(part), *parts[0].shape[1:])
    for i, x in enumerate(parts):
        out[part == i] = x
    return out
