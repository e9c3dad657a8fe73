"""One interface to the weights, config and tokenizer of a model, wherever they come from.

A checkpoint is opened in full before anything is computed: every tensor that the config needs has to be there
with the right shape and a float type, and nothing may be there that the model would leave out. Tensors are
then read one at a time out of memory-mapped files, so that a loader peaks at its own copy of the weights and
one tensor more. Pickle and remote code are never touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from idlm_kernels.cpu.native import GGUF_BLOCKS, Blocks

from ._files import SafetensorsFile, is_there, naming, read_json_object, require_finite, require_float
from .config import ModelConfig, token_ids
from .download import default_model
from .errors import CheckpointError, cut, short
from .gguf import ROPE_FREQS, GgufFile, config_from_gguf, huggingface_name, undo_rotary_permutation
from .tokenizer import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_HUB_ADAPTER = ["adapter/*.json", "adapter/*.safetensors"]
_ROTARY_LINEAR = re.compile(r"\.self_attn\.[qk]_proj\.")
_MEBIBYTE = 1 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint; reads headers only.

    Args:
        source: a folder in Hugging Face layout (config.json and safetensors), one GGUF file, "default" for
            the default model (fetched into the cache at first use), or, as a string that is no local path, a
            hub id "org/name". The network is touched for the last two alone.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: nothing is there, or a file of the checkpoint is missing.
        CheckpointError: what is there is damaged, contradicts itself or is not supported.
    """
    if source == "default":
        path = default_model()
    else:
        path = Path(source).expanduser()
        if not path.exists():
            if isinstance(source, str) and _HUB_ID.fullmatch(source):
                folder = _fetch(source, revision)
                with naming(folder):
                    return _FolderCheckpoint(folder, name=source)
            raise FileNotFoundError(
                f"{source}: no such file or folder; wanted a Hugging Face folder, a .gguf file, a hub id "
                "'org/name', "
                "or 'default'"
            )
    if revision is not None:
        raise ValueError(f"revision {revision!r} has a meaning for hub ids only, and {source} is not one")
    if path.is_dir():
        with naming(path):
            return _FolderCheckpoint(path, name=path.resolve().name)
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickle_error(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: a safetensors file alone lacks the config; give its folder")
    with naming(path):
        return _GgufCheckpoint(path)


class Checkpoint(ABC):
    """The tensors of a model by their canonical Hugging Face names, its config and its tokenizer."""

    name: str
    config: ModelConfig
    path: Path

    def names(self) -> list[str]:
        """Every tensor of the model, in the order of the forward pass."""
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype (fp32, fp16, bf16; quantised GGUF types come as fp32).

        Raises KeyError for a name outside of `names()`, CheckpointError when the tensor holds NaN or Inf.
        """
        if name not in self._shapes:
            raise KeyError(f"{self.name} has no tensor {name!r}")
        file = self._file_of(name)
        with naming(file):
            tensor = self._read(name)
            require_finite(file, name, tensor)
        return tensor

    def blocks(self, name: str) -> Blocks | None:
        """A quantised weight as it is stored, where the CPU kernels take it so; a view of the file."""
        return None

    def forget(self, name: str) -> None:  # noqa: B027  # a hint, which need not be taken
        """Say that a tensor is not needed for now: what it takes of memory-mapped files may go."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights. FileNotFoundError or CheckpointError when there is none
        of use."""
        with naming(self.path):
            tokenizer = self._read_tokenizer()
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only "
                f"{self.config.vocab_size} rows"
            )
        return tokenizer

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.config.tensor_shapes()

    def _check_shapes(self, found: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Holds the tensors of the file against those that the config asks for, in both directions."""
        missing = [name for name in self._shapes if name not in found]
        if missing:
            raise CheckpointError(f"{self._file_of('')}: {_listed(missing)} missing, which the config asks for")
        extra = sorted(name for name in found if name not in self._shapes and name not in ignored)
        if extra:
            raise CheckpointError(
                f"{self._file_of(extra[0])}: {_listed(extra)} not part of this architecture and config"
            )
        for name, wanted in self._shapes.items():
            if found[name] != wanted:
                raise CheckpointError(
                    f"{self._file_of(name)}: {name} has shape {list(found[name])}, the config asks for {list(wanted)}"
                )

    def _file_of(self, name: str) -> Path:
        """The file that holds a tensor, or that should list it."""
        return self.path

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def _read_tokenizer(self) -> Tokenizer: ...


def identity(checkpoint: Checkpoint) -> str:
    """A hash that tells models apart without reading all of them: of the config, and of each weight file the size, the
    first and the last MiB."""
    path, config = checkpoint.path, checkpoint.config
    digest = hashlib.sha256(repr(config).encode())
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{file.name if path.is_dir() else ''} {size}".encode())
            for start in (0, max(0, size - _MEBIBYTE)):
                stream.seek(start)
                digest.update(stream.read(_MEBIBYTE))
    return digest.hexdigest()


class _FolderCheckpoint(Checkpoint):
    """config.json beside model.safetensors, or beside an index and its shards."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.path, self.name = path, name
        self._files = _open_weights(path)
        config = read_json_object(path / "config.json")
        with naming(path / "config.json"):
            self.config = ModelConfig.from_hf(config)
        self.config = _complete_ids(self.config, path)
        found = {name: file.shape(name) for name, file in self._files.items()}
        # A buffer that old writers saved.
        ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            ignored.add("lm_head.weight")  # a copy of the embedding
        self._check_shapes(found, frozenset(ignored))
        for tensor in self._shapes:
            require_float(self._files[tensor].path, tensor, self._files[tensor].dtype(tensor))

    def _file_of(self, name: str) -> Path:
        if name in self._files:
            return self._files[name].path
        return next(file for file in _weights(self.path) if is_there(file))

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._files[name].tensor(name)
        is_tied = self.config.tie_word_embeddings and name == "model.embed_tokens.weight"
        head = self._files.get("lm_head.weight") if is_tied else None
        if head is not None and not _same(tensor, head.tensor("lm_head.weight")):
            raise CheckpointError(
                f"{self.path / 'config.json'}: tie_word_embeddings is true, but {head.path} holds an lm_head.weight "
                "that differs from the embedding: set it to false, or remove the tensor"
            )
        return tensor

    def _read_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)


class _GgufCheckpoint(Checkpoint):
    """A GGUF file: config and tokenizer from its metadata, tensors renamed and their rows put in Hugging Face
    order."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        self._file = GgufFile(path)
        self.config = config_from_gguf(self._file)
        self._gguf_names: dict[str, str] = {}
        found: dict[str, tuple[int, ...]] = {}
        for gguf_name, place in self._file.tensors.items():
            if gguf_name != ROPE_FREQS:  # read into the config
                name = huggingface_name(gguf_name) or gguf_name
                self._gguf_names[name], found[name] = gguf_name, place.shape
        self._check_shapes(found)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._file.tensor(self._gguf_names[name])
        if self.config.architecture == "llama" and _ROTARY_LINEAR.search(name):
            tensor = undo_rotary_permutation(tensor, self.config.head_dim)
        return tensor

    def blocks(self, name: str) -> Blocks | None:
        found = self._file.blocks(self._gguf_names[name])
        if found is None or found[0] not in GGUF_BLOCKS:
            return None
        kind, data = found
        order = None
        if self.config.architecture == "llama" and _ROTARY_LINEAR.search(name):
            order = undo_rotary_permutation(torch.arange(data.shape[0], dtype=torch.int32), self.config.head_dim)
        return Blocks(kind, data, order)

    def forget(self, name: str) -> None:
        self._file.forget(self._gguf_names[name])

    def _read_tokenizer(self) -> Tokenizer:
        with naming(self.path, "the tokenizer in it cannot be used"):
            return Tokenizer.from_gguf(self._file.fields, str(self.path))


def _fetch(hub_id: str, revision: str | None) -> Path:
    # Imported here: it costs 0.2 s, and only a hub id needs it.
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
        # An adapter inside the model's folder (see `bundle`), of the same commit: it names the folder.
        commit = root.name if re.fullmatch(r"[0-9a-f]{40}", root.name) else revision
        snapshot_download(hub_id, revision=commit, allow_patterns=_HUB_ADAPTER, ignore_patterns=["*/*/*"])
        return root
    except Exception as error:  # the errors of its HTTP library have no base in common
        where = f"{hub_id}@{revision}" if revision else hub_id
        raise FileNotFoundError(
            f"{where}: no such local folder, and the Hugging Face hub did not give it: {error}"
        ) from error


def _open_weights(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it."""
    single, index = _weights(path)
    if is_there(single):
        file = SafetensorsFile(single)
        return dict.fromkeys(file.names, file)
    if not is_there(index):
        raise _no_weights_error(path)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty")
    shards: dict[str, SafetensorsFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]{0,199}\.safetensors", shard):
            raise CheckpointError(
                f"{index}: {cut(name)} lies in {short(shard)}; wanted the name of a .safetensors file beside it"
            )
        if shard not in shards:
            if not is_there(path / shard):
                raise FileNotFoundError(f"{path / shard}: no such file, but {index.name} puts {cut(name)} there")
            shards[shard] = SafetensorsFile(path / shard)
        if name not in shards[shard].names:
            raise CheckpointError(f"{path / shard}: holds no {cut(name)}, but {index.name} puts it there")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _weights(path: Path) -> tuple[Path, Path]:
    """Where a folder has its weights: all in one file, or an index of several."""
    return path / "model.safetensors", path / "model.safetensors.index.json"


def _no_weights_error(path: Path) -> Exception:
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return _pickle_error(pickles[0])
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return CheckpointError(f"{path}: a folder of GGUF files; give one of them, for example {ggufs[0]}")
    return FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: pickle checkpoints can run code when they are read and are never opened; convert it to "
        "safetensors, "
        "for example with transformers' save_pretrained"
    )


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two stored tensors are one: shape, dtype and bytes."""
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _complete_ids(config: ModelConfig, path: Path) -> ModelConfig:
    """Ids that live beside config.json: the end ids of generation_config.json and, for SDAR, the tokenizer's
    MASK."""
    generation = path / "generation_config.json"
    if is_there(generation):
        settings = read_json_object(generation)
        try:
            more = token_ids(settings, "eos_token_id")
            config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
        except CheckpointError as error:
            raise CheckpointError(f"{generation}: {str(error).removeprefix('config: ')}") from None
    if config.architecture == "sdar" and config.mask_token_id is None:
        mask = _mask_from_tokenizer(path)
        with naming(path / "tokenizer_config.json"):
            config = dataclasses.replace(config, mask_token_id=mask)
    return config


def _mask_from_tokenizer(path: Path) -> int:
    file = path / "tokenizer_config.json"
    settings = read_json_object(file) if is_there(file) else {}
    mask, added = settings.get("mask_token"), settings.get("added_tokens_decoder")
    mask = mask.get("content") if isinstance(mask, dict) else mask
    for token_id, token in added.items() if isinstance(added, dict) and isinstance(mask, str) else ():
        if isinstance(token, dict) and token.get("content") == mask and re.fullmatch(r"\d{1,9}", token_id):
            return int(token_id)
    raise CheckpointError(
        f"{path / 'config.json'}: an SDAR model needs its MASK token: no mask_token_id here and no mask_token in "
        "tokenizer_config.json"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(cut, names[:3]))}{more} {'is' if len(names) == 1 else 'are'}"
