"""Streaming text: the same text as `decode`, in pieces, each of them final."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import bytes_to_unicode

from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.tokenizer import Detokenizer, Tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A vocabulary of the Llama 2 kind: a character that it lacks is spelled by byte tokens, and a run of
    byte tokens that is no UTF-8 decodes to one U+FFFD per byte, so one more byte may change all of the
    run."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    for text in ("▁", "▁the", "▁in", "a", "b", "é", "你", "\n", "<", "0x41>"):
        vocab[text] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


BYTE_FALLBACK = byte_fallback_tokenizer()


def wrapped_byte_level_tokenizer() -> Tokenizer:
    """Every byte by its own id."""
    spelled = bytes_to_unicode()
    backend = Backend(models.BPE(vocab={spelled[byte]: byte for byte in range(256)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"})


WRAPPED = wrapped_byte_level_tokenizer()


@pytest.fixture(scope="module")
def default(default_gguf) -> Tokenizer:
    return load_checkpoint(default_gguf).tokenizer


def stream(tokenizer: Tokenizer, pieces: list[list[int]], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


def check(tokenizer: Tokenizer, pieces: list[list[int]], skip: bool) -> None:
    ids = [token for piece in pieces for token in piece]
    wanted = tokenizer.decode(ids, skip_special_tokens=skip)
    texts = stream(tokenizer, pieces, skip)
    assert "".join(texts) == wanted
    # Each prefix is final, so no U+FFFD is emitted but those of the whole text.
    emitted = ""
    for text in texts:
        emitted += text
        assert wanted.startswith(emitted)


def pieces_of(ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(ids, max_size=5), max_size=12)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_of_a_byte_level_vocabulary(default, data, skip):
    # Single bytes (the first 260 ids or so) make broken and split characters far likelier than a uniform
    # draw.
    ids = st.one_of(st.integers(0, 260), st.integers(0, 49_160))
    check(default, data.draw(pieces_of(ids)), skip)


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 4), max_size=100), skip=st.booleans())
def test_real_text_in_random_pieces(default, text, cuts, skip):
    ids = default.encode(text)
    pieces = []
    for size in cuts:
        pieces.append(ids[:size])
        ids = ids[size:]
    check(default, [*pieces, ids], skip)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_of_a_byte_fallback_vocabulary(data, skip):
    tokenizer = BYTE_FALLBACK
    character = [3 + byte for byte in "你é".encode()]
    ids = st.one_of(st.sampled_from(character), st.integers(0, tokenizer.vocab_size + 2))
    check(tokenizer, data.draw(pieces_of(ids)), skip)


@settings(deadline=None, max_examples=300)
@given(pieces=pieces_of(st.one_of(st.sampled_from(list("你é".encode())), st.integers(0, 300))), skip=st.booleans())
def test_random_ids_of_a_wrapped_byte_level_decoder(pieces, skip):
    """A tokenizer.json may wrap the decoder in a sequence, which hides that it is byte-level."""
    check(WRAPPED, pieces, skip)


def test_characters_come_out_as_soon_as_they_are_complete(default):
    text = "naïve 你好 👩‍👩‍👧‍👦!"
    ids = default.encode(text)
    assert len(ids) > len(text), "the text has to be split inside of characters for this test"
    detokenizer = Detokenizer(default)
    emitted = ""
    raw = b""
    for token in ids:
        emitted += detokenizer.push([token])
        raw += default.token_bytes(token, skip_special_tokens=True)
        assert emitted == raw.decode("utf-8", errors="ignore")
    assert emitted == text and detokenizer.flush() == ""


def test_byte_fallback_holds_back_runs_of_bytes_alone():
    tokenizer = BYTE_FALLBACK
    vocab = {tokenizer.token_text(i): i for i in range(tokenizer.vocab_size)}
    first, second, third = (vocab[f"<0x{byte:02X}>"] for byte in "你".encode())
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([vocab["▁the"]]) == "the"
    assert [detokenizer.push([token]) for token in (first, second, third)] == ["", "", ""]
    assert detokenizer.push([vocab["a"]]) == "你a"
    assert detokenizer.push([first]) == "" and detokenizer.flush() == "\ufffd"


def test_unfinished_character_at_the_end(default):
    ids = default.encode("é👩")[:-1]
    texts = stream(default, [ids], True)
    assert texts[0] == "é" and texts[1] == default.decode(ids)[1:] == "\ufffd"
