"""The GGUF reader: values against the `gguf` package, row order against llama.cpp's rule, and hostile
headers."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.gguf import GgufFile

QUANTISED = {
    "attn_q.weight": Kind.Q8_0,
    "attn_k.weight": Kind.Q5_1,
    "ffn_up.weight": Kind.Q4_1,
    "ffn_down.weight": Kind.Q4_0,
    "attn_output.weight": Kind.F16,
    "token_embd.weight": Kind.BF16,
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", [None, QUANTISED], ids=["fp32", "quantised"])
def test_every_tensor_comes_back_in_hugging_face_order(write_gguf, architecture, tied, kinds):
    path, wanted = write_gguf(architecture, tied=tied, kinds=kinds)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.architecture == architecture
    assert checkpoint.config.tie_word_embeddings == tied
    assert checkpoint.names() == list(wanted)
    for name, tensor in wanted.items():
        found = checkpoint.tensor(name)
        assert torch.equal(found.float(), tensor), name


def test_stored_dtypes(write_gguf):
    path, _ = write_gguf(kinds=QUANTISED)
    checkpoint = load_checkpoint(path)
    assert checkpoint.tensor("model.layers.1.self_attn.o_proj.weight").dtype == torch.float16
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    assert checkpoint.tensor("model.norm.weight").dtype == torch.float32


def test_config_and_name(write_gguf):
    path, _ = write_gguf(metadata={"tokenizer.ggml.eot_token_id": 1})
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    assert (checkpoint.name, checkpoint.path) == ("tiny", path)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 32, 64)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 8)
    assert (config.max_position_embeddings, config.rope_theta) == (128, 10000.0)
    assert config.rms_norm_eps == np.float32(1e-5)
    assert (config.eos_token_ids, config.bos_token_id, config.mask_token_id) == ((2, 1, 0), 1, None)


def test_default_model_against_the_gguf_package(default_gguf):
    checkpoint = load_checkpoint(default_gguf)
    reader = gguf.GGUFReader(default_gguf)
    dequantised = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors if "blk.1" not in t.name
    }
    from .conftest import to_gguf_name, undo_by_index

    checked = 0
    for name in checkpoint.names():
        gguf_name = to_gguf_name(name) if "layers" not in name else None
        if name.startswith("model.layers.0."):
            gguf_name = to_gguf_name(name)
        if gguf_name is None:
            continue
        wanted = dequantised[gguf_name]
        if "attn_q" in gguf_name or "attn_k" in gguf_name:
            wanted = undo_by_index(wanted, 9 if "attn_q" in gguf_name else 3)
        assert torch.equal(checkpoint.tensor(name), torch.tensor(wanted)), name
        checked += 1
    assert checked == 11 and len(reader.tensors) == len(checkpoint.names())


def test_large_tensors_are_dequantised_in_parts(write_gguf, monkeypatch):
    path, wanted = write_gguf(kinds=QUANTISED)
    monkeypatch.setattr("idlm_kernels.model.gguf._DEQUANTIZE_ELEMENTS", 100)  # 3 rows of 32 at a time
    found = load_checkpoint(path).tensor("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(found, wanted["model.layers.0.mlp.up_proj.weight"])


def test_rope_factors(write_gguf):
    path, _ = write_gguf(extra={"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)})
    config = load_checkpoint(path).config
    assert config.rope_freq_factors == (1.0, 2.0, 4.0, 8.0)
    path, _ = write_gguf(extra={"rope_freqs.weight": np.ones(5, np.float32)}, name="five.gguf")
    with pytest.raises(CheckpointError, match="5 values, wanted 4"):
        load_checkpoint(path)
    path, _ = write_gguf(extra={"rope_freqs.weight": np.zeros(4, np.float32)}, name="zero.gguf")
    with pytest.raises(CheckpointError, match=r"rope_freq_factors is 0.0"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"llama.rope.scaling.type": "linear"}, "'linear' is not supported"),
        ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4, wanted the head size 8"),
        ({"llama.attention.value_length": 4}, "value_length is 4"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is .*wanted a number"),
        ({"llama.attention.head_count": 0}, "0 heads"),
        ({"llama.attention.head_count": 5}, "not a multiple of 5 heads"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of num_kv_heads 3"),
        ({"llama.embedding_length": 64}, "64, 64|has shape|wanted the head size"),
        ({"llama.feed_forward_length": 96}, "has shape \\[64, 32\\], the config asks for \\[96, 32\\]"),
        ({"llama.block_count": 3}, "model.layers.2.input_layernorm.weight.* and 6 more are missing"),
        ({"llama.block_count": 1}, "layers.1.* not part of"),
        ({"llama.block_count": None}, "block_count is None, wanted a number"),
        ({"llama.vocab_size": 17}, "model.embed_tokens.weight has shape"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "eos_token_ids\\[0\\] is 5000"),
        ({"general.alignment": 3}, "general.alignment is 3"),
        ({"general.alignment": [8, 8]}, "general.alignment is array"),
        ({"llama.rope.scaling.type": [1, 2]}, "rope.scaling.type array.* is not supported"),
        ({"tokenizer.ggml.eos_token_id": [1, 2]}, "eos_token_id is array.*, wanted a token id"),
    ],
    ids=str,
)
def test_refused(write_gguf, metadata, message):
    path, _ = write_gguf(metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_other_architectures_and_unknown_tensors_are_refused(write_gguf, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    with pytest.raises(CheckpointError, match="architecture 'gemma' is not supported"):
        load_checkpoint(tmp_path / "gemma.gguf")
    for extra in ("blk.0.attn_q.bias_scale", "rope_factors_long.weight", "blk.0.attn_q_norm.weight"):
        path, _ = write_gguf(extra={extra: np.ones(8, np.float32)}, name=f"{extra}.gguf")
        with pytest.raises(CheckpointError, match="not part of this architecture"):
            load_checkpoint(path)
    path, _ = write_gguf(extra={"blk.0.attn_q.bias": np.ones(32, np.float32)}, name="bias.gguf")
    with pytest.raises(CheckpointError, match=r"k_proj.bias.* missing"):
        load_checkpoint(path)


def test_a_pipe_as_gguf_is_refused_as_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"pipe\.gguf: not a regular file"):
        load_checkpoint(tmp_path / "pipe.gguf")


def test_biases_are_permuted_too(write_gguf):
    sizes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    extra = {f"blk.{i}.{name}.bias": np.arange(n, dtype=np.float32) for i in (0, 1) for name, n in sizes.items()}
    path, _ = write_gguf(extra=extra)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.attention_bias
    one_head = torch.tensor([0.0, 2, 4, 6, 1, 3, 5, 7])
    wanted = torch.cat([one_head + 8 * head for head in range(4)])
    assert torch.equal(checkpoint.tensor("model.layers.1.self_attn.q_proj.bias"), wanted)
    assert torch.equal(checkpoint.tensor("model.layers.1.self_attn.v_proj.bias"), torch.arange(16.0))


def test_non_finite_weights_are_named_and_counted(write_gguf):
    path, _ = write_gguf()
    place = GgufFile(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[place.offset + 4 : place.offset + 12] = struct.pack("<ff", float("nan"), float("-inf"))
    path.write_bytes(data)
    checkpoint = load_checkpoint(path)
    checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds 2 non-finite values of 2048"):
        checkpoint.tensor("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(KeyError, match=r"no tensor 'model.layers.7"):
        checkpoint.tensor("model.layers.7.mlp.up_proj.weight")


# --- headers that lie -------------------------------------------------------------------------------------


def header(*, version: int = 3, tensors: int = 0, fields: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str = "w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


PADDING = bytes(96)
LIES = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + bytes(100), "does not start with 'GGUF'"),
    "version 1": (header(version=1, rest=PADDING), "version 1"),
    "version 4": (header(version=4, rest=PADDING), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PADDING, "big-endian"),
    "cut in the counts": (header()[:14], "truncated"),
    "fields": (header(fields=2**63, rest=PADDING), "claims 9223372036854775808 metadata"),
    "tensors": (header(tensors=2**40, rest=PADDING), "claims .* tensors"),
    "long key": (
        header(fields=1, rest=struct.pack("<Q", 2**62) + PADDING),
        "claims 4611686018427387904 bytes",
    ),
    "key beyond the end": (header(fields=1, rest=struct.pack("<Q", 1000) + PADDING), "truncated"),
    "key twice": (
        header(fields=2, rest=(text("k") + struct.pack("<IB", 0, 1)) * 2 + PADDING),
        "'k' occurs twice",
    ),
    "key not UTF-8": (header(fields=1, rest=struct.pack("<Q", 1) + b"\xff" + PADDING), "not UTF-8"),
    "unknown field type": (
        header(fields=1, rest=text("k") + struct.pack("<I", 99) + PADDING),
        "unknown type 99",
    ),
    "array length": (
        header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 2**60) + PADDING),
        "more than 10000000",
    ),
    "array in file": (
        header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 10**6) + PADDING),
        "truncated",
    ),
    "strings": (
        header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 10**6) + PADDING),
        "more than the file can hold",
    ),
    "nested array": (header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1) + PADDING), "nested"),
    "no dimension": (header(tensors=1, rest=entry(dims=()) + PADDING), "0 dimensions"),
    "many dimensions": (
        header(tensors=1, rest=text("w") + struct.pack("<I", 2**31) + PADDING),
        "2147483648 dimensions",
    ),
    "zero dimension": (header(tensors=1, rest=entry(dims=(0,)) + PADDING), "has the shape \\[0\\]"),
    "huge dimension": (header(tensors=1, rest=entry(dims=(2**62, 4)) + PADDING), "beyond the end"),
    "wrapping product": (header(tensors=1, rest=entry(dims=(2**32, 2**32)) + PADDING), "beyond the end"),
    "unknown tensor type": (header(tensors=1, rest=entry(kind=77) + PADDING), "unknown type 77"),
    "half a block": (
        header(tensors=1, rest=entry(dims=(33,), kind=8) + PADDING),
        "no whole Q8_0 blocks of 32",
    ),
    "offset": (header(tensors=1, rest=entry(offset=2**63) + PADDING), "beyond the end"),
    "crooked offset": (header(tensors=1, rest=entry(offset=1) + PADDING), "not a multiple of 32"),
    "tensor twice": (header(tensors=2, rest=entry() * 2 + PADDING), "'w' occurs twice"),
    "overlap": (header(tensors=2, rest=entry("a", (8,)) + entry("b", (8,)) + PADDING), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", LIES)
def test_lying_header(tmp_path, case):
    data, message = LIES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "array", [struct.pack("<IQ", 8, 1) + text("llama"), struct.pack("<IQII", 4, 2, 1, 2)], ids=["texts", "numbers"]
)
def test_an_architecture_that_is_an_array_is_refused_with_the_file_named(tmp_path, array):
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(fields=1, rest=text("general.architecture") + struct.pack("<I", 9) + array + PADDING))
    with pytest.raises(CheckpointError, match=r"bad\.gguf: architecture (\['llama'\]|array.*) is not supported"):
        load_checkpoint(path)


def test_minimal_header_is_read(tmp_path):
    """The lies above are refused for what they claim, not for how they are built."""
    rest = text("k") + struct.pack("<IIQHH", 9, 2, 2, 5, 6) + entry("a") + entry("b", offset=32)
    path = tmp_path / "good.gguf"
    path.write_bytes(header(tensors=2, fields=1, rest=rest + PADDING))
    file = GgufFile(path)
    assert file.fields["k"].tolist() == [5, 6]
    assert file.tensors["b"].offset - file.tensors["a"].offset == 32


def open_in_full(path: Path) -> bool:
    """Whether config, tensors and tokenizer can be had. Anything but success and CheckpointError escapes."""
    try:
        checkpoint = load_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
        checkpoint.tokenizer.encode("in the hé 12")
    except CheckpointError:
        return False
    return True


def test_fuzzed_files_open_or_raise_checkpoint_error(write_gguf, tmp_path):
    path, _ = write_gguf(kinds=QUANTISED)
    good = path.read_bytes()
    assert open_in_full(path)
    header_end = min(place.offset for place in GgufFile(path).tensors.values())
    rng = random.Random(7)
    target = tmp_path / "fuzzed.gguf"
    opened = refused = 0
    tracemalloc.start()
    for trial in range(700):
        data = bytearray(good)
        if trial % 7 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice((1, 1, 1, 8))):
                position = rng.randrange(32 if trial % 7 == 1 else header_end)
                data[position] = rng.choice((data[position] ^ 1 << rng.randrange(8), 0, 0xFF, 0x80))
        target.write_bytes(data)
        if open_in_full(target):
            opened += 1
        else:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened > 50 and refused > 200
    assert peak < 64 << 20, f"a file of {len(good)} bytes made the reader allocate {peak} bytes"
