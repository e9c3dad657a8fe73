"""Small problems by which a kernel shows on the device at hand that it is right: what `auto` asks of a device backend.

Each check runs one op of a backend and compares results and written arguments with `python_ref`: floats with its fp64
results, within twice the error that PyTorch makes in the same dtype; ids, counts and flags exactly. Where decoding
rests on bits (design section 4) bits are compared too: a row alone and among others, in a prefill and in a decode step,
with another page size, beside an adapter full of NaN. Inputs have fixed seeds, and no sampled id is a near-tie.

Passing is not the test suite: a few shapes, bf16 alone, no schedule but the device's own. It keeps a kernel that is
miscompiled, or that this device does not take, out of `auto`. To add an op, write a function like those below and enter
it in `CHECKS`; until then `auto` takes the op from no device backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import python_ref
from python_ref.contract import GREEDY_BELOW, QState
from python_ref.sampling import law, sanitise, scale_by_temperature

Arguments = dict[str, Any]
Case = tuple[ModuleType, torch.device]

CPU = torch.device("cpu")

# Ops whose promises to each other hold within one backend: a prepared weight, the bits of rows without an adapter and
# of the activation; the noise and the cuts of a row. `auto` takes all of a group from a backend, as far as it has them,
# or none.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("prepare_weight", "linear", "gated_lora_linear", "linear_silu_and_mul", "silu_and_mul"),
    ("sample_rows", "verify_accept"),
)


class _Wrong(Exception):
    """A result that is not the contract's; the message says which."""


def self_check(module: ModuleType, op: str, device: torch.device) -> str | None:
    """Why `op` of a backend's module is not to be trusted on this device; None if it passes. Never raises."""
    if op not in CHECKS:
        return "not checked: there is no self-check for it yet"
    # In a thread of its own: the caller's modes, autocast, default device and CUDA stream end at its thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_outcome, module, op, device).result()


def _outcome(module: ModuleType, op: str, device: torch.device) -> str | None:
    try:
        if device.type != "cuda":
            CHECKS[op]((module, device))
        else:
            with torch.cuda.device(device):
                CHECKS[op]((module, device))
    except _Wrong as wrong:
        return str(wrong)
    except Exception as error:  # whatever a compiler, a driver or a kernel may raise
        reason = " ".join(f"it raised {type(error).__name__}: {error}".split())[:300]
        return reason + _aftermath(device)
    return None


