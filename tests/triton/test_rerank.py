"""rerank_drafts on backend `triton`: the drafts of the reference, and the very distributions they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import idlm_kernels
import python_ref
from bench.ptx import recorded_launches, resources
from idlm_kernels.generate import SamplingParams, step
from idlm_kernels.testing import check_bits
from idlm_kernels.triton import rerank
from python_ref import DraftDistributions
from python_ref.contract import GREEDY_BELOW, STREAM_DRAFT
from python_ref.noise import gumbel
from python_ref.sampling import log_norm_of, perturbed_argmax, sanitise, scale_by_temperature, truncation_cut
from tests.generate.test_rerank import with_head
from tests.ref.test_rerank import SAMPLERS, WEIGHTS, distributions_for, faulty, problem, tied
from tests.softgpu_support import SCHEDULES
from tests.triton.support import DEVICE, INTERPRETED, assert_ieee, caught, mutant
from tests.triton.test_end_to_end import PROMPTS, tiny_generator

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]
SOME = {"greedy": SAMPLERS["greedy"], "all": SAMPLERS["all"]} if INTERPRETED else SAMPLERS  # it takes seconds for each


def compare(module: ModuleType, args: dict[str, Any], q: DraftDistributions | None = None) -> Tensor:
    """Equal drafts; distributions that differ from the reference's by rounding at most."""
    wanted_q = copy.deepcopy(q)
    got = module.rerank_drafts(**args, draft_dists=q)
    wanted = python_ref.rerank_drafts(**args, draft_dists=wanted_q)
    assert got.tolist() == wanted.tolist()
    if q is not None and wanted_q is not None:
        kept_again(args, q, got)
        near = {"rtol": 2e-5, "atol": 2e-5} if q.logits.dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2.0**-7}
        for part in ("logits", "cut", "log_norm"):
            torch.testing.assert_close(getattr(q, part), getattr(wanted_q, part), **near)
    return got


def kept_again(args: dict[str, Any], q: DraftDistributions, drafts: Tensor) -> None:
    """The cut, the normaliser and the drafts follow from the logits that were kept, where drafts were chosen."""
    chosen, (batch, num_spec_tokens) = args["num_drafts"] > 0, drafts.shape

    def each(name: str) -> Tensor:
        return args[name].unsqueeze(1).expand(batch, num_spec_tokens)[chosen].flatten()

    kept = q.logits[chosen].flatten(0, 1)
    z = scale_by_temperature(sanitise(kept, args["id_limit"], args["mask_id"])[0], each("temperature"))
    cut = truncation_cut(z, each("top_k"), each("top_p"), each("min_p"))
    assert q.cut[chosen].flatten().tolist() == cut.tolist()
    torch.testing.assert_close(q.log_norm[chosen].flatten(), log_norm_of(z, cut), rtol=1e-6, atol=1e-6)
    position = (args["positions"].unsqueeze(1) + 1 + torch.arange(num_spec_tokens))[chosen].flatten()
    noise = gumbel(each("seed"), position, z.shape[1], STREAM_DRAFT)
    greedy = each("temperature") < GREEDY_BELOW
    assert drafts[chosen].flatten().tolist() == perturbed_argmax(z, cut, greedy, noise).tolist()


