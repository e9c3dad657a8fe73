"""The compiled CPU kernels: finds and loads the library `libidlm_cpu`, mirrors its structs, packs weights.

`make native-cpu` (csrc/build_cpu.py) builds it with any C++17 compiler, in seconds and without nvcc; wheels bring it.
Nothing needs it: without it the `cpu` backend computes with torch's own kernels. IDLM_CPU_NATIVE=0 leaves it out, and
IDLM_CPU_ISA chooses one of the instruction sets that `idlm doctor` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import threading
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parents[1] / "csrc"
LIBRARY = "libidlm_cpu.so"

Q4, Q8, F16, BF16, F32, I8 = range(6)  # kinds of numbers, as in csrc/include/idlm/cpu.h
GGUF_BLOCKS = {"Q4_0": (10, Q4, 18), "Q4_1": (11, Q4, 20), "Q8_0": (12, Q8, 34)}  # source kind, kind, bytes per 32
DTYPES = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32}


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("lora_a_scale", c_void_p),
        ("lora_b_scale", c_void_p),
        ("part", c_void_p),
        ("kind", c_int32),
        ("lora_kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("rank", c_int32),
        ("parts", c_int32),
        ("scale", c_float),
    )


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
        ("rotary", c_void_p),
        ("head", Linear),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("eps", c_float),
        ("has_adapter", c_int32),
        ("int8_activations", c_int32),
    )


class Cache(Structure):
    _fields_ = (("k", c_void_p), ("v", c_void_p), ("num_pages", c_int64), ("page_size", c_int32))


class Rows(Structure):
    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("is_mask", c_void_p),
        ("page_table", c_void_p),
        ("seq_lens", c_void_p),
        ("query_start_loc", c_void_p),
        ("tree_mask", c_void_p),
        ("logits_rows", c_void_p),
        ("x", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("page_table_stride", c_int64),
        ("max_position", c_int64),
        ("rows", c_int32),
        ("batch", c_int32),
        ("num_logits", c_int32),
    )


class State(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("text", "drafts", "lengths", "num_drafts", "draft_source", "finish_reason")),
        *(
            (name, c_void_p)
            for name in ("max_drafts", "length_limits", "error_flags", "stop_ids", "page_table", "seed")
        ),
        *((name, c_int64) for name in ("text_stride", "drafts_stride", "stops_stride", "page_table_stride")),
        *((name, c_int32) for name in ("batch", "max_len", "num_spec_tokens", "num_stops", "max_pages")),
    )


class Plan(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("mask_id", "noise_below")),
        *((name, c_int32) for name in ("page_size", "quadratic", "rows")),
        *((name, c_void_p) for name in ("ids", "is_mask", "positions", "slots", "tree_mask", "seq_lens")),
        ("query_start_loc", c_void_p),
    )


class Commit(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("num_accepted", "tokens", "next_drafts", "next_num_drafts", "outcome")),
        *((name, c_int64) for name in ("tokens_stride", "next_drafts_stride", "outcome_stride")),
        ("acceptance", c_float),
        *((name, c_int32) for name in ("quadratic", "suffix")),
    )


class Decision(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "query_start_loc", "num_drafts", "drafts", "temperature")),
        *((name, c_int64) for name in ("logits_stride", "drafts_stride", "vocabulary", "id_limit", "mask_id")),
        *((name, c_int32) for name in ("rows", "batch", "num_spec_tokens", "quadratic")),
        *((name, c_void_p) for name in ("num_accepted", "tokens", "next_drafts", "next_num_drafts")),
        ("greedy_below", c_float),
    )


class Drawing(Structure):
    _fields_ = (
        ("logits", c_void_p),
        *((name, c_int64) for name in ("n", "mask_id", "seed", "position")),
        *((name, c_float) for name in ("temperature", "top_p", "min_p")),
        *((name, c_int32) for name in ("top_k", "stream")),
    )


class Move(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("num_accepted", "tokens", "next_drafts", "next_num_drafts")),
        *((name, c_void_p) for name in ("stop_ids", "length_limits")),
        *((name, c_int64) for name in ("tokens_stride", "next_drafts_stride", "stops_stride", "text_stride")),
        ("drafts_stride", c_int64),
        *((name, c_int32) for name in ("batch", "width", "num_spec_tokens", "num_stops")),
        *((name, c_void_p) for name in ("text", "drafts", "lengths", "num_drafts", "finish_reason", "emitted")),
    )


class Reranking(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "hidden", "first_mask", "previous", "drafts", "num_drafts")),
        *((name, c_void_p) for name in ("embedding", "head", "from_hidden", "from_previous", "from_state", "to_query")),
        *((name, c_int64) for name in ("logits_stride", "vocabulary", "id_limit", "mask_id")),
        *(
            (name, c_int32)
            for name in ("batch", "num_spec_tokens", "rows", "width", "state", "embedding_kind", "head_kind")
        ),
        ("is_packed", c_int32),
        *((name, c_void_p) for name in ("out", "temperature", "top_p", "min_p", "top_k", "positions", "seed")),
        ("greedy_below", c_float),
    )


def _abi() -> int:
    sizes = zip(
        (Linear, Layer, Model, Cache, Rows, Plan, Decision, Reranking, Move, State, Commit, Drawing),
        (1, 1000, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41),
        strict=True,
    )
    return sum(factor * ctypes.sizeof(struct) for struct, factor in sizes)


def source_hash() -> str | None:
    """What the library must have been built from; None where the sources are not at hand (an installed package)."""
    files = sorted([*_SOURCES.glob("cpu/*.h"), *_SOURCES.glob("cpu/*.cpp"), *_SOURCES.glob("include/idlm/cpu.h")])
    if not files:
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or the sentence that says why there is none."""
    if os.environ.get("IDLM_CPU_NATIVE") == "0":
        return "switched off by IDLM_CPU_NATIVE=0"
    path = _HERE / LIBRARY
    how = "run `make native-cpu`" if _SOURCES.is_dir() else "install idlm_kernels where there is a C++ compiler"
    if not path.is_file():
        return f"not built; {how}"
    try:
        library = ctypes.CDLL(str(path))
        library.idlm_cpu_source_hash.restype = c_char_p
        built_from = library.idlm_cpu_source_hash().decode()
    except (OSError, AttributeError) as error:
        return f"{path} does not load: {error}"
    wanted = source_hash()
    if wanted is not None and wanted != built_from:
        return f"built from other sources than those in csrc/cpu; {how}"
    if library.idlm_cpu_abi() != _abi():
        return f"{path} has structs of other sizes; {how}"
    library.idlm_cpu_packed_bytes.restype = c_int64
    library.idlm_cpu_packed_bytes.argtypes = (c_int32, c_int64, c_int64)
    library.idlm_cpu_pack.argtypes = (
        *(c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int64),
        *(c_void_p, c_int64, c_int64),
    )
    library.idlm_cpu_unpack_rows.argtypes = (c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p)
    library.idlm_cpu_unpack_rows.restype = None
    library.idlm_cpu_forward.argtypes = (c_void_p, c_void_p, c_void_p, c_int32)
    library.idlm_cpu_forward.restype = c_char_p
    for name in ("idlm_cpu_plan_rows", "idlm_cpu_commit_step"):
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p, c_void_p), None
    library.idlm_cpu_advance.argtypes = (c_void_p,)
    library.idlm_cpu_advance.restype = None
    library.idlm_cpu_verify_greedy.argtypes = (c_void_p,)
    library.idlm_cpu_draw.argtypes, library.idlm_cpu_draw.restype = (c_void_p,), c_int64
    library.idlm_cpu_rerank.argtypes = (c_void_p, c_int32)
    library.idlm_cpu_rerank.restype = c_char_p
    library.idlm_cpu_isa.restype = c_char_p
    library.idlm_cpu_use_isa.argtypes = (c_char_p,)
    if (isa := os.environ.get("IDLM_CPU_ISA")) and library.idlm_cpu_use_isa(isa.encode()):
        raise ValueError(f"IDLM_CPU_ISA is {isa!r}, wanted one of {', '.join(_sets(library))}")
    return library


