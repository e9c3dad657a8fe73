"""The adapter folder: read by this library and by peft, and refused where it is damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.peers import transformers_llama
from idlm_kernels.generate.plan import prefill_rows
from idlm_kernels.model import load_adapter
from idlm_kernels.model.adapter import MODULES
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.rerank import RerankHead
from idlm_kernels.ops import use_backend
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.export import export, file_sha256
from idlm_kernels.training.lora import GatedLora
from idlm_kernels.training.train import Trainee, TrainSettings
from tests.tiny import TINY, MemoryCheckpoint, tiny_state
from tests.training.support import PROVENANCE, dense, exported, noisy_lora

SETTINGS = TrainSettings(rank=3, alpha=6.0, steps=50, seed=9)
PREDICTIONS = Predictions(
    [torch.tensor([[True, True, False], [True, False, False], [False, False, False]])],
    [torch.tensor([[True, True, False], [False, False, False], [False, False, False]])],
)
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mask_embedding.safetensors"}
WITH_HEAD = {"rerank_head.safetensors", "idlm_training.json"}


def trainee_of(width: int = 5) -> Trainee:
    model = dense(MemoryCheckpoint(TINY))
    head = Trainee.new(model, TrainSettings(rerank_width=width)).rerank if width else None
    if head is not None:
        with torch.no_grad():
            head.to_query.normal_(generator=torch.Generator().manual_seed(1))
    return Trainee(noisy_lora(TINY), head)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export(tmp_path / "mine", trainee_of(), SETTINGS, PROVENANCE, 40, PREDICTIONS)
    return tmp_path / "mine"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    trainee = trainee_of()
    export(tmp_path / "mine", trainee, SETTINGS, PROVENANCE, 40, PREDICTIONS, dtype=dtype)
    assert names(tmp_path / "mine") == FILES | WITH_HEAD
    adapter = load_adapter(tmp_path / "mine", TINY)
    assert (adapter.name, adapter.rank, adapter.scale) == ("mine", 3, 2.0)
    assert len(adapter.pairs) == 7 * TINY.num_layers
    for key, pair in trainee.lora.pairs.items():
        for written, read in zip(pair, adapter.pairs[key], strict=True):
            assert torch.equal(written.detach().to(dtype), read)
    assert adapter.mask_embedding is not None and adapter.rerank_head is not None and trainee.rerank is not None
    assert torch.equal(adapter.mask_embedding, trainee.lora.mask_embedding.detach().to(dtype))
    for field in dataclasses.fields(RerankHead):
        written, read = getattr(trainee.rerank, field.name), getattr(adapter.rerank_head, field.name)
        assert torch.equal(written.detach().to(dtype), read)
    assert adapter.acceptance == [0.5, 1.0, 0.0], "with the head, which the generator will use"


def test_the_adapter_of_a_folder_can_be_measured_again(folder: Path) -> None:
    trainee, again = trainee_of(), GatedLora.from_adapter(load_adapter(folder, TINY))
    assert (again.rank, again.alpha, again.scale) == (3, 6.0, 2.0)
    x = torch.randn(2, TINY.hidden_size)
    want = trainee.lora.delta(x, 1, "q_proj")
    torch.testing.assert_close(again.delta(x, 1, "q_proj"), want.detach(), rtol=0.05, atol=0.05)
    (folder / "mask_embedding.safetensors").unlink()
    without = load_adapter(folder, TINY)
    with pytest.raises(ValueError, match="mine has no MASK embedding, and the model has no MASK token"):
        GatedLora.from_adapter(without)
    assert torch.equal(GatedLora.from_adapter(without, torch.ones(32)).mask_embedding, torch.ones(32))


def test_a_head_or_a_record_of_an_earlier_export_does_not_stay(folder: Path) -> None:
    export(folder, trainee_of(0), SETTINGS, PROVENANCE, 40, PREDICTIONS)
    adapter = load_adapter(folder, TINY)
    assert names(folder) == FILES | {"idlm_training.json"} and adapter.rerank_head is None
    assert adapter.acceptance == [1.0, 1.0, 0.0]
    export(folder, trainee_of(0), SETTINGS, PROVENANCE, 40, None)
    assert load_adapter(folder, TINY).acceptance is None
    assert "samples" in json.loads((folder / "idlm_training.json").read_text())


def test_the_record_and_the_card_say_what_it_is(folder: Path) -> None:
    record = json.loads((folder / "idlm_training.json").read_text())
    assert record["base"] == "org/tiny" and record["base_sha256"] == "0" * 64 and record["steps"] == 40
    assert TrainSettings(**record["settings"]) == SETTINGS
    assert (record["samples"], record["tokens"]) == (3, 42)
    assert (record["acceptance"], record["acceptance_reranked"]) == ([1.0, 1.0, 0.0], [0.5, 1.0, 0.0])
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/tiny\nlibrary_name: peft\n---\n")
    for part in (
        f"base: org/tiny, sha256 {'0' * 64}",
        "data: 3 prompts, 42 tokens",
        "40 steps of 12 samples, stride 4, rank 3, learning rate 0.002, seed 9",
        "re-ranking head: yes",
        "| 1 | 1.000 | 0.500 |",
        "| 2 | 1.000 | 1.000 |",
        "| 3 | 0.000 | 0.000 |",
        "Tokens per forward at N=4: chain 2.00, quadratic 2.00, quadratic and re-ranked 2.00",
        "Do not\nmerge",
    ):
        assert part in card, part
    assert str(folder) not in card + json.dumps(record)


def test_equal_adapters_are_equal_files(folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "again", trainee_of(), SETTINGS, PROVENANCE, 40, PREDICTIONS)
    for name in FILES | WITH_HEAD:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_peft_computes_the_same(tmp_path: Path) -> None:
    """Rows that are all MASK: peft knows no gate, so its adapter acts on every row."""
    peft = pytest.importorskip("peft")
    checkpoint, trainee = MemoryCheckpoint(TINY, seed=4), trainee_of()
    count = 6
    with use_backend("torch"):
        paged = exported(tmp_path, checkpoint, trainee)
        rows = prefill_rows(tiny_state([[0] * count], 8), [0], [count], 0, 16)
        rows = dataclasses.replace(rows, is_mask=torch.ones(count, dtype=torch.bool), has_masks=True)
        ours, _ = paged.forward(rows, paged.new_cache(8, 16))
    base = transformers_llama(checkpoint)  # type: ignore[arg-type]
    embeds = trainee.lora.mask_embedding.detach().expand(1, count, -1)
    with torch.no_grad():
        before = base(inputs_embeds=embeds).logits[0]
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(inputs_embeds=embeds).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 0.1, "the adapter has a say"


# What is refused


def tampered(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_model", lambda t: t.update({B: torch.ones(47, 3)}), r"shape \[47, 3\], .* ask for \[48, 3\]"),
        ("adapter_model", lambda t: t[B].fill_(torch.nan), "up_proj.lora_B.weight holds 144 non-finite values"),
        ("adapter_model", lambda t: t.pop(B), "has no counterpart"),
        ("mask_embedding", lambda t: t.update(mask_embedding=torch.ones(33)), r"shape \[33\], wanted \[32\]"),
        ("mask_embedding", lambda t: t["mask_embedding"].fill_(torch.inf), "32 non-finite values"),
        ("rerank_head", lambda t: t.update(to_query=torch.ones(32, 6)), r"to_query has shape \[32, 6\]"),
        ("rerank_head", lambda t: t.update(from_state=torch.ones(5, 4)), r"from_state has shape \[5, 4\]"),
        ("rerank_head", lambda t: t.update(from_hidden=torch.ones(0, 32)), "from_hidden has shape|has shape"),
        ("rerank_head", lambda t: t["from_hidden"].fill_(-torch.inf), "from_hidden holds 160 non-finite"),
        ("rerank_head", lambda t: t.pop("from_previous"), "wanted from_hidden, from_previous, from_state, to_query"),
        ("rerank_head", lambda t: t.update(more=torch.ones(1)), "wanted from_hidden"),
        ("rerank_head", lambda t: t.update(to_query=torch.ones(32, 5, dtype=torch.int8)), "stored as I8"),
    ],
)
def test_damaged_tensors(name: str, change: Callable[..., Any], message: str, folder: Path) -> None:
    tampered(folder / f"{name}.safetensors", change)
    with pytest.raises(CheckpointError, match=f"{name}.safetensors: .*{message}"):
        load_adapter(folder, TINY)


@pytest.mark.parametrize("shares", [[], [1.01], [-0.1, 0.5], [True], ["0.5"], 0.5, [0.5] * 32, [float("nan")]])
def test_acceptance_that_is_no_list_of_shares(shares: Any, folder: Path) -> None:
    file = folder / "idlm_training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"acceptance_reranked": shares}))
    with pytest.raises(CheckpointError, match="idlm_training.json"):
        load_adapter(folder, TINY)


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="the model and rank 3 ask for"):
        load_adapter(folder, dataclasses.replace(TINY, hidden_size=40))


def test_every_linear_is_named(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == list(MODULES) and (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert config["base_model_name_or_path"] == "org/tiny"


# The hash of the base


def test_the_hash_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one" * 1_000_000)
    (tmp_path / "config.json").write_text("{}")
    assert file_sha256(tmp_path / "b.safetensors") == hashlib.sha256(b"two").hexdigest()
    assert file_sha256(tmp_path) == hashlib.sha256(b"one" * 1_000_000 + b"two").hexdigest()
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(FileNotFoundError, match=missing):
            file_sha256(tmp_path / missing)


def test_a_licence_is_stated_where_there_is_one(tmp_path: Path) -> None:
    licensed = dataclasses.replace(PROVENANCE, license="apache-2.0")
    export(tmp_path, trainee_of(), SETTINGS, licensed, 40, None)
    assert "library_name: peft\nlicense: apache-2.0\n---\n" in (tmp_path / "README.md").read_text()
