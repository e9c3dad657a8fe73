"""Introspective-consistency training of a gated LoRA adapter: the base is frozen, only MASK rows carry gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from idlm_kernels.model.adapter import Adapter
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.rerank import RerankHead
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import CleanPass, DenseModel
from idlm_kernels.training.distance import total_variation
from idlm_kernels.training.lora import GatedLora, copy_all
from python_ref.contract import NUM_CANDIDATES


@dataclass(frozen=True)
class TrainSettings:
    """What decides a training run. stride N trains N - 1 MASK rows per block.

    spacing: a block starts every so many tokens, at a random offset. loss: "ce", cross-entropy; "tv", total
    variation (`training.distance`) with `kl` times the Kullback-Leibler divergence; "ce-tv", first the one and for the
    last fifth of the steps the other, each with a warm-up of its own. hard, soft: weights of the base model's own token
    and of its distribution, as targets; against the distribution alone cross-entropy has the gradient of the
    Kullback-Leibler divergence. curriculum: strides 2, 4, 8 .. N for an equal share of the steps each, not N for all.
    offset_decay: weight of MASK row j is offset_decay^j.
    rerank_width: of the re-ranking head, 0 for none. noise_below: 0, and MASK rows embed a vector that is trained too;
    else they embed ids drawn from 1 .. noise_below - 1. start: what the run began with, if not with nothing (a hash).
    """

    stride: int = 4
    rank: int = 16
    alpha: float = 16.0
    steps: int = 1000
    batch: int = 12
    spacing: int = 3
    learning_rate: float = 2e-3
    warmup: int = 20
    loss: Literal["ce", "tv", "ce-tv"] = "ce"
    kl: float = 0.0
    curriculum: bool = False
    hard: float = 0.5
    soft: float = 0.5
    offset_decay: float = 0.7
    rerank_width: int = 256
    noise_below: int = 0
    seed: int = 0
    start: str = ""

    def __post_init__(self) -> None:
        least = {
            "stride": 2,
            "rank": 1,
            "steps": 1,
            "batch": 1,
            "spacing": 1,
            "warmup": 0,
            "kl": 0,
            "hard": 0,
            "soft": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least {low}")
        if self.noise_below < 0 or self.noise_below == 1:
            raise ValueError(f"noise_below is {self.noise_below}, wanted 0 or at least 2")
        if self.loss not in ("ce", "tv", "ce-tv"):
            raise ValueError(f"loss is {self.loss!r}, wanted 'ce', 'tv' or 'ce-tv'")
        if self.loss != "ce" and abs(self.hard + self.soft - 1) > 1e-6:
            raise ValueError(f"hard + soft is {self.hard + self.soft:g}, wanted 1: total variation is of distributions")

    @property
    def num_spec_tokens(self) -> int:
        return self.stride - 1

    @property
    def first_tv_step(self) -> int:
        """Steps before this one fall by cross-entropy, the others by total variation."""
        return {"ce": self.steps, "tv": 0, "ce-tv": self.steps - max(1, self.steps // 5)}[self.loss]

    def stride_at(self, step: int) -> int:
        """The stride that a step trains."""
        if not self.curriculum:
            return self.stride
        strides = [*(2**i for i in range(1, self.stride.bit_length()) if 2**i < self.stride), self.stride]
        return strides[min(step * len(strides) // self.steps, len(strides) - 1)]

    def rate(self, step: int) -> float:
        """Learning rate of a step. The second part of "ce-tv" rises to half the height of the first."""
        if self.loss != "ce-tv":
            return rate_at(step, self.steps, self.warmup, self.learning_rate)
        first = self.first_tv_step
        if step < first:
            return rate_at(step, first, self.warmup, self.learning_rate)
        return rate_at(step - first, self.steps - first, self.warmup, self.learning_rate / 2)


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Batch:
    """Right-padded sequences and the blocks of MASK rows that are trained on them.

    ids int64 [B, T]; next_ids int64 [B, T]: what clean rows predict, -1 outside of the answers; anchors int64 [B, A]:
    the clean row before each block; labels int64 [B, A, K]: what MASK rows predict, -1 where the answer ends before;
    noise int64 [B, A * K]: ids that MASK rows embed, None where that is the adapter's vector; weight fp32 [B, A, K]: of
    each label in the loss, besides that of its place in the block, None where all weigh the same.
    """

    ids: Tensor
    next_ids: Tensor
    anchors: Tensor
    labels: Tensor
    noise: Tensor | None = None
    weight: Tensor | None = None


def make_batch(
    samples: Sequence[Sample], num_spec_tokens: int, spacing: int, generator: torch.Generator, device: torch.device
) -> Batch:
    """Blocks start at every spacing-th clean row of an answer (its last prompt row included), at a random offset."""
    length = max(len(s.prompt) + len(s.answer) for s in samples)
    ids = torch.zeros(len(samples), length + num_spec_tokens + 1, dtype=torch.int64)
    labelled = torch.full_like(ids, -1)
    rows = []
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        ids[row, :end] = torch.tensor(sample.prompt + sample.answer)
        labelled[row, start:end] = ids[row, start:end]
        offset = int(torch.randint(spacing, (1,), generator=generator))
        rows.append(torch.arange(start - 1 + offset, max(end - 2, start + offset), spacing))
    count = max(map(len, rows))
    anchors = torch.stack([F.pad(row, (0, count - len(row)), value=-1) for row in rows])
    targets = anchors.clamp(min=0).unsqueeze(2) + 2 + torch.arange(num_spec_tokens)
    labels = labelled.unsqueeze(1).expand(-1, count, -1).gather(2, targets.clamp(max=labelled.shape[1] - 1))
    labels = torch.where(anchors.unsqueeze(2) < 0, -1, labels)
    next_ids = labelled[:, 1 : length + 1]
    return Batch(*(x.to(device) for x in (ids[:, :length], next_ids, anchors.clamp(min=0), labels)))


@dataclass
class Trainee:
    """What is trained: the adapter and the re-ranking head, with Adam's state."""

    lora: GatedLora
    rerank: RerankHead | None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def parameters(self) -> list[Tensor]:
        return self.lora.parameters() + (self.rerank.parameters() if self.rerank else [])

    @classmethod
    def new(cls, model: DenseModel, settings: TrainSettings, start: Adapter | None = None) -> Trainee:
        """What a run begins with: nothing learned yet, or all that `start` holds, where it fits the settings."""
        mask_id, width = model.config.mask_token_id, settings.rerank_width
        mask = model.embedding.float().mean(0) if mask_id is None else model.embedding[mask_id].float()
        lora = GatedLora(model.config, settings.rank, settings.alpha, mask, settings.seed)
        head = _new_head(model, width, settings.seed + 1) if width else None
        if start is not None:
            lora.copy_(start)
            if head is not None and start.rerank_head is not None:
                copy_all(f"{start.name}: its re-ranking head", head.parameters(), start.rerank_head.parameters())
        return cls(lora, head)


