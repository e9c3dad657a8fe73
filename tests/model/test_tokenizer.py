"""Ids, text and chat templates against transformers, and against a byte-pair encoder written out in
Python."""

from __future__ import annotations

import base64
import json
import os
import unicodedata
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from idlm_kernels.model import tokenizer as tokenizer_module
from idlm_kernels.model._growth import Growth
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.model.gguf import GgufFile
from idlm_kernels.model.tokenizer import Tokenizer

from .conftest import MERGES, SPECIAL, byte_vocabulary

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "I'm sure they're 12345 or 3.14159; it's 50%, we'LL see. DON'T",
    "  two  spaces   three\t\ttabs \n\n\n newlines\r\n end  ",
    " " * 200 + "x" + "\n" * 50,
    "你好，世界！これは日本語です。 한국어 텍스트 ﷽ 𠮷野家",
    "مرحبا بالعالم ١٢٣ שלום עולם \u202bRTL\u202c",
    "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🇩🇪 ☺️ 😀😃",
    "def f(x: int) -> str:\n    return f'{x!r:>{width}}'  # comment\n\n\tif (a&&b||c) { x[i++] += 0xFF; }",
    "\x00\x01\x02\x03\x05\x07\x08\x0b\x0c\x1b[31m\x7f\x80\u0085\u00a0\u2028\u200b\ufeff\ufffd",
    "\x04\x06\x13 bytes that the vocabulary lacks \U000c0000",
    "e\u0301 vs é, ﬁ ligature, Å vs A\u030a, ½ ² Ⅷ ൧൨",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start|ish <|im_end |> <|im_start|><|im_start|>",
    "https://example.org/a?b=c&d=%20e#f __init__ CamelCaseWord snake_case_word",
    "a" * 1000,
    "naïve façade — “quotes” … ‘single’ № ™ ©",
    "1 22 333 4444 55555  6\n7",
]


@pytest.fixture(scope="module")
def ours(default_gguf) -> Tokenizer:
    return load_checkpoint(default_gguf).tokenizer


@pytest.fixture(scope="module")
def theirs(default_gguf) -> PreTrainedTokenizerFast:
    """transformers' reading of the same file. It knows no 'smollm' pre-tokenizer and takes GPT-2's, so the
    one that the model's own tokenizer.json names (single digits, then GPT-2's) is put in."""
    tokenizer = AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def read_twice(folder) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_gguf_equals_transformers(ours, theirs, text):
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    for skip in (True, False):
        wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == wanted


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_folder_equals_transformers(read_twice, text):
    tokenizer, reference = read_twice
    ids = reference(text).input_ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_attributes(ours, theirs, folder):
    for tokenizer in (ours, Tokenizer.from_folder(folder)):
        assert tokenizer.vocab_size == len(theirs) == 49152
        assert (tokenizer.bos_id, tokenizer.eos_ids[0]) == (theirs.bos_token_id, theirs.eos_token_id)
        assert tokenizer.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
        assert tokenizer.is_byte_level and tokenizer.has_chat_template
    assert [ours.token_text(token) for token in ours.eos_ids] == ["<|im_end|>", "<|endoftext|>"]


# --- each pre-tokenizer against llama.cpp's rule, in plain Python -----------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_CPP = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "qwen2": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST],
    "llama-bpe": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def split(text: str, patterns: list[str]) -> list[str]:
    """Each pattern cuts the pieces that the one before left, into its matches and what lies between them."""
    pieces = [text]
    for pattern in patterns:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match[0]]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