def check_samplers(module: ModuleType, dtype: torch.dtype = BASE) -> None:
    for i, sampler in enumerate(SOME.values()):
        args = problem(dtype=dtype, seed=i, num_spec_tokens=2 if INTERPRETED else 3, **sampler)
        compare(module, args)
        compare(module, args, distributions_for(args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sampler(dtype: torch.dtype) -> None:
    check_samplers(rerank, dtype)


def mixed(**shape: Any) -> dict[str, Any]:
    """A problem in which every request samples in its own way."""
    args = problem(**{"dtype": BASE, "temperature": 1.0, **shape})
    for b in range(args["drafts"].shape[0]):
        for name, value in list(SAMPLERS.values())[b % len(SAMPLERS)].items():
            args[name][b] = value
    return args


@pytest.mark.parametrize("num_spec_tokens", [1, 3] if INTERPRETED else range(1, 8))
def test_every_stride(num_spec_tokens: int) -> None:
    args = mixed(num_spec_tokens=num_spec_tokens, batch=5)
    compare(rerank, args, distributions_for(args))


def check_shapes(module: ModuleType) -> None:
    """Widths and hidden sizes around and beyond a block."""
    for i, shape in enumerate(
        [
            {"vocab_size": 31, "width": 1, "hidden": 1},
            {"vocab_size": 257, "width": 31, "hidden": 65},
            {"vocab_size": 83, "width": 300, "hidden": 1033},
        ][: 2 if INTERPRETED else None]
    ):
        args = mixed(**{"num_spec_tokens": 2, "batch": 4, "seed": i, **shape})
        args["from_state"] *= 0.1
        compare(module, args, distributions_for(args) if i == 1 else None)


def test_shapes() -> None:
    check_shapes(rerank)


def check_shared(module: ModuleType) -> None:
    """CTAs that serve eight requests, the last one fewer."""
    args = mixed(batch=19, num_spec_tokens=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kMinCtas", 1)
        assert module.num_served(19, 2) == 8
        compare(module, args, distributions_for(args))


@pytest.mark.compiled
def test_requests_that_share_a_cta() -> None:
    check_shared(rerank)


def test_who_shares_a_cta() -> None:
    """At W 256: one request has all CTAs for itself, many share the matrices by eight."""
    assert [rerank.num_served(batch, 64) for batch in (1, 8, 16, 64)] == [1, 1, 3, 8]


def check_groups(module: ModuleType) -> None:
    """More groups than candidates, so that some are left out."""
    compare(module, mixed(vocab_size=12_305, batch=2, num_spec_tokens=1))


@pytest.mark.compiled
def test_a_vocabulary_of_many_groups() -> None:
    check_groups(rerank)


@pytest.mark.compiled
@pytest.mark.parametrize("vocab_size", [1, 2, 33])
def test_fewer_ids_than_candidates(vocab_size: int) -> None:
    args = mixed(vocab_size=vocab_size, batch=8) | {"mask_id": -1 if vocab_size == 1 else 1}
    compare(rerank, args)
    compare(rerank, args, distributions_for(args))


def check_ties(module: ModuleType) -> None:
    """Ties decide which ids are candidates and which is drafted."""
    for seed in range(1 if INTERPRETED else 2):
        for vocab_size in (83,) if INTERPRETED else (83, 700):
            args = tied(mixed(vocab_size=vocab_size, seed=seed, temperature=0.0))
            args["logits"][:, ::3] *= -0.0  # -0.0 and 0.0 tie
            compare(module, args)
            compare(module, args | {"temperature": torch.ones(4)}, distributions_for(args))


def test_ties() -> None:
    check_ties(rerank)


def check_faults(module: ModuleType) -> None:
    for mask_id in (0,) if INTERPRETED else (-1, 0, 7):
        for name in ("all",) if INTERPRETED else ("greedy", "plain", "all"):
            args = faulty(problem(dtype=torch.float32, **SAMPLERS[name])) | {"mask_id": mask_id}
            compare(module, args)
            compare(module, args, distributions_for(args))


def test_faults_give_defined_drafts() -> None:
    check_faults(rerank)


@pytest.mark.compiled
@pytest.mark.parametrize("name", WEIGHTS)
def test_nan_in_weights(name: str) -> None:
    args = problem(dtype=BASE)
    args[name].view(-1)[::7] = torch.nan
    compare(rerank, args, distributions_for(args))
    args[name][:] = torch.nan
    compare(rerank, args, distributions_for(args))


def check_padded(module: ModuleType) -> None:
    """Requests without drafts: nothing of theirs is read or written; ids and rows out of range are harmless."""
    args = mixed(batch=11)
    args["num_drafts"][::4] = 0
    args["first_mask"][::4], args["previous"][::4] = 10**9, -1
    args["previous"][1], args["first_mask"][2] = 10**9, args["logits"].shape[0] - 1
    q = distributions_for(args)
    before = copy.deepcopy(q)
    drafts = compare(module, args, q)
    assert drafts[::4].tolist() == args["drafts"][::4].tolist()
    for part in ("logits", "cut", "log_norm"):
        check_bits(getattr(q, part)[::4], getattr(before, part)[::4])


@pytest.mark.compiled
def test_requests_without_drafts() -> None:
    check_padded(rerank)


@pytest.mark.compiled
def test_free_strides() -> None:
    args = mixed(vocab_size=83, batch=5)

    def apart(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:-1], 3)], dim=-1)[..., : x.shape[-1]]

    strided = args | {name: apart(args[name]) for name in (*WEIGHTS, "logits", "hidden", "drafts")}
    wide = DraftDistributions.empty(5, 7, 90, torch.float32, DEVICE)
    q = DraftDistributions(wide.logits[:, 2:5, :85], wide.cut[:, 1:4], wide.log_norm[:, :3])
    out = torch.full((5, 9), -5)
    wanted = compare(rerank, strided, q)
    assert rerank.rerank_drafts(**strided, draft_dists=q, out=out[:, 1:4]).tolist() == wanted.tolist()
    assert out[:, 1:4].tolist() == wanted.tolist() and (out[:, [0, 4]] == -5).all()


