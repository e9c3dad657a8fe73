"""Compile what a model will launch before it is served: its steps and prefills on tensors without memory.

Kernels are compiled per form of their arguments (dtypes, and of each integer whether it is 1 or a multiple of 16) and
per constant, some of which follow from batch and context. Which they are a dry run of the very code that serves finds
out: every plan, batch size and width of table, prefills of many lengths. Nothing runs: tensors are on the device
`meta`, and a launch compiles and goes no further. What is compiled lies in Triton's cache, where the process that
serves finds it, with the same Triton, sources and target.

    python -m idlm_kernels.generate.warm '{"model": "qwen3-8b", ...}'      # a worker of `idlm warm`; see Wanted

Several workers share the work: who meets a form first claims it. They report on standard output, a line of JSON each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from idlm_kernels.generate.engine import MAX_STOP_IDS, EngineOptions, _buckets
from idlm_kernels.generate.plan import StepPlan, plans_up_to
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import Decoder, decode_step, first_step, prefill_chunk
from idlm_kernels.model import ModelConfig, Transformer, load_checkpoint
from idlm_kernels.model.adapter import Adapter, load_adapter
from idlm_kernels.model.random_weights import RandomCheckpoint
from python_ref import DraftDistributions

META = torch.device("meta")
# Tokens of a forward, up to the engine's budget: each number of row tiles, and each form of the number itself.
PREFILLS = (1, 2, 7, 16, 37, 48, *(n + more for n in range(64, 512, 64) for more in (0, 1)), 512)
PAGES = 4096  # of the cache; launches do not depend on how many there are


@dataclass(frozen=True)
class Wanted:
    """What to compile. model: see `load`; adapter: a folder or None. plan, stride: bound the plans from above, as in
    Generator.policy. max_num_seqs, max_model_lens, page_size: of the engines that will serve. claims: a folder that
    workers share. listing: name the forms and compile nothing."""

    model: str
    adapter: str | None = None
    target: str = "cuda:90"
    dtype: str = "auto"
    plan: str = "auto"
    stride: int = 4
    rule: str = "match"
    max_num_seqs: int = 8
    max_model_lens: Sequence[int] = (2048,)
    page_size: int = 64
    claims: str | None = None
    listing: bool = False

    def plans(self) -> list[StepPlan]:
        plans = plans_up_to(self.plan, self.stride)  # type: ignore[arg-type]
        return [StepPlan("ar", 1), *(plan for plan in plans if plan.kind != "ar")]


def gpu_target(text: str) -> GPUTarget:
    """ValueError for anything but `cuda:90` and the like."""
    kind, _, number = text.partition(":")
    if kind != "cuda" or not number.isdigit() or int(number) < 80:
        raise ValueError(f"target is {text!r}, wanted cuda:90 (for an H100) or another capability from cuda:80 on")
    return GPUTarget("cuda", int(number), 32)


class CompileOnly:
    """A Triton driver for a GPU that is not there: names the target, loads and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_current_device = lambda: 0
        self.set_current_device = lambda d: None
        self.get_current_stream = lambda d=0: 0
        self.get_device_capability = lambda d=0: divmod(target.arch, 10)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def dry_launch(kernel: Any, grid: Any, like: Tensor, *args: Any, **meta: Any) -> None:
    """`common.launch`, less the launch."""
    overlaps = triton.runtime.driver.active.get_current_target().arch >= 90
    kernel.warmup(*args, grid=grid, **meta, enable_fp_fusion=False, launch_pdl=overlaps)


def use_dry_launches(target: GPUTarget) -> None:
    """From now on this process compiles kernels for a target and launches none, on tensors of any device."""
    import idlm_kernels.triton  # noqa: F401 - loads every kernel
    from idlm_kernels.ops import _dispatch

    triton.runtime.driver.set_active(CompileOnly(target))
    for name, module in list(sys.modules.items()):
        if name.startswith("idlm_kernels.triton.") and hasattr(module, "launch"):
            module.launch = dry_launch  # type: ignore[attr-defined]
    backend = _dispatch._backends["triton"]
    _dispatch._backends["triton"] = dataclasses.replace(backend, device_types=("cuda", "cpu", "meta"), automatic=False)


# The model


class _Shapes:
    """A checkpoint of the shapes of another one, of one layer, since all have the same."""

    def __init__(self, config: ModelConfig, path: Path, dtype: torch.dtype):
        self.config = dataclasses.replace(config, num_layers=1)
        self.name, self.path, self._dtype = path.name, path, dtype

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self.config.tensor_shapes()[name], dtype=self._dtype, device=META)


def load(wanted: Wanted) -> Transformer:
    """The model's shapes, without its weights: a checkpoint's, or those of a name like qwen3-8b."""
    from idlm_kernels.model.random_weights import SHAPES

    if wanted.model.lower() in SHAPES:
        checkpoint: Any = RandomCheckpoint.of(wanted.model)
        dtype = checkpoint.dtype
    else:
        checkpoint = load_checkpoint(wanted.model)
        dtype = torch.bfloat16 if checkpoint.path.suffix == ".gguf" else checkpoint.tensor("model.norm.weight").dtype
    adapter = None if wanted.adapter is None else load_adapter(wanted.adapter, checkpoint.config)
    return shape_of(checkpoint.config, Path(checkpoint.path), dtype, wanted.dtype, adapter)


