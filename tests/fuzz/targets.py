"""The readers of strangers' files: for each a good file or folder, how it is spoiled, and how it is opened in full."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

from idlm_kernels.model import _files
from idlm_kernels.model.adapter import MODULES, load_adapter
from idlm_kernels.model.chat_template import ChatTemplate
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.config import ModelConfig
from idlm_kernels.model.tokenizer import Tokenizer as OurTokenizer

from .mutations import spoiled_bytes, spoiled_json, spoiled_text

CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": [3, 4],
    "layer_types": ["full_attention"],
    "sliding_window": None,
}
TEXT = "in the hé 12 <|x|> aa"


@dataclass(frozen=True)
class Target:
    """files: name -> content of a good folder. spoil: -> name and new content of one of them. read: open the folder in
    full; what it raises has to name a file in it."""

    files: Callable[[], dict[str, bytes]]
    spoil: Callable[[Random, dict[str, bytes]], tuple[str, bytes]]
    read: Callable[[Path], None]


def _spoil_json(*names: str) -> Callable[[Random, dict[str, bytes]], tuple[str, bytes]]:
    def spoil(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
        name = random.choice(names)
        return name, spoiled_json(random, files[name])

    return spoil


# --- weights and config -----------------------------------------------------------------------------------


def _model() -> ModelConfig:
    return ModelConfig.from_hf({**CONFIG, "mask_token_id": 39})


@lru_cache
def _folder() -> dict[str, bytes]:
    shapes = _model().tensor_shapes()
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    settings = {"mask_token": "<|MASK|>", "added_tokens_decoder": {"39": {"content": "<|MASK|>"}}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [5, 3]}).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "model.safetensors": save(tensors),
    }


@lru_cache
def _sharded() -> dict[str, bytes]:
    files = dict(_folder())
    header_bytes = int.from_bytes(files["model.safetensors"][:8], "little")
    names = [n for n in json.loads(files["model.safetensors"][8 : 8 + header_bytes]) if n != "__metadata__"]
    generator = torch.Generator().manual_seed(1)
    shapes, weight_map = _model().tensor_shapes(), {}
    del files["model.safetensors"]
    for i in range(2):
        shard = f"model-{i + 1}-of-2.safetensors"
        part = names[i::2]
        files[shard] = save({name: torch.randn(shapes[name], generator=generator) for name in part})
        weight_map |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def _spoil_weights(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    data = files["model.safetensors"]
    size = int.from_bytes(data[:8], "little")
    if random.randrange(3) == 0:
        return "model.safetensors", spoiled_bytes(random, data, random.choice((8, 8 + size, len(data))))
    header = spoiled_json(random, data[8 : 8 + size])
    header += b" " * (-len(header) % 8)
    return "model.safetensors", struct.pack("<Q", len(header)) + header + data[8 + size :]


def _read_checkpoint(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.tensor(name)


def _read_config(folder: Path) -> None:
    config = load_checkpoint(folder).config
    config.inv_freq()


# --- GGUF -------------------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _array(kind: int, values: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(values)) + b"".join(values)


def _field(value: Any) -> bytes:
    """Type and value as GGUF has them."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if value and isinstance(value[0], str):
        return _array(8, [_string(text) for text in value])
    return _array(5, [struct.pack("<i", number) for number in value])


_GGUF_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġt", "he", "in"]
_GGUF_FIELDS = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "llama.rope.scaling.type": "none",
    "llama.vocab_size": len(_GGUF_TOKENS) + 1,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": _GGUF_TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(_GGUF_TOKENS) - 3)],
    "tokenizer.ggml.merges": ["Ġ t", "h e", "i n"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}


@lru_cache
def _gguf_tensors() -> tuple[list[bytes], bytes]:
    """The entries of the tensors, and their data."""
    kinds = {"attn_q": "Q8_0", "ffn_up": "Q4_0", "attn_output": "F16"}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(_GGUF_TOKENS) + 1, 32), "output_norm": (32,)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "rope_freqs": (4,)}
    shapes |= {"blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    entries, data = [], b""
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[kinds.get(name.split(".")[-1], "F32")]
        values = np.random.default_rng(1).random(shape, dtype=np.float32) + 1
        place = struct.pack("<IQ", kind, len(data))
        entries.append(_string(f"{name}.weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]) + place)
        data += gguf.quants.quantize(values, kind).tobytes()
        data += bytes(-len(data) % 32)
    return entries, data


def _gguf_bytes(fields: list[tuple[str, bytes]], entries: list[bytes], data: bytes) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(fields))
    head += b"".join(_string(key) + value for key, value in fields) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


def _gguf() -> dict[str, bytes]:
    return {"model.gguf": _gguf_bytes([(key, _field(value)) for key, value in _GGUF_FIELDS.items()], *_gguf_tensors())}


_GGUF_VALUES: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 2**31, 2**32 - 1, True, False, 0.0, -1.0, 1e30, float("nan"), float("inf")),
    *("", "x", "llama", "qwen3", "none", "[", "é" * 300),
    *([], [1], [1, 2], [3] * 262, [-1] * 1000, ["llama"], ["a", "b"], [""], ["gpt2"], ["a b", "a b c"]),
)


