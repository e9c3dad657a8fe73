"""Hugging Face folders: sharded and not, shapes and dtypes against the config, and files that lie."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from idlm_kernels.model import checkpoint as checkpoint_module
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "SDARForCausalLM"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back(tiny_hf, write_folder, architecture, shards, dtype):
    folder, tensors = write_folder(tiny_hf(architecture), shards=shards, dtype=dtype)
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.name, checkpoint.path) == ("tiny", folder)
    assert checkpoint.names() == list(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.tensor(name)
        assert found.dtype == dtype and torch.equal(found, tensor), name


def test_reads_what_transformers_writes(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).is_file()
    checkpoint = load_checkpoint(str(tmp_path))
    state = model.state_dict()
    assert set(checkpoint.names()) == set(state) - {"lm_head.weight"}
    assert all(torch.equal(checkpoint.tensor(name), state[name]) for name in checkpoint.names())


def test_tied_head_may_be_stored_and_is_left_out(tiny_hf, write_folder):
    folder, tensors = write_folder(tiny_hf())
    config = tiny_hf(tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in load_checkpoint(folder).names()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert "inv_freq" not in "".join(load_checkpoint(folder).names())


def test_end_ids_of_the_generation_config_count(tiny_hf, write_folder):
    folder, _ = write_folder(tiny_hf(eos_token_id=5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5]}))
    assert load_checkpoint(folder).config.eos_token_ids == (5, 6)


def test_sdar_mask_id_from_the_tokenizer_config(tiny_hf, write_folder):
    config = tiny_hf("SDARForCausalLM")
    del config["mask_token_id"]
    folder, _ = write_folder(config)
    with pytest.raises(CheckpointError, match="an SDAR model needs its MASK token"):
        load_checkpoint(folder)
    settings = {
        "mask_token": "<|MASK|>",
        "added_tokens_decoder": {"7": {"content": "x"}, "9": {"content": "<|MASK|>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_checkpoint(folder).config.mask_token_id == 9


# --- what cannot be found ---------------------------------------------------------------------------------


def test_missing_sources(tmp_path, tiny_hf, write_folder, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_fetch", lambda *_: pytest.fail("a local path must not reach for the hub"))
    for source in (
        tmp_path / "org" / "name",
        str(tmp_path / "absent"),
        "absent",
        "./org/name",
        "../a/b",
        "a/b/c",
    ):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_checkpoint(source)
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_checkpoint(tmp_path)
    folder, _ = write_folder(tiny_hf())
    with pytest.raises(ValueError, match="revision 'main'"):
        load_checkpoint(folder, revision="main")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load_checkpoint(folder)


def test_hub_ids_go_to_the_hub_with_the_revision(tiny_hf, write_folder, monkeypatch):
    import huggingface_hub

    folder, _ = write_folder(tiny_hf())
    calls = []

    def snapshot_download(hub_id, **arguments):
        calls.append((hub_id, arguments))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = load_checkpoint("org/name.v1", revision="v2")
    assert checkpoint.name == "org/name.v1" and checkpoint.path == folder
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(calls[0][1]["allow_patterns"])
    for hub_id, arguments in calls:
        assert hub_id == "org/name.v1" and arguments["revision"] == "v2"
        assert not any(pattern in ("*", "*.bin", "*.py") for pattern in arguments["allow_patterns"])


def test_hub_failures_name_the_repository(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="org/name@v2: no such local folder, and the Hugging Face hub"):
        load_checkpoint("org/name", revision="v2")


def test_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        for source in (folder, folder / name):
            with pytest.raises(CheckpointError, match=f"{name}: pickle .* convert it to safetensors"):
                load_checkpoint(source)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_checkpoint_say_what_to_give(tiny_hf, write_folder, tmp_path):
    folder, _ = write_folder(tiny_hf())
    with pytest.raises(CheckpointError, match="give its folder"):
        load_checkpoint(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not start with 'GGUF'"):
        load_checkpoint(folder / "config.json")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="give one of them"):
        load_checkpoint(tmp_path / "ggufs")


# --- tensors against the config ---------------------------------------------------------------------------


def rewrite(folder, change):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q), f"{Q} is missing, which the config asks for"),
        (
            lambda t: t.update({Q: torch.ones(32, 31)}),
            "has shape \\[32, 31\\], the config asks for \\[32, 32\\]",
        ),
        (lambda t: t.update({Q: torch.ones(1024)}), "has shape \\[1024\\]"),
        (
            lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int8)}),
            "is stored as I8; supported are F32, F16, BF16",
        ),
        (lambda t: t.update({Q: torch.ones(32, 32).to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
        (lambda t: t.update({Q: torch.ones(32, 32).double()}), "is stored as F64"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(32)}), "q_proj.bias is not part of"),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
            "layers.2.* is not part of",
        ),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    ],
    ids=["missing", "shape", "rank", "int8", "fp8", "fp64", "bias", "layer", "head"],
)
def test_refused_tensors(tiny_hf, write_folder, change, message):
    folder, _ = write_folder(tiny_hf())
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_weights_are_named_and_counted(tiny_hf, write_folder, dtype):
    folder, _ = write_folder(tiny_hf(), dtype=dtype)

    def poison(tensors):
        tensors[Q][3, 4:7] = float("nan")
        tensors[Q][0, 0] = float("inf")

    rewrite(folder, poison)
    checkpoint = load_checkpoint(folder)
    checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=f"{Q} holds 4 non-finite values of 1024"):
        checkpoint.tensor(Q)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_non_finite_weight_is_enough(tiny_hf, write_folder, value):
    folder, _ = write_folder(tiny_hf())
    rewrite(folder, lambda tensors: tensors[Q][31, 31].fill_(value))
    with pytest.raises(CheckpointError, match=f"{Q} holds 1 non-finite values"):
        load_checkpoint(folder).tensor(Q)


# --- indices and headers that lie -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", "", 7, "a\\b.safetensors"],
)
def test_index_that_points_elsewhere(tiny_hf, write_folder, shard):
    folder, _ = write_folder(tiny_hf(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"wanted the name of a .safetensors file beside it"):
        load_checkpoint(folder)


def test_index_that_lies(tiny_hf, write_folder):
    folder, _ = write_folder(tiny_hf(), shards=2)
    good = json.loads((folder / INDEX).read_text())

    def with_map(weight_map):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return folder

    with pytest.raises(FileNotFoundError, match=r"absent.safetensors: no such file, but"):
        load_checkpoint(with_map({**good["weight_map"], Q: "absent.safetensors"}))
    other = next(shard for shard in good["weight_map"].values() if shard != good["weight_map"][Q])
    with pytest.raises(CheckpointError, match=f"holds no {Q}, but"):
        load_checkpoint(with_map({**good["weight_map"], Q: other}))
    without = {name: shard for name, shard in good["weight_map"].items() if name != Q}
    with pytest.raises(CheckpointError, match=f"{Q} is missing"):
        load_checkpoint(with_map(without))
    for wrong in ({}, [], None):
        with pytest.raises(CheckpointError, match="'weight_map' is missing or empty"):
            load_checkpoint(with_map(wrong))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\xff", '{"a": NaN}', "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"],
    ids=["empty", "open", "list", "null", "latin-1", "nan", "deep", "long number"],
)
def test_damaged_json(tiny_hf, write_folder, text):
    folder, _ = write_folder(tiny_hf())
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_checkpoint(folder)


def test_json_of_absurd_size(tiny_hf, write_folder, monkeypatch):
    from idlm_kernels.model import _files

    folder, _ = write_folder(tiny_hf())
    with pytest.raises(CheckpointError, match="larger than"):
        _files.read_json_object(folder / "config.json", max_bytes=20)


def safetensors_bytes(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(shape=(2,), dtype="F32", offsets=(0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        safetensors_bytes(one(), bytes(7)),
        safetensors_bytes(one(), bytes(8), length=2**62),
        safetensors_bytes(one(), bytes(8), length=5),
        safetensors_bytes(one(offsets=(0, 2**40)), bytes(8)),
        safetensors_bytes(one(offsets=(8, 0)), bytes(8)),
        safetensors_bytes(one(shape=(3,)), bytes(8)),
        safetensors_bytes(one(shape=(2**62, 4)), bytes(8)),
        safetensors_bytes(one(dtype="F99"), bytes(8)),
        safetensors_bytes(one(), bytes(16)),
        safetensors_bytes(b"\xff\xfe", bytes(8)),
        safetensors_bytes(b"{", bytes(8)),
    ],
    ids=[
        "empty",
        "byte",
        "truncated",
        "huge header",
        "short header",
        "offset",
        "reversed",
        "shape",
        "overflow",
        "dtype",
        "surplus",
        "not UTF-8",
        "not JSON",
    ],
)
def test_lying_safetensors(tiny_hf, write_folder, data):
    folder, _ = write_folder(tiny_hf())
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or not a safetensors file"):
        load_checkpoint(folder)


def test_fuzzed_files_open_or_raise_checkpoint_error(tiny_hf, write_folder):
    folder, _ = write_folder(tiny_hf())
    path = folder / "model.safetensors"
    good = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    rng = random.Random(5)
    opened = refused = 0
    tracemalloc.start()
    for trial in range(600):
        data = bytearray(good)
        if trial % 6 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            position = rng.randrange(8 if trial % 6 == 1 else header_end)
            data[position] = rng.choice((data[position] ^ 1 << rng.randrange(8), 0, 0xFF, ord("9"), ord('"')))
        path.unlink()  # the tensors of the last round still map the old file
        path.write_bytes(data)
        try:
            checkpoint = load_checkpoint(folder)
            for name in checkpoint.names():
                checkpoint.tensor(name)
            opened += 1
        except CheckpointError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened > 5 and refused > 300
    assert peak < 64 << 20


def test_tokenizer_larger_than_the_embedding(tiny_hf, write_folder):
    from tokenizers import Tokenizer, models

    folder, _ = write_folder(tiny_hf())
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file"):
        _ = load_checkpoint(folder).tokenizer
    Tokenizer(models.WordLevel({str(i): i for i in range(301)}, unk_token="0")).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="301 ids, the embedding only 300 rows"):
        _ = load_checkpoint(folder).tokenizer


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tiny_hf, write_folder):
    folder, tensors = write_folder(tiny_hf())
    (folder / "config.json").write_text(json.dumps(tiny_hf(tie_word_embeddings=True)))
    with pytest.raises(CheckpointError, match=r"config\.json: tie_word_embeddings is true, but .* differs"):
        load_checkpoint(folder).tensor("model.embed_tokens.weight")
    for other in (torch.tensor(1.0), tensors["model.embed_tokens.weight"].half()):  # another shape, another dtype
        save_file(tensors | {"lm_head.weight": other}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="differs"):
            load_checkpoint(folder).tensor("model.embed_tokens.weight")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_checkpoint(folder).tensor("model.embed_tokens.weight"), tensors["lm_head.weight"])


def test_a_pipe_as_config_is_refused_and_not_waited_for(tiny_hf, write_folder):
    folder, _ = write_folder(tiny_hf())
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        load_checkpoint(folder)


def test_an_end_id_that_is_none_names_its_file(tiny_hf, write_folder):
    folder, _ = write_folder(tiny_hf())
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'x'"):
        load_checkpoint(folder)


def test_a_fault_is_looked_for_in_one_file_and_not_in_a_folder(tiny_hf, write_folder):
    folder, tensors = write_folder(tiny_hf(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    shard = folder / index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: {name} is missing"):
        load_checkpoint(folder)
    index["weight_map"][name] = shard.name
    (folder / INDEX).write_text(json.dumps(index))
    held = {key: tensors[key] for key, file in index["weight_map"].items() if file == shard.name}
    for value, message in ((torch.ones(3), "has shape"), (tensors[name] * math.inf, "non-finite")):
        shard.unlink()
        save_file({**held, name: value}, shard)
        with pytest.raises(CheckpointError, match=f"{shard.name}: {name} .*{message}"):
            load_checkpoint(folder).tensor(name)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("generation_config.json", '{"eos_token_id": 65536}', r"eos_token_ids\[0\] is 65536"),
        ("tokenizer_config.json", '{"mask_token": "m", "added_tokens_decoder": {"999": {"content": "m"}}}', "is 999"),
    ],
)
def test_an_id_beyond_the_vocabulary_names_the_file_that_has_it(tiny_hf, write_folder, file, content, message):
    config = tiny_hf("SDARForCausalLM")
    folder, _ = write_folder(config)
    if file == "tokenizer_config.json":
        del config["mask_token_id"]
        (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file}: .*{message}"):
        load_checkpoint(folder)
