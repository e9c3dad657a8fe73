"""Log-probabilities of given texts, from clean rows: what AR decoding of the same tokens would have reported.

Rows are packed over many texts into forwards of at most `max_num_batched_tokens` rows. Texts with the same context
share its pages, and texts that differ in their last token alone are one text: as rows are row-invariant, neither
changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.generate.plan import slot_of
from idlm_kernels.model.cpu_stack import CpuCache
from idlm_kernels.model.rows import Rows
from idlm_kernels.model.transformer import KVCache, Transformer


@dataclass(frozen=True)
class Score:
    """logprobs: of the tokens of a continuation, under the model's own distribution (before temperature and
    truncation). is_greedy: whether greedy decoding of the context gives just these tokens."""

    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the continuation."""
        return sum(self.logprobs)


@dataclass(eq=False)
class _Text:
    """Tokens whose rows are computed, from `start` to their end: those before lie in pages that are filled already.

    readers: the pairs that read its rows, from `first` on.
    """

    tokens: tuple[int, ...]
    start: int = 0
    first: int = 0
    readers: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Scorer:
    """Scores pairs of a context and its continuation, both token ids.

    num_pages, page_size: of the KV cache; the longest text has to fit. id_limit: ids from here on are never sampled.
    """

    def __init__(
        self, model: Transformer, num_pages: int, page_size: int, id_limit: int, max_num_seqs: int, max_rows: int
    ):
        self.model, self.page_size, self.id_limit = model, page_size, id_limit
        self.num_pages, self.max_num_seqs, self.max_rows = num_pages, max_num_seqs, max_rows
        self._cache: KVCache | CpuCache = model.new_cache(num_pages, page_size)

    def score(
        self, pairs: Sequence[tuple[list[int], list[int]]], progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """The scores, in the order of the pairs. progress is called with the number of pairs that are done."""
        values = [[0.0] * len(continuation) for _, continuation in pairs]
        greedy = [True] * len(pairs)
        done = sum(not continuation for _, continuation in pairs)
        for wave in self._waves(pairs):
            contexts: dict[tuple[int, ...], _Text] = {}
            for text in wave:
                contexts.setdefault(text.tokens[: text.start], _Text(text.tokens[: text.start]))
            free = iter(range(self.num_pages))
            for shared in contexts.values():
                shared.pages = list(islice(free, len(shared.tokens) // self.page_size))
            for text in wave:
                own = -(-(len(text.tokens) - text.start) // self.page_size)
                text.pages = contexts[text.tokens[: text.start]].pages + list(islice(free, own))
            self._run(list(contexts.values()), pairs, values, greedy)
            self._run(wave, pairs, values, greedy)
            done += sum(len(text.readers) for text in wave)
            if progress is not None:
                progress(done)
        return [Score(v, g) for v, g in zip(values, greedy, strict=True)]

    def _waves(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[_Text]]:
        """The texts in groups that fit into the cache, those with the same whole pages of context side by side."""
        texts: dict[tuple[int, ...], _Text] = {}
        for number, (context, continuation) in enumerate(pairs):
            if continuation:
                tokens = (*context, *continuation[:-1])  # no row predicts anything after the last one
                text = texts.setdefault(tokens, _Text(tokens, first=len(context) - 1))
                text.first = min(text.first, len(context) - 1)
                text.readers.append(number)
        by_context: dict[tuple[int, ...], list[_Text]] = {}
        for text in texts.values():
            text.start = text.first // self.page_size * self.page_size
            by_context.setdefault(text.tokens[: text.start], []).append(text)
        waves: list[list[_Text]] = []
        pages = 0
        for pages_of_context, group in by_context.items():
            shared, is_here = len(pages_of_context) // self.page_size, False
            for text in group:
                own = -(-(len(text.tokens) - text.start) // self.page_size)
                needed = own + (0 if is_here else shared)
                if not waves or len(waves[-1]) == self.max_num_seqs or pages + needed > self.num_pages:
                    waves.append([])
                    pages, needed = 0, own + shared
                waves[-1].append(text)
                pages, is_here = pages + needed, True
        return waves

    def _run(
        self,
        texts: list[_Text],
        pairs: Sequence[tuple[list[int], list[int]]],
        values: list[list[float]],
        greedy: list[bool],
    ) -> None:
        """Compute the rows of texts, as many together as a forward takes, and read what their readers want."""
        chunks: list[tuple[_Text, int, int]] = []
        room = self.max_rows
        for text in texts:
            start = text.start
            while start < len(text.tokens):
                stop = min(len(text.tokens), start + room)
                chunks.append((text, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    self._forward(chunks, pairs, values, greedy)
                    chunks, room = [], self.max_rows
        if chunks:
            self._forward(chunks, pairs, values, greedy)

    def _forward(
        self,
        chunks: list[tuple[_Text, int, int]],
        pairs: Sequence[tuple[list[int], list[int]]],
        values: list[list[float]],
        greedy: list[bool],
    ) -> None:
        wanted: list[int] = []  # rows of the forward whose logits are read
        reads: list[tuple[int, int, int, int]] = []  # index in `wanted`, token, pair, place in its continuation
        before = 0
        for text, start, stop in chunks:
            for position in range(max(start, text.first), stop) if text.readers else ():
                for number in text.readers:
                    context, continuation = pairs[number]
                    place = position + 1 - len(context)
                    if place >= 0:
                        reads.append((len(wanted), continuation[place], number, place))
                wanted.append(before + position - start)
            before += stop - start
        device = self.model.device
        with torch.inference_mode():
            rows = torch.tensor(wanted, dtype=torch.int64, device=device)
            logits, _ = self.model.forward(self._rows(chunks), self._cache, logits_rows=rows)
            if not reads:
                return
            index, tokens, _, _ = torch.tensor(reads, device=device).unbind(1)
            logits = logits.float()
            chosen = (logits[index, tokens] - logits.logsumexp(1)[index]).tolist()
            best = self._greedy(logits)[index].tolist()
        for (_, token, number, place), value, likeliest in zip(reads, chosen, best, strict=True):
            values[number][place] = value
            greedy[number] &= token == likeliest

    def _rows(self, chunks: list[tuple[_Text, int, int]]) -> Rows:
        device = self.model.device
        width = max(len(text.pages) for text, _, _ in chunks)
        counts = [stop - start for _, start, stop in chunks]
        table = torch.tensor([(text.pages + [0] * width)[:width] for text, _, _ in chunks], dtype=torch.int32)
        request = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)])
        positions = torch.tensor([p for _, start, stop in chunks for p in range(start, stop)])
        return Rows(
            ids=torch.tensor([t for text, start, stop in chunks for t in text.tokens[start:stop]], device=device),
            is_mask=torch.zeros(len(positions), dtype=torch.bool, device=device),
            positions=positions.to(device),
            slot_mapping=slot_of(table, request, positions, self.page_size).to(device),
            page_table=table.to(device),
            seq_lens=torch.tensor([stop for _, _, stop in chunks], dtype=torch.int32, device=device),
            query_start_loc=torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32),
            tree_mask=None,
            max_query_len=max(counts),
            has_masks=False,
        )

    def _greedy(self, logits: Tensor) -> Tensor:
        """What greedy decoding samples from each row: never MASK, nor an id beyond the tokenizer."""
        count, device, mask_id = logits.shape[0], logits.device, self.model.config.mask_token_id
        zero = torch.zeros(count, device=device)
        none = torch.zeros(count, dtype=torch.int32, device=device)
        return ops.sample_rows(
            logits,
            none,
            temperature=zero,
            top_k=none,
            top_p=zero + 1,
            min_p=zero,
            seed=none.long(),
            id_limit=self.id_limit,
            mask_id=-1 if mask_id is None else mask_id,
        )
