"""The problems: one for each op, with its name in `PROBLEMS`. A new op needs one more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import python_ref
from idlm_kernels.testing.calls import Arguments, Call, Draw, Problem
from python_ref import DraftDistributions, Penalties, StepState

# Linear layers


@dataclass(frozen=True, kw_only=True)
class Linear(Problem):
    """x [rows, k], weight [n, k], bias [n]."""

    op = "linear"
    per_row = ("x",)
    rows: int = 7
    n: int = 100
    k: int = 584
    bias: bool = True

    def arguments(self, draw: Draw) -> Arguments:
        return _layer(draw, self.rows, self.n, self.k, self.bias, self.dtype)


def _layer(draw: Draw, rows: int, n: int, k: int, bias: bool, dtype: torch.dtype) -> Arguments:
    layer = {"x": draw.normal(rows, k, dtype=dtype), "weight": draw.normal(n, k, scale=k**-0.5, dtype=dtype)}
    return layer | ({"bias": draw.normal(n, dtype=dtype)} if bias else {})


@dataclass(frozen=True, kw_only=True)
class GatedLoraLinear(Problem):
    """Packed slices of these widths, with an adapter of this rank on rows 1, 4, 7 ... Without a rank there is none."""

    op = "gated_lora_linear"
    per_row = ("x", "lora_mask")
    rows: int = 9
    k: int = 320
    output_sizes: tuple[int, ...] = (70, 40, 90)
    rank: int = 24
    bias: bool = True
    lora_mask_dtype: torch.dtype = torch.bool

    def arguments(self, draw: Draw) -> Arguments:
        n, k, rank, dtype = sum(self.output_sizes), self.k, self.rank, self.dtype
        layer = _layer(draw, self.rows, n, k, self.bias, dtype)
        if not rank:
            return layer
        return layer | {
            "lora_a": draw.normal(len(self.output_sizes) * rank, k, scale=k**-0.5, dtype=dtype),
            "lora_b": draw.normal(n, rank, scale=rank**-0.5, dtype=dtype),
            "lora_mask": (torch.arange(self.rows, device=draw.device) % 3 == 1).to(self.lora_mask_dtype),
            "scale": 0.7,
            "output_sizes": list(self.output_sizes),
        }


@dataclass(frozen=True, kw_only=True)
class LinearSiluAndMul(GatedLoraLinear):
    """The same, of gate and up."""

    op = "linear_silu_and_mul"
    output_sizes: tuple[int, ...] = (51, 60, 89)


# Attention


@dataclass(frozen=True, kw_only=True)
class StridedAttention(Problem):
    """Requests with so many slots and so many rows, on pages in random order, and `padding` rows of none.

    heads: Hq, Hkv, D. tail: None, a chain; "random" masks; or those of a "quadratic" step, N * N rows per request.
    What no request has written is NaN.
    """

    op = "strided_attention"
    lengths: tuple[int, ...] = (300, 45, 0)
    rows: tuple[int, ...] = (7, 4, 0)
    heads: tuple[int, int, int] = (8, 2, 64)
    page_size: int = 16
    padding: int = 1
    tail: str | None = None

    def arguments(self, draw: Draw) -> Arguments:
        num_heads, num_kv_heads, head_dim = self.heads
        shape = (len(self.lengths), max(self.lengths), num_kv_heads, head_dim)
        k, v = (draw.normal(*shape, dtype=self.dtype) for _ in range(2))
        total = sum(self.rows) + self.padding
        tail: Arguments = {}
        if self.tail == "random":
            tail["tree_mask"] = draw.integers(-(2**63), 2**63 - 1, total)
        elif self.tail is not None:
            masks = [mask for count in self.rows for mask in quadratic_masks(round(count**0.5))]
            tail["tree_mask"] = draw.tensor([*masks, *[1] * self.padding], torch.int64)
        return {
            "q": draw.normal(total, num_heads, head_dim, dtype=self.dtype),
            **paged(k, v, self.lengths, self.page_size, draw=draw),
            "seq_lens": draw.tensor(self.lengths),
            "query_start_loc": draw.tensor([sum(self.rows[:i]) for i in range(len(self.rows) + 1)]),
            "max_query_len": max(self.rows),
            "lse": torch.zeros(total, num_heads, dtype=torch.float32, device=draw.device),
            **tail,
        }


def quadratic_masks(stride: int, num_drafts: int | None = None) -> list[int]:
    """The tree masks of a quadratic step: clean rows 0 .. num_drafts, then stride - 1 MASK rows for each of them."""
    clean = stride if num_drafts is None else num_drafts + 1
    masks = [(2 << i) - 1 for i in range(clean)]
    for branch in range(clean):
        first = clean + branch * (stride - 1)
        masks += [((2 << branch) - 1) | (((2 << j) - 1) << first) for j in range(stride - 1)]
    return [mask - (1 << 64) if mask >= 1 << 63 else mask for mask in masks]


def paged(
    k: Tensor, v: Tensor, lengths: Sequence[int], page_size: int, *, head_major: bool = False, draw: Draw | None = None
) -> Arguments:
    """k_cache, v_cache and page_table with k, v [B, slots, Hkv, D] on pages in random order, NaN beyond each length.

    head_major: the caches are views of tensors [Hkv, num_pages, page_size, D]. Some pages belong to no request.
    """
    draw = draw or Draw(k.device)
    batch, num_slots, num_kv_heads, head_dim = k.shape
    max_pages = -(-num_slots // page_size) + 1
    num_pages = batch * max_pages + 2
    table = draw.order(num_pages)[: batch * max_pages].view(batch, max_pages)
    caches = {}
    for name, content in (("k_cache", k), ("v_cache", v)):
        nan = content.new_full((), torch.nan)
        cache = nan.repeat(num_pages, page_size, num_kv_heads, head_dim)
        if head_major:
            cache = nan.repeat(num_kv_heads, num_pages, page_size, head_dim).permute(1, 2, 0, 3)
        for b, length in enumerate(lengths):
            slot = torch.arange(length, device=k.device)
            cache[table[b, slot // page_size], slot % page_size] = content[b, :length]
        caches[name] = cache
    return {**caches, "page_table": table.to(torch.int32)}


def repaged(call: Call, page_size: int, head_major: bool = False) -> Call:
    """The call with its K and V on other pages: see `paged`."""
    k, v = (call[name][call["page_table"].long()].flatten(1, 2) for name in ("k_cache", "v_cache"))
    lengths = call["seq_lens"].tolist()
    return call.changed(**paged(k[:, : max(lengths)], v[:, : max(lengths)], lengths, page_size, head_major=head_major))


def request_rows(call: Call, b: int, rows: slice) -> Call:
    """Rows of request b of a chain as another step holds them: alone, and a length that ends with the last of them."""
    start, end = call["query_start_loc"][b : b + 2].tolist()
    first, last, _ = rows.indices(end - start)
    own = slice(start + first, start + last)
    return call.changed(
        q=call["q"][own],
        page_table=call["page_table"][b : b + 1],
        seq_lens=call["seq_lens"][b : b + 1] - (end - start) + last,
        query_start_loc=call["query_start_loc"].new_tensor([0, last - first]),
        max_query_len=last - first,
        tree_mask=None,
        lse=None if call["lse"] is None else call["lse"][own],
    )


# Rows


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Problem):
    """x, residual [rows, width]; eps counts."""

    op = "rms_norm"
    per_row = ("x", "residual")
    rows: int = 5
    width: int = 1000
    residual: bool = True

    def arguments(self, draw: Draw) -> Arguments:
        shape, dtype = (self.rows, self.width), self.dtype
        x, weight = draw.normal(*shape, dtype=dtype), draw.normal(self.width, dtype=dtype)
        residual = {"residual": draw.normal(*shape, dtype=dtype)} if self.residual else {}
        return {"x": x, "weight": weight, "eps": 0.3, **residual}


@dataclass(frozen=True, kw_only=True)
class SiluAndMul(Problem):
    """x [rows, 2 * width]."""

    op = "silu_and_mul"
    per_row = ("x",)
    rows: int = 5
    width: int = 300

    def arguments(self, draw: Draw) -> Arguments:
        return {"x": draw.normal(self.rows, 2 * self.width, scale=3.0, dtype=self.dtype)}


@dataclass(frozen=True, kw_only=True)
class Embed(Problem):
    """Ids within and beyond a vocabulary of 10, on MASK rows and others."""

    op = "embed"
    per_row = ("ids", "is_mask")
    width: int = 600
    mask_embedding: bool = True

    def arguments(self, draw: Draw) -> Arguments:
        return {
            "ids": draw.tensor([4, 0, -1, 9, 10, 2**40, 5], torch.int64),
            "weight": draw.normal(10, self.width, dtype=self.dtype),
            "is_mask": draw.tensor([0, 2, 0, 0, 1, 0, 256]),
            "mask_embedding": draw.normal(self.width, dtype=self.dtype) if self.mask_embedding else None,
        }


@dataclass(frozen=True, kw_only=True)
class QkNormRopeAppend(Problem):
    """heads: Hq, Hkv, D. Slots in random order, the third of which is skipped; the caches hold NaN."""

    op = "qk_norm_rope_append"
    per_row = ("qkv", "positions", "slot_mapping")
    rows: int = 5
    heads: tuple[int, int, int] = (8, 2, 128)
    page_size: int = 6
    norm: bool = True
    cache_dtype: torch.dtype | None = None

    def arguments(self, draw: Draw) -> Arguments:
        (num_heads, num_kv_heads, head_dim), dtype = self.heads, self.dtype
        num_pages = -(-self.rows // self.page_size) + 2
        slots = draw.order(num_pages * self.page_size)[: self.rows]
        slots[2:3] = -1
        frequencies = 10_000.0 ** -torch.linspace(0, 1, head_dim // 2, device=draw.device)
        shape = (num_pages, self.page_size, num_kv_heads, head_dim)
        nan = torch.full((), torch.nan, device=draw.device).to(self.cache_dtype or dtype)
        arguments = {
            "qkv": draw.normal(self.rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype),
            "positions": draw.integers(0, 50, self.rows),
            "rotary": python_ref.rotary_table(frequencies, 50),
            "slot_mapping": slots,
            "k_cache": nan.repeat(shape),
            "v_cache": nan.repeat(shape),
        }
        if self.norm:
            weights = {f"{x}_weight": draw.normal(head_dim, dtype=dtype) for x in "qk"}
            return {**arguments, **weights, "eps": 0.3}
        return arguments


# Sampling

VOCAB, MASK_ID = 5003, 7


def sampling_parameters(draw: Draw, count: int, vocab_size: int) -> Arguments:
    """Greedy, plain and every truncation, by turns. The last 13 ids may not be sampled."""
    kinds = torch.arange(count, device=draw.device) % 6
    columns = {
        "temperature": (1.0, 0.0, 0.7, 1.3, 0.9, 0.8),
        "top_k": (0, 0, 5, 0, 0, 50),
        "top_p": (1.0, 1.0, 1.0, 0.9, 1.0, 0.6),
        "min_p": (0.0, 0.0, 0.0, 0.0, 0.1, 0.02),
    }
    each = {x: draw.tensor(v, torch.int32 if x == "top_k" else torch.float32)[kinds] for x, v in columns.items()}
    seed = torch.arange(count, device=draw.device) * 0x1234_5678_9ABC - 3
    return {**each, "seed": seed, "id_limit": vocab_size - 13, "mask_id": MASK_ID}


@dataclass(frozen=True, kw_only=True)
class SampleRows(Problem):
    """Rows of every kind, ties, and every fault: NaN, +inf, nothing finite. What may not be sampled is the largest."""

    op = "sample_rows"
    per_row = ("logits", "positions", "temperature", "top_k", "top_p", "min_p", "seed", "error_flags")
    vocab_size: int = VOCAB

    def arguments(self, draw: Draw) -> Arguments:
        parameters = sampling_parameters(draw, 14, self.vocab_size)
        logits = draw.normal(14, self.vocab_size, scale=3.0, dtype=self.dtype)
        logits[:, MASK_ID] = logits[:, parameters["id_limit"]] = 100.0
        logits[1, [30, 31, 32]] = 50.0
        logits[11, 5], logits[12, 70] = torch.nan, torch.inf
        logits[13] = -torch.inf
        positions = torch.arange(14, device=draw.device) * 331
        return {"logits": logits, "positions": positions, **parameters, "error_flags": draw.tensor([0] * 14)}


@dataclass(frozen=True, kw_only=True)
class ApplyPenalties(Problem):
    """Six requests, K = 3: all penalties, each alone, none, a bias of ids that occur and that do not, no rows.

    Texts of 40 ids, so that most occur often, in prompt, output and drafts; some of no vocabulary, some logits NaN.
    """

    op = "apply_penalties"
    quadratic: bool = True
    vocab_size: int = 601
    max_len: int = 300
    num_biases: int = 5

    def arguments(self, draw: Draw) -> Arguments:
        num_spec_tokens, batch, vocab_size = 3, 6, self.vocab_size
        num_drafts = [3, 2, 0, 3, 1, 0]
        counts = [1 + n + num_spec_tokens * (n + 1 if self.quadratic else 1) for n in num_drafts[:5]] + [0]
        logits = draw.normal(sum(counts) + 2, vocab_size, scale=3.0, dtype=self.dtype)
        logits[0, 7], logits[1, 8], logits[2, 9] = torch.nan, torch.inf, -torch.inf
        text = draw.integers(-1, 40, batch, self.max_len)
        text[:, 3] = vocab_size
        drafts = draw.integers(0, 45, batch, num_spec_tokens)
        drafts[0] = draw.tensor([44, 44, 5], torch.int64)
        bias_ids = draw.tensor([[-1] * self.num_biases] * batch, torch.int64)
        if self.num_biases:
            of_others = torch.arange(self.num_biases, device=draw.device) * 7 + 30
            bias_ids[0], bias_ids[4] = of_others, of_others
            bias_ids[4, 1:2], bias_ids[4, 2:3], bias_ids[4, 3:4] = 2, 30, vocab_size
        return {
            "logits": logits,
            "query_start_loc": draw.tensor([sum(counts[:b]) for b in range(batch + 1)]),
            "num_drafts": draw.tensor(num_drafts),
            "drafts": drafts,
            "text": text,
            "lengths": draw.tensor([self.max_len, 200, 1, 40, 129, 30]),
            "penalties": Penalties(
                prompt_lengths=draw.tensor([100, 0, 1, 20, 129, 10]),
                presence=draw.tensor([0.5, 0.0, -1.5, 0.0, 0.0, 1.0], torch.float32),
                frequency=draw.tensor([0.3, 0.7, 0.0, 0.0, 0.0, 1.0], torch.float32),
                repetition=draw.tensor([1.3, 1.0, 0.8, 1.0, 1.0, 2.0], torch.float32),
                bias_ids=bias_ids,
                bias=draw.normal(batch, self.num_biases, scale=5.0, dtype=torch.float32),
            ),
            "quadratic": self.quadratic,
        }


@dataclass(frozen=True, kw_only=True)
class VerifyAccept(Problem):
    """The second step of six requests, K = 3; the last two have no drafts: one has no MASK rows, one no rows at all.

    The logits are near those that the drafts come from: some drafts stand, some do not, greedy and sampled.
    """

    op = "verify_accept"
    quadratic: bool = True
    rule: str = "match"
    vocab_size: int = VOCAB

    def arguments(self, draw: Draw) -> Arguments:
        num_spec_tokens, batch, vocab_size = 3, 6, self.vocab_size
        distributions = draw.normal(batch * (1 + num_spec_tokens), vocab_size, scale=3.0, dtype=self.dtype)
        first: Arguments = {
            "logits": distributions,
            "query_start_loc": draw.tensor(range(0, len(distributions) + 1, 1 + num_spec_tokens)),
            "num_drafts": draw.tensor([0] * batch),
            "drafts": draw.tensor([[-1] * num_spec_tokens] * batch, torch.int64),
            "positions": draw.tensor(range(0, 100 * batch, 100)),
            **sampling_parameters(draw, batch, vocab_size),
            "quadratic": self.quadratic,
            "rule": self.rule,
            "draft_dists": None,
        }
        if self.rule == "rejection":
            first["draft_dists"] = DraftDistributions.empty(batch, num_spec_tokens, vocab_size, self.dtype, draw.device)
        _, _, drafts, _ = python_ref.verify_accept(**first)
        drafts[0, 2] = 11  # rejected by `match`, after two that are accepted
        drafts[3, 2] = vocab_size  # no id
        num_drafts = [3, 3, 2, 3, 0, 0]
        counts = [1 + n + num_spec_tokens * (n + 1 if self.quadratic else 1) for n in num_drafts[:4]] + [1, 0]
        logits = draw.normal(sum(counts), vocab_size, scale=3.0, dtype=self.dtype)
        for b in range(4):
            start, near = sum(counts[:b]), distributions[b * (1 + num_spec_tokens) + 1 :][: num_drafts[b]].float()
            noise = draw.normal(*near.shape, scale=0.4, dtype=torch.float32)
            logits[start : start + num_drafts[b]] = (near + noise).to(self.dtype)
        return first | {
            "logits": logits,
            "query_start_loc": draw.tensor([sum(counts[:b]) for b in range(batch + 1)]),
            "num_drafts": draw.tensor(num_drafts),
            "drafts": drafts,
            "positions": first["positions"] + 1,
            "error_flags": draw.tensor([0] * batch),
        }


@dataclass(frozen=True, kw_only=True)
class TopLogprobs(Problem):
    """Tokens of four requests, not all places taken: rows with ties, all alike, with NaN, with few finite logits."""

    op = "top_logprobs"
    vocab_size: int = 2103
    count: int = 20

    def arguments(self, draw: Draw) -> Arguments:
        logits = draw.normal(10, self.vocab_size, scale=3.0, dtype=self.dtype)
        logits[0, 100:140] = 30.0
        logits[1] = 2.0
        logits[2, 5::2], logits[2, 6] = torch.nan, 50.0
        logits[4, 7:] = -torch.inf
        logits[5, -1:] = 99.0  # not listed
        return {
            "logits": logits,
            "query_start_loc": draw.tensor([0, 3, 3, 7, 9]),
            "tokens": draw.tensor([[3, 0, -1], [-1, -1, -1], [2, 4, 7], [9, 9, 1]], torch.int64),
            "count": self.count,
            "id_limit": self.vocab_size - 13,
        }


@dataclass(frozen=True, kw_only=True)
class RerankDrafts(Problem):
    """K drafts for requests of every kind, the fourth of which has none; draft_dists in fp32: no rounding decides."""

    op = "rerank_drafts"
    batch: int = 5
    num_spec_tokens: int = 3
    vocab_size: int = VOCAB
    hidden: int = 96
    width: int = 24
    rejection: bool = False

    def arguments(self, draw: Draw) -> Arguments:
        batch, num_spec_tokens, hidden, width = self.batch, self.num_spec_tokens, self.hidden, self.width
        rows = batch * num_spec_tokens + 1
        num_drafts = draw.tensor([num_spec_tokens] * batch)
        num_drafts[3:4] = 0
        arguments: Arguments = {
            "logits": draw.normal(rows, self.vocab_size, scale=3.0, dtype=self.dtype),
            "hidden": draw.normal(rows, hidden, dtype=self.dtype),
            "first_mask": (draw.order(batch) * num_spec_tokens + 1).to(torch.int32),
            "previous": draw.integers(0, self.vocab_size, batch),
            "positions": draw.integers(0, 1000, batch, dtype=torch.int32),
            "drafts": torch.arange(batch * num_spec_tokens, device=draw.device).view(batch, num_spec_tokens),
            "num_drafts": num_drafts,
            **sampling_parameters(draw, batch, self.vocab_size),
            "embedding": draw.normal(self.vocab_size, hidden, dtype=self.dtype),
            "head_rows": draw.normal(self.vocab_size, hidden, scale=2 * hidden**-0.5, dtype=self.dtype),
            "from_hidden": draw.normal(width, hidden, scale=hidden**-0.5, dtype=self.dtype),
            "from_previous": draw.normal(width, hidden, scale=hidden**-0.5, dtype=self.dtype),
            "from_state": draw.normal(width, width, scale=width**-0.5, dtype=self.dtype),
            "to_query": draw.normal(hidden, width, scale=2 * width**-0.5, dtype=self.dtype),
        }
        if self.rejection:
            arguments["draft_dists"] = DraftDistributions.empty(
                batch, num_spec_tokens, self.vocab_size, torch.float32, draw.device
            )
        return arguments


@dataclass(frozen=True, kw_only=True)
class Advance(Problem):
    """Requests that run on, stop inside the step or at a limit, have ended before, or have no rows, at random."""

    op = "advance"
    batch: int = 40
    num_spec_tokens: int = 3
    num_stops: int = 2
    max_len: int = 30

    def arguments(self, draw: Draw) -> Arguments:
        batch, num_spec_tokens, max_len = self.batch, self.num_spec_tokens, self.max_len
        accepted = draw.integers(0, num_spec_tokens + 1, batch, dtype=torch.int32)
        tokens = draw.integers(0, 12, batch, num_spec_tokens + 1)
        tokens[torch.arange(num_spec_tokens + 1, device=draw.device) > accepted.unsqueeze(1)] = -1
        tokens[draw.integers(0, 6, batch) == 0] = -1  # a request without rows
        lengths = draw.integers(1, max_len, batch, dtype=torch.int32)
        limits = (lengths + draw.integers(-2, num_spec_tokens + 3, batch, dtype=torch.int32)).clamp(max=max_len)
        return {
            "num_accepted": accepted,
            "tokens": tokens,
            "next_drafts": draw.integers(-1, 12, batch, num_spec_tokens),
            "next_num_drafts": draw.integers(0, num_spec_tokens + 1, batch, dtype=torch.int32),
            "text": draw.integers(0, 12, batch, max_len),
            "lengths": lengths,
            "drafts": draw.integers(0, 12, batch, num_spec_tokens),
            "num_drafts": draw.integers(0, num_spec_tokens + 1, batch, dtype=torch.int32),
            "length_limits": limits,
            "stop_ids": draw.integers(-1, 12, batch, self.num_stops),
            "finish_reason": draw.integers(0, 6, batch, dtype=torch.int32).clamp(min=3) - 3,
        }


def _state(draw: Draw, num_spec_tokens: int) -> StepState:
    """Eight places: texts that repeat themselves, requests that stop, reach their limit, had NaN, are absent."""
    batch = 8
    place, column = torch.arange(batch, device=draw.device), torch.arange(24, device=draw.device)
    return StepState(
        text=(column * 3 % 7).repeat(batch, 1) + place.unsqueeze(1) % 2,
        lengths=draw.tensor([1, 9, 20, 12, 24, 15, 3, 17]),
        drafts=(place.unsqueeze(1) + torch.arange(num_spec_tokens, device=draw.device)) % 7,
        num_drafts=draw.tensor([0, 1, 2, 3, 3, 2, 0, 1]).clamp(max=num_spec_tokens),
        max_drafts=draw.tensor([3, 3, 1, 3, 3, 3, 3, 0]).clamp(max=num_spec_tokens),
        draft_source=draw.tensor([0, 1, 2, 1, 1, 2, 0, 1]),
        length_limits=draw.tensor([24, 24, 21, 24, 24, 24, 24, 24]),
        stop_ids=draw.tensor([[-1, 4]] * batch, torch.int64),
        finish_reason=draw.tensor([0, 0, 0, 0, 0, 0, 3, 0]),
        error_flags=draw.tensor([0, 0, 0, 2, 0, 1, 0, 0]),
        page_table=draw.order(batch * 6).view(batch, 6).to(torch.int32),
        seed=place * 0x1234_5678_9ABC - 3,
    )


@dataclass(frozen=True, kw_only=True)
class PlanRows(Problem):
    """The rows of eight places' next step; the longest text goes beyond its pages."""

    op = "plan_rows"
    num_spec_tokens: int = 3
    quadratic: bool = True
    noise_below: int = 0

    def arguments(self, draw: Draw) -> Arguments:
        how = {"quadratic": self.quadratic, "noise_below": self.noise_below}
        return {"state": _state(draw, self.num_spec_tokens), "mask_id": 5, "page_size": 5, **how}


