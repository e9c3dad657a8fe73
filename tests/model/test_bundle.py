"""Which adapter a model gets, and what its MASK rows embed: recognised, asked for, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from idlm_kernels.generate import Generator
from idlm_kernels.model import load_checkpoint
from idlm_kernels.model.adapter import DEFAULT_ADAPTER, TRAINING_FILE
from idlm_kernels.model.bundle import adapter_folder, load_with_input
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.mask_input import MaskInput
from tests.tiny import save_tiny_bundle, save_tiny_model

QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "vocab_size": 260, "mask_token_id": 258,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: bundles of either config, and a model alone."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen3", "sdar", "alone"):
        (root / name).mkdir()
    made = {name: save_tiny_bundle(root / name, **config) for name, config in (("qwen3", QWEN3), ("sdar", SDAR))}
    return made | {"alone": save_tiny_model(root / "alone")}


def loaded(folder: Path, **wanted: Any) -> Generator:
    return Generator.from_pretrained(folder, dtype="fp32", **wanted)


def test_a_bundle_brings_its_adapter_and_draws_uniform_ids(folders: dict[str, Path]) -> None:
    generator = loaded(folders["sdar"])
    assert generator.model.has_adapter and generator.model.mask_input == MaskInput("uniform", 258)
    assert generator.model.mask_embedding is None
    generator = loaded(folders["qwen3"], mask_token_id=200)
    assert generator.model.has_adapter and generator.model.mask_input == MaskInput("uniform", 200)
    assert not loaded(folders["sdar"], adapter=None).model.has_adapter
    assert not loaded(folders["alone"]).model.has_adapter


def test_which_folder() -> None:
    assert adapter_folder("default", Path("/nowhere")) == DEFAULT_ADAPTER
    assert adapter_folder("/nowhere", Path("/nowhere")) is None


def test_what_is_asked_for_comes_first(folders: dict[str, Path]) -> None:
    for asked, want in (
        ({"mask_input": "mean"}, MaskInput("mean")),
        ({"mask_input": "token"}, MaskInput("token", 258)),
        ({"mask_input": "token", "mask_token_id": 7}, MaskInput("token", 7)),
        ({"mask_input": "uniform", "mask_token_id": 100}, MaskInput("uniform", 100)),
        ({"mask_token_id": 260}, MaskInput("uniform", 260)),
    ):
        assert loaded(folders["sdar"], **asked).model.mask_input == want  # type: ignore[arg-type]


def test_what_the_adapter_says_comes_before_a_guess(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(folders["sdar"], tmp_path / "bundle"))
    said = bundle / "adapter" / TRAINING_FILE
    said.write_text(json.dumps({"mask_input": MaskInput("uniform", 77).record()}))
    assert loaded(bundle).model.mask_input == MaskInput("uniform", 77)
    assert loaded(bundle, mask_input="uniform").model.mask_input == MaskInput("uniform", 77)
    said.write_text(json.dumps({"mask_input": {"kind": "mean"}}))
    assert loaded(bundle).model.mask_input == MaskInput("mean")
    said.unlink()
    vector = torch.arange(32).float()
    save_file({"mask_embedding": vector}, bundle / "adapter" / "mask_embedding.safetensors")
    generator = loaded(bundle)
    assert generator.model.mask_input == MaskInput("vector")
    assert generator.model.mask_embedding is not None and torch.equal(generator.model.mask_embedding, vector)


def test_an_adapter_elsewhere_that_says_nothing_gets_the_models_own(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(folders["qwen3"] / "adapter", tmp_path / "adapter"))
    for folder, want in (("sdar", MaskInput("token", 258)), ("qwen3", MaskInput("mean"))):
        _, found = load_with_input(load_checkpoint(folders[folder]), adapter)
        assert found == want


@pytest.mark.parametrize(
    ("folder", "wanted", "message"),
    [
        ("qwen3", {}, r"adapter: mask_input 'uniform' needs the id of the MASK token.*--mask-token-id"),
        ("qwen3", {"mask_input": "uniform"}, "needs the id of the MASK token"),
        ("qwen3", {"mask_token_id": 257}, "mask_token_id is 257, wanted 2 to 256 for mask_input 'uniform'"),
        ("qwen3", {"mask_token_id": 1}, "mask_token_id is 1, wanted 2 to 256"),
        ("sdar", {"mask_input": "token", "mask_token_id": 260}, "mask_token_id is 260, wanted 0 to 259"),
        ("sdar", {"mask_input": "mean", "mask_token_id": 3}, "mask_input 'mean' has no use for one"),
        ("sdar", {"mask_input": "noise"}, "mask_input is 'noise', wanted one of vector, token, mean, uniform"),
        ("sdar", {"mask_input": "vector"}, "needs an adapter with a mask_embedding.safetensors"),
        ("sdar", {"mask_token_id": True}, "mask_token_id must be an int, got bool"),
        ("alone", {"mask_input": "uniform", "mask_token_id": 9}, "alone: .* there is no folder 'adapter'"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: str, wanted: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        loaded(folders[folder], **wanted)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("uniform", "mask_input is 'uniform', wanted kind and mask_token_id"),
        ({"kind": "noise"}, "mask_input is 'noise', wanted one of"),
        ({"kind": "uniform", "mask_token_id": "9"}, "mask_token_id must be an int, got str"),
        ({"kind": "uniform", "low": 3}, "wanted kind and mask_token_id"),
        ({"kind": "vector"}, "mask_input is 'vector', which does not go without a mask_embedding.safetensors"),
        ({"kind": ["uniform"]}, "mask_input is"),
    ],
)
def test_what_an_adapter_says_wrongly_is_refused(
    said: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(folders["sdar"], tmp_path / "bundle"))
    (bundle / "adapter" / TRAINING_FILE).write_text(json.dumps({"mask_input": said}))
    with pytest.raises(CheckpointError, match=rf"{TRAINING_FILE}: .*{message}"):
        loaded(bundle)


def test_a_bundle_whose_adapter_folder_is_empty(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(folders["sdar"], tmp_path / "bundle"))
    (bundle / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        loaded(bundle)


def test_a_hub_id_brings_the_adapter_of_the_same_commit(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(folders["sdar"], tmp_path / commit))
    calls: list[dict[str, Any]] = []

    def snapshot_download(hub_id: str, **arguments: Any) -> str:
        calls.append(arguments)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    generator = loaded("org/bundle", revision="v1")  # type: ignore[arg-type]
    assert generator.model.has_adapter and generator.model.mask_input == MaskInput("uniform", 258)
    assert [call["revision"] for call in calls] == ["v1", commit]
    assert calls[1]["allow_patterns"] == ["adapter/*.json", "adapter/*.safetensors"]
