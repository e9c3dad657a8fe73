"""A trained adapter as a folder in PEFT's layout, with what I-DLM needs beside it and a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save

from idlm_kernels.model.adapter import BLOCK_OF, MASK_EMBEDDING_FILE, MODULES, TRAINING_FILE
from idlm_kernels.model.mask_input import MaskInput
from idlm_kernels.model.rerank import FILE as RERANK_FILE
from idlm_kernels.model.rerank import RerankHead
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.lora import GatedLora
from idlm_kernels.training.train import Trainee, TrainSettings


@dataclass(frozen=True)
class Provenance:
    """What an adapter was trained on: the base model's name and sha256, samples and tokens of the data.

    license: of the adapter, for the card; none is stated when it is empty.
    """

    base: str
    base_sha256: str
    samples: int
    tokens: int
    license: str = ""


def file_sha256(path: Path) -> str:
    """Of a file, or of the weight files of a folder in the order of their names."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: neither a file nor a folder with .safetensors files in it")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def export(
    folder: Path,
    trainee: Trainee,
    settings: TrainSettings,
    provenance: Provenance,
    steps: int,
    predictions: Predictions | None,
    dtype: torch.dtype = torch.bfloat16,
    history: Mapping[str, object] | None = None,
) -> None:
    """Write the adapter; each file in one piece. What an earlier one left in the folder does not stay.

    predictions: on held-out samples, for the card and for planning. history: what else its record says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lora, head = trainee.lora, trainee.rerank
    _save(folder / "adapter_model.safetensors", lora_tensors(lora), dtype)
    if settings.noise_below:
        (folder / MASK_EMBEDDING_FILE).unlink(missing_ok=True)
    else:
        _save(folder / MASK_EMBEDDING_FILE, {"mask_embedding": lora.mask_embedding}, dtype)
    if head is not None:
        _save(folder / RERANK_FILE, {f.name: getattr(head, f.name) for f in fields(RerankHead)}, dtype)
    else:
        (folder / RERANK_FILE).unlink(missing_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": provenance.base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(MODULES),
        "inference_mode": True,
    }
    _write(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    record = {**asdict(provenance), "steps": steps, "settings": asdict(settings), **(history or {})}
    if settings.noise_below:  # a vector says it by being there
        record["mask_input"] = MaskInput("uniform", settings.noise_below).record()
    if predictions is not None:
        record["acceptance"] = _rounded(predictions.acceptance())
        record["acceptance_reranked"] = _rounded(predictions.acceptance(reranked=True))
    _write(folder / TRAINING_FILE, json.dumps(record, indent=2) + "\n")
    _write(folder / "README.md", _card(settings, provenance, steps, predictions, head is not None))


def lora_tensors(lora: GatedLora) -> dict[str, torch.Tensor]:
    """The pairs by PEFT's names."""
    tensors: dict[str, torch.Tensor] = {}
    for (layer, module), (a, b) in lora.pairs.items():
        block = BLOCK_OF[module]
        prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    return tensors


def _card(
    settings: TrainSettings, provenance: Provenance, steps: int, predictions: Predictions | None, reranks: bool
) -> str:
    lines = [
        "---",
        f"base_model: {provenance.base}",
        "library_name: peft",
        *([f"license: {provenance.license}"] if provenance.license else []),
        "---",
        "",
        f"# Gated LoRA adapter for {provenance.base}",
        "",
        "Makes the base model propose the tokens beyond the next one, for introspective strided decoding with",
        "idlm_kernels. It is active on MASK rows only, so the output is the base model's, token for token. Do not",
        "merge it into the base model.",
        "",
        f"- base: {provenance.base}, sha256 {provenance.base_sha256}",
        f"- data: {provenance.samples} prompts, {provenance.tokens} tokens of the base model's own continuations",
        f"- training: {steps} steps of {settings.batch} samples, stride {settings.stride}, rank {settings.rank},"
        f" learning rate {settings.learning_rate:g}, seed {settings.seed}",
        f"- re-ranking head: {'yes' if reranks else 'no'}",
    ]
    if predictions is not None:
        n = settings.stride
        chain, quadratic = (predictions.tpf(quadratic=b) for b in (False, True))
        again = predictions.tpf(quadratic=True, reranked=True)
        lines += [
            "",
            f"Greedy decoding of {len(predictions.plain)} held-out prompts, computed in one pass"
            " (`idlm_kernels.training.acceptance`):",
            "",
            "| draft | acceptance | re-ranked |",
            "|---|---|---|",
            *(
                f"| {j} | {plain:.3f} | {reranked:.3f} |"
                for j, (plain, reranked) in enumerate(
                    zip(predictions.acceptance(), predictions.acceptance(reranked=True), strict=True), 1
                )
            ),
            "",
            f"Tokens per forward at N={n}: chain {chain:.2f}, quadratic {quadratic:.2f}, quadratic and re-ranked"
            f" {again:.2f}.",
        ]
    return "\n".join(lines) + "\n"


def _rounded(shares: list[float]) -> list[float]:
    return [round(share, 4) for share in shares]


def _save(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    part = path.with_suffix(".part")
    stored = {name: x.detach().to("cpu", dtype).contiguous() for name, x in tensors.items()}
    part.write_bytes(save(stored, {"format": "pt"}))
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
