"""The rows of a forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Rows:
    """The rows of one forward, packed by request. T rows, B requests; rows past query_start_loc[B] are padding.

    ids int64 [T]; is_mask bool [T]; positions int64 [T]; slot_mapping int64 [T] (-1: nothing is written);
    page_table int32 [B, max_pages]; seq_lens int32 [B], these rows included; query_start_loc int32 [B + 1];
    tree_mask int64 [T] or None for plain causal rows; max_query_len: the most rows of one request;
    has_masks: False promises, without a look at is_mask, that none is True: the adapter is left out.
    """

    ids: Tensor
    is_mask: Tensor
    positions: Tensor
    slot_mapping: Tensor
    page_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    tree_mask: Tensor | None
    max_query_len: int
    has_masks: bool = True