class ReferenceEncoder:
    """Special tokens first, then the split, then merges by rank. Slow and obvious."""

    def __init__(self, fields: dict) -> None:
        tokens = fields["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
        self.special = [tokens[i] for i in np.flatnonzero(fields["tokenizer.ggml.token_type"] == 3)]
        self.spelled = bytes_to_unicode()

    def encode(self, text: str, pre: str) -> list[int]:
        ids, ranks, special, spelled = self.ids, self.ranks, self.special, self.spelled
        if pre == "qwen2":  # in Qwen's tokenizer.json, not in llama.cpp
            text = unicodedata.normalize("NFC", text)
        out = []
        for part in regex.split("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")", text):
            if part in special:
                out.append(ids[part])
                continue
            for word in split(part, LLAMA_CPP[pre]):
                symbols = [spelled[byte] for byte in word.encode()]
                if pre == "llama-bpe" and "".join(symbols) in ids:
                    symbols = ["".join(symbols)]
                symbols = [symbol for symbol in symbols if symbol in ids or len(symbol) > 1]
                while True:
                    pairs = [(ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(symbols))]
                    rank, i = min(pairs, default=(1 << 30, 0))
                    if rank == 1 << 30:
                        break
                    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
                out += [ids[symbol] for symbol in symbols]
        return out


def tiny_fields(**changes) -> dict:
    tokens = byte_vocabulary()
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    fields = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": MERGES,
        "bos_token_id": 1, "eos_token_id": 2, "token_type": np.array(kinds, np.int32), **changes,
    }  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
    template = named.pop("tokenizer.ggml.chat_template", None)
    return named if template is None else {**named, "tokenizer.chat_template": template}


@pytest.fixture(scope="module", params=[pytest.param("default model", marks=pytest.mark.default_model), "tiny"])
def both_encoders(request):
    """pre -> (ours, the reference), of the default model's vocabulary, and of one with numbers of several
    digits."""
    is_tiny = request.param == "tiny"
    fields = tiny_fields() if is_tiny else GgufFile(request.getfixturevalue("default_gguf")).fields
    reference = ReferenceEncoder(fields)
    ours = {pre: Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": pre}) for pre in LLAMA_CPP}
    return lambda pre: (ours[pre], reference)


@pytest.mark.parametrize("pre", LLAMA_CPP)
@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_pre_tokenizers_against_llama_cpp(both_encoders, pre, text):
    tokenizer, reference = both_encoders(pre)
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, pre)


def test_qwen2_composes_characters_as_its_own_tokenizer_does():
    decomposed, composed = "e\u0301", "é"
    qwen = Tokenizer.from_gguf(tiny_fields(pre="qwen2"))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    gpt2 = Tokenizer.from_gguf(tiny_fields())
    assert gpt2.encode(decomposed) != gpt2.encode(composed)


def test_llama3_takes_whole_words_before_merges():
    tokens = [*byte_vocabulary(), "word"]  # no merge leads there
    kinds = np.array([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), np.int32)
    fields = {"tokens": tokens, "token_type": kinds, "add_bos_token": False}
    assert Tokenizer.from_gguf(tiny_fields(pre="llama-bpe", **fields)).encode("word") == [len(tokens) - 1]
    assert len(Tokenizer.from_gguf(tiny_fields(pre="qwen2", **fields)).encode("word")) == 4


@pytest.mark.parametrize(
    "changes, before, after",
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"add_bos_token": True, "bos_token_id": None}, [], []),
    ],
)
def test_tokens_around_a_text(changes, before, after):
    tokenizer = Tokenizer.from_gguf(tiny_fields(**changes))
    plain = tokenizer.encode("in the", add_special_tokens=False)
    assert tokenizer.encode("in the") == before + plain + after
    assert plain and not {1, 2} & set(plain)


