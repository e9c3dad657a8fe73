"""What a tokenizer.json may make of a text: bounds that the tokenizers library does not have.

Nine normalisers that write ten letters for one make gigabytes of a word, and the library then aborts the process, when
it encodes and already when it reads the file, since it normalises added tokens. So the file is looked at before the
library gets it. Where the steps together cannot make a text much longer, as in published models, that is all. Where
they could, each text is led through them one by one first.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import normalizers

from .errors import CheckpointError, short

TIMES = 16  # a text may get this many times longer (compatibility forms of Unicode: 11 times) ...
MORE_BYTES = 1 << 16  # ... and this much
# What one step may make at its worst, where that cannot be counted beforehand: SentencePiece's tables have 33 bytes for
# one character.
_TIMES_AT_WORST, _BYTES_AT_WORST = 36, 1 << 24
_MAX_TOKEN_CHARS = 1 << 16  # each time that it is decoded
_MAX_WORD_CHARS = 1000  # of WordPiece, which takes time with the third power
_MAX_AFFIX_CHARS = 100  # put before or after each part of a word, to look it up
_MAX_IDS_AROUND = 1000  # of every text
_MAX_STEPS = 1000

# The most bytes of UTF-8 for one, https://www.unicode.org/faq/normalization.html. A step that is not named here is one
# that this version does not know.
_NORMALIZERS = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 12, "ByteLevel": 2}
_NORMALIZERS |= dict.fromkeys(("Strip", "StripAccents", "Nmt"), 1)
_PRE_TOKENIZERS = {"ByteLevel": 2, "Metaspace": 6}  # the latter writes 3 bytes for a space, and 3 before a word
_UNKNOWN = 12


class Growth:
    """What a tokenizer.json does to the length of a text.

    Raises CheckpointError where no text is safe: pre-tokenisers, decoders and templates that multiply it, vocabularies
    with endless tokens.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._steps = list(_parts(settings.get("normalizer"), "normalizers"))
        self._is_small = _product(map(_times, self._steps)) <= TIMES and sum(map(_more, self._steps)) <= MORE_BYTES
        pre_tokenizers = _parts(settings.get("pre_tokenizer"), "pretokenizers")
        _require(_product(_PRE_TOKENIZERS.get(str(step.get("type")), 1) for step in pre_tokenizers), "pre_tokenizer")
        _require(_product(map(_times_decoding, _parts(settings.get("decoder"), "decoders"))), "decoder")
        processors = list(_parts(settings.get("post_processor"), "processors"))
        _require(_product(map(_copies, processors)), "post_processor")
        around = sum(map(_ids_around, processors))
        if around > _MAX_IDS_AROUND:
            raise CheckpointError(f"post_processor puts {around} tokens around a text, more than {_MAX_IDS_AROUND}")
        self._check_tokens(settings)

    def check(self, text: str) -> None:
        """ValueError for a text that gets too long."""
        if self._is_small:
            return
        size = len(text.encode("utf-8", "surrogatepass"))
        allowed, at_worst = TIMES * size + MORE_BYTES, max(_TIMES_AT_WORST * size, _BYTES_AT_WORST)
        for step in self._steps:
            worst = _times(step) * size + _more(step)
            counted = _replaced_bytes(step, text, size)
            if (worst > at_worst) if counted is None else (counted > allowed):
                raise ValueError(_too_long(step, allowed))
            text = _normalized(step, text)
            size = len(text.encode("utf-8", "surrogatepass"))
            if size > allowed:
                raise ValueError(_too_long(step, allowed))

    def _check_tokens(self, settings: Mapping[str, Any]) -> None:
        model = settings.get("model")
        model = model if isinstance(model, dict) else {}
        longest = model.get("max_input_chars_per_word", 0)
        if isinstance(longest, int) and longest > _MAX_WORD_CHARS:
            raise CheckpointError(f"max_input_chars_per_word is {short(longest)}, more than {_MAX_WORD_CHARS}")
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            affix = model.get(name)
            if isinstance(affix, str) and len(affix) > _MAX_AFFIX_CHARS:
                raise CheckpointError(f"{name} has {len(affix)} characters, more than {_MAX_AFFIX_CHARS}")
        vocab = model.get("vocab")
        words: Iterable[Any] = vocab if isinstance(vocab, dict) else ()
        if isinstance(vocab, list):  # Unigram: pairs of a token and its score
            words = (pair[0] for pair in vocab if isinstance(pair, list) and pair)
        added = settings.get("added_tokens")
        added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        check_lengths((*words, *(token.get("content") for token in added)))
        for token in added:
            if isinstance(token.get("content"), str) and token.get("normalized") is not False:
                try:
                    self.check(token["content"])
                except ValueError as error:
                    raise CheckpointError(f"the added token {short(token['content'])}: {error}") from None