def save_run(
    path: Path,
    step: int,
    settings: dict[str, object],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint in one piece: there is always a whole one, whatever happens."""
    tensors = {}
    for i, p in enumerate(parameters):
        tensors[f"{i}.value"] = p.detach()
        if state := optimizer.state.get(p):  # at stride 2 the re-ranking head carries nothing on
            tensors |= {f"{i}.mean": state["exp_avg"], f"{i}.square": state["exp_avg_sq"]}
    part = path.with_suffix(".part")
    # One entry: safetensors writes several in an order that changes from process to process.
    save_file(tensors, part, metadata={"run": json.dumps({"step": step, "settings": settings}, sort_keys=True)})
    part.replace(path)


def load_run(
    path: Path, settings: dict[str, object], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Continue from a checkpoint of the same settings; returns the number of steps that were taken."""
    with safe_open(path, "pt") as file:
        run = json.loads((file.metadata() or {}).get("run", '{"settings": {}}'))
        _require_same(path, run["settings"], settings)
        step, names = int(run["step"]), set(file.keys())
        for i, p in enumerate(parameters):
            value = file.get_tensor(f"{i}.value")
            if value.shape != p.shape:
                raise CheckpointError(
                    f"{path}: tensor {i} has shape {list(value.shape)}, this model asks for {list(p.shape)}"
                )
            with torch.no_grad():
                p.copy_(value)
            if f"{i}.mean" in names:
                mean, square = (file.get_tensor(f"{i}.{name}").to(p.device) for name in ("mean", "square"))
                state = {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": square}
                optimizer.state[p] = state
    return step


def _require_same(path: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    different = [
        f"{key} {found.get(key)!r} and not {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{path}: from a run with other settings ({', '.join(different)}); choose another --output or delete it"
        )


class Vocabulary:
    """The ids that occur in the data: the LM head is restricted to them, which makes training affordable."""

    def __init__(self, model: DenseModel, samples: Sequence[Sample]):
        ids = sorted({token for sample in samples for token in sample.answer})
        self.ids = torch.tensor(ids, device=model.device)
        self.head = model.head[self.ids]
        self._index = torch.full((model.head.shape[0],), -1, device=model.device)
        self._index[self.ids] = torch.arange(len(ids), device=model.device)

    def index(self, ids: Tensor) -> Tensor:
        """Places of ids in the vocabulary; -1 stays -1."""
        return torch.where(ids < 0, -1, self._index[ids.clamp(min=0)])


def loss_of(
    model: DenseModel, trainee: Trainee, batch: Batch, vocabulary: Vocabulary, settings: TrainSettings, step: int = 0
) -> Tensor:
    """The training loss of a batch at a step (adapter and re-ranking head together)."""
    with torch.no_grad():
        clean = model.clean(batch.ids)
    lora = trainee.lora
    embedded = lora.mask_embedding if batch.noise is None else F.embedding(batch.noise, model.embedding)
    num_spec_tokens = batch.labels.shape[2]
    hidden = model.masked(clean, batch.anchors, num_spec_tokens, embedded, lora)
    rows = batch.labels >= 0
    weight = settings.offset_decay ** torch.arange(num_spec_tokens, device=model.device, dtype=torch.float32)
    weight = weight.expand(rows.shape)[rows]
    if batch.weight is not None:
        weight = weight * batch.weight[rows]
    labels = vocabulary.index(batch.labels[rows])
    teacher = _teacher(model, clean, batch)
    # Short answers at an unlucky offset may leave no label at all: no gradient then, and no NaN.
    weight = weight / weight.sum().clamp(min=1e-9)
    if step >= settings.first_tv_step:
        read = [hidden[rows]]
        if trainee.rerank is not None:
            # The head adds u to what the LM head reads. Adapter and head are taught together what the two make.
            queries = _queries(model, trainee.rerank, batch, hidden)[rows]
            read.append((read[0].float() + queries).to(model.dtype))
        far = [total_variation(x, vocabulary.head, teacher, labels, settings.hard, settings.kl) for x in read]
        return sum(((part * weight).sum() for part in far), start=hidden.new_zeros((), dtype=torch.float32))
    logits = F.linear(hidden[rows], vocabulary.head).float()
    with torch.no_grad():
        target = settings.soft * F.linear(teacher, vocabulary.head).float().softmax(-1)
        target[torch.arange(len(labels)), labels] += settings.hard
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum()
    if trainee.rerank is not None:
        loss = loss + _rerank_loss(model, trainee.rerank, batch, hidden.detach(), logits.detach(), labels, vocabulary)
    return loss


def _teacher(model: DenseModel, clean: CleanPass, batch: Batch) -> Tensor:
    """Hidden states [R, H] of the base model's own rows that predict what the trained MASK rows predict."""
    num_spec_tokens = batch.labels.shape[2]
    at = batch.anchors.unsqueeze(2) + 1 + torch.arange(num_spec_tokens, device=model.device)
    at = at.clamp(max=clean.hidden.shape[1] - 1).flatten(1).unsqueeze(2).expand(-1, -1, clean.hidden.shape[2])
    return clean.hidden.gather(1, at).unflatten(1, batch.labels.shape[1:])[batch.labels >= 0]


def _rerank_loss(
    model: DenseModel,
    head: RerankHead,
    batch: Batch,
    hidden: Tensor,
    logits: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary,
) -> Tensor:
    """Cross-entropy among the candidates of each row, given the true token before it; rows without the label skip."""
    queries = _queries(model, head, batch, hidden)[batch.labels >= 0]
    values, places = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=1)
    scores = values + (vocabulary.head[places].float() @ queries.unsqueeze(2)).squeeze(2)
    hit = places == labels.unsqueeze(1)
    found = hit.any(1)
    return F.cross_entropy(scores[found], hit[found].long().argmax(1)) if bool(found.any()) else scores.sum() * 0


def _queries(model: DenseModel, head: RerankHead, batch: Batch, hidden: Tensor) -> Tensor:
    """u [B, A, K, H] of every MASK row, given the true token before what it predicts."""
    state, parts = None, []
    for j in range(hidden.shape[2]):
        before = (batch.anchors + 1 + j).clamp(max=batch.ids.shape[1] - 1)
        previous = F.embedding(batch.ids.gather(1, before), model.embedding).float()
        query, state = head.query(hidden[:, :, j].float(), previous, state)
        parts.append(query)
    return torch.stack(parts, dim=2)


def _new_head(model: DenseModel, width: int, seed: int) -> RerankHead:
    hidden, generator = model.config.hidden_size, torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float) -> Tensor:
        value = torch.randn(rows, columns, generator=generator) * (scale / math.sqrt(columns))
        return value.to(model.device).requires_grad_()

    return RerankHead(
        matrix(width, hidden, 1.0), matrix(width, hidden, 1.0), matrix(width, width, 0.5), matrix(hidden, width, 0.0)
    )


def train(
    model: DenseModel,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    settings: TrainSettings,
    checkpoint: Path,
    *,
    start: Adapter | None = None,
    until: int | None = None,
    weigh: Callable[[Sequence[int], Batch], Tensor] | None = None,
    evaluate_every: int = 50,
    save_every: int = 25,
    report: Callable[[Trainee, int, float, Predictions | None], None] = lambda trainee, step, loss, predictions: None,
) -> Trainee:
    """Train, from `start` where it is given, or go on from `checkpoint` where it exists, until settings.steps.

    until: stop after so many steps already; what was learned is that of a longer run that was stopped there. weigh: the
    weight of a batch, made of the indices of its samples and the batch.

    report(trainee, steps taken, loss, predictions on held_out or None) is called after each step. The same seed gives
    the same adapter, whether or not the run was interrupted.
    """
    trainee = Trainee.new(model, settings, start)
    identity = {**asdict(settings), "samples": len(samples)}
    step = load_run(checkpoint, identity, trainee.parameters(), trainee.optimizer) if checkpoint.exists() else 0
    vocabulary = Vocabulary(model, samples)
    order = Order(samples, settings.batch, settings.seed)
    end = settings.steps if until is None else min(until, settings.steps)
    while step < end:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        indices = order.batch(step)
        chosen = [samples[i] for i in indices]
        batch = make_batch(chosen, settings.stride_at(step) - 1, settings.spacing, generator, model.device)
        if settings.noise_below:
            shape = len(chosen), batch.labels[0].numel()
            batch.noise = torch.randint(1, settings.noise_below, shape, generator=generator).to(model.device)
        if weigh is not None:
            batch.weight = weigh(indices, batch)
        loss = loss_of(model, trainee, batch, vocabulary, settings, step)
        trainee.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.lora.parameters(), 1.0)
        for group in trainee.optimizer.param_groups:
            group["lr"] = settings.rate(step)
        trainee.optimizer.step()
        step += 1
        last = step == end
        if last or step % save_every == 0:
            save_run(checkpoint, step, identity, trainee.parameters(), trainee.optimizer)
        predictions = None
        if held_out and (last or step % evaluate_every == 0):
            below = settings.noise_below
            predictions = Predictions.of(model, trainee.lora, trainee.rerank, held_out, settings.num_spec_tokens, below)
        report(trainee, step, float(loss.detach()), predictions)
    return trainee


class Order:
    """Which samples each step sees: every epoch a new permutation, in batches of about one length."""

    def __init__(self, samples: Sequence[Sample], size: int, seed: int):
        self._lengths = [len(s.prompt) + len(s.answer) for s in samples]
        self._usable = [i for i, s in enumerate(samples) if len(s.answer) >= 2]
        self._size, self._seed = size, seed
        self._epoch, self._batches = -1, [[0]]
        if not self._usable:
            raise ValueError("no sample has an answer of two tokens or more: there is nothing to train on")

    def batch(self, step: int) -> list[int]:
        size = self._size
        per_epoch = -(-len(self._usable) // size)
        if (epoch := step // per_epoch) != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 7_919 + epoch)
            shuffled = [self._usable[i] for i in torch.randperm(len(self._usable), generator=generator).tolist()]
            batches = []
            for start in range(0, len(shuffled), size * 16):
                pool = sorted(shuffled[start : start + size * 16], key=lambda i: self._lengths[i])
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            turns = torch.randperm(len(batches), generator=generator).tolist()
            self._epoch, self._batches = epoch, [batches[i] for i in turns]
        return self._batches[step % per_epoch]