def _spoil_gguf(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Half of them with values of another kind or size, in a header that is sound; the others as bytes."""
    entries, data = _gguf_tensors()
    if random.randrange(2):
        whole = files["model.gguf"]
        return "model.gguf", spoiled_bytes(random, whole, random.choice((32, len(whole) - len(data), len(whole))))
    fields = [(key, _field(value)) for key, value in _GGUF_FIELDS.items()]
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(fields))
        how = random.randrange(8)
        if how == 0:
            del fields[at]
        elif how == 1:
            key = random.choice(("tokenizer.ggml.eom_token_id", "tokenizer.ggml.mask_token_id", "llama.x", "general.x"))
            fields.insert(at, (key, _field(random.choice(_GGUF_VALUES))))
        elif how == 2:
            fields[at] = fields[at][0], fields[random.randrange(len(fields))][1]
        else:
            fields[at] = fields[at][0], _field(random.choice(_GGUF_VALUES))
    if random.randrange(4) == 0:
        at = random.randrange(len(entries))
        entries = [*entries[:at], spoiled_bytes(random, entries[at], len(entries[at])), *entries[at + 1 :]]
    return "model.gguf", _gguf_bytes(fields, entries, data)


def _read_gguf(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "model.gguf")
    for name in checkpoint.names():
        checkpoint.tensor(name)
    _use(checkpoint.tokenizer)


# --- tokenizers -------------------------------------------------------------------------------------------


@lru_cache
def _tokenizer() -> dict[str, bytes]:
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "Ġt", "he", "in"])}
    backend = Tokenizer(models.BPE(vocab, [("Ġ", "t"), ("h", "e"), ("i", "n")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("a", "b"), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("b", "a")])
    backend.add_special_tokens([AddedToken("<|x|>", special=True), "<|end|>"])
    backend.add_tokens([AddedToken("plain", normalized=True)])
    backend.post_processor = processors.TemplateProcessing(single="<|x|> $A", special_tokens=[("<|x|>", 259)])
    settings = {
        "bos_token": "<|x|>",
        "eos_token": {"content": "<|end|>", "lstrip": False},
        "added_tokens_decoder": {"262": {"content": "<|new|>", "special": True, "normalized": True}},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps({"pad_token": "<|x|>"}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [260]}).encode(),
    }


@lru_cache
def _tokenizers() -> list[bytes]:
    """tokenizer.json of three kinds, with equal numbers of tokens."""
    bpe = json.loads(_tokenizer()["tokenizer.json"])
    words = ["[UNK]", "##a", "in", "the", "h", "é", "12", "▁", *(f"w{i}" for i in range(251))]
    charsmap = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"x\0").decode()
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -float(i)] for i, word in enumerate(words)]}
    precompiled: Any = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    other = {
        "normalizer": {"type": "Sequence", "normalizers": [precompiled, {"type": "NFKC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": unigram | {"byte_fallback": False},
    }
    wordpiece = {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
        | {"strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(words)}},
    }
    return [json.dumps(settings).encode() for settings in (bpe, bpe | other, bpe | wordpiece)]


def _spoil_tokenizer(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    name = random.choice(("tokenizer.json",) * 4 + tuple(files))
    if name != "tokenizer.json":
        return name, spoiled_json(random, files[name])
    settings = json.loads(random.choice(_tokenizers()))
    if random.randrange(4) == 0:
        return name, spoiled_json(random, json.dumps(settings).encode())
    # The vocabulary has most of the values, and says little.
    model = settings["model"]
    vocab = model["vocab"]
    model["vocab"] = empty = vocab[:1] if isinstance(vocab, list) else {"a": 0}
    changed = json.loads(_or_null(spoiled_json(random, json.dumps(settings).encode())))
    model = changed.get("model") if isinstance(changed, dict) else None
    if isinstance(model, dict) and model.get("vocab") == empty:
        model["vocab"] = vocab
    return name, json.dumps(changed).encode()


def _or_null(data: bytes) -> bytes:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return b"null"
    return data


def _use(tokenizer: OurTokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    tokenizer.decode([*ids, 0, 1, 5, 259])
    for token in ids[:5]:
        tokenizer.token_bytes(token, skip_special_tokens=False)


def _read_tokenizer(folder: Path) -> None:
    _use(OurTokenizer.from_folder(folder))


# --- adapters ---------------------------------------------------------------------------------------------


@lru_cache
def _adapter() -> dict[str, bytes]:
    shapes, tensors = _model().tensor_shapes(), {}
    generator = torch.Generator().manual_seed(1)
    for name, shape in shapes.items():
        if name.removesuffix(".weight").rpartition(".")[2] in MODULES:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, shape[1], generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator)
    head = {"from_hidden": (4, 8), "from_previous": (4, 8), "from_state": (4, 4), "to_query": (8, 4)}
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": list(MODULES),
        "rank_pattern": {"model.layers.[0-9].self_attn.(q|k)_proj": 2, "down_proj": 2},
        "alpha_pattern": {"v_proj": 8.0},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save(tensors),
        "mask_embedding.safetensors": save({"mask_embedding": torch.ones(8)}),
        "rerank_head.safetensors": save({name: torch.ones(shape) for name, shape in head.items()}),
        "idlm_training.json": json.dumps(
            {"acceptance": [0.5], "acceptance_reranked": [0.6, 0.1], "mask_input": {"kind": "vector"}}
        ).encode(),
    }


def _spoil_adapter(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    name = random.choice(("adapter_config.json",) * 4 + tuple(files))
    if name.endswith(".json"):
        return name, spoiled_json(random, files[name])
    return name, _spoil_weights(random, {"model.safetensors": files[name]})[1]


def _read_adapter(folder: Path) -> None:
    adapter = load_adapter(folder, _model())
    for module in MODULES:
        adapter.pair(0, module)


# --- templates --------------------------------------------------------------------------------------------

TEMPLATE = """{%- if tools %}{{ '<tools>' + tools | tojson(indent=2) }}{% endif -%}
{%- set ns = namespace(n=0, text='') %}{% macro turn(m) %}{{ '<|' ~ m['role'] ~ '|>' + m.content | trim }}{% endmacro %}
{% for m in messages %}{% if loop.index0 is divisibleby 7 %}{% continue %}{% endif %}{{ turn(m) }}
{%- if m.role not in ('user', 'system') %}{{ raise_exception('roles') }}{% endif %}
{%- set ns.n = ns.n + m.content | length %}{% for i in range(3) %}{{ loop.index * i }}{% endfor %}{% endfor %}
{% if add_generation_prompt %}{{ strftime_now('%Y')[:2] ~ ns.n ** 2 }}{% generation %}x{% endgeneration %}{% endif %}"""
PIECES = r"""
{{ }} {% %} {# #} {%- -%} | ~ + * ** / // % [ ] ( ) . , : == not in is for if else endif endfor set macro call
range(99999) range(3) loop loop.previtem messages tools ns.n ns.text 'aa' 99999999 -1 1e400 0x10 None true |list |join
|tojson(indent=99999) |indent(9999) |center(9999999) |batch(3) |slice(9999) |replace('a','aaaa') |xmlattr |map('upper')
|attr('__class__') .__class__ .__init__ .__globals__ .format(1) .mro() lipsum() cycler(1) joiner() namespace() turn(m)
{%set{%for{% import include extends block filter raw endraw autoescape do with " ' \\ é
"""


def _spoil_template(random: Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    text = files["chat_template.jinja"].decode()
    return "chat_template.jinja", spoiled_text(random, text, [*PIECES.split(), " ", "\n", "\x00", "\ud800"]).encode(
        "utf-8", "surrogatepass"
    )


_SHARED = ChatTemplate("")  # one process for many templates, which a tokenizer has one of


def _read_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    try:
        source = _files.read_bytes(file, 1 << 20).decode()
    except UnicodeDecodeError:
        return
    _SHARED.source, _SHARED.origin = source, str(file)
    messages = [{"role": role, "content": f"{role} é"} for role in ("user", "system", "user")]
    _SHARED.render({"messages": messages, "tools": None, "add_generation_prompt": True})


TARGETS = {
    "gguf": Target(_gguf, _spoil_gguf, _read_gguf),
    "safetensors": Target(_folder, _spoil_weights, _read_checkpoint),
    "index": Target(_sharded, _spoil_json("model.safetensors.index.json"), _read_checkpoint),
    "config": Target(
        _folder,
        _spoil_json("config.json", "config.json", "generation_config.json", "tokenizer_config.json"),
        _read_config,
    ),
    "tokenizer": Target(_tokenizer, _spoil_tokenizer, _read_tokenizer),
    "adapter": Target(_adapter, _spoil_adapter, _read_adapter),
    "template": Target(lambda: {"chat_template.jinja": TEMPLATE.encode()}, _spoil_template, _read_template),
}