def test_unused_and_user_defined_tokens():
    tokens = [*byte_vocabulary(), "<think>", "[PAD0]", "[PAD1]"]
    kinds = np.array([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 3) + [4, 5, 5], np.int32)
    tokenizer = Tokenizer.from_gguf(tiny_fields(tokens=tokens, token_type=kinds))
    assert tokenizer.vocab_size == len(tokens) - 2
    assert tokenizer.encode("<think>") == [len(tokens) - 3]
    assert tokenizer.decode([len(tokens) - 3]) == "<think>" and len(tokens) - 3 not in tokenizer.special_ids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "llama"}, "'llama' is not supported"),
        ({"model": None}, "None is not supported"),
        ({"model": np.ones(3)}, "model array.* is not supported"),
        ({"pre": ["gpt-2"]}, "pre \\['gpt-2'\\] is not supported"),
        ({"pre": np.ones(3)}, "pre array.* is not supported"),
        ({"pre": None}, "pre is missing: how the model splits .* --pre-tokenizer"),
        ({"add_bos_token": np.ones(2)}, "add_bos_token is array.*, wanted true or false"),
        ({"add_eos_token": "no"}, "add_eos_token is 'no', wanted true or false"),
        ({"eot_token_id": np.ones(2)}, "eot_token_id is array.*, wanted a token id"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"pre": "tekken"}, "'tekken' is not supported; supported: default, gpt-2, llama-bpe"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a" * 10**5, *byte_vocabulary()[1:]]}, "has 100000 characters"),
        ({"tokens": [*byte_vocabulary()[:-1], SPECIAL[0]]}, "1 tokens twice"),
        ({"merges": ["a b c"]}, "'a b c', wanted two tokens"),
        ({"merges": ["ab"]}, "'ab', wanted two tokens"),
        ({"merges": ["q z"]}, "does not fit the tokens"),
        ({"merges": np.ones(3)}, "merges is missing or not a list"),
        ({"token_type": np.ones(4, np.int32)}, "one type to each"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, outside"),
        ({"add_bos_token": True, "tokens": ["x:y:z", *byte_vocabulary()[1:]], "bos_token_id": 0}, "cannot be used"),
        ({"eos_token_id": -1}, "eos_token_id is -1, outside"),
        ({"chat_template": "a" * (1 << 20) + "a"}, "chat_template is longer than 1048576"),
        ({"chat_template": ["a"]}, "chat_template is not a string"),
    ],
    ids=str,
)
def test_refused_vocabularies(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(tiny_fields(**changes))


def test_a_gguf_that_cannot_be_tokenised_still_gives_its_weights(write_gguf):
    path, _ = write_gguf(metadata={"tokenizer.ggml.pre": "tekken"})
    checkpoint = load_checkpoint(path)
    assert checkpoint.tensor("model.norm.weight").shape == (32,)
    with pytest.raises(CheckpointError, match=f"{path.name}: .*'tekken'"):
        _ = checkpoint.tokenizer


def test_bad_arguments(ours):
    with pytest.raises(TypeError, match="text is a list"):
        ours.encode(["a"])
    with pytest.raises(ValueError, match="surrogate pair at index 1"):
        ours.encode("a\ud800")
    assert ours.decode([-1, 10**12, 49152, *ours.encode("ok")]) == "ok"


# --- folders ----------------------------------------------------------------------------------------------


def save_tiny(folder: Path, **settings) -> Path:
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_named_tokens_are_special_however_they_are_written(tmp_path):
    save_tiny(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, pad_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": "[UNK]", "bos_token": "b"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.special_ids) == (2, (3, 1), {2, 3, 4})
    assert tokenizer.decode([2, 0, 3]) == "a" and tokenizer.vocab_size == 5


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    save_tiny(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_id=4, pad_token="[UNK]")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a b a b") == [0, 1, 0, 1]
    assert tokenizer.encode("a") == [0]


def test_vocab_size_counts_up_to_the_last_id(tmp_path):
    Backend(models.WordLevel({"a": 0, "b": 17}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).vocab_size == 18


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    for text in ("", "{}", '{"model": {"type": "Unigram"}}', "[" * 1000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
            Tokenizer.from_folder(tmp_path)
    save_tiny(tmp_path, chat_template=7)
    with pytest.raises(CheckpointError, match="chat_template is not a string"):
        Tokenizer.from_folder(tmp_path)
    save_tiny(tmp_path, chat_template="a" * (1 << 20) + "a")
    with pytest.raises(CheckpointError, match="chat_template is longer than 1048576"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: found a JSON list"):
        Tokenizer.from_folder(tmp_path)
    save_tiny(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_the_last_default_template_of_a_list_counts_and_odd_entries_do_not(tmp_path):
    entries = [{"name": []}, 3, {"name": "default", "template": "a"}, {"name": "default", "template": "b"}]
    save_tiny(tmp_path, chat_template=entries)
    assert Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user"}]) == "b"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_in_a_tokenizer_folder_is_refused_and_not_passed_over(tmp_path, name):
    save_tiny(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        Tokenizer.from_folder(tmp_path)


def test_half_a_surrogate_pair_as_a_special_token_names_its_file(tmp_path):
    save_tiny(tmp_path, eos_token="</s>")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "\\ud800"}')
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: .*surrogates not allowed"):
        Tokenizer.from_folder(tmp_path)


def test_adding_many_tokens_looks_at_each_once(tmp_path, monkeypatch):
    """Each call of the library's `add_tokens` goes through all tokens so far, so one call for each was quadratic."""
    added = {str(i + 5): {"content": f"<{i}>"} for i in range(1000)}
    calls = []

    class Counting:
        def __init__(self, backend):
            self._backend = backend

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self._backend, name)

    backend = Counting(Backend.from_file(str(save_tiny(tmp_path) / "tokenizer.json")))
    tokenizer_module._add_missing(backend, added, tmp_path, Growth({}))
    assert calls.count("add_tokens") == 1 and backend.token_to_id("<999>") == 1004


# --- a tokenizer.json that multiplies a text --------------------------------------------------------------

TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def save_with(folder: Path, **changes) -> Path:
    save_tiny(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def sequence_of(*steps: dict, kind: str = "normalizers") -> dict:
    return {"type": "Sequence", kind: list(steps)}


@pytest.mark.parametrize(
    "step",
    [
        TEN,
        {**TEN, "pattern": {"Regex": "a"}},
        {**TEN, "pattern": {"Regex": ""}},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 3000},
    ],
    ids=["string", "expression", "empty", "long"],
)
def test_normalisers_that_multiply_a_text_are_stopped_before_they_run(tmp_path, step):
    """Nine of them make 10^9 letters of one, and the library ends the process."""
    tokenizer = Tokenizer.from_folder(save_with(tmp_path, normalizer=sequence_of(*[step] * 8, sequence_of(step))))
    assert tokenizer.encode("b") == [1] if step is TEN else True
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*the normalizer 'Replace' makes more than"):
        tokenizer.encode("a b a b" * 9)


def test_normalisers_run_on_added_tokens_when_the_file_is_read(tmp_path):
    token = {"id": 5, "content": "a<x>", "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    for normalized in (True, False):
        added = [{**token, "normalized": normalized}]
        save_with(tmp_path, normalizer=sequence_of(*[TEN] * 9), added_tokens=added)
        if normalized:
            with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*the added token 'a<x>': the normalizer"):
                Tokenizer.from_folder(tmp_path)
        else:
            assert Tokenizer.from_folder(tmp_path).vocab_size == 6
    settings = json.dumps({"added_tokens_decoder": {"5": {"content": "a<x>", "normalized": True}}})
    save_with(tmp_path, normalizer=sequence_of(*[TEN] * 9), added_tokens=[])
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .*makes more than"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence_of({"type": "Prepend", "prepend": "▁"}, {**TEN, "pattern": {"String": " "}, "content": "▁"}),
        sequence_of({"type": "NFKC"}, {"type": "Lowercase"}, {"type": "NFD"}, {"type": "StripAccents"}),
        sequence_of(*[{**TEN, "content": "aa"}] * 4, {**TEN, "pattern": {"Regex": "a+"}, "content": "a"}),
    ],
    ids=["llama 2", "unicode", "there and back"],
)
def test_normalisers_that_end_within_bounds_give_what_the_library_gives(tmp_path, normalizer):
    tokenizer = Tokenizer.from_folder(save_with(tmp_path, normalizer=normalizer))
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a b a", "", "\ufdfa" * 50, "a" * 100, "Å ½ " * 20, " " * 3000):
        assert tokenizer.encode(text) == backend.encode(text).ids


REFUSED_STEPS = [
    ({"pre_tokenizer": sequence_of(*[BYTES] * 5, kind="pretokenizers")}, "pre_tokenizer can make a text 32 times"),
    ({"decoder": sequence_of(TEN, TEN, kind="decoders")}, "decoder can make a text 100 times longer"),
    (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 17,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            }
        },
        "post_processor can make a text 17 times",
    ),
    (
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**6, "vocab": {}}},
        "max_input_chars_per_word is 1000",
    ),
    ({"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a" * 10**5: 0}}}, "has 100000 characters"),
    ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 10**5, 0.0]]}}, "has 100000 characters"),
    (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 4 + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"x": {"id": "x", "ids": [0] * 300, "tokens": ["a"] * 300}},
            }
        },
        "post_processor puts 1200 tokens around",
    ),
    (
        {"model": {"type": "WordPiece", "continuing_subword_prefix": "#" * 101, "vocab": {"a": 0}}},
        "continuing_subword_prefix has 101 characters",
    ),
    ({"normalizer": sequence_of(*[{"type": "NFC"}] * 1001)}, "more than 1000 normalizers"),
    (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/P///wAAAAAAAAAA"}},
        "precompiled_charsmap claims 4294967292 bytes of 12",
    ),
    (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "TemplateProcessing"}},  # without its padding
        "precompiled_charsmap is not base64",
    ),
]


