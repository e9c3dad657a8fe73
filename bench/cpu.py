"""The default model on this machine's CPU: plans against AR, prefill, batches, memory, and llama.cpp where installed.

    python -m bench.cpu [--threads 2] [--tokens 96] [--prompts 12] [--rounds 3] [--temperature 0] [--load] [--json]

One run: everything takes turns, so that what else the machine does slows all of it. A plan's figure is the median over
prompts, each by its best round; others are the median of the rounds. llama.cpp reads the same GGUF file through
llama-cpp-python, an optional peer. --load adds a program that keeps every core busy. Figures of a CPU say nothing about
a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from idlm_kernels.cpu import native
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model.download import default_model

PLANS: tuple[tuple[str, Any], ...] = (("ar", 1), ("quadratic", 2), ("quadratic", 3), ("chain", 4), ("auto", "auto"))
HELD_OUT = Path(__file__).with_name("heldout.jsonl")
START_UP = """
import re, sys
from idlm_kernels.cli import main
sys.argv = ["idlm", "generate", "-p", "List five fruits.", "--max-tokens", "1"]
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def prompts_of(generator: Generator, count: int) -> list[list[int]]:
    """Held-out prompts, every domain in turn, as conversations."""
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    texts = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()]
    some = texts[:: max(1, len(texts) // count)][:count]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in some]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def decode(
    generator: Generator, prompt: list[int], tokens: int, plan: tuple[str, Any], temperature: float
) -> tuple[float, float, list[int]]:
    """Tokens per second from the first token on, tokens per forward, and the tokens."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=0)
    stream = generator.stream(prompt, params, plan=plan[0], stride=plan[1])  # type: ignore[arg-type]
    next(stream)
    have, start = len(stream._request.output.token_ids), time.perf_counter()
    for _ in stream:
        pass
    result = stream.result
    return (len(result.token_ids) - have) / (time.perf_counter() - start), result.tpf, result.token_ids


class LlamaCpp:
    """llama.cpp on the same file: greedy, with its defaults but for the threads."""

    def __init__(self, threads: int):
        from llama_cpp import Llama

        self.model = Llama(
            str(default_model()), n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )

    def decode(self, prompt: list[int], tokens: int) -> float:
        self.model.reset()
        stream = self.model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        next(stream)
        start = time.perf_counter()
        for _ in range(tokens - 1):
            next(stream)
        return (tokens - 1) / (time.perf_counter() - start)

    def prefill(self, prompt: list[int]) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompt)
        return len(prompt) / (time.perf_counter() - start)


def prefill(generator: Generator, prompt: list[int]) -> float:
    """Prompt tokens per second up to the first token."""
    start = time.perf_counter()
    generator.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True), plan="ar")
    return len(prompt) / (time.perf_counter() - start)


def batch(generator: Generator, prompts: list[list[int]], size: int, tokens: int, plan: str) -> float:
    some = [prompts[i % len(prompts)] for i in range(size)]
    start = time.perf_counter()
    results = generator.generate(some, SamplingParams(max_tokens=tokens, ignore_eos=True), plan=plan)  # type: ignore[arg-type]
    return sum(len(r.token_ids) for r in results) / (time.perf_counter() - start)


def start_up() -> tuple[float, float]:
    """Seconds and peak MB of a whole command that prints one token."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", START_UP], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(re.findall(r"^(\d+)$", done.stderr, re.MULTILINE)[-1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the plans; llama.cpp is greedy (default 0)")
    parser.add_argument("--load", action="store_true", help="measure beside a program on every core")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, wanted at least 1")
    torch.set_num_threads(args.threads)
    count = (os.cpu_count() or 1) if args.load else 0
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        report = measured(args)
    finally:
        for process in busy:
            process.kill()
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    generator = Generator.from_pretrained("default")
    prompts = prompts_of(generator, args.prompts)
    peer = LlamaCpp(args.threads) if importlib.util.find_spec("llama_cpp") else None
    names = [plan if plan in ("ar", "auto") else f"{plan} N={stride}" for plan, stride in PLANS]
    speeds: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in [*names, "llama.cpp"]}
    tpf: dict[str, list[float]] = {name: [] for name in names}
    equal = dict.fromkeys(names, 0)
    for number in range(args.rounds):
        for i, prompt in enumerate(prompts):
            want: list[int] = []
            for name, plan in zip(names, PLANS, strict=True):
                speed, share, tokens = decode(generator, prompt, args.tokens, plan, args.temperature)
                want = want or tokens
                speeds[name][i].append(speed)
                if number == 0:
                    tpf[name].append(share)
                    equal[name] += tokens == want
            if peer is not None:
                speeds["llama.cpp"][i].append(peer.decode(prompt, args.tokens))
    long = (prompts[0] * 100)[:512]
    rates: dict[str, dict[str, list[float]]] = {"prefill": {"ours": [], "llama.cpp": []}, "batch 8": {}, "batch 16": {}}
    for _ in range(args.rounds):
        rates["prefill"]["ours"].append(prefill(generator, long))
        if peer is not None:
            rates["prefill"]["llama.cpp"].append(peer.prefill(long))
        for size in (8, 16):
            for plan in ("ar", "auto"):
                found = batch(generator, prompts, size, args.tokens, plan)
                rates[f"batch {size}"].setdefault(plan, []).append(found)
    seconds, peak = min(start_up() for _ in range(args.rounds))
    best = {name: [max(of) for of in each] for name, each in speeds.items() if each[0]}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "kernels": native.status(),
        "threads": args.threads,
        "load": args.load,
        "temperature": args.temperature,
        "plans": {
            name: {
                "tokens_per_second": median(each),
                "tpf": median(tpf[name]) if name in tpf else None,
                "of_ar": geometric_mean([a / b for a, b in zip(each, best["ar"], strict=True)]),
                "least_of_ar": min(a / b for a, b in zip(each, best["ar"], strict=True)),
                "texts_equal_to_ar": equal.get(name),
            }
            for name, each in best.items()
        },
        "prompts": len(prompts),
        "rates": {what: {who: median(of) for who, of in by.items() if of} for what, by in rates.items()},
        "start_up": {"seconds": seconds, "peak_megabytes": peak},
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['machine']}; CPU kernels: {report['kernels']}; {report['threads']} threads", end="")
    sampled = f", temperature {report['temperature']:g}" if report["temperature"] else ""
    print(sampled + (", beside a program on every core\n" if report["load"] else "\n"))
    print("| plan | tokens/s | TPF | of AR | least of AR on a prompt | texts equal to AR |")
    print("|---|---|---|---|---|---|")
    for name, plan in report["plans"].items():
        tpf = "" if plan["tpf"] is None else f"{plan['tpf']:.2f}"
        same = "" if plan["texts_equal_to_ar"] is None else f"{plan['texts_equal_to_ar']} of {report['prompts']}"
        of_ar = f"{plan['of_ar']:.2f} | {plan['least_of_ar']:.2f}"
        print(f"| {name} | {plan['tokens_per_second']:.1f} | {tpf} | {of_ar} | {same} |")
    print()
    for what, by in report["rates"].items():
        print(f"{what}, tokens/s: " + ", ".join(f"{who} {rate:.1f}" for who, rate in by.items()))
    up = report["start_up"]
    print(f"one token as a whole command: {up['seconds']:.2f} s, peak {up['peak_megabytes']:.0f} MB")


if __name__ == "__main__":
    main()
