"""What drafts from finished outputs are worth on this machine: the default model, with and without a history.

    python -m bench.history [--prompts 16] [--tokens 128] [--samples 6] [--plan quadratic] [--stride 4] [--json]

Three kinds of traffic, in one engine each, with four requests at a time: (1) the held-out prompts asked once, where
nothing repeats; (2) the same asked again, greedy; (3) rollouts: --samples of each prompt at T = 0.7 with seeds of their
own, as RL draws them, the second and later ones counted. The two engines take turns, and every text of the one must be
the text of the other. Figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from rich.console import Console

from bench.acceptance import held_out, table
from idlm_kernels.generate import Engine, EngineOptions, Generator, SamplingParams

HISTORY = 1 << 16  # tokens


def decode(engine: Engine, prompts: list[list[int]], params: SamplingParams, seed: int) -> tuple[list[Any], float]:
    """The results, and the seconds that they took together."""
    requests = [engine.submit(prompt, params, seed) for prompt in prompts]
    start = time.perf_counter()
    for _ in engine.events():
        pass
    seconds = time.perf_counter() - start
    plan = engine.policy.widest
    return [r.output.result(plan.kind, plan.stride) for r in requests], seconds


def rows_of(generator: Generator, prompts: list[list[int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each traffic and engine. Each round is a call of `decode`; the first one of a traffic may not count."""
    greedy, sampled = SamplingParams(max_tokens=options.tokens), SamplingParams(0.7, max_tokens=options.tokens)
    rounds = {
        "asked once": [(greedy, 0, True)],
        "asked again": [(greedy, 0, False), (greedy, 0, True)],
        "rollouts": [(sampled, seed, seed > 0) for seed in range(options.samples)],
    }
    rows = []
    for traffic, each in rounds.items():
        engines = {
            tokens: generator.engine(
                EngineOptions(
                    plan=options.plan,
                    stride=options.stride,
                    max_num_seqs=4,
                    max_model_len=max(map(len, prompts)) + options.tokens,
                    history_tokens=tokens,
                )
            )
            for tokens in (0, HISTORY)
        }
        found: dict[int, list[Any]] = {tokens: [] for tokens in engines}
        seconds = dict.fromkeys(engines, 0.0)
        for params, seed, counts in each:
            texts = {}
            for tokens, engine in engines.items():
                results, took = decode(engine, prompts, params, seed)
                texts[tokens] = [r.token_ids for r in results]
                if counts:
                    found[tokens] += results
                    seconds[tokens] += took
            assert texts[0] == texts[HISTORY], "a draft changed a text"
        for tokens, results in found.items():
            count = sum(r.tokens for r in results)
            rows.append(
                {
                    "traffic": traffic,
                    "history": tokens,
                    "tpf": count / sum(r.forwards for r in results),
                    "tokens_per_second": count / seconds[tokens],
                    **{f"acceptance, {source}": _mean(results, source) for source in ("mask", "history")},
                }
            )
    return rows


def _mean(results: list[Any], source: str) -> float | None:
    """Acceptance of a source, the mean of the requests that had drafts of it."""
    shares = [r.acceptance_by_source[source] for r in results if source in r.acceptance_by_source]
    return sum(shares) / len(shares) if shares else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--samples", type=int, default=6, help="rollouts of a prompt")
    parser.add_argument("--plan", choices=("chain", "quadratic"), default="quadratic")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = Generator.from_pretrained("default")
    rows = rows_of(generator, [ids for _, ids in held_out(generator, options.prompts)], options)
    if options.json:
        print(json.dumps(rows))
    else:
        Console().print(table(f"{options.plan} N={options.stride}", rows))


if __name__ == "__main__":
    main()
