"""How far the drafts' distribution q is from the distribution p that verification draws from.

The chance that a draft of q is accepted is 1 - TV(p, q), with TV = sum |p - q| / 2: total variation is what decoding
pays for, and cross-entropy only bounds it. Where q is still far from p total variation gives next to no gradient, so
a little of the Kullback-Leibler divergence beside it, or a start from an adapter that knows something, helps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_VALUES = 1 << 23  # logits at once: 32 MB in fp32, whatever the vocabulary


def total_variation(hidden: Tensor, head: Tensor, target: Tensor, labels: Tensor, hard: float, kl: float) -> Tensor:
    """sum |p - q| + kl * KL(p, q) over the vocabulary, fp32 [R]; twice the chance of a rejection where kl is 0.

    q is the softmax of hidden [R, H] through the LM head [V, H]. p is the one of target [R, H], hidden states of the
    base, mixed with the labels int64 [R]: a share `hard` of its mass goes to the label. Chunks of rows are computed
    anew for the gradient, so that R * V values are never held. Gradients go to hidden alone.

    Example:

        >>> head, labels = torch.eye(2), torch.tensor([0])
        >>> sure, open = torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> total_variation(open, head, sure, labels, hard=0.0, kl=0.0)
        tensor([1.])
    """
    rows = max(1, _CHUNK_VALUES // len(head))
    parts = zip(hidden.split(rows), target.split(rows), labels.split(rows), strict=True)
    found = [checkpoint(_distances, h, head, t, ids, hard, kl, use_reentrant=False) for h, t, ids in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _distances(hidden: Tensor, head: Tensor, target: Tensor, labels: Tensor, hard: float, kl: float) -> Tensor:
    log_q = F.linear(hidden, head).float().log_softmax(-1)
    with torch.no_grad():
        p = F.linear(target, head).float().softmax(-1) * (1 - hard)
        p[torch.arange(len(labels), device=p.device), labels] += hard
    distance = (p - log_q.exp()).abs().sum(-1)
    if kl:
        distance = distance + kl * F.kl_div(log_q, p, reduction="none").sum(-1)
    return distance