def test_a_long_text_passes_a_table_that_may_write_much_for_a_character(tmp_path):
    """As the tables of SentencePiece do: U+FDFA becomes 33 bytes."""
    table = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + b"x" * 33 + b"\0").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    tokenizer = Tokenizer.from_folder(save_with(tmp_path, normalizer=normalizer, pre_tokenizer=None))
    assert tokenizer.encode("b" * 600_000) == [4]


@pytest.mark.parametrize("changes, message", REFUSED_STEPS, ids=[message[:20] for _, message in REFUSED_STEPS])
def test_steps_that_would_multiply_any_text_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: .*{message}"):
        Tokenizer.from_folder(save_with(tmp_path, **changes))


def test_a_key_that_occurs_twice_is_refused_since_two_readers_may_see_two_values(tmp_path):
    file = save_tiny(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace('"model":', '"normalizer": null, "model":'))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer.* a key occurs twice"):
        Tokenizer.from_folder(tmp_path)


# --- ends that the keys of a GGUF do not name -------------------------------------------------------------


def with_tokens(*more: str, kind: int = 3, **changes) -> dict:
    tokens = [*byte_vocabulary(), *more]
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - len(more)) + [kind] * len(more)
    return tiny_fields(tokens=tokens, token_type=np.array(kinds, np.int32), **changes)


