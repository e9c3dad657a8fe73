"""The engine on this machine's CPU: throughput by concurrency and plan, and what the host costs per step.

    python -m bench.engine [--threads 2] [--tokens 48] [--concurrency 1 4 16] [--scheduler-only]

(1) tokens/s of the default model, without its adapter, at each concurrency in each plan up to N = 4, greedy, prompts of
bench/prompts.jsonl.
(2) host microseconds per step with the device work stubbed out, amortised over whole windows, boundaries included;
beside it a plain loop that visits every request after every step, as engines with a scheduler in the step do.
Figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from idlm_kernels.generate import Engine, EngineOptions, Generator, PlanPolicy, SamplingParams, StepPlan
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import Decoder
from idlm_kernels.model import Transformer
from idlm_kernels.model.random_weights import SHAPES, RandomCheckpoint
from python_ref.step import OUTCOME

TINY = dataclasses.replace(
    SHAPES["qwen3-8b"],
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
)
EMITTED, FINISH = OUTCOME.index("num_emitted"), OUTCOME.index("finish_reason")
PLANS = ("ar", "chain", "quadratic", "auto")


def prompts_of(generator: Generator) -> list[list[int]]:
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    texts = [json.loads(line).get("prompt") for line in Path(__file__).with_name("prompts.jsonl").open()]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts if text]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def throughput(generator: Generator, concurrency: int, plan: str, tokens: int) -> float:
    """tokens/s of `concurrency` requests of equal length, prefill included."""
    prompts = prompts_of(generator)
    batch = [prompts[i % len(prompts)] for i in range(concurrency)]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    results = generator.generate(batch, params, plan=plan, stride=4)  # type: ignore[arg-type]
    return sum(r.tokens for r in results) / (time.perf_counter() - start)


def stub(decoder: Decoder, state: DecodeState) -> Tensor:
    """A step that commits one token per request and computes nothing."""
    one = torch.ones(state.batch, dtype=torch.int32)
    tokens = torch.full((state.batch, decoder.plan.stride), 5)
    zero = torch.zeros_like(one)
    return torch.cat([torch.stack((zero, zero, one, zero, zero, zero), dim=1).long(), tokens], dim=1)


def stub_seconds(batch: int, repeats: int = 400) -> float:
    """What the stub and packing its outcome cost by themselves."""
    state = DecodeState.empty(batch, 8, 1, 3, 4, mask_token_id=None, id_limit=64, device=torch.device("cpu"))
    decoder = Decoder(None, None, StepPlan("quadratic", 4), "match")  # type: ignore[arg-type]
    start = time.perf_counter()
    for _ in range(repeats):
        stub(decoder, state)
    return (time.perf_counter() - start) / repeats


def host_microseconds(batch: int, steps: int = 512) -> tuple[float, float]:
    """Per step: the engine's host time, and that of a plain loop over requests with one read per request."""
    model = Transformer(RandomCheckpoint(TINY, dtype=torch.float32))
    options = EngineOptions(max_num_seqs=batch, max_model_len=steps + 64, page_size=64)
    engine = Engine(model, None, PlanPolicy.fixed(StepPlan("quadratic", 4)), options, step=stub)
    for seed in range(batch):
        engine.submit([1], SamplingParams(max_tokens=steps + 32), seed)
    list(engine.window())  # prefill
    calls = 0
    start = time.perf_counter()
    while calls < steps:
        calls += sum(1 for _ in engine.window()) // batch
    engine_seconds = (time.perf_counter() - start) / calls

    state = engine._state
    decoder = dataclasses.replace(engine._decoder)
    start = time.perf_counter()
    for _ in range(64):
        outcome = stub(decoder, state)
        for b in range(batch):
            count = int(outcome[b, EMITTED])
            tokens = outcome[b, len(OUTCOME) : len(OUTCOME) + count].tolist()
            state.lengths[b] += count
            state.text[b, 0] = tokens[0]
            if int(outcome[b, FINISH]) or int(state.lengths[b]) >= int(state.length_limits[b]):
                state.lengths[b] = 1
    loop_seconds = (time.perf_counter() - start) / 64
    own = stub_seconds(batch)
    return (engine_seconds - own) * 1e6, (loop_seconds - own) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--scheduler-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{platform.machine()} {capability}, {arguments.threads} threads, torch {torch.__version__}")
    if not arguments.scheduler_only:
        generator = Generator.from_pretrained("default", adapter=None)
        table = Table("tokens/s at concurrency", *(str(c) for c in arguments.concurrency))
        for plan in PLANS:
            rates = [throughput(generator, c, plan, arguments.tokens) for c in arguments.concurrency]
            table.add_row(plan, *(f"{rate:.1f}" for rate in rates))
        console.print(table)
    table = Table("host us per step, batch", "1", "8", "64")
    rows = [host_microseconds(batch) for batch in (1, 8, 64)]
    table.add_row("engine", *(f"{engine:.0f}" for engine, _ in rows))
    table.add_row("plain loop", *(f"{loop:.0f}" for _, loop in rows))
    console.print(table)


if __name__ == "__main__":
    main()
