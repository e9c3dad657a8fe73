"""idlm_kernels.generate.warm: the dry run meets every kernel that serving launches, in the same form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idlm_kernels.generate import warm
from tests.softgpu_support import ROOT
from tests.tiny import save_tiny_model

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]

SERVING = """
import dataclasses, json, sys
from triton import knobs
import idlm_kernels
from bench.gpu_parts import EagerRecorder
from idlm_kernels.generate import Engine, EngineOptions, Generator, SamplingParams
from idlm_kernels.model import Transformer
from idlm_kernels.ops import _dispatch
from tests.softgpu_support import activate_triton

activate_triton()
backend = dataclasses.replace(_dispatch._backends["triton"], device_types=("cuda", "cpu"))
_dispatch._backends["triton"] = backend
forms = {}
new_cache = Transformer.new_cache

def cache_of_a_gpu(self, num_pages, page_size):  # whose tokens of a page lie together
    cache = new_cache(self, num_pages, page_size)
    cache.k, cache.v = ([x.contiguous() for x in layers] for layers in (cache.k, cache.v))
    return cache

Transformer.new_cache = cache_of_a_gpu

def before(**hook):
    forms[hook["repr"] + hook["compile"]["key"]] = hook["fn"].name
    return False

knobs.runtime.jit_cache_hook = before
with idlm_kernels.use_backend("triton"):
    generator = Generator.from_pretrained(sys.argv[1], dtype="fp32")
    for plan, stride in (("ar", 2), ("quadratic", 2)):
        options = EngineOptions(max_num_seqs=2, max_model_len=600, page_size=64)
        policy = generator.policy(plan, stride)
        engine = Engine(generator.model, None, policy, "match", options, recorder=EagerRecorder())
        for count in (5, 16, 300, 590, 90):
            engine.submit([3] * count, SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9), 5)
        for request, event in engine.events():
            assert request.output.error is None, request.output.error
print(json.dumps(forms))
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(**wanted: Any) -> list[dict[str, Any]]:
    text = run("-m", "idlm_kernels.generate.warm", json.dumps(wanted))
    return [json.loads(line) for line in text.splitlines()]


def test_serving_meets_no_kernel_that_was_not_compiled(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path))
    served = json.loads(run("-c", SERVING, model).splitlines()[-1])
    sizes = {"plan": "quadratic", "stride": 2, "max_num_seqs": 2, "max_model_lens": [600], "page_size": 64}
    found = told(model=model, dtype="fp32", listing=True, **sizes)
    assert [x["failed"] for x in found if "failed" in x] == []
    assert "end" in found[-1]
    missing = {name: form for form, name in served.items() if form not in {x.get("form") for x in found}}
    assert len(served) > 15 and missing == {}


def test_workers_share_the_work_and_the_cache_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels of a prefill of one token, few enough to be compiled here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    claims = tmp_path / "claims"
    claims.mkdir()
    (tmp_path / "model").mkdir()
    script = """
import json, sys
from idlm_kernels.generate import warm
calls = warm.calls
warm.calls = lambda model, wanted: [x for x in calls(model, wanted) if x[0] == "a chunk of 1"][:1]
warm.main()
"""
    model = str(save_tiny_model(tmp_path / "model"))
    wanted = {"model": model, "plan": "ar", "max_num_seqs": 1, "max_model_lens": [64]}

    def kernels(**more: Any) -> list[tuple[str, bool]]:
        lines = [json.loads(line) for line in run("-c", script, json.dumps({**wanted, **more})).splitlines()]
        assert not [x for x in lines if "failed" in x]
        return sorted((x["kernel"], x["cached"]) for x in lines if "cached" in x)

    first = kernels(claims=str(claims))
    assert len(first) > 3 and not any(cached for _, cached in first)
    assert kernels(claims=str(claims)) == [], "claimed by the one before"
    assert kernels() == [(name, True) for name, _ in first]


@pytest.mark.parametrize("target", ["cuda", "hip:90", "cuda:7", "cuda:x"])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ValueError, match="wanted cuda:90"):
        warm.gpu_target(target)
