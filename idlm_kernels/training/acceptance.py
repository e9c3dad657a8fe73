"""How many drafts would be accepted: greedy acceptance and tokens per forward on known texts, from one forward each.

Exact for greedy decoding: the base's own continuation is the path, so the drafts of every point on it can be computed
at once and the steps of a plan walked afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm_kernels.model.rerank import RerankHead
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.lora import GatedLora
from python_ref.contract import NUM_CANDIDATES
from python_ref.noise import noise_ids


@dataclass
class Predictions:
    """plain, reranked: per sample bool [n, K], whether a draft is right; row i: the drafts made when answer token i was
    sampled, for tokens i + 1 ... . plain without the re-ranking head, reranked with it
    (the same where there is none)."""

    plain: list[Tensor]
    reranked: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: DenseModel,
        lora: GatedLora | None,
        head: RerankHead | None,
        samples: Sequence[Sample],
        num_spec_tokens: int,
        noise_below: int = 0,
    ) -> Predictions:
        """lora None: of a converted model, whose MASK is a token of its own. noise_below: MASK rows embed ids drawn
        from 1 .. noise_below - 1, with the seed 0 as a decode would draw them for a chain."""
        vector = model.own_mask if lora is None else lora.mask_embedding
        plain, reranked = [], []
        for sample in samples:
            ids = torch.tensor([sample.prompt + sample.answer], device=model.device)
            start, count = len(sample.prompt), len(sample.answer)
            anchors = torch.arange(start - 1, start - 1 + count, device=model.device)
            embedded = mask_rows(model, vector, anchors, num_spec_tokens, noise_below, seed=0)
            hidden = model.masked(model.clean(ids), anchors[None], num_spec_tokens, embedded, lora)[0]
            logits = F.linear(hidden, model.head).float()
            if model.config.mask_token_id is not None:
                logits[..., model.config.mask_token_id] = -torch.inf
            ahead = anchors.unsqueeze(1) + 2 + torch.arange(num_spec_tokens, device=model.device)
            labels = F.pad(ids[0], (0, num_spec_tokens + 2), value=-1)[ahead]
            plain.append((logits.argmax(-1) == labels).cpu())
            if head is None:
                reranked.append(plain[-1])
            else:
                reranked.append((_rerank(model, head, hidden, logits, ids[0, anchors + 1]) == labels).cpu())
        return cls(plain, reranked)

    @property
    def num_spec_tokens(self) -> int:
        """K, the drafts of a row."""
        return self.plain[0].shape[1]

    def acceptance(self, *, reranked: bool = False) -> list[float]:
        """By draft index: the share of drafts that are right where all before them are.

        Over all points of the answers. Drafts beyond the end of an answer are never verified and do not count.
        """
        right, verified = [0] * self.num_spec_tokens, [0] * self.num_spec_tokens
        for stands in self.reranked if reranked else self.plain:
            prefix = stands.long().cumprod(1)
            for j in range(self.num_spec_tokens):
                within = prefix[: max(0, len(prefix) - 1 - j)]  # rows whose draft j lies in the answer
                right[j] += int(within[:, j].sum())
                verified[j] += len(within) if j == 0 else int(within[:, j - 1].sum())
        return [r / max(1, v) for r, v in zip(right, verified, strict=True)]

    def tpf(self, *, quadratic: bool, reranked: bool = False, stride: int | None = None) -> float:
        """Committed tokens per forward of the plan's steps, over all samples together."""
        steps = self.steps(quadratic=quadratic, reranked=reranked, stride=stride)
        return sum(steps) / max(1, len(steps))

    def steps(self, *, quadratic: bool, reranked: bool = False, stride: int | None = None) -> list[int]:
        """Tokens that each step of the plan commits, from sample to sample."""
        most = self.num_spec_tokens if stride is None else stride - 1
        return self.budgeted_steps([most if quadratic else 0] * most, reranked=reranked)

    def budgeted_steps(self, widths: Sequence[int], *, reranked: bool = False) -> list[int]:
        """Tokens that each step of a budgeted plan commits, from sample to sample.

        widths[b]: the MASK rows of branch b, at most M = len(widths). The branch after a step's last draft has M
        whatever the widths, so that widths of 0 are the chain and widths of M the quadratic plan.
        """
        most = len(widths)
        if not 0 < most <= self.num_spec_tokens:
            raise ValueError(f"widths has {most} entries, wanted 1 to {self.num_spec_tokens}, the drafts of a row")
        if not all(0 <= width <= most for width in widths):
            raise ValueError(f"widths is {list(widths)}, wanted 0 to {most} MASK rows in each branch")
        committed = []
        for stands in self.reranked if reranked else self.plain:
            accepted = stands[:, :most].long().cumprod(1).sum(1).tolist()
            i, n = 0, most  # the prefill samples token 0 and drafts from there
            while i + 1 < len(accepted):
                a = min(n, accepted[i])
                committed.append(min(a + 1, len(accepted) - 1 - i))
                i += committed[-1]
                n = most if a == n else widths[a]
        return committed


def mask_rows(
    model: DenseModel, vector: Tensor, anchors: Tensor, num_spec_tokens: int, noise_below: int, seed: int
) -> Tensor:
    """What the MASK rows after clean rows `anchors` [A] of one sample embed: a vector [H], or noise [A * K, H]."""
    if not noise_below:
        return vector
    position = (anchors.unsqueeze(1) + 1 + torch.arange(num_spec_tokens, device=anchors.device)).flatten()
    return F.embedding(noise_ids(torch.full_like(position, seed), position, position, noise_below), model.embedding)


def _rerank(model: DenseModel, head: RerankHead, hidden: Tensor, logits: Tensor, previous: Tensor) -> Tensor:
    """Greedy drafts [n, K] after re-ranking; previous int64 [n]: the tokens that the MASK rows could not see."""
    drafts, state = [], None
    for j in range(hidden.shape[1]):
        embedded = F.embedding(previous, model.embedding).float()
        query, state = head.query(hidden[:, j].float(), embedded, state)
        values, ids = logits[:, j].topk(min(NUM_CANDIDATES, logits.shape[2]), dim=1)
        scores = values + (model.head[ids].float() @ query.unsqueeze(2)).squeeze(2)
        previous = ids.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        drafts.append(previous)
    return torch.stack(drafts, dim=1)
