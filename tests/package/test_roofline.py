"""bench.roofline: bytes of a step against another count of them, and its layers against gemm_prediction."""

from __future__ import annotations

import math

import pytest

from bench import gemm_prediction, native_gemm, roofline
from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.model import ModelConfig

QWEN = roofline.MODELS["qwen3-8b"]
AR, CHAIN = StepPlan("ar", 1), StepPlan("chain", 4)


def step(plan: StepPlan, batch: int = 1, context: int = 1024, rank: int = 128) -> roofline.Step:
    return roofline.Step(QWEN, plan, batch, context, rank)


def test_bytes_are_those_of_the_checkpoint() -> None:
    config = ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
            "vocab_size": 151_936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": False,
        }
    )  # fmt: skip
    read = {k: v for k, v in config.tensor_shapes().items() if "norm" not in k and "embed" not in k}
    weights = 2 * sum(map(math.prod, read.values()))
    kv = 36 * 2 * 1024 * 8 * 128 * 2
    assert step(AR).bytes() == weights + kv
    assert step(AR, batch=8, context=512).bytes() == weights + 4 * kv


def test_an_adapter_costs_its_bytes_where_there_are_mask_rows() -> None:
    assert step(AR, rank=128).bytes() == step(AR, rank=0).bytes()
    more = step(CHAIN, rank=128).bytes() - step(CHAIN, rank=0).bytes()
    # q, k, v; o; gate, up; down: A is [r, K], B is [N, r].
    assert more == 36 * 2 * 128 * (3 * 4096 + 6144 + 4096 + 4096 + 2 * 4096 + 24576 + 12288 + 4096)


@pytest.mark.parametrize("layer", list(native_gemm.LAYERS))
@pytest.mark.parametrize("rows", [7, 64, 128])
def test_a_layer_is_predicted_as_by_gemm_prediction(layer: str, rows: int) -> None:
    projection = QWEN.projections()[list(native_gemm.LAYERS).index(layer)]
    case = native_gemm.Case(layer, rows, 0)
    wanted = gemm_prediction.predicted_us(case)
    found = roofline.Step(QWEN, AR, rows, 1024, 0)._linear_us(*projection)
    assert found == pytest.approx(wanted, rel=0.15)


def test_no_step_is_predicted_below_its_floor_and_all_are_in_the_table() -> None:
    for plan in roofline.PLANS:
        times = [step(plan, batch) for batch in roofline.BATCHES]
        assert all(x.predicted_ms() > x.floor_ms() for x in times)
        assert sorted(times, key=roofline.Step.predicted_ms) == times
    lines = roofline.table(QWEN, 1024, 128).splitlines()
    assert len(lines) == 2 + len(roofline.PLANS) * len(roofline.BATCHES)
    assert "| 298 |" in lines[2] and "| 7.0 |" in lines[2] and "| 300 |" in lines[6] and "| 8.5 |" in lines[6]
