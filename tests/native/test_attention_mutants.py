"""Planted faults in attention: each must be caught by the checks that the kernel passes.

A mutant is the bf16 kernel for head_dim 128, compiled (PTX only) from a changed file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels import _semaphores
from idlm_kernels.native import attention
from tests.native.attention_support import (
    check_chain,
    check_columns,
    check_edges,
    check_max_query_len,
    check_order,
    check_row_bits,
    check_scales,
    check_spoilt,
    check_tail,
    check_tree,
    check_values,
    check_window,
)
from tests.native.mutants import mutant
from tests.native.support import Toolkit

SOURCE = """#include "attention/kernel.cuh"
namespace idlm::attention {
Kernel kernel_bf16(int32_t) { return attention_kernel<__nv_bfloat16, 128>; }
int32_t shared_bytes(int32_t head_dim) { return bytes_of(head_dim); }
}
"""

Check = Callable[[ModuleType], None]
# Three faults are missing, since the emulator does not show them: q without its fence, the next unit's q over an output
# that is still read, and parts that are joined while the last is on its way.
MUTANTS: dict[str, tuple[Check, str, str, str]] = {
    "causal edge off by one": (
        check_values,
        "softmax.cuh",
        "bits = below(step + i + 1);",
        "bits = below(step + i);",
    ),
    "the slot of the next row is seen": (
        check_row_bits,
        "softmax.cuh",
        "bits = below(step + i + 1);",
        "bits = below(step + i + 2);",
    ),
    "window edge off by one": (
        check_window,
        "softmax.cuh",
        "below(step + i - p.window)",
        "below(step + i + 1 - p.window)",
    ),
    "a tile is whole though its window begins in it": (
        check_window,
        "schedule.cuh",
        "first_whole = (Request::lowest(p, r.first + last_row) + kTileSlots - 1) / kTileSlots;",
        "first_whole = 0;",
    ),
    "tail bit of the neighbour": (check_tail, "softmax.cuh", "tail << step :", "tail << step << 1 :"),
    "a tree mask hides nothing from a tile": (
        check_tail,
        "schedule.cuh",
        "end_whole = min(p.tree_mask != nullptr ? r.first :",
        "end_whole = min(p.tree_mask != nullptr ? r.length :",
    ),
    "sum not rescaled": (check_values, "kernel.cuh", "t[h] = __fmaf_rn(t[h], share[h], sum);", "t[h] += sum;"),
    "o not rescaled": (check_values, "kernel.cuh", "o[panel][e] *= share[e / 2 % 2];", "o[panel][e] *= 1.0f;"),
    "a join forgets a rescaling": (
        check_tree,
        "softmax.cuh",
        "__fmaf_rn(x, earlier, __fmul_rn(y, later))",
        "__fmaf_rn(x, earlier, y)",
    ),
    "leaves begin where the row's window does": (
        check_row_bits,
        "kernel.cuh",
        "const bool leaf_ends = tile % kLeafTiles == kLeafTiles - 1;",
        "const bool leaf_ends = (tile - x.first_tile) % kLeafTiles == kLeafTiles - 1;",
    ),
    "the tree is a chain": (
        check_tree,
        "kernel.cuh",
        "if (!last) push(super ? S::kTreeLevels : leaf & 1);",
        "if (!last) push(2);",
    ),
    "the last super is not joined": (
        check_tree,
        "kernel.cuh",
        "if (super) pop(S::kTreeLevels);",
        "if (super && !last) pop(S::kTreeLevels);",
    ),
    "parts are joined in another order": (
        check_tree,
        "combine.cuh",
        "nodes[i] = Node::joined(nodes[i], nodes[i + step]);",
        "nodes[0] = Node::joined(nodes[0], nodes[i + step]);",
    ),
    "nobody joins the parts": (check_values, "kernel.cuh", "== u.parts - 1;", "== u.parts;"),
    "the counter is not set back": (check_values, "kernel.cuh", "if (last) *word = 0;", ""),
    "a part is left out": (
        check_edges,
        "combine.cuh",
        "part < first || part >= end)",
        "part < first || part + 1 >= end)",
    ),
    "a V that is not finite is multiplied": (
        check_spoilt,
        "kernel.cuh",
        "if (x.whole(tile)) return;",
        "if (p.batch >= 0) return;",
    ),
    "a V that is not finite reaches every row": (
        check_spoilt,
        "kernel.cuh",
        "if (seen[h] && !isfinite(v))",
        "if (!isfinite(v))",
    ),
    "an Inf that weighs nothing is added as it is": (
        check_spoilt,
        "kernel.cuh",
        "weighs[h] ? v : __int_as_float(0x7FC00000)",
        "v",
    ),
    "the last padding row is left as it was": (
        check_values,
        "combine.cuh",
        "zero(p.query_start_loc[p.batch], p.num_rows);",
        "zero(p.query_start_loc[p.batch], p.num_rows - 1);",
    ),
    "rows beyond max_query_len are left as they were": (
        check_max_query_len,
        "combine.cuh",
        "end - start > p.max_query_len);",
        "end - start > p.max_query_len + 100);",
    ),
    "page table by physical page": (
        check_values,
        "copy.cuh",
        "none ? -1 : min(max(table[slot / p.page_size], 0)",
        "none ? -1 : min(max(slot / p.page_size, 0)",
    ),
    "head of the wrong group": (
        check_values,
        "softmax.cuh",
        "head = u.kv_head * p.group + static_cast<int32_t>(packed_row % p.group);",
        "head = u.kv_head + static_cast<int32_t>(packed_row % p.group) * p.num_kv_heads;",
    ),
    "columns behind those of a head are read": (
        check_columns,
        "copy.cuh",
        "filled_up = piece * 8 >= p.head_dim;",
        "filled_up = false;",
    ),
    "columns behind those of a head are written": (
        check_columns,
        "kernel.cuh",
        "if (which.exists && piece * 8 < p.head_dim)\n        store_piece",
        "if (which.exists)\n        store_piece",
    ),
    "parts of heads overlap": (
        check_columns,
        "kernel.cuh",
        "if (panel * 64 + 8 * j < p.head_dim)",
        "if (p.head_dim > 0)",
    ),
    "all heads have the scale of the first": (
        check_scales,
        "softmax.cuh",
        "scales[kv_head * stride]",
        "scales[0 * kv_head * stride]",
    ),
    "scale of V forgotten": (check_scales, "softmax.cuh", "factor = __fdiv_rn(v_scale,", "factor = __fdiv_rn(1.0f,"),
    "units of a tile begin half a leaf late": (
        check_edges,
        "schedule.cuh",
        "begin = static_cast<int32_t>(max(int64_t{low}, first_slot));",
        "begin = static_cast<int32_t>(max(int64_t{low}, first_slot + (first_slot > 0 ? 128 : 0)));",
    ),
    "a block is filled while it is read": (
        check_order,
        "copy.cuh",
        "int32_t tile) {\n      barrier_wait(ring.empty(), ring.parity ^ 1);\n",
        "int32_t tile) {\n",
    ),
    "V is read before it is there": (
        check_order,
        "kernel.cuh",
        "    barrier_wait(ring.full(), ring.parity);\n    fence_async_shared();\n    if (x.whole",
        "    fence_async_shared();\n    if (x.whole",
    ),
    "the tile is joined before all threads know": (
        check_order,
        "kernel.cuh",
        "    group_sync();\n    return sBoard->last != 0;",
        "    return sBoard->last != 0;",
    ),
    "q is read before it is written": (check_chain, "kernel.cuh", "  wait_for_previous_kernel();\n", ""),
}

# The others take as long, and show what many tests see.
FIRST = {
    "the slot of the next row is seen",
    "a tree mask hides nothing from a tile",
    "leaves begin where the row's window does",
    "the tree is a chain",
    "the counter is not set back",
    "a V that is not finite is multiplied",
    "a V that is not finite reaches every row",
}


@pytest.fixture
def fresh_flags(monkeypatch: pytest.MonkeyPatch, softgpu: ModuleType) -> Iterator[None]:
    """Flags of its own, and a short patience with CTAs that wait for one another."""
    monkeypatch.setattr(_semaphores, "_words", {})
    with softgpu.configured(livelock=200_000):
        yield


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize("check", [check_values, check_spoilt, check_order, check_chain])
def test_the_kernel_passes(check: Check, module: ModuleType, softgpu: ModuleType) -> None:
    check(softgpu)


@pytest.mark.usefixtures("clean_runtime", "fresh_flags")
@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m not in FIRST)) for m in MUTANTS])
def test_mutants_are_caught(
    name: str,
    module: ModuleType,
    softgpu: ModuleType,
    toolkit: Toolkit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check, file, old, new = MUTANTS[name]
    changed = mutant(f"attention/{file}", old, new, SOURCE, softgpu, toolkit, tmp_path)
    monkeypatch.setattr(attention, "load", lambda: changed)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check(softgpu)
