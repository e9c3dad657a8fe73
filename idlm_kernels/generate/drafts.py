"""Draft sources. Drafts may come from anywhere: in `match` a wrong one costs a row and never changes the output."""

from __future__ import annotations

import torch
from torch import Tensor

NO_DRAFTS, MASK_DRAFTS, SUFFIX_DRAFTS = 0, 1, 2  # values of `draft_source`
SOURCES = {MASK_DRAFTS: "mask", SUFFIX_DRAFTS: "suffix"}

LONGEST_MATCH = 8  # tokens that are compared
FILL_MATCH = 2  # a match of so many tokens drafts where MASK rows have no draft
OVERRIDE_MATCH = 6  # so many replace the drafts of MASK rows


def suffix_drafts(text: Tensor, lengths: Tensor, num_drafts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What followed the last earlier occurrence of the end of each text, on the device and without a search loop.

    text int64 [B, max_len], lengths int32 [B] -> drafts int64 [B, num_drafts], their number int32 [B] (fewer where
    the earlier occurrence lies near the end) and the length of the match int32 [B], at most LONGEST_MATCH tokens.
    """
    max_len = text.shape[1]
    index = torch.arange(max_len, device=text.device)
    length = lengths.long().unsqueeze(1)
    earlier = index < length - 1  # places where an earlier occurrence may end
    run = torch.ones_like(earlier)
    match = torch.zeros_like(text)
    for back in range(min(LONGEST_MATCH, max_len)):
        end = text.gather(1, (length - 1 - back).clamp(min=0))
        same = (text[:, : max_len - back] == end) & (length - 1 - back >= 0)
        run = run & torch.nn.functional.pad(same, (back, 0))
        match = match + run
    # The longest match, the latest of equals.
    best = torch.where(earlier, match * max_len + index, -1).amax(1).clamp(min=0)
    matched, end_of_match = best // max_len, best % max_len
    offset = torch.arange(num_drafts, device=text.device)
    source = end_of_match.unsqueeze(1) + 1 + offset
    drafts = text.gather(1, source.clamp(max=max_len - 1))
    count = (length.squeeze(1) - 1 - end_of_match).clamp(0, num_drafts)
    count = torch.where((matched > 0) & (length.squeeze(1) > 1), count, 0)
    return drafts, count.to(torch.int32), torch.where(count > 0, matched, 0).to(torch.int32)
