"""The generator on this machine's CPU, beside transformers' `generate`, with the default model.

    python -m bench.generator [--threads 2] [--tokens 96] [--repeats 3] [--json]

It is the `cpu` backend without the compiled kernels, whose parts cannot be told apart; for those there is `bench.cpu`.

One run, one process, same weights and threads: (1) tokens/s of transformers in fp32 and of the generator in each plan,
the runs taking turns, best of the repeats; (2) where the time of a step goes: matrix products, attention, the rest;
(3) the peak memory of loading, in a process of its own. Figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.peers import transformers_llama
from idlm_kernels import ops
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import Transformer, load_checkpoint

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
PLANS = (("ar", 1), ("chain", 4), ("quadratic", 4))
# VmHWM is the peak of this program alone; ru_maxrss would start from that of the process which forked it.
PEAK = """
import re
from idlm_kernels.generate import Generator
peak = lambda: re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
before = peak()
Generator.from_pretrained("default", adapter=None)
print(before, peak())
"""


@contextmanager
def timed_ops(*names: str) -> Iterator[dict[str, float]]:
    """Seconds spent in the named public ops while the block runs."""
    seconds = dict.fromkeys(names, 0.0)
    originals = {name: getattr(ops, name) for name in names}

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - start
            return result

        return run

    for name, function in originals.items():
        setattr(ops, name, wrap(name, function))
    try:
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(ops, name, function)


def step_share(generator: Generator, prompt: list[int], plan: str, tokens: int, temperature: float) -> dict[str, float]:
    """Milliseconds of one decode step by part."""
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=tokens, ignore_eos=True)
    stream = generator.stream(prompt, params, plan=plan, stride=4)  # type: ignore[arg-type]
    next(stream)  # prefill
    products = ("linear", "gated_lora_linear", "linear_silu_and_mul")  # the activation of the last is timed with it
    with timed_ops(*products, "strided_attention", "verify_accept") as seconds:
        start = time.perf_counter()
        steps = sum(1 for _ in stream)
        total = time.perf_counter() - start
    linear = sum(seconds[name] for name in products)
    parts = {
        "step": total,
        "matrix products": linear,
        "attention": seconds["strided_attention"],
        "verify_accept": seconds["verify_accept"],
    }
    parts["the rest"] = total - sum(list(parts.values())[1:])
    return {name: value / steps * 1e3 for name, value in parts.items()}


def measure(threads: int, tokens: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint("default")
    tokenizer = checkpoint.tokenizer
    generator = Generator(Transformer(checkpoint), tokenizer)
    peer = transformers_llama(checkpoint)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}]), add_special_tokens=False
    )
    ids = torch.tensor([prompt])

    def run_peer() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )
        return (out.shape[1] - len(prompt)) / (time.perf_counter() - start)

    def run(plan: str, stride: int) -> float:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        result = generator.generate([prompt], params, plan=plan, stride=stride)[0]  # type: ignore[arg-type]
        return result.tokens_per_second

    speed: dict[str, float] = {}
    for _ in range(repeats):
        speed["transformers fp32"] = max(speed.get("transformers fp32", 0.0), run_peer())
        for plan, stride in PLANS:
            name = plan if plan == "ar" else f"{plan} N={stride}"
            speed[name] = max(speed.get(name, 0.0), run(plan, stride))
    peak = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout.split()
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads",
        "torch": torch.__version__,
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "tokens_per_second": speed,
        "ar_over_transformers": speed["ar"] / speed["transformers fp32"],
        "step_ms": {
            f"{plan} T={temperature}": step_share(generator, prompt, plan, tokens, temperature)
            for plan, _ in PLANS
            for temperature in (0.0, 0.8)
        },
        "import_peak_mb": int(peak[0]) / 1e3,
        "load_peak_mb": int(peak[1]) / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    os.environ["IDLM_CPU_NATIVE"] = "0"  # read when the first model is loaded
    figures = measure(arguments.threads, arguments.tokens, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{figures['machine']}, torch {figures['torch']}; {figures['tokens']} tokens, greedy, best of runs")
    table = Table("", "tokens/s", "of transformers")
    for name, value in figures["tokens_per_second"].items():
        table.add_row(name, f"{value:.1f}", f"{value / figures['tokens_per_second']['transformers fp32']:.2f}")
    console.print(table)
    parts = Table("ms per step", *next(iter(figures["step_ms"].values())))
    for name, row in figures["step_ms"].items():
        parts.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console.print(parts)
    console.print(f"peak memory: {figures['import_peak_mb']:.0f} MB imported, {figures['load_peak_mb']:.0f} MB loaded")


if __name__ == "__main__":
    main()