def test_a_llama_3_gguf_without_an_eot_key_stops_at_the_end_of_a_turn():
    fields = with_tokens("<|end_of_text|>", "<|eot_id|>", "<|python_tag|>")
    end = len(fields["tokenizer.ggml.tokens"]) - 3
    fields["tokenizer.ggml.eos_token_id"] = end
    assert Tokenizer.from_gguf(fields).eos_ids[0] == end
    assert set(Tokenizer.from_gguf(fields).eos_ids) == {end, end + 1, 0, 2}  # <|endoftext|> and <|im_end|> as well


@pytest.mark.parametrize("kind", [1, 4], ids=["normal", "user-defined"])
def test_a_token_that_a_text_may_spell_is_no_end_by_its_name(kind):
    fields = with_tokens("<|eot_id|>", kind=kind)
    assert len(fields["tokenizer.ggml.tokens"]) - 1 not in Tokenizer.from_gguf(fields).eos_ids


# --- chat templates ---------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": '你好 👩‍👩‍👧‍👦 <b>&amp;</b> "quoted" {{ not a template }}\n\n'},
    {
        "role": "assistant",
        "content": "\tHi!",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}],
    },
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "blocks": "  {% for m in messages %}\n    {% if loop.first %}\n{{ bos_token }}\n    {% endif %}\n"
    "{{ m.role | upper }}: {{ m.content | trim }}{{ eos_token }}\n  {% endfor %}\n",
    "controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[2] | tojson(indent=2) }}{{ [1, 'é'] | tojson(ensure_ascii=True) }}",
    "names": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ tools is none }}|{{ documents is none }}|{{ extra }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "missing": "{% if thinking is defined %}yes{% else %}no{% endif %}"
    "{{ messages[0].missing }}{{ messages[0]['missing'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_equal_transformers(theirs, ours, name, add_generation_prompt):
    wanted = theirs.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        extra="more",
    )
    tokenizer = Tokenizer(ours._backend, special_tokens=ours._special_tokens, chat_template=TEMPLATES[name])
    found = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt, extra="more")
    assert found == wanted


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], MESSAGES[3:]], ids=["system", "user", "empty"])
def test_the_models_own_template_equals_transformers(theirs, ours, folder, messages):
    for tokenizer in (ours, Tokenizer.from_folder(folder)):
        text = tokenizer.apply_chat_template(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_where_a_folder_keeps_its_template(tmp_path):
    def rendered() -> str:
        return Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])

    save_tiny(tmp_path)
    assert not Tokenizer.from_folder(tmp_path).has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        rendered()
    save_tiny(tmp_path, chat_template="string")
    assert rendered() == "string"
    save_tiny(tmp_path, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert rendered() == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered() == "file"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe|undefined"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ undefined_name.attribute }}", "undefined"),
        ("{% for %}", "the chat template failed"),
        ("{% include '/etc/passwd' %}", "the chat template failed"),
        ("{{ messages[0]['role'] + 1 }}", "the chat template failed"),
        ('{{ "a" * 3000000000 }}', "times 3000000000 is longer"),
        ("{{ (3000000000 * [1]) | length }}", "is longer"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "beyond what a chat template may compute"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than"),
    ],
)
def test_templates_that_fail_or_break_out(ours, template, message):
    tokenizer = Tokenizer(ours._backend, special_tokens={}, chat_template=template)
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_messages_are_checked(ours):
    for wrong in ("Hi", [["user", "Hi"]], {"role": "user"}):
        with pytest.raises(TypeError, match="messages must be a list of dicts"):
            ours.apply_chat_template(wrong)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_the_content_of_a_message_is_text_or_parts_of_text(ours, content, text):
    tokenizer = Tokenizer(ours._backend, special_tokens={}, chat_template="[{{ messages[0]['content'] }}]")
    assert tokenizer.apply_chat_template([{"role": "user", "content": content}]) == f"[{text}]"