def _sets(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while name := library.idlm_cpu_isa(len(names)):
        names.append(name.decode())
    return names


def library() -> ctypes.CDLL | None:
    """The library, or None; `status` says why."""
    found = _load()
    return None if isinstance(found, str) else found


def status() -> str:
    """One sentence: the instruction set in use and the others at hand, or why there is no library."""
    found = _load()
    if isinstance(found, str):
        return found
    sets = _sets(found)
    chosen = os.environ.get("IDLM_CPU_ISA") or sets[0]
    others = [name for name in sets if name != chosen]
    return f"{chosen}{' (at hand: ' + ', '.join(others) + ')' if others else ''}"


_HUGE = 2 << 20
_CHUNK = 8 * _HUGE
_room_lock = threading.Lock()
_chunk, _chunk_used = torch.empty(0, dtype=torch.uint8), 0


def room(size: int) -> Tensor:
    """Zeros uint8 [size] on a multiple of 64 bytes, for what every forward reads: in huge pages where there are any.

    A model's weights are some 25,000 pages of 4 KB, more than a core keeps the places of: on a virtual machine a
    forward then waits for them as long as for the weights. Weights lie side by side in chunks, since few are as large
    as a huge page; a chunk is freed with the last tensor that lies in it.
    """
    global _chunk, _chunk_used
    with _room_lock:
        start = -(-_chunk_used // 64) * 64
        if start + size > len(_chunk):
            if size > _CHUNK // 2:
                return _zeros(size)
            _chunk, start = _zeros(_CHUNK), 0
        _chunk_used = start + size
        return _chunk[start : start + size]


def _zeros(size: int) -> Tensor:
    """Zeros uint8 [size] of their own, from the start of a huge page on; memory is taken as it is written."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, size + _HUGE, **private)
    with contextlib.suppress(AttributeError, OSError):  # other systems, and those without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size]


@dataclass(frozen=True)
class Blocks:
    """A weight [n, k] as a GGUF stores it: kind Q4_0, Q4_1 or Q8_0; data uint8 [n, bytes of a row]; order int32 [n] or
    None: the row of data that is row i of the weight."""

    kind: str
    data: Tensor
    order: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1] // GGUF_BLOCKS[self.kind][2] * 32


class PackedWeight:
    """A weight [n, k] in groups of 16 outputs, for the library's kernels; filled by `put`."""

    def __init__(self, kind: int, n: int, k: int):
        found = library()
        assert found is not None
        self.kind, self.n, self.k, self._library = kind, n, k, found
        self.data = room(found.idlm_cpu_packed_bytes(kind, n, k))  # zeros: what pads the last group
        self.address = self.data.data_ptr()

    def put(self, weight: Tensor | Blocks, first_group: int = 0, step: int = 1) -> None:
        """Pack a weight as the groups first_group, first_group + step, .. ValueError where a scale is not finite."""
        if isinstance(weight, Blocks):
            kind, data, order = GGUF_BLOCKS[weight.kind][0], weight.data, weight.order
        else:
            kind, data, order = DTYPES[weight.dtype], weight.contiguous(), None
        n, k = weight.shape
        fault = self._library.idlm_cpu_pack(
            kind,
            data.data_ptr(),
            data.stride(0) * data.element_size(),
            None if order is None else order.data_ptr(),
            n,
            k,
            self.address,
            first_group,
            step,
        )
        if fault:
            raise ValueError("a block's scale is not finite")

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, fp32 [len(ids), k], of ids int64; zeros for an id outside 0 .. n - 1."""
        if ids.dtype != torch.int64:
            raise TypeError(f"ids are {ids.dtype}, wanted torch.int64")
        ids = ids.contiguous()
        out = torch.empty(len(ids), self.k)
        self._library.idlm_cpu_unpack_rows(
            self.kind, self.address, self.n, self.k, ids.data_ptr(), len(ids), out.data_ptr()
        )
        return out
