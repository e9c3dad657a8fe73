"""What a decode step asks of an H100 SXM by plan and batch: launches, bytes, their floor, and a prediction of its time.

    python -m bench.roofline --model qwen3-8b [--context 1024] [--rank 128]

Nothing of it is measured but what others measured, in columns and lines that say so. Bytes: the weights, the adapter
and the KV of the context once each. Floor: these at the 3.35 TB/s of the data sheet. Predicted: linear layers and LM
head as in bench/gemm_prediction.py, from its assumed rates (backend cuda, the adapter in the layer's own launch, waves
left out); the KV at the same rate of memory; the sampler by the warp instructions in bench/budgets/triton.json, without
top-p; and what each launch takes beyond that. A run on the hardware replaces the prediction.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from bench.gemm_prediction import ADAPTER_US, END_US, L2_TB_PER_S, MEMORY_TB_PER_S, PARTS_US, START_US, TFLOP_PER_S
from idlm_kernels.generate.plan import StepPlan

BUDGET = Path(__file__).parent / "budgets" / "triton.json"
H100_TB_PER_S = 3.35
WARP_INSTRUCTIONS_PER_US = 132 * 2 * 1755.0  # two per clock and SM, of the four that an SM can issue, at 1.755 GHz
SMALL_US = 2.5  # a launch of few bytes after another one in a graph: norms, rotary embedding, sampler
ATTENTION_US = 6.0  # what attention takes beside its bytes: lengths and pages, one tile's latency, the CTAs' meeting
# Launches of a step around the layers: plan_rows, embed, norm, LM head, three of verify_accept, commit_step. Torch adds
# some small kernels. Held, with those of a layer, by tests/triton/test_nodes.py.
AROUND, AROUND_TORCH, PER_LAYER = 8, {False: 2, True: 4}, 8


@dataclass(frozen=True)
class Shapes:
    """Of a model; sizes in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def projections(self) -> list[tuple[int, int, int]]:
        """(N, K, slices that have an adapter of their own) of the linear layers of one layer."""
        kv = self.kv_heads * self.head_dim
        q = self.heads * self.head_dim
        return [
            (q + 2 * kv, self.hidden, 3),
            (self.hidden, q, 1),
            (2 * self.intermediate, self.hidden, 2),
            (self.hidden, self.intermediate, 1),
        ]


MODELS = {"qwen3-8b": Shapes(36, 4096, 12288, 32, 8, 128, 151_936)}
# What others report, of which step. Both of Qwen3-8B in bf16.
AUTHORS_MS = {("ar", 1): 7.0, ("chain", 1): 8.5}  # the authors, one H100, N = 4; not measured here
UNO = """\
Uno (arXiv 2609.04010), measured by its authors on an H200 with 1.43 times the bandwidth; two forwards a cycle:
  one request: 445 tokens/s at best (tree 16, 32), AR 176 (its repository)
  64 requests, 1k in, 8k out: AR 3662, block 4 / 8 / 16: 5733 / 5600 / 4112 tokens/s (table 18)
  tokens per cycle, T=1, block 4 / 8 / 16: 3.89 / 4.94 / 5.42 (table 17a); with the same acceptance one pass
  makes 2.89 / 3.94 / 4.42 tokens a forward (derived, not measured)"""
# Tokens per forward of one quadratic pass with Uno's acceptance at T=1, by N: 1 + (tokens per cycle - 2).
UNO_TPF = {4: 2.89, 8: 3.94, 16: 4.42}


