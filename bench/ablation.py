"""What the choices of training an adapter are worth at equal steps, data and seed: one small run of each, from nothing.

    python -m bench.ablation [--output FOLDER] [--steps 60] [--batch 4] [--prompts 128] [--tokens 48] [--rank 16]
                             [--held-out 24] [--held-out-tokens 64] [--threads 1] [--seed 0] [--only NAME ...] [--json]

Each row of the table differs from the first in one setting. Measured on prompts of bench/heldout.jsonl and the model's
own greedy answers to them, without a re-ranking head: share of drafts that are right where all before them are, and
tokens per forward at N = 4 (`training.acceptance`). Everything is written to FOLDER as it goes: the same command goes
on after an interruption, and the same seed gives the same table on one kind of processor with one thread. So small a
budget shows what learns fastest, not what is best in the end. "another seed" is the first run once more with other
batches: what differs from the first by as little as it does says nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.acceptance import HELD_OUT, table
from idlm_kernels.generate.batch_file import encoder
from idlm_kernels.model import load_checkpoint
from idlm_kernels.model.tokenizer import Tokenizer
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import DataSettings, Sample, generate_samples, read_samples
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.export import file_sha256
from idlm_kernels.training.memory import keep_freed_memory
from idlm_kernels.training.prompts import prompts
from idlm_kernels.training.train import TrainSettings, train


def variants(first: TrainSettings, noise_below: int) -> dict[str, TrainSettings]:
    """The runs by name; the first is what the others differ from in one setting."""
    rank = first.rank
    changed: dict[str, dict[str, Any]] = {
        "CE + KL, halves": {},
        "another seed": {"seed": first.seed + 1},
        "CE": {"hard": 1.0, "soft": 0.0},
        "KL": {"hard": 0.0, "soft": 1.0},
        "TV + 0.01 KL": {"loss": "tv", "kl": 0.01, "hard": 0.0, "soft": 1.0},
        "CE + KL, then TV": {"loss": "ce-tv", "kl": 0.01},
        "alpha/r 4": {"alpha": 4.0 * rank},
        "alpha/r 16": {"alpha": 16.0 * rank},
        "alpha/r 64": {"alpha": 64.0 * rank},
        "uniform noise": {"noise_below": noise_below},
        "curriculum": {"curriculum": True},
        "twice the rank": {"rank": 2 * rank, "alpha": 2 * first.alpha},
    }
    return {name: dataclasses.replace(first, **changes) for name, changes in changed.items()}


def held_out_prompts(tokenizer: Tokenizer, count: int) -> list[tuple[list[int], str]]:
    """Prompt ids and domain of prompts spread over bench/heldout.jsonl."""
    records = [json.loads(line) for line in HELD_OUT.open(encoding="utf-8")]
    count = min(count, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    encode = encoder(tokenizer, tokenizer.has_chat_template, None)
    return [(encode({"prompt": record["prompt"]}), record["domain"]) for record in chosen]


def run(
    name: str,
    settings: TrainSettings,
    base: DenseModel,
    samples: list[Sample],
    held_out: list[Sample],
    folder: Path,
) -> dict[str, Any]:
    """A row of the table; from FOLDER where the run is there, or a part of it."""
    folder.mkdir(parents=True, exist_ok=True)
    saved, figures = folder / "checkpoint.safetensors", folder / "row.json"
    start, losses = time.monotonic(), []
    trainee = train(base, samples, [], settings, saved, report=lambda trainee, step, loss, _: losses.append(loss))
    seconds = time.monotonic() - start
    if not losses and figures.exists():
        row: dict[str, Any] = json.loads(figures.read_text())
        return row
    found = Predictions.of(base, trainee.lora, None, held_out, settings.stride - 1, settings.noise_below)
    row = {
        "run": name,
        **{f"draft {j}": share for j, share in enumerate(found.acceptance(), 1)},
        "chain": found.tpf(quadratic=False),
        "quadratic": found.tpf(quadratic=True),
        "s per step": seconds / max(1, len(losses)),
    }
    figures.write_text(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--output", type=Path, default=Path("ablation"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--held-out-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these runs alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)

    checkpoint = load_checkpoint(options.model)
    base = DenseModel.load(checkpoint, torch.device("cpu"), torch.bfloat16)
    first = TrainSettings(
        rank=options.rank,
        alpha=float(options.rank),
        steps=options.steps,
        batch=options.batch,
        warmup=min(20, max(1, options.steps // 6)),
        rerank_width=0,
        seed=options.seed,
    )
    runs = variants(first, checkpoint.config.mask_token_id or checkpoint.config.vocab_size)
    if unknown := set(options.only or ()) - runs.keys():
        parser.error(f"no run is named {', '.join(sorted(unknown))}; there are {', '.join(runs)}")
    encode = encoder(checkpoint.tokenizer, checkpoint.tokenizer.has_chat_template, None)
    texts = [(encode({"prompt": p.text}), p.domain) for p in prompts(options.prompts, options.seed)]
    made = DataSettings(file_sha256(checkpoint.path), options.tokens, min(128, len(texts)), options.seed)
    greedy = dataclasses.replace(made, max_tokens=options.held_out_tokens, sampled_share=0.0)
    data, seen = options.output / "data.jsonl", options.output / "held_out.jsonl"
    generate_samples(base, texts, data, made)
    generate_samples(base, held_out_prompts(checkpoint.tokenizer, options.held_out), seen, greedy)
    samples, held_out = read_samples(data), read_samples(seen)

    rows, console = [], Console(stderr=True)
    for name, settings in runs.items():
        if options.only and name not in options.only:
            continue
        folder = options.output / "".join(c if c.isalnum() else "-" for c in name)
        rows.append(run(name, settings, base, samples, held_out, folder))
        console.print(table(f"{name} is done", rows[-1:]))
    record = {"machine": platform.processor() or platform.machine(), "settings": vars(options), "rows": rows}
    if options.json:
        print(json.dumps(record, default=str))
    else:
        answers = sum(len(s.answer) for s in samples)
        title = f"{options.steps} steps of {options.batch}, {answers} tokens of {len(samples)} answers"
        Console().print(table(f"{title}, seed {options.seed}", rows))


if __name__ == "__main__":
    main()