@dataclass(frozen=True, kw_only=True)
class CommitStep(Problem):
    """What verify_accept may have decided for eight places, the last two of which have no rows."""

    op = "commit_step"
    num_spec_tokens: int = 3

    def arguments(self, draw: Draw) -> Arguments:
        tokens = draw.integers(0, 6, 8, self.num_spec_tokens + 1)
        tokens[6:] = -1
        return {
            "num_accepted": draw.tensor([0, 1, 2, 3, 1, 2, 0, 0]).clamp(max=self.num_spec_tokens),
            "tokens": tokens,
            "next_drafts": draw.integers(-1, 6, 8, self.num_spec_tokens),
            "next_num_drafts": draw.tensor([3, 0, 3, 3, 0, 3, 0, 3]).clamp(max=self.num_spec_tokens),
            "state": _state(draw, self.num_spec_tokens),
        }


PROBLEMS: dict[str, type[Problem]] = {
    kind.op: kind
    for kind in (
        Linear, GatedLoraLinear, LinearSiluAndMul, StridedAttention, RmsNorm, SiluAndMul, Embed, QkNormRopeAppend,
        SampleRows, ApplyPenalties, VerifyAccept, TopLogprobs, RerankDrafts, Advance, PlanRows, CommitStep,
    )
}  # fmt: skip