def shape_of(
    config: ModelConfig, path: Path, stored: torch.dtype, dtype: str = "auto", adapter: Adapter | None = None
) -> Transformer:
    shapes: Any = _Shapes(config, path, stored)
    return Transformer(shapes, device=META, dtype=dtype, adapter=adapter)


# The dry run


def calls(model: Transformer, wanted: Wanted) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps and prefills as the engine makes them, of a model on `meta`."""
    plans, batch = wanted.plans(), wanted.max_num_seqs
    widest = max(plan.num_drafts for plan in plans)
    cache = model.new_cache(PAGES, wanted.page_size)
    for max_model_len in wanted.max_model_lens:
        num_slots = max_model_len - 1 + max(plan.max_rows for plan in plans)
        state = DecodeState.empty(
            batch,
            max_model_len,
            -(-num_slots // wanted.page_size),
            widest,
            MAX_STOP_IDS,
            mask_token_id=model.config.mask_token_id,
            mask_input=model.mask_input,
            id_limit=model.config.vocab_size,
            device=META,
        )
        budget = min(EngineOptions.max_num_batched_tokens, max_model_len)
        for plan in plans:
            decoder = Decoder(model, cache, plan, wanted.rule, rerank=model.rerank_head is not None)
            for bucket in _buckets(batch, few=True):
                requests = _requests(decoder, state, 0, bucket, widest)
                yield f"{plan.kind} N={plan.stride}, {bucket} requests", functools.partial(decode_step, *requests)
            for several, first in itertools.product(
                range(1, batch + 1), (0, 1)
            ):  # from an even index and from an odd one
                if first + several > batch:
                    continue
                requests = _requests(decoder, state, first, first + several, widest)
                for count in PREFILLS:
                    if count * several > budget:
                        break
                    ends = [0] * several, [count] * several
                    yield f"{several} prefills of {count}", functools.partial(first_step, *requests, *ends)
                    if several == 1:
                        yield f"a chunk of {count}", functools.partial(prefill_chunk, *requests, 0, count)


def _requests(decoder: Decoder, state: DecodeState, first: int, last: int, widest: int) -> tuple[Decoder, DecodeState]:
    """Some requests of a state, as Engine gives them to a step."""
    num_spec_tokens = decoder.plan.num_drafts
    if decoder.rule == "rejection":
        model, batch = decoder.model, len(state.lengths)
        q = DraftDistributions.empty(batch, widest, model.config.vocab_size, model.dtype, META)
        part = DraftDistributions(
            q.logits[first:last, :num_spec_tokens],
            q.cut[first:last, :num_spec_tokens],
            q.log_norm[first:last, :num_spec_tokens],
        )
        decoder = dataclasses.replace(decoder, draft_dists=part)
    return decoder, state.requests(first, last).with_drafts(num_spec_tokens)


# A worker


def claimed(folder: Path, key: str) -> bool:
    """Whether this process is the first to ask for a form of a kernel."""
    try:
        os.close(os.open(folder / key, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


_launchers: set[str] = set()


def build_launcher(src: Any, metadata: Any) -> bool:
    """Build what calls a kernel of this signature, where Triton (before 3.7) compiles a C function for each: a second
    with gcc, at the first launch. False where there is nothing to do or no way to do it here: then that launch does."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "make_launcher"):
        return False
    text = driver.make_launcher(dict(src.constants), dict(src.signature), getattr(metadata, "tensordesc_meta", None))
    if text in _launchers:
        return False
    _launchers.add(text)
    build._load_module_from_path = lambda name, path: None  # built, not loaded: that would take libcuda
    try:
        driver.compile_module_from_src(
            src=text,
            name="__triton_launcher",
            library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
    except Exception as error:  # no libcuda, no gcc
        print(f"no launcher: {error}", file=sys.stderr)
        return False
    return True


def work(wanted: Wanted, tell: Callable[[dict[str, Any]], None]) -> None:
    """Compile what nobody has claimed, or only list it. Faults of a call are told, and the others go on."""
    use_dry_launches(gpu_target(wanted.target))
    seen: set[str] = set()

    def before(**hook: Any) -> bool:
        """Triton's hook before a compilation: True leaves it out."""
        key = hashlib.sha256(f"{hook['repr']}|{hook['compile']['key']}".encode()).hexdigest()[:32]
        new = key not in seen
        seen.add(key)
        if wanted.listing:
            if new:
                tell({"kernel": hook["fn"].name, "form": hook["repr"] + hook["compile"]["key"]})
            return True
        return wanted.claims is not None and not claimed(Path(wanted.claims), key)

    def after(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        build_launcher(src, metadata)
        seconds = 0.0 if cache_hit else times.total / 1e6
        tell({"kernel": src.name, "cached": cache_hit, "seconds": seconds})

    knobs.runtime.jit_cache_hook, knobs.compilation.listener = before, after
    from idlm_kernels.ops import use_backend

    with use_backend("triton"), torch.inference_mode():
        model = load(wanted)
        for name, call in calls(model, wanted):
            try:
                call()
            except Exception as error:  # whatever a compiler raises
                words = " ".join(str(error).split())[:300]
                tell({"failed": f"{name}: {type(error).__name__}: {words}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", help="a Wanted in JSON")
    torch.set_num_threads(1)
    start = time.monotonic()

    def tell(found: dict[str, Any]) -> None:
        print(json.dumps(found), flush=True)

    work(Wanted(**json.loads(parser.parse_args().wanted)), tell)
    tell({"end": time.monotonic() - start})


if __name__ == "__main__":
    main()
