"""Drafts from finished outputs of the same engine: what rollouts of one prompt, and questions asked again, repeat.

After DAS (arXiv 2511.13841), whose index is a suffix tree: here the host keeps the places of runs of tokens in finished
texts and, at the boundary of a window, hands each request those where others went on from the same tokens. Inside the
window the device looks the end of the text up in them, step by step, without the host. In `match` no draft changes the
output.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from idlm_kernels.generate.state import DecodeState
from python_ref.contract import FILL_MATCH, HISTORY_DRAFTS, OVERRIDE_MATCH, RUNNING, SUFFIX_DRAFTS
from python_ref.step import LONGEST_MATCH

CONTEXT = 64  # tokens before a place that are compared, and that are kept of a prompt
PASSAGE = 128  # tokens of a place that are handed over: LONGEST_MATCH before it, and what followed
PASSAGES = 4  # handed over for a request
HANDED_OVER = PASSAGE * PASSAGES
_ANCHOR = 3  # tokens that the index finds a place by
_PLACES = 32  # of an anchor that are looked at, the latest


class History:
    """The latest finished texts, of `capacity` tokens together, and where each run of three tokens ends in them."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_tokens = 0
        self._texts: dict[int, list[int]] = {}  # by number, the oldest first
        self._added = 0
        self._places: defaultdict[tuple[int, ...], deque[tuple[int, int]]] = defaultdict(deque)  # text, end

    def add(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Keep an output, and the end of its prompt; the oldest texts make room."""
        text = [*prompt[-CONTEXT:], *output][-self.capacity :]
        if not output or len(text) <= _ANCHOR:
            return
        while self.num_tokens + len(text) > self.capacity:
            self._forget_oldest()
        number, self._added = self._added, self._added + 1
        self._texts[number] = text
        self.num_tokens += len(text)
        for end in range(_ANCHOR, len(text)):  # not the last one, after which nothing comes
            self._places[tuple(text[end - _ANCHOR : end])].append((number, end))

    def _forget_oldest(self) -> None:
        number = next(iter(self._texts))
        text = self._texts.pop(number)
        self.num_tokens -= len(text)
        for end in range(_ANCHOR, len(text)):
            anchor = tuple(text[end - _ANCHOR : end])
            places = self._places[anchor]
            places.popleft()  # those of the oldest text come first
            if not places:
                del self._places[anchor]

    def passages(self, text: Sequence[int]) -> list[int]:
        """HANDED_OVER ids: passages around the places that have most in common with the end of `text`, -1 between them.

        The best comes last. Of places that go on alike the latest is taken. Nothing but -1 where there is none.
        """
        found: dict[tuple[int, ...], tuple[int, int, int]] = {}  # by what follows: tokens in common, text, end
        places = self._places.get(tuple(text[-_ANCHOR:]), deque())
        for number, end in islice(reversed(places), _PLACES):
            other = self._texts[number]
            place = (_in_common(text, other, end), number, end)
            follows = tuple(other[end : end + LONGEST_MATCH])
            found[follows] = max(found.get(follows, place), place)
        handed: list[int] = []
        for _, number, end in sorted(found.values())[-PASSAGES:]:
            start = max(0, end - LONGEST_MATCH)
            handed += [*self._texts[number][start : start + PASSAGE - 1], -1]
        return handed + [-1] * (HANDED_OVER - len(handed))


def _in_common(text: Sequence[int], other: Sequence[int], end: int) -> int:
    """How many tokens, at most CONTEXT, end both `text` and other[:end]."""
    most = min(CONTEXT, len(text), end)
    return next((i for i in range(most) if text[-1 - i] != other[end - 1 - i]), most)


def draft_from_history(state: DecodeState) -> None:
    """Draft what followed the end of each text in the passages handed over, where that is better than what there is.

    After a match of FILL_MATCH tokens where there is no draft, of OVERRIDE_MATCH in the place of MASK rows'; drafts
    from the text itself stay. Writes drafts, num_drafts and draft_source of `state`, without a read on the host.
    """
    drafts, count, matched = history_drafts(state.text, state.lengths, state.history, state.drafts.shape[1])
    wanted = torch.where(state.num_drafts > 0, OVERRIDE_MATCH, FILL_MATCH)
    count = torch.minimum(count, state.max_drafts)
    used = (matched >= wanted) & (count > 0) & (state.finish_reason == RUNNING)
    used = used & (state.draft_source != SUFFIX_DRAFTS)
    state.drafts.copy_(torch.where(used.unsqueeze(1), drafts, state.drafts))
    state.num_drafts.copy_(torch.where(used, count, state.num_drafts))
    state.draft_source.copy_(torch.where(used, HISTORY_DRAFTS, state.draft_source))


def history_drafts(text: Tensor, lengths: Tensor, history: Tensor, num_drafts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What followed the place in `history` that has most in common with the end of each text; the last of equals.

    text int64 [B, max_len], lengths int32 [B], history int64 [B, H] with -1 between passages -> drafts int64 [B,
    num_drafts], their number int32 [B] (fewer where the passage ends) and the tokens in common int32 [B], at most
    LONGEST_MATCH.
    """
    size, device = history.shape[1], text.device
    offset = torch.arange(LONGEST_MATCH, device=device)
    at = lengths.long().unsqueeze(1) - LONGEST_MATCH + offset
    ending = torch.where(at >= 0, text.gather(1, at.clamp(min=0)), -2)  # which is nowhere in `history`
    # Of each place the last tokens, and the latest of them that differs: all after it are in common.
    before = torch.nn.functional.pad(history, (LONGEST_MATCH - 1, 0), value=-1).unfold(1, LONGEST_MATCH, 1)
    differs = torch.where(before == ending.unsqueeze(1), -1, offset).amax(2)
    goes_on = torch.nn.functional.pad(history[:, 1:] >= 0, (0, 1))
    match = (LONGEST_MATCH - 1 - differs) * goes_on
    best = torch.where(match > 0, match * size + torch.arange(size, device=device), -1).amax(1).clamp(min=0)
    matched, place = best // size, best % size
    source = place.unsqueeze(1) + 1 + torch.arange(num_drafts, device=device)
    drafts = history.gather(1, source.clamp(max=size - 1))
    there = (drafts >= 0) & (source < size)
    count = torch.where(matched > 0, there.long().cumprod(1).sum(1), 0)
    return drafts.clamp(min=0), count.to(torch.int32), matched.to(torch.int32)
