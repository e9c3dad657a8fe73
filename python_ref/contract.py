"""The constants and types that references, operations, kernels and engine share; the C++ headers hold the same numbers.

Kernels get them as constants of the compiler, so a number that stands here stands nowhere else in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Streams of noise.
STREAM_TARGET = 0  # target, bonus and residual samples, every AR sample, and the drafts of `match`
STREAM_DRAFT = 1  # drafts of `rejection`
STREAM_ACCEPT = 2  # the acceptance uniform of `rejection`, at id 0
STREAM_INPUT = 3  # what MASK rows embed, where that is noise

# Bits of `error_flags`.
FLAG_NAN = 1  # a logit was NaN, taken as -inf
FLAG_INF = 2  # a logit was +inf, taken as the largest finite value
FLAG_EMPTY_ROW = 4  # no finite logit: the lowest allowed id was taken
FLAG_BAD_DRAFT = 8  # a draft id or draft count out of range: the draft was rejected

# Values of `finish_reason`.
RUNNING = 0
STOPPED = 1  # by an id
LENGTH = 2  # by the length limit
IDLE = 3  # of a slot of the batch without a request, or whose prompt is being prefilled
FAILED = 4  # of a request whose logits were NaN

# Values of `draft_source`.
NO_DRAFTS = 0
MASK_DRAFTS = 1  # of MASK rows
SUFFIX_DRAFTS = 2  # of the text itself
HISTORY_DRAFTS = 3  # of finished outputs

# Drafts of the text, after a match of so many of its last tokens.
FILL_MATCH = 2  # where MASK rows have no draft
OVERRIDE_MATCH = 6  # in the place of theirs

GREEDY_BELOW = 1e-4  # temperatures below this mean argmax
NUM_CANDIDATES = 32  # of a MASK row, among which re-ranking chooses


@dataclass
class DraftDistributions:
    """The distributions that the current drafts were drawn from, exactly as they were sampled (`rejection` only).

    logits [B, K, V]: the MASK rows, logit_bias added; cut fp32 [B, K]: an id is kept iff logit / T >= cut;
    log_norm fp32 [B, K]: log-sum-exp of the kept logits / T; both fp64 for fp64 logits. Read, then overwritten with
    those of the next drafts; a request that is proposed none keeps what is there.
    """

    logits: Tensor
    cut: Tensor
    log_norm: Tensor

    @classmethod
    def empty(
        cls, batch: int, num_drafts: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> DraftDistributions:
        acc = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, num_drafts, vocab_size, dtype=dtype, device=device),
            torch.zeros(batch, num_drafts, dtype=acc, device=device),
            torch.zeros(batch, num_drafts, dtype=acc, device=device),
        )

    def requests(self, first: int, last: int) -> DraftDistributions:
        """A view of requests first .. last - 1."""
        return DraftDistributions(self.logits[first:last], self.cut[first:last], self.log_norm[first:last])