@dataclass(frozen=True)
class Step:
    """A decode step of `batch` requests with `context` tokens each."""

    shapes: Shapes
    plan: StepPlan
    batch: int
    context: int
    rank: int  # of the adapter; 0: none. A plan without MASK rows does not read it.

    @property
    def rows(self) -> int:
        return self.batch * self.plan.max_rows

    @property
    def has_adapter(self) -> bool:
        return self.rank > 0 and self.plan.num_drafts > 0

    def launches(self) -> int:
        """Nodes of the recorded step."""
        return self.shapes.layers * PER_LAYER + AROUND + AROUND_TORCH[self.has_adapter]

    def _linear_bytes(self, n: int, k: int, slices: int) -> int:
        return 2 * (n * k + (self.rank * (slices * k + n) if self.has_adapter else 0))

    def kv_bytes(self) -> int:
        """Of one layer."""
        return 2 * 2 * self.batch * self.context * self.shapes.kv_heads * self.shapes.head_dim

    def bytes(self) -> int:
        linear = sum(self._linear_bytes(*projection) for projection in self.shapes.projections())
        return self.shapes.layers * (linear + self.kv_bytes()) + 2 * self.shapes.vocab * self.shapes.hidden

    def floor_ms(self) -> float:
        return self.bytes() / H100_TB_PER_S / 1e9

    def _linear_us(self, n: int, k: int, slices: int) -> float:
        """As predicted_us of bench/gemm_prediction.py, without its waves: x is read once per 128 rows of the weight."""
        tokens = 64 if self.rows <= 64 else 128 if self.rows <= 128 else -(-self.rows // 256) * 256
        size = self._linear_bytes(n, k, slices)
        traffic = size * max(tokens // 256, 1) + 2 * self.rows * k * -(-n // 128)
        flops = tokens * float(size)  # two per weight of two bytes
        body = max(size / MEMORY_TB_PER_S, traffic / L2_TB_PER_S, flops / TFLOP_PER_S) / 1e6
        return START_US + body + END_US + PARTS_US + ADAPTER_US * self.has_adapter

    def predicted_ms(self) -> float:
        shapes = self.shapes
        layer = sum(self._linear_us(*projection) for projection in shapes.projections())
        layer += ATTENTION_US + self.kv_bytes() / MEMORY_TB_PER_S / 1e6
        layer += (PER_LAYER - 5) * SMALL_US
        head = START_US + 2 * shapes.vocab * shapes.hidden / MEMORY_TB_PER_S / 1e6 + END_US
        around = (AROUND - 1 + AROUND_TORCH[self.has_adapter]) * SMALL_US
        return (shapes.layers * layer + head + sampler_us(self.rows) + around) / 1e3


def sampler_us(rows: int) -> float:
    """Of T rows at a temperature: bound by the instructions of noise and maxima, not by the logits' bytes."""
    launches = json.loads(BUDGET.read_text())["launches"]
    case = "sample_rows rows=7 top_p=1.0 spread=3.0"
    (count,) = (x["warp_instructions"] for x in launches if (x["case"], x["kernel"]) == (case, "perturb"))
    return rows / 7 * count / WARP_INSTRUCTIONS_PER_US


PLANS = (StepPlan("ar", 1), StepPlan("chain", 4), StepPlan("quadratic", 4), StepPlan("quadratic", 8))
BATCHES = (1, 8, 32, 64)


def table(shapes: Shapes, context: int, rank: int) -> str:
    lines = [
        "| step | rows | launches | GB | floor ms | predicted ms | authors' ms | tokens/s at Uno's acceptance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        for batch in BATCHES:
            step = Step(shapes, plan, batch, context, rank)
            name = plan.kind if plan.kind == "ar" else f"{plan.kind} N={plan.stride}"
            authors = AUTHORS_MS.get((plan.kind, batch), "")
            tpf = UNO_TPF.get(plan.stride, 0) if plan.kind == "quadratic" else 0
            speed = f"{batch * tpf / step.predicted_ms() * 1e3:.0f}" if tpf else ""
            cells = [f"B={batch} {name}", step.rows, step.launches(), f"{step.bytes() / 1e9:.2f}"]
            cells += [f"{step.floor_ms():.2f}", f"{step.predicted_ms():.2f}", authors, speed]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-8b")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each request")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter; 0: none")
    arguments = parser.parse_args()
    if arguments.context < 1 or arguments.rank < 0:
        parser.error("--context takes 1 or more, --rank 0 or more")
    print(f"{arguments.model}, H100 SXM, bf16, context {arguments.context}, adapter of rank {arguments.rank}")
    print("Floor and predicted are reckoned, not measured; tokens/s follow from the prediction.\n")
    print(table(MODELS[arguments.model], arguments.context, arguments.rank))
    print("\nMeasured by the authors of I-DLM (arXiv 2604.11035): a step of one request, AR and chain N=4.")
    print(UNO)


if __name__ == "__main__":
    main()