def test_what_is_left_to_the_reference() -> None:
    for dtype, shape in ((torch.float64, {}), (BASE, {"num_spec_tokens": 0}), (BASE, {"batch": 0})):
        args = problem(dtype=dtype, **shape)
        assert torch.equal(rerank.rerank_drafts(**args), python_ref.rerank_drafts(**args))


@pytest.mark.compiled
def test_a_request_alone_has_the_same_bits() -> None:
    args = mixed(batch=12, num_spec_tokens=2, vocab_size=257, width=31, hidden=65)
    q = distributions_for(args)
    drafts = rerank.rerank_drafts(**args, draft_dists=q)
    for b in (0, 9):
        per_request = ("first_mask", "previous", "positions", "drafts", "num_drafts")
        names = (*per_request, "temperature", "top_k", "top_p", "min_p", "seed")
        alone = args | {name: args[name][b : b + 1] for name in names}
        own = distributions_for(alone)
        assert rerank.rerank_drafts(**alone, draft_dists=own).tolist() == drafts[b : b + 1].tolist()
        for part in ("logits", "cut", "log_norm"):
            check_bits(getattr(own, part), getattr(q, part)[b : b + 1])


@pytest.mark.compiled
def test_the_shape_of_qwen3_8b(softgpu: ModuleType) -> None:
    """Launches, registers and bytes where they matter."""
    args = problem(batch=1, vocab_size=1024, hidden=4096, width=256, dtype=torch.bfloat16) | {"id_limit": 151_934}
    args["logits"] = torch.randn(5, 151_936).bfloat16() * 3
    args["embedding"] = args["head_rows"] = args["head_rows"].repeat(149, 1)  # every id a few times over
    for name in ("from_hidden", "from_previous", "from_state", "to_query"):
        args[name] *= 0.1
    with recorded_launches(softgpu) as launches:
        compare(rerank, args, distributions_for(args))
    assert [launch.name for launch in launches] == ["maxima", "candidates", *["state", "score"] * 3, "last"]
    for launch in launches:
        assert resources(launch.ptx).spill_bytes == 0, launch.name
    rows = 3 * 151_936 * 2
    assert launches[0].counters["global_load_bytes"] < 1.15 * rows  # each CTA reads which row it is of, per lane


@pytest.mark.compiled
def test_arithmetic_is_ieee(softgpu: ModuleType) -> None:
    args = problem(dtype=torch.float32)
    with recorded_launches(softgpu) as launches:
        compare(rerank, args, distributions_for(args))
        compare(rerank, args)
    assert_ieee(launches)


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    args = mixed(vocab_size=700, batch=5)
    with softgpu.configured(**SCHEDULES[schedule]):
        compare(rerank, args, distributions_for(args))


