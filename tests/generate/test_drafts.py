"""suffix_drafts against a plain search."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_kernels.generate.drafts import LONGEST_MATCH, suffix_drafts


def by_search(tokens: list[int], num_drafts: int) -> tuple[list[int], int]:
    """What followed the latest of the longest earlier occurrences of the end of the text, and the match length."""
    best, matched = -1, 0
    for end in range(len(tokens) - 1):
        run = 0
        while run < LONGEST_MATCH and run <= end and tokens[end - run] == tokens[-1 - run]:
            run += 1
        if run and run >= matched:
            best, matched = end, run
    return tokens[best + 1 : best + 1 + num_drafts] if matched else [], matched


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_equals_a_search(texts: list[list[int]], num_drafts: int) -> None:
    padded = torch.full((len(texts), 45), 1)  # stale tokens lie after the text
    for b, tokens in enumerate(texts):
        padded[b, : len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in texts], dtype=torch.int32)
    drafts, count, matched = suffix_drafts(padded, lengths, num_drafts)
    for b, tokens in enumerate(texts):
        want, match = by_search(tokens, num_drafts)
        assert drafts[b, : int(count[b])].tolist() == want
        assert int(matched[b]) == match
