"""GGUF files: a strict reader of the header, and the mapping to Hugging Face configs, names and row order.

The `gguf` package's reader trusts every count in the file and needs seconds for a vocabulary of 49,152
tokens. A guard in front of it would have to walk the whole header anyway, so this walk *is* the reader: each
count is held against the bytes that are left before anything is allocated. Block layouts and dequantisation
stay with the `gguf` package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
import math
import mmap
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._files import is_there, naming
from .config import MAX_DIMENSION, ModelConfig
from .errors import CheckpointError, short

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_NAME_BYTES = 1024
_MAX_ARRAY_LENGTH = 10**7
_MAX_TENSORS = 10**6
_MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DEQUANTIZE_ELEMENTS = 1 << 22  # per call: `dequantize` holds its output twice


def gguf_module(name: str) -> ModuleType:
    """gguf.<name>. The package is imported where a GGUF is read, and is wanted nowhere else."""
    try:
        return importlib.import_module(f"gguf.{name}")
    except ImportError as error:
        raise CheckpointError(
            "reading a GGUF file, as the default model is one, needs the package gguf: "
            f"pip install 'idlm_kernels[gguf]' ({error})"
        ) from None


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch order, `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """The header of a GGUF file, checked, and its tensors, memory-mapped.

    `fields` maps metadata keys to int, float, bool, str, list[str] or a read-only numpy array; `tensors` maps
    GGUF names to places. Raises CheckpointError for a file that is truncated or lies about any count, size,
    type or offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_there(path):
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        with naming(path):
            self.fields, self.tensors = _HeaderReader(path, self._data).read()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor: F32, F16 and BF16 as they are, quantised ones as fp32. A copy; the rest of the file
        stays cold."""
        place = self.tensors[name]
        raw = np.frombuffer(self._data, dtype=np.uint8, count=place.num_bytes, offset=place.offset)
        if dtype := _FLOATS.get(place.kind.name):
            return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(place.shape)
        dequantize = gguf_module("quants").dequantize
        out = np.empty(place.shape, dtype=np.float32)
        rows = out.reshape(-1, place.shape[-1])
        blocks = raw.reshape(rows.shape[0], -1)
        step = max(1, _DEQUANTIZE_ELEMENTS // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            try:
                with np.errstate(all="ignore"):  # what is not finite is counted and refused by the caller
                    rows[part] = dequantize(blocks[part], place.kind)
            except NotImplementedError:
                raise CheckpointError(f"{self.path}: {name}: type {place.kind.name} cannot be dequantised") from None
        return torch.from_numpy(out)

    def forget(self, name: str) -> None:
        """Let the system take back the memory behind one tensor, which it reads again if need be."""
        place = self.tensors[name]
        first = -(-place.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (place.offset + place.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED, first, last - first)

    def blocks(self, name: str) -> tuple[str, torch.Tensor] | None:
        """The type of a quantised matrix and its rows as they are stored, uint8 [rows, bytes], read-only; None for
        another tensor."""
        place = self.tensors[name]
        if place.kind.name in _FLOATS or len(place.shape) != 2:
            return None
        raw = np.frombuffer(self._data, dtype=np.uint8, count=place.num_bytes, offset=place.offset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no tensors that cannot be written; nobody writes this one
            return place.kind.name, torch.from_numpy(raw).view(place.shape[0], -1)


class _HeaderReader:
    """Walks the header once. Every read is checked against the end of the file first."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.size = path, data, 0, len(data)
        self.constants = gguf_module("constants")

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self.take(4, "magic") != _MAGIC:
            raise self.error("does not start with 'GGUF'")
        version = self.scalar("<I", "version")
        if version & 0xFFFF == 0:
            raise self.error("big-endian GGUF is not supported")
        if version not in _VERSIONS:
            raise self.error(f"version {version} is not supported; supported: {_VERSIONS}")
        tensor_count = self.scalar("<Q", "tensor count")
        field_count = self.scalar("<Q", "metadata count")
        # The shortest entries: a key (8 + 1), a type (4) and a value (1); a name (8 + 1), dims (4 + 8), type
        # and offset (12).
        if field_count > (self.size - self.position) // 14 or tensor_count > (self.size - self.position) // 33:
            raise self.error(f"claims {field_count} metadata entries and {tensor_count} tensors, more than it can hold")
        if tensor_count > _MAX_TENSORS:
            raise self.error(f"claims {tensor_count} tensors, more than {_MAX_TENSORS}")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.string("metadata key", _MAX_NAME_BYTES)
            if key in fields:
                raise self.error(f"metadata key {key!r} occurs twice")
            fields[key] = self.value(self.scalar("<I", f"type of {key!r}"), key)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {short(alignment)}, wanted a power of two from 8")
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        return fields, self.place(entries, alignment)

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            number = self.scalar(_SCALARS[kind], key)
            return bool(number) if kind == _BOOL else number
        if kind == _STRING:
            return self.string(key, self.size)
        if kind == _ARRAY:
            return self.array(key)
        raise self.error(f"{key!r} has the unknown type {kind}")

    def array(self, key: str) -> Any:
        kind, length = self.scalar("<I", f"element type of {key!r}"), self.scalar("<Q", f"length of {key!r}")
        if length > _MAX_ARRAY_LENGTH:
            raise self.error(f"{key!r} claims {length} elements, more than {_MAX_ARRAY_LENGTH}")
        if kind == _STRING:
            if length > (self.size - self.position) // 8:
                raise self.error(f"{key!r} claims {length} strings, more than the file can hold")
            return [self.string(key, self.size) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.error(f"{key!r} is an array of type {kind}, which is nested or unknown")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize, key), dtype=dtype)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string("tensor name", _MAX_NAME_BYTES)
        num_dims = self.scalar("<I", f"dimensions of {name!r}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"tensor {name!r} claims {num_dims} dimensions, wanted 1 to {_MAX_DIMS}")
        # GGUF stores the fastest dimension first.
        shape = tuple(self.scalar("<Q", f"shape of {name!r}") for _ in range(num_dims))[::-1]
        kind = self.scalar("<I", f"type of {name!r}")
        try:
            tensor_type = self.constants.GGMLQuantizationType(kind)
        except ValueError:
            raise self.error(f"tensor {name!r} has the unknown type {kind}") from None
        return name, shape, tensor_type, self.scalar("<Q", f"offset of {name!r}")

    def place(
        self, entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Tensor places from the start of the file: inside it, aligned, not overlapping, whole blocks."""
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.error(f"tensor {name!r} occurs twice")
            block_size, block_bytes = self.constants.GGML_QUANT_SIZES[kind]
            if min(shape) < 1:
                raise self.error(f"tensor {name!r} has the shape {list(shape)}")
            if shape[-1] % block_size:
                raise self.error(
                    f"tensor {name!r}: rows of {shape[-1]} are no whole {kind.name} blocks of {block_size}"
                )
            num_bytes = math.prod(shape) // block_size * block_bytes
            if offset % alignment:
                raise self.error(f"tensor {name!r}: offset {offset} is not a multiple of {alignment}")
            if num_bytes > self.size or data_start + offset + num_bytes > self.size:
                raise self.error(
                    f"tensor {name!r} of {num_bytes} bytes at offset {offset} lies beyond the end of the "
                    "file "
                    f"({self.size} bytes): truncated?"
                )
            tensors[name] = GgufTensor(shape, kind, data_start + offset, num_bytes)
        end, before = 0, ""
        for name, place in sorted(tensors.items(), key=lambda item: item[1].offset):
            if place.offset < end:
                raise self.error(f"tensors {before!r} and {name!r} overlap")
            end, before = place.offset + place.num_bytes, name
        return tensors

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise self.error(
                f"ends inside {what!r}: {count} bytes wanted, {self.size - self.position} left: truncated?"
            )
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def scalar(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str, max_bytes: int) -> str:
        length = self.scalar("<Q", what)
        if length > max_bytes:
            raise self.error(f"{what!r} claims {length} bytes, more than {max_bytes}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what!r} is not UTF-8: {error}") from None

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


# --- from llama.cpp's names and layouts to Hugging Face's -------------------------------------------------

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|bias)")

ROPE_FREQS = "rope_freqs.weight"

# Ends of a turn, a message or a document in the vocabularies of published models, after llama.cpp's list. "</s>" is not
# here: where it is an end, it is the eos key's.
_END_TOKENS = frozenset(
    [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
    ]
)

# The keys of an architecture's block that are read, or that say nothing about the computation. Others are
# refused.
_READ_KEYS = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "vocab_size",
    ]
)


def huggingface_name(gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name that has no
    counterpart."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = _LAYER_PATTERN.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def undo_rotary_permutation(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp interleaves the two rotary halves of each head's q and k rows; this puts them back. [heads *
    head_dim, ...]"""
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model config that a GGUF's metadata and tensor list describe. Raises CheckpointError as ModelConfig
    does."""
    path, fields = file.path, file.fields
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ("llama", "qwen3"):
        raise CheckpointError(
            f"{path}: architecture {short(architecture)} is not supported in GGUF; supported: 'llama', 'qwen3'"
        )
    prefix = f"{architecture}."

    scaling = fields.get(prefix + "rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling != "none":
        raise CheckpointError(f"{path}: {prefix}rope.scaling.type {short(scaling)} is not supported; only 'none' is")
    unknown = sorted(key for key in fields if key.startswith(prefix) and key[len(prefix) :] not in _READ_KEYS)
    if unknown:
        raise CheckpointError(f"{path}: metadata not supported: {', '.join(unknown[:5])}")

    def number(key: str, default: int | float | None = None) -> Any:
        value = fields.get(prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{path}: {prefix}{key} is {short(value)}, wanted a number")
        return value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing or not a matrix")
    num_heads, hidden_size = number("attention.head_count"), number("embedding_length")
    if not isinstance(num_heads, int) or num_heads < 1 or not isinstance(hidden_size, int):
        raise CheckpointError(f"{path}: {num_heads!r} heads over a hidden size of {hidden_size!r}")
    if prefix + "attention.key_length" not in fields and hidden_size % num_heads:
        raise CheckpointError(f"{path}: hidden size {hidden_size} is not a multiple of {num_heads} heads")
    head_dim = number("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise CheckpointError(f"{path}: {prefix}{key} is {number(key)}, wanted the head size {head_dim}")
    factors = None
    if ROPE_FREQS in file.tensors:
        if file.tensors[ROPE_FREQS].kind.name != "F32":
            raise CheckpointError(f"{path}: {ROPE_FREQS} is stored as {file.tensors[ROPE_FREQS].kind.name}, wanted F32")
        if math.prod(file.tensors[ROPE_FREQS].shape) > MAX_DIMENSION:
            raise CheckpointError(f"{path}: {ROPE_FREQS} has the shape {list(file.tensors[ROPE_FREQS].shape)}")
        factors = tuple(file.tensor(ROPE_FREQS).flatten().tolist())
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=number("vocab_size", embedding.shape[0]),
            hidden_size=hidden_size,
            intermediate_size=number("feed_forward_length"),
            num_layers=number("block_count"),
            num_heads=num_heads,
            num_kv_heads=number("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_theta=number("rope.freq_base", 10000.0),
            rope_scaling=None,
            rope_freq_factors=factors,
            max_position_embeddings=number("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            qk_norm=architecture == "qwen3",
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
            mask_token_id=_optional_id(fields, "tokenizer.ggml.mask_token_id"),
            eos_token_ids=eos_ids(fields),
            bos_token_id=_optional_id(fields, "tokenizer.ggml.bos_token_id"),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def eos_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: end of text, of a turn and of a message as far as keys name them, and then the control
    tokens that are known to be ends by their names.

    Converters write one of the keys or two, and a Hugging Face folder lists more ends than that, so the names count
    beside the keys and not only in their absence. llama.cpp does the same. Tokens of another type do not count: a text
    may spell those.
    """
    named = (_optional_id(fields, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    found = [token for token in named if token is not None]
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        control = np.flatnonzero(kinds == gguf_module("constants").TokenType.CONTROL)
        found += [int(i) for i in control if tokens[i] in _END_TOKENS]
    return tuple(dict.fromkeys(found))


def _optional_id(fields: Mapping[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CheckpointError(f"{key} is {short(value)}, wanted a token id")
    return value