@pytest.mark.compiled
@pytest.mark.parametrize("verify", ["match", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_decoding_drafts_what_the_references_draft(
    verify: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32: every draft of every step, and the tokens."""
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=5)
    found: dict[str, Any] = {}
    chosen: Callable[..., Tensor] = step.rerank_drafts
    for backend in ("torch", "triton"):
        drafts: list[list[list[int]]] = []

        def recording(*args: Any, drafts: list[list[list[int]]] = drafts, **options: Any) -> Tensor:
            result = chosen(*args, **options)
            drafts.append(result.tolist())
            return result

        monkeypatch.setattr(step, "rerank_drafts", recording)
        with idlm_kernels.use_backend(backend):
            assert idlm_kernels.backends(DEVICE.type)["rerank_drafts"] == backend
            generator = with_head(tiny_generator(torch.float32))
            results = generator.generate(PROMPTS, params, plan="quadratic", stride=3, verify=verify)
        found[backend] = [result.token_ids for result in results], drafts
    assert found["triton"] == found["torch"]
    assert len(found["torch"][1]) > 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.compiled
def test_decoding_in_half_precision(backend: str) -> None:
    """A model whose weights, activations and head are bf16, as on a GPU: what it writes is what AR writes."""
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=5)
    texts = []
    with idlm_kernels.use_backend(backend):
        for plan in ("ar", "quadratic"):
            generator = with_head(tiny_generator(torch.bfloat16))
            head = generator.model.rerank_head
            assert head is not None
            generator.model.rerank_head = head.to(DEVICE, torch.bfloat16)
            results = generator.generate(PROMPTS, params, plan=plan, stride=3)  # type: ignore[arg-type]
            assert [result.error for result in results] == [None, None]
            texts.append([result.token_ids for result in results])
    assert texts[0] == texts[1]


MUTANTS = {
    "mask id among the candidates": (check_faults, "(id_ != mask_id) & (x == x)", "(x == x)"),
    "candidates of the first groups": (check_groups, "mask=g < num_groups, other", "mask=g < num_groups // 2, other"),
    "ties to the highest id": (check_ties, "tl.where(score == tl.max(score, axis=0), id_, kNoId)", "-id_"),
    "requests beyond the first eight": (check_shared, "triton.cdiv(batch, by_state)", "batch // by_state"),
    "noise of the next position": (check_samplers, "gPositions + request) + 1 + j", "gPositions + request) + 2 + j"),
    "drafts from the target's stream": (check_samplers, "kStreamDraft if shape.HAS_Q", "kStreamTarget if shape.HAS_Q"),
    "noise by the quad": (check_samplers, "(id_ & 2) == 0, low", "(id_ & 4) == 0, low"),
    "nothing carried on": (check_samplers, "x += carried", "x += carried * 0.0"),
    "state of another request": (check_samplers, "gBefore = gMine - batch", "gBefore = gMine - (batch - 1)"),
    "embedding not normalised": (check_samplers, "row_part + y * _inverse_rms(squares, H)", "row_part + y"),
    "one slice of the query": (check_shapes, "+ c[None, :], mask=s < shape.SLICES", "+ c[None, :], mask=s < 1"),
    "top-k without its ties": (check_ties, "above = z[None, :] > z", "above = z[None, :] >= z"),
    "top-p of the mass before top-k": (check_samplers, "weight = tl.where(kept,", "weight = tl.where(z > -9e9,"),
    "distribution before it is rounded": (
        check_samplers,
        "x = x.to(q.of.logits.dtype.element_ty).to(tl.float32)",
        "x = x * 1.0",
    ),
    "distributions not cleared": (check_samplers, "nothing, mask=id_ < vocab_size", "nothing, mask=id_ < 16"),
    "distributions of padded requests": (
        check_padded,
        "if tl.load(gNumDrafts + request) <= 0:",
        "if num_spec_tokens <= 0:",
    ),
    "drafts of padded requests": (
        check_padded,
        "tl.store(gMine + i, before, mask=i < num_spec_tokens)",
        "tl.store(gMine, -1)",
    ),
    "an empty row without a distribution": (check_faults, "where(is_empty, c == 0, x", "where(is_empty, c < 0, x"),
    "an empty row without a draft": (check_faults, "draft = tl.where(is_empty, lowest_id(mask_id), draft)", ""),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check, old, new = MUTANTS[name]
    assert caught(check, mutant(rerank, old, new, tmp_path))
