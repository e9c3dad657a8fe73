"""How far the drafts of an adapter stand on prompts that it has not seen, and what that is worth on this machine.

    python -m bench.acceptance [--adapter FOLDER] [--prompts 48] [--tokens 128] [--speed 16] [--rejection 12]
                               [--json] [--html FILE]

(1) acceptance by draft index and domain, greedy, with and without re-ranking; (2) tokens per forward (TPF) of chain and
quadratic plans, greedy and at T = 0.7, `match`: the output is the AR text whatever is drafted, so one forward over each
AR text gives the drafts of every step of every plan, and the steps are walked; (3) --rejection: TPF of as many prompts
decoded with `rule="rejection"`, whose text is another with every plan; (4) --speed: tokens/s of as many prompts in
each plan, one prompt at a time, the plans taking turns. Figures of a CPU say nothing about a GPU. --html: a page that
shows all of it beside the formulas (`bench.explorer`).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.explorer import budgeted_points, page
from idlm_kernels import ops
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.rerank import rerank_drafts
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model import load_checkpoint
from idlm_kernels.model.adapter import DEFAULT_ADAPTER, load_adapter
from idlm_kernels.training.acceptance import Predictions, mask_rows
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.lora import GatedLora

HELD_OUT = Path(__file__).with_name("heldout.jsonl")
STRIDES = (2, 3, 4, 6)
BUDGETS = (6, 8, 9, 10, 12, 14, 16, 20, 25, 30, 36)  # rows
TEMPERATURE = 0.7
SEED = 1
SPEED_PLANS = (
    ("ar", 1),
    ("chain", 2),
    ("chain", 3),
    ("chain", 4),
    ("quadratic", 2),
    ("quadratic", 3),
    ("quadratic", 4),
)


@dataclass
class Text:
    """A held-out prompt and the AR text that follows it, as ids."""

    domain: str
    prompt: list[int]
    answer: list[int]
    seed: int


def held_out(generator: Generator, count: int) -> list[tuple[str, list[int]]]:
    """Domain and prompt ids of prompts spread over the file."""
    records = [json.loads(line) for line in HELD_OUT.open(encoding="utf-8")]
    chosen = [records[i * len(records) // count] for i in range(min(count, len(records)))]
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    found = []
    for record in chosen:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": record["prompt"]}])
        found.append((record["domain"], tokenizer.encode(chat, add_special_tokens=False)))
    return found


def ar_texts(generator: Generator, prompts: list[tuple[str, list[int]]], tokens: int, temperature: float) -> list[Text]:
    params = SamplingParams(temperature=temperature, seed=SEED, max_tokens=tokens)
    results = generator.generate([ids for _, ids in prompts], params, plan="ar")
    return [
        Text(domain, ids, result.token_ids, result.seed) for (domain, ids), result in zip(prompts, results, strict=True)
    ]


@torch.no_grad()
def predictions(
    generator: Generator,
    dense: DenseModel,
    lora: GatedLora,
    texts: list[Text],
    temperature: float,
    num_spec_tokens: int,
) -> Predictions:
    """Whether the drafts of every point of every text stand, by the sampling and the re-ranking of the generator."""
    model, plain, reranked = generator.model, [], []
    for text in texts:
        ids = torch.tensor([text.prompt + text.answer])
        anchors = torch.arange(len(text.answer)) + len(text.prompt) - 1
        below = model.mask_input.noise_below
        embedded = mask_rows(dense, lora.mask_embedding, anchors, num_spec_tokens, below, text.seed)
        hidden = dense.masked(dense.clean(ids), anchors[None], num_spec_tokens, embedded, lora)[0]
        logits = F.linear(hidden, dense.head).flatten(0, 1)
        state = _state_at(generator, anchors + 1, text.seed, temperature, num_spec_tokens)
        positions = (state.lengths.unsqueeze(1) + 1 + torch.arange(num_spec_tokens)).flatten().to(torch.int32)
        each = [
            x.repeat_interleave(num_spec_tokens)
            for x in (state.temperature, state.top_k, state.top_p, state.min_p, state.seed)
        ]
        drafts = ops.sample_rows(logits, positions, *each, state.id_limit, state.sampled_mask_id).view(
            -1, num_spec_tokens
        )
        labels = F.pad(ids[0], (0, num_spec_tokens + 2), value=-1)[positions.long()].view(-1, num_spec_tokens)
        plain.append(drafts == labels)
        if model.rerank_head is not None:
            none = torch.zeros(len(anchors), dtype=torch.int32)
            first, every = torch.arange(len(anchors), dtype=torch.int32) * num_spec_tokens, none + num_spec_tokens
            sampled = ids[0, anchors + 1].unsqueeze(1)
            drafts = rerank_drafts(
                model, state, logits, hidden.flatten(0, 1), first, none, sampled, drafts, every, None
            )
        reranked.append(drafts == labels)
    return Predictions(plain, reranked)


def _state_at(
    generator: Generator, lengths: Tensor, seed: int, temperature: float, num_spec_tokens: int
) -> DecodeState:
    """One place for each point of a text: what re-ranking reads of a state."""
    tokenizer, config = generator.tokenizer, generator.config
    assert tokenizer is not None
    state = DecodeState.empty(
        len(lengths),
        1,
        1,
        num_spec_tokens,
        1,
        mask_token_id=config.mask_token_id,
        id_limit=min(config.vocab_size, tokenizer.vocab_size),
        device=torch.device("cpu"),
    )
    state.lengths.copy_(lengths)
    state.temperature.fill_(temperature)
    state.seed.fill_(seed if seed < 2**63 else seed - 2**64)
    return state


def subsets(texts: list[Text], found: Predictions) -> Iterator[tuple[str, Predictions]]:
    """All texts, then each domain."""
    yield "all", found
    for domain in sorted({text.domain for text in texts}):
        index = [i for i, text in enumerate(texts) if text.domain == domain]
        yield domain, Predictions([found.plain[i] for i in index], [found.reranked[i] for i in index])


def tpf_rows(found: Predictions) -> list[dict[str, Any]]:
    return [
        {
            "stride": stride,
            **{
                f"{'quadratic' if quadratic else 'chain'}{' re-ranked' if again else ''}": found.tpf(
                    quadratic=quadratic, reranked=again, stride=stride
                )
                for quadratic in (False, True)
                for again in (False, True)
            },
        }
        for stride in STRIDES
    ]


def budget_rows(found: Predictions, again: bool) -> list[dict[str, Any]]:
    """TPF of the walk within row budgets: chain and quadratic plans, and the budgeted ones that the formula picks.

    "in turn": what two quadratic plans give that take turns, so that a step has as many rows on average.
    """
    longest = found.num_spec_tokens + 1
    tpf = {
        kind: {n: found.tpf(quadratic=kind == "quadratic", reranked=again, stride=n) for n in range(2, longest + 1)}
        for kind in ("chain", "quadratic")
    }
    budgeted = budgeted_points(found.acceptance(reranked=again), longest)
    rows = []
    for budget in BUDGETS:
        best = [p for p in budgeted if p.rows <= budget][-1]
        steps = found.budgeted_steps(best.widths, reranked=again)
        n = math.isqrt(budget)
        low, high = tpf["quadratic"][n], tpf["quadratic"][min(n + 1, longest)]
        share = (budget - n * n) / (2 * n + 1)
        rows.append(
            {
                "rows": budget,
                "chain": max(x for n, x in tpf["chain"].items() if 2 * n - 1 <= budget),
                "quadratic": max(x for n, x in tpf["quadratic"].items() if n * n <= budget),
                "in turn": (1 - share) * low + share * high,
                "budgeted": sum(steps) / len(steps),
                "branches": best.plan.removeprefix("budgeted "),
                "its rows": best.rows,
                "formula": best.tpf,
            }
        )
    return rows


def curve(name: str, found: Predictions, again: bool) -> dict[str, Any]:
    """What the explorer draws: acceptance by draft, TPF of each plan, and how many tokens its steps commit."""
    kinds = {"chain": False, "quadratic": True}
    return {
        "name": name,
        "acceptance": found.acceptance(reranked=again),
        "tpf": {
            kind: {str(n): found.tpf(quadratic=quadratic, reranked=again, stride=n) for n in STRIDES}
            for kind, quadratic in kinds.items()
        },
        "committed": {
            kind: [steps.count(i) / len(steps) for i in range(1, 5)]
            for kind, quadratic in kinds.items()
            for steps in [found.steps(quadratic=quadratic, reranked=again, stride=4)]
        },
    }


def rejection_rows(generator: Generator, prompts: list[tuple[str, list[int]]], tokens: int) -> list[dict[str, Any]]:
    """TPF at N = 4 of real decodes."""
    rows = []
    for plan in ("chain", "quadratic"):
        for again in (False, True):
            params = SamplingParams(temperature=TEMPERATURE, seed=SEED, max_tokens=tokens)
            results = generator.generate(
                [ids for _, ids in prompts],
                params,
                plan=plan,  # type: ignore[arg-type]
                stride=4,
                rule="rejection",
                rerank=again,
            )
            tpf = sum(r.tokens for r in results) / sum(r.forwards for r in results)
            rows.append({"plan": plan, "re-ranked": again, "tpf": tpf})
    return rows


def speed_rows(generator: Generator, prompts: list[tuple[str, list[int]]], tokens: int) -> list[dict[str, Any]]:
    """tokens/s and TPF of each plan over all prompts, one at a time, greedy; every text must be the AR text."""
    plans: list[tuple[str, int | str]] = [*SPEED_PLANS, ("auto", "auto")]
    seconds = dict.fromkeys(plans, 0.0)
    counts = {plan: [0, 0] for plan in plans}
    for _, ids in prompts:
        reference: list[int] | None = None
        for plan in plans:
            start = time.perf_counter()
            result = generator.generate([ids], SamplingParams(max_tokens=tokens), plan=plan[0], stride=plan[1])[0]  # type: ignore[arg-type]
            seconds[plan] += time.perf_counter() - start
            reference = reference or result.token_ids
            assert result.token_ids == reference, f"{plan} differs from AR"
            counts[plan][0] += result.tokens
            counts[plan][1] += result.forwards
    ar = counts["ar", 1][0] / seconds["ar", 1]
    return [
        {
            "plan": kind if kind in ("ar", "auto") else f"{kind} N={stride}",
            "tpf": counts[kind, stride][0] / counts[kind, stride][1],
            "tokens_per_second": (rate := counts[kind, stride][0] / seconds[kind, stride]),
            "of_ar": rate / ar,
        }
        for kind, stride in plans
    ]


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    result = Table(*rows[0], title=title)
    for row in rows:
        result.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=DEFAULT_ADAPTER)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--speed", type=int, default=16, metavar="PROMPTS")
    parser.add_argument("--rejection", type=int, default=12, metavar="PROMPTS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the explorer page too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    checkpoint = load_checkpoint("default")
    generator = Generator.from_pretrained("default", adapter=options.adapter)
    dense = DenseModel.load(checkpoint, torch.device("cpu"), torch.float32)
    lora = GatedLora.from_adapter(load_adapter(options.adapter, checkpoint.config))
    prompts = held_out(generator, options.prompts)
    record: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "threads": options.threads}
    for name, temperature in (("greedy", 0.0), (f"T={TEMPERATURE}", TEMPERATURE)):
        texts = ar_texts(generator, prompts, options.tokens, temperature)
        found = predictions(generator, dense, lora, texts, temperature, max(STRIDES) - 1)
        record[f"tpf {name}"] = tpf_rows(found)
        for again in (False, True):
            record[f"budgets {name}{', re-ranked' * again}"] = budget_rows(found, again)
            record.setdefault("curves", []).append(curve(f"{name}{', re-ranked' * again}", found, again))
        if temperature == 0:
            record["acceptance"] = [
                {
                    "domain": domain,
                    "tokens": sum(map(len, part.plain)),
                    **{f"{j}": share for j, share in enumerate(part.acceptance()[:3], 1)},
                    **{f"{j} re-ranked": share for j, share in enumerate(part.acceptance(reranked=True)[:3], 1)},
                }
                for domain, part in subsets(texts, found)
            ]
    if options.rejection:
        chosen = held_out(generator, options.rejection)
        record[f"rejection, N=4, T={TEMPERATURE}"] = rejection_rows(generator, chosen, options.tokens)
    if options.speed:
        record["speed, greedy"] = speed_rows(generator, held_out(generator, options.speed), options.tokens)
    if options.html is not None:
        options.html.write_text(page(record), encoding="utf-8")
    if options.json:
        print(json.dumps(record))
        return
    console = Console()
    for title, rows in record.items():
        if isinstance(rows, list) and title != "curves":
            console.print(table(title, rows))


if __name__ == "__main__":
    main()