def _aftermath(device: torch.device) -> str:
    """What an exception left behind: some CUDA errors stay until the process ends."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:  # the error once more
            return "; the error stays with this process, start it again with IDLM_BACKEND=torch"
    return ""


# Running and judging


def _random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random, dtype=torch.float32) * scale).to(dtype)


def _fp32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with all tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, QState):
        return QState(change(value.logits), change(value.cut), change(value.log_norm))
    if isinstance(value, tuple):
        return tuple(_map(change, x) for x in value)
    return value


def _call(module: ModuleType, op: str, arguments: Arguments, device: torch.device) -> tuple[Any, Arguments]:
    """The result, and the arguments as the call leaves them, both on the CPU. `arguments` stay as they are."""
    moved = {name: _map(lambda x: x.to(device, copy=True), value) for name, value in arguments.items()}
    # What a backend lacks the references compute.
    result = getattr(module, op, getattr(python_ref, op))(**moved)
    return _map(Tensor.cpu, result), {name: _map(Tensor.cpu, value) for name, value in moved.items()}


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _compared(case: Case, op: str, arguments: Arguments) -> Any:
    """The result of an op, once it and every tensor argument that the call may have written are right."""
    module, device = case
    widened = {name: _map(_widened, value) for name, value in arguments.items()}
    got, left = _call(module, op, arguments, device)
    peer, peer_left = _call(python_ref, op, arguments, CPU)
    exact, exact_left = _call(python_ref, op, widened, CPU)
    results = [x if isinstance(x, tuple) else (x,) for x in (got, peer, exact)]
    for x, y, z in zip(*results, strict=True):
        _judge("the result", x, y, z)
    for name, x in left.items():
        if isinstance(x, Tensor):
            _judge(name, x, peer_left[name], exact_left[name])
    if left.get("q_state") is not None:
        _judge_laws(left, exact_left, got[3] if op == "verify_accept" else left["num_drafts"])
    return got


def _judge(what: str, got: Tensor, peer: Tensor, exact: Tensor) -> None:
    """`peer`: the same computation by PyTorch in the same dtype."""
    if got.dtype != peer.dtype or got.shape != peer.shape:
        raise _Wrong(f"{what} is {got.dtype} {list(got.shape)}, wanted {peer.dtype} {list(peer.shape)}")
    if not got.is_floating_point():
        if not torch.equal(got, exact):
            raise _Wrong(f"{what} is {_shown(got, got != exact)}, wanted {_shown(exact, got != exact)}")
        return
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(pattern(got), pattern(peer)):
            raise _Wrong(f"{what} has other {pattern.__name__[2:]} entries than the reference")
    finite = torch.isfinite(exact) & torch.isfinite(peer)
    if not finite.any():
        return
    error, allowed = ((x.double() - exact)[finite].abs().max() for x in (got, peer))
    # Where the peer happens to be exact one rounding of the largest value is granted, and to fp32 what the approximate
    # exponentials and logarithms of a GPU cost.
    granted = max(torch.finfo(got.dtype).eps, 2.0**-16) * exact[finite].abs().max()
    allowed = torch.maximum(2 * allowed, granted)
    if error > allowed:
        raise _Wrong(f"{what} is off by {error:.3g} from the fp64 result, allowed are {allowed:.3g}")


def _shown(x: Tensor, where: Tensor) -> str:
    return ", ".join(str(v) for v in x[where][:4].tolist())


def _judge_laws(left: Arguments, exact_left: Arguments, next_num_drafts: Tensor) -> None:
    """The laws that `rejection` stores for its next drafts, as probabilities: how ruled out ids are stored is free."""
    laws = []
    for arguments in (left, exact_left):
        q, temperature = arguments["q_state"], arguments["temperature"].double()
        z = sanitise(q.logits.double(), arguments["id_limit"], arguments["mask_id"])[0]
        z = scale_by_temperature(z, temperature.unsqueeze(1))
        # A cut is rounded to fp32: what it is to keep lies at least that near.
        cut = q.cut.double() - 1e-6 * (1 + q.cut.double().abs())
        laws.append(law(z, cut, q.log_norm.double(), (temperature < GREEDY_BELOW).unsqueeze(1)))
    difference = (laws[0] - laws[1])[next_num_drafts > 0].abs().max()
    if not difference < 1e-4:
        raise _Wrong(f"a law of a next draft is off by a probability of {difference:.3g}")


def _same_bits(a: Tensor, b: Tensor, promise: str) -> None:
    if a.shape != b.shape or not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        raise _Wrong(f"bits differ: {promise}")


def _same_alone(case: Case, op: str, arguments: Arguments, per_row: Sequence[str], whole: Tensor, row: int) -> None:
    """A row of the result again, from a call with that row alone."""
    alone = arguments | {name: arguments[name][row : row + 1] for name in per_row}
    _same_bits(_call(case[0], op, alone, case[1])[0], whole[row : row + 1], "a row alone and among others")


# Linear layers


def _linear(case: Case) -> None:
    """Odd sizes: a prefill and steps of 1 and 7 rows, of which each fills the machine in its way; then an LM head."""
    arguments = {
        "x": _random(1, 130, 776),
        "weight": _random(2, 6404, 776, scale=0.04),
        "bias": _random(3, 6404),
    }
    whole = _compared(case, "linear", arguments)
    for rows in (1, 7):
        few = _call(case[0], "linear", arguments | {"x": arguments["x"][:rows]}, case[1])[0]
        _same_bits(few, whole[:rows], f"{rows} rows alone and among 130")
    head = {"x": _random(4, 5, 136), "weight": _random(5, 16390, 136, scale=0.1)}
    _same_alone(case, "linear", head, ("x",), _compared(case, "linear", head), 3)


def _prepare_weight(case: Case) -> None:
    """A prepared weight looks like the plain one and gives the result of it."""
    module, device = case
    x, weight = _random(1, 5, 584).to(device), _random(2, 100, 584, scale=0.04)
    prepared = getattr(module, "prepare_weight", python_ref.prepare_weight)(weight.to(device))
    if (prepared.shape, prepared.dtype, prepared.device.type) != (weight.shape, weight.dtype, device.type):
        raise _Wrong("a prepared weight has another shape, dtype or device")
    got = getattr(module, "linear", python_ref.linear)(x, prepared).cpu()
    x = x.cpu()
    exact = python_ref.linear(x.double(), weight.double())
    _judge("linear of a prepared weight", got, python_ref.linear(x, weight), exact)


def _adapter() -> Arguments:
    """Three slices of unequal widths, rank 24; rows with and without the adapter side by side."""
    return {
        "x": _random(1, 7, 584),
        "weight": _random(2, 100, 584, scale=0.04),
        "bias": _random(3, 100),
        "lora_a": _random(4, 72, 584, scale=0.04),
        "lora_b": _random(5, 100, 24, scale=0.2),
        "gate": torch.tensor([False, True, True, False, True, False, False]),
        "scale": 0.7,
        "slices": [52, 30, 18],
    }


def _gated_lora_linear(case: Case) -> None:
    arguments = _adapter()
    plain = {name: arguments[name] for name in ("x", "weight", "bias")}
    clean = ~arguments["gate"]
    base = _call(case[0], "linear", plain, case[1])[0][clean]
    got = _compared(case, "gated_lora_linear", arguments)
    _same_bits(got[clean], base, "a row without the adapter and the same row of linear")
    arguments |= {name: torch.full_like(arguments[name], torch.nan) for name in ("lora_a", "lora_b")}
    got = _call(case[0], "gated_lora_linear", arguments, case[1])[0]
    _same_bits(got[clean], base, "a row without the adapter beside an adapter of NaN")


def _linear_silu_and_mul(case: Case) -> None:
    arguments = _adapter()
    plain = {name: arguments[name] for name in ("x", "weight", "bias")}
    for given, layer in ((plain, "linear"), (arguments, "gated_lora_linear")):
        got = _compared(case, "linear_silu_and_mul", given)
        unfused = {"x": _call(case[0], layer, given, case[1])[0]}
        apart = _call(case[0], "silu_and_mul", unfused, case[1])[0]
        _same_bits(got, apart, f"linear_silu_and_mul and silu_and_mul of {layer}")


# Attention


def _attention(seed: int, lengths: Sequence[int], rows: Sequence[int], heads: tuple[int, int, int]) -> Arguments:
    """Requests of given lengths and rows over pages of 16 slots, and a padding row. heads: Hq, Hkv, D."""
    num_heads, num_kv_heads, head_dim = heads
    shape = (len(lengths), max(lengths), num_kv_heads, head_dim)
    ends = [sum(rows[: i + 1]) for i in range(len(rows))]
    return {
        "q": _random(seed, ends[-1] + 1, num_heads, head_dim),
        "seq_lens": _int32(*lengths),
        "query_start_loc": _int32(0, *ends),
        "max_query_len": max(rows),
        **_paged(_random(seed + 1, *shape), _random(seed + 2, *shape), lengths, 16),
    }


def _paged(k: Tensor, v: Tensor, lengths: Sequence[int], page_size: int) -> Arguments:
    """Caches with k, v [B, slots, Hkv, D] on pages in random order; whatever lies beyond a length is NaN."""
    batch, num_slots = k.shape[:2]
    max_pages = -(-num_slots // page_size)
    order = torch.randperm(batch * max_pages + 1, generator=torch.Generator().manual_seed(page_size))
    page_table = order[: batch * max_pages].view(batch, max_pages).to(torch.int32)
    caches = {}
    for name, content in (("k_cache", k), ("v_cache", v)):
        cache = content.new_full((len(order), page_size, *content.shape[2:]), torch.nan)
        for b, length in enumerate(lengths):
            s = torch.arange(length)
            cache[page_table[b, s // page_size].long(), s % page_size] = content[b, :length]
        caches[name] = cache
    return {**caches, "page_table": page_table}


def _strided_attention(case: Case) -> None:
    module, device = case
    # A chain: a context of more than one chunk, a short one, a request that is absent.
    chain = _attention(10, (300, 45, 0), (7, 4, 0), (8, 2, 128))
    got = _compared(case, "strided_attention", chain)
    causal = torch.tensor([(2 << i) - 1 for i in (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0)])
    tail = _call(module, "strided_attention", chain | {"tail_mask": causal}, device)[0]
    _same_bits(tail, got, "a chain with a tail mask and without")
    # The first row of request 0 as AR sees it: one row, one request, pages of another size.
    k, v = (chain[name][chain["page_table"][0].long()].flatten(0, 1)[None, :294] for name in ("k_cache", "v_cache"))
    alone = {"q": chain["q"][:1], "seq_lens": _int32(294), "query_start_loc": _int32(0, 1), "max_query_len": 1}
    first = _call(module, "strided_attention", alone | _paged(k, v, (294,), 24), device)[0]
    _same_bits(first, got[:1], "a row alone on pages of 24 slots and among others on pages of 16")
    # A tree of drafts: every row sees itself and some of the rows before it.
    tree = _attention(20, (70, 290, 0), (9, 6, 0), (8, 2, 128))
    earlier = torch.randint(0, 1 << 9, (16,), generator=torch.Generator().manual_seed(20))
    own = torch.tensor([1 << i for i in (*range(9), *range(6), 0)])
    tree |= {"tail_mask": earlier & (own - 1) | own, "lse": torch.zeros(16, 8, dtype=torch.float32)}
    tree |= {"k_scale": _fp32(0.7)[0], "v_scale": _fp32(1.3)[0]}
    _compared(case, "strided_attention", tree)
    _compared(case, "strided_attention", chain | {"window": 20})
    # A prefill long enough for tiles of its own, and its last row as a step of one row.
    prefill = _attention(30, (290,), (290,), (32, 8, 128))
    got = _compared(case, "strided_attention", prefill)
    alone = {"q": prefill["q"][289:290], "query_start_loc": _int32(0, 1), "max_query_len": 1}
    last = _call(module, "strided_attention", prefill | alone, device)[0]
    _same_bits(last, got[289:290], "the last row of a prefill and the same row alone")
    # The heads of a small Llama.
    _compared(case, "strided_attention", _attention(40, (300, 20), (4, 5), (9, 3, 64)))


# Rows


def _rms_norm(case: Case) -> None:
    arguments: Arguments = {"x": _random(1, 5, 1000), "weight": _random(2, 1000), "eps": 0.3}
    _compared(case, "rms_norm", arguments)
    arguments["residual"] = _random(3, 5, 1000)
    got = _compared(case, "rms_norm", arguments)
    _same_alone(case, "rms_norm", arguments, ("x", "residual"), got, 3)


def _silu_and_mul(case: Case) -> None:
    arguments = {"x": _random(1, 5, 600, scale=3.0)}
    got = _compared(case, "silu_and_mul", arguments)
    _same_alone(case, "silu_and_mul", arguments, ("x",), got, 3)


def _embed(case: Case) -> None:
    """Ids out of range, and MASK rows with and without a vector of their own."""
    arguments = {"ids": torch.tensor([4, 0, -1, 9, 10]), "weight": _random(1, 10, 600)}
    arguments["is_mask"] = torch.tensor([False, True, False, False, True])
    _compared(case, "embed", arguments)
    arguments |= {"mask_embedding": _random(2, 600), "is_mask": _int32(0, 2, 0, 0, 1)}
    _compared(case, "embed", arguments)


def _qk_norm_rope_append(case: Case) -> None:
    """Positions other than slots, a row that is not written; with norms as Qwen3 and without as Llama has it."""
    inv_freq = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    arguments: Arguments = {
        "qkv": _random(1, 5, 12 * 128),
        "positions": torch.tensor([40, 41, 41, 42, 3]),
        "rotary": python_ref.rotary_table(inv_freq.float(), 64),
        "slot_mapping": torch.tensor([20, 21, 22, 7, -1]),
        "k_cache": _random(2, 5, 6, 2, 128),
        "v_cache": _random(3, 5, 6, 2, 128),
    }
    _compared(case, "qk_norm_rope_append", arguments)
    arguments |= {"q_weight": _random(4, 128), "k_weight": _random(5, 128), "eps": 0.3}
    got = _compared(case, "qk_norm_rope_append", arguments)
    per_row = ("qkv", "positions", "slot_mapping")
    _same_alone(case, "qk_norm_rope_append", arguments, per_row, got, 2)


# Sampling

VOCAB, ID_LIMIT, MASK_ID = 5003, 4990, 7


def _parameters(count: int) -> Arguments:
    """Greedy, plain and every truncation, by turns."""
    kinds = torch.arange(count) % 6
    return {
        "temperature": _fp32(1.0, 0.0, 0.7, 1.3, 0.9, 0.8)[kinds],
        "top_k": _int32(0, 0, 5, 0, 0, 50)[kinds],
        "top_p": _fp32(1.0, 1.0, 1.0, 0.9, 1.0, 0.6)[kinds],
        "min_p": _fp32(0.0, 0.0, 0.0, 0.0, 0.1, 0.02)[kinds],
        "seed": torch.arange(count) * 0x1234_5678_9ABC - 3,
        "id_limit": ID_LIMIT,
        "mask_id": MASK_ID,
    }


def _sample_rows(case: Case) -> None:
    """Rows of every kind, ties, and every fault: NaN, +inf, nothing finite. What may not be sampled is the largest."""
    logits = _random(1, 14, VOCAB, scale=3.0)
    logits[:, MASK_ID] = logits[:, ID_LIMIT] = 100.0
    logits[1, [30, 31, 4500]] = 50.0
    logits[11, 5], logits[12, 70] = torch.nan, torch.inf
    logits[13] = -torch.inf
    arguments = {"logits": logits, "positions": torch.arange(14) * 331, **_parameters(14)}
    arguments["status"] = torch.zeros(14, dtype=torch.int32)
    got = _compared(case, "sample_rows", arguments)
    per_row = ("logits", "positions", "temperature", "top_k", "top_p", "min_p", "seed", "status")
    _same_alone(case, "sample_rows", arguments, per_row, got, 3)
    # A row without a finite logit takes the lowest id that is not MASK.
    empty = {name: arguments[name][13:] for name in per_row}
    _compared(case, "sample_rows", arguments | empty | {"mask_id": 0})


def _step(branched: bool, mode: str) -> Arguments:
    """The second step of six requests, K = 3; the last two have no drafts: one has no MASK rows, one no rows at all.

    The logits are near those that the drafts come from: some drafts stand, some do not, greedy and sampled."""
    num_k, batch = 3, 6
    q_state = QState.empty(batch, num_k, VOCAB, torch.bfloat16, CPU) if mode == "rejection" else None
    laws = _random(1, batch * (1 + num_k), VOCAB, scale=3.0)
    first: Arguments = {
        "logits": laws,
        "query_start_loc": _int32(*range(0, len(laws) + 1, 1 + num_k)),
        "num_drafts": torch.zeros(batch, dtype=torch.int32),
        "drafts": torch.full((batch, num_k), -1),
        "positions": torch.arange(batch, dtype=torch.int32) * 100,
        **_parameters(batch),
        "branched": branched,
        "mode": mode,
        "q_state": q_state,
    }
    _, _, drafts, _ = python_ref.verify_accept(**first)
    drafts[0, 2] = 11  # refused by `match`, after two that stand
    drafts[3, 2] = VOCAB  # no id
    num_drafts = [3, 3, 2, 3, 0, 0]
    mask_rows = [num_k * (n + 1 if branched else 1) for n in num_drafts[:4]] + [0, 0]
    counts = [1 + n + m for n, m in zip(num_drafts[:5], mask_rows[:5], strict=True)] + [0]
    logits = _random(2, sum(counts), VOCAB, scale=3.0)
    for b in range(4):
        start = sum(counts[:b])
        nearly = laws[b * (1 + num_k) + 1 :][: num_drafts[b]].float()
        noise = _random(3 + b, *nearly.shape, scale=0.4, dtype=torch.float32)
        logits[start : start + num_drafts[b]] = (nearly + noise).to(logits.dtype)
    return first | {
        "logits": logits,
        "query_start_loc": _int32(*(sum(counts[:b]) for b in range(batch + 1))),
        "num_drafts": _int32(*num_drafts),
        "drafts": drafts,
        "positions": first["positions"] + 1,
        "status": torch.zeros(batch, dtype=torch.int32),
    }


def _verify_accept(case: Case) -> None:
    for branched, mode in ((True, "match"), (False, "match"), (True, "rejection")):
        _compared(case, "verify_accept", _step(branched, mode))


def _rerank_drafts(case: Case) -> None:
    """K = 3 for five requests of every kind, one of which has no drafts; q_state in fp32, where no rounding decides."""
    num_k, batch, size, width = 3, 5, 96, 24
    arguments: Arguments = {
        "logits": _random(1, 16, VOCAB, scale=3.0),
        "hidden": _random(2, 16, size),
        "first_mask": _int32(1, 13, 0, 7, 4),
        "previous": torch.tensor([3, 4000, 5, 77, 1]),
        "positions": _int32(40, 7, 0, 900, 31),
        "drafts": torch.arange(15).view(batch, num_k),
        "num_drafts": _int32(3, 3, 3, 0, 3),
        **_parameters(batch),
        "embedding": _random(3, VOCAB, size),
        "head_rows": _random(4, VOCAB, size, scale=0.2),
        "from_hidden": _random(5, width, size, scale=0.1),
        "from_previous": _random(6, width, size, scale=0.1),
        "from_state": _random(7, width, width, scale=0.2),
        "to_query": _random(8, size, width, scale=0.4),
    }
    _compared(case, "rerank_drafts", arguments)
    q_state = QState.empty(batch, num_k, VOCAB, torch.float32, CPU)
    _compared(case, "rerank_drafts", arguments | {"q_state": q_state})


def _advance(case: Case) -> None:
    """Running on, stopping inside the step, the length limit, no room, ended by a stop or a limit before, no rows."""
    tokens = [[3, 5, 1, -1], [7, 4, 6, -1], [8, 9, 8, 9], [2, 2, -1, -1], [3, 3, -1, -1], [3, 3, -1, -1], [-1] * 4]
    arguments = {
        "num_accepted": _int32(2, 2, 3, 1, 1, 1, 0),
        "tokens": torch.tensor(tokens),
        "next_drafts": torch.arange(21).view(7, 3),
        "next_num_drafts": _int32(3, 3, 3, 0, 3, 3, 0),
        "text": torch.arange(84).view(7, 12) + 100,
        "lengths": _int32(2, 5, 8, 12, 4, 4, 4),
        "drafts": torch.arange(21).view(7, 3) + 50,
        "num_drafts": _int32(3, 2, 3, 1, 1, 1, 2),
        "length_limits": _int32(12, 12, 10, 12, 12, 12, 12),
        "stop_ids": torch.tensor([[4, -1], [4, 6], [5, -1], [-1, -1], [3, -1], [3, -1], [-1, 5]]),
        "finish": _int32(0, 0, 0, 0, 1, 2, 0),
    }
    _compared(case, "advance", arguments)


CHECKS: dict[str, Callable[[Case], None]] = {
    "prepare_weight": _prepare_weight,
    "linear": _linear,
    "gated_lora_linear": _gated_lora_linear,
    "linear_silu_and_mul": _linear_silu_and_mul,
    "silu_and_mul": _silu_and_mul,
    "rms_norm": _rms_norm,
    "embed": _embed,
    "qk_norm_rope_append": _qk_norm_rope_append,
    "strided_attention": _strided_attention,
    "sample_rows": _sample_rows,
    "verify_accept": _verify_accept,
    "rerank_drafts": _rerank_drafts,
    "advance": _advance,
}