@pytest.mark.parametrize(
    "content", [3, {"text": "a"}, ["a"], [{"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": None}]]
)
def test_other_contents_of_a_message_are_refused(ours, content):
    with pytest.raises(ValueError, match="a message"):
        ours.apply_chat_template([{"role": "user", "content": content}])


def test_a_conversation_without_messages_is_refused(ours):
    with pytest.raises(ValueError, match="messages is empty"):
        ours.apply_chat_template([])


def test_tokens_that_only_the_config_adds_are_one_id(tmp_path):
    added = {"5": {"content": "<|new|>", "special": True}, "6": {"content": "<plain>"}, "0": {"content": "a"}}
    tokenizer = Tokenizer.from_folder(save_tiny(tmp_path, added_tokens_decoder=added))
    assert tokenizer.encode("a <|new|> b <plain>") == [0, 5, 1, 6]
    assert tokenizer.special_id("<|new|>") == 5 and tokenizer.special_id("<plain>") is None
    save_tiny(tmp_path, added_tokens_decoder={"9": {"content": "<|far|>"}})
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: .*'<\|far\|>' the id 9"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_of_the_tokenizers_library_is_an_error_that_names_the_file(tmp_path):
    save_tiny(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text())
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    settings["model"] = model | {"continuing_subword_prefix": "/dev/zero"}  # longer than the token it is cut from
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert not isinstance(caught.value.__cause__, Exception), "it is a BaseException, which `except Exception` misses"


def test_strftime_now(ours):
    tokenizer = Tokenizer(ours._backend, special_tokens={}, chat_template="{{ strftime_now('%Y') }}")
    years = {str(datetime.now().year)}
    text = tokenizer.apply_chat_template([{"role": "user", "content": ""}])
    assert text in years | {str(datetime.now().year)}


def test_byte_spelling_is_gpt2s(ours):
    """`token_bytes` of every id, against the decoder of the tokenizers library."""
    decoder = decoders.ByteLevel()
    for token in range(0, ours.vocab_size, 7):
        raw = ours.token_bytes(token, skip_special_tokens=False)
        assert raw.decode("utf-8", errors="replace") == decoder.decode([ours.token_text(token)])
    assert ours.token_bytes(1, skip_special_tokens=True) == b""


def test_token_types_are_those_of_the_gguf_package():
    assert (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED) == (3, 4, 5)