def check_lengths(tokens: Iterable[Any]) -> None:
    """Refuses a token whose text would be written each time that it is decoded."""
    for token in tokens:
        if isinstance(token, str) and len(token) > _MAX_TOKEN_CHARS:
            raise CheckpointError(f"the token {short(token)} has {len(token)} characters, more than {_MAX_TOKEN_CHARS}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: of two equal keys, two readers may see different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _parts(node: Any, inner: str) -> Iterable[Mapping[str, Any]]:
    """The steps that sequences in sequences come to, in order."""
    waiting, count = [node], 0
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict):
            continue
        if node.get("type") == "Sequence" and isinstance(node.get(inner), list):
            waiting += reversed(node[inner])
            continue
        count += 1
        if count > _MAX_STEPS:
            raise CheckpointError(f"more than {_MAX_STEPS} {inner}")
        yield node


def _product(factors: Iterable[int]) -> int:
    product = 1
    for factor in factors:
        product = min(product * max(1, factor), 1 << 40)
    return product


def _require(times: int, name: str) -> None:
    if times > TIMES:
        raise CheckpointError(f"{name} can make a text {times} times longer, more than {TIMES}")


def _bytes(value: Any) -> int:
    return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0


def _times(step: Mapping[str, Any]) -> int:
    """How many times longer a normaliser makes a text at most."""
    kind = step.get("type")
    if kind == "Replace":
        pattern = step.get("pattern")
        found = _bytes(pattern.get("String")) if isinstance(pattern, dict) else 0
        content = _bytes(step.get("content"))
        # An expression, and an empty string, may match between any two characters.
        return max(1, -(-content // found)) if found else 1 + content
    if kind == "Prepend":
        return 1
    if kind == "Precompiled":
        return _times_precompiled(step.get("precompiled_charsmap"))
    return _NORMALIZERS.get(str(kind), _UNKNOWN)


def _more(step: Mapping[str, Any]) -> int:
    """Bytes that a normaliser adds to any text."""
    return _bytes(step.get("prepend")) if step.get("type") == "Prepend" else _bytes(step.get("content"))


def _times_precompiled(charsmap: Any) -> int:
    """SentencePiece's table: the length of a trie, the trie, and the texts that it leads to, each with a zero byte."""
    if not isinstance(charsmap, str):
        return _UNKNOWN
    try:
        blob = base64.b64decode(charsmap, validate=True)
    except ValueError as error:  # and not left to the library, which reads more than this does
        raise CheckpointError(f"precompiled_charsmap is not base64: {error}") from None
    trie = int.from_bytes(blob[:4], "little")
    if trie > len(blob) - 4:  # the library allocates what it says
        raise CheckpointError(f"precompiled_charsmap claims {trie} bytes of {len(blob)}")
    texts = blob[4 + trie :]
    return max(map(len, texts.split(b"\0")), default=1)


def _times_decoding(step: Mapping[str, Any]) -> int:
    if step.get("type") == "Replace":
        return _times(step)
    # These write a text of their own for a token, which has a byte at least.
    return max(1, _bytes(step.get("replacement")), _bytes(step.get("word_delimiter_token")))


def _copies(step: Mapping[str, Any]) -> int:
    """How often a template writes the text."""
    single = step.get("single")
    return sum("Sequence" in part for part in single if isinstance(part, dict)) if isinstance(single, list) else 1


def _ids_around(step: Mapping[str, Any]) -> int:
    """How many ids a template writes besides the text."""
    single, special = step.get("single"), step.get("special_tokens")
    if not isinstance(single, list) or not isinstance(special, dict):
        return 0
    lengths = {
        name: len(token["ids"])
        for name, token in special.items()
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    parts = [part.get("SpecialToken") for part in single if isinstance(part, dict)]
    return sum(lengths.get(str(part.get("id")), 1) for part in parts if isinstance(part, dict))


def _replaced_bytes(step: Mapping[str, Any], text: str, size: int) -> int | None:
    """The exact length after a replacement of a string, None for any other step."""
    pattern = step.get("pattern")
    found = pattern.get("String") if isinstance(pattern, dict) else None
    if step.get("type") != "Replace" or not isinstance(found, str) or not found:
        return None
    return size + text.count(found) * (_bytes(step.get("content")) - _bytes(found))


def _normalized(step: Mapping[str, Any], text: str) -> str:
    normalizer = normalizers.NFC()
    normalizer.__setstate__(json.dumps(step).encode())
    return normalizer.normalize_str(text)


def _too_long(step: Mapping[str, Any], allowed: int) -> str:
    return f"the normalizer {short(step.get('type'))} makes more than {allowed} bytes of it"
