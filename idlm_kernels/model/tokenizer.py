"""Text to token ids and back, chat templates, and text that comes out token by token.

The work is done by the `tokenizers` library, from a tokenizer.json or from a vocabulary that a GGUF carries.
What a GGUF does not say, the pre-tokenizer's regular expressions, is named by a key and written out below.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ._files import MAX_JSON_BYTES, is_there, naming, read_bytes, read_json_object
from ._growth import Growth, check_lengths, unique_keys
from .chat_template import ChatTemplate
from .errors import CheckpointError, short
from .gguf import eos_ids as gguf_eos_ids
from .gguf import gguf_module

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_ID = 2**32 - 1  # ids are 32 bits wide in the tokenizers library, which raises beyond


class Tokenizer:
    """A vocabulary with its special tokens and, where there is one, its chat template.

    Attributes:
        vocab_size: ids from here up are padding rows of the embedding and are never sampled.
        eos_ids: ids that end a text.
        bos_id: the id that begins one, if the vocabulary has it.
        special_ids: ids that `decode` leaves out by default.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        eos_ids: Sequence[int] = (),
        chat_template: ChatTemplate | str | None = None,
        vocab_size: int | None = None,
        source: str = "",
        growth: Growth | None = None,
    ) -> None:
        """`special_tokens` maps names such as "bos_token" to their text, as chat templates see them; `source` is the
        file that errors name; `growth` bounds what its steps may make of a text."""
        backend.no_truncation()  # a tokenizer.json may ask for both, and either would change the prompt
        backend.no_padding()
        # transformers makes every named token special, whether or not the file marks it so.
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        named = [text for text in dict.fromkeys(special_tokens.values()) if text not in known]
        backend.add_special_tokens(
            [
                AddedToken(text, special=True, normalized=False)
                for text in named
                if backend.token_to_id(text) is not None
            ]
        )
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_template = ChatTemplate(chat_template, source) if isinstance(chat_template, str) else chat_template
        self._source, self._growth = source, growth
        if vocab_size is None:
            vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size: int = vocab_size
        eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos is None else [eos]), *eos_ids]))
        self.bos_id: int | None = self._id_of("bos_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token for token, info in added.items() if info.special)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, if there is one."""
        return None if self._chat_template is None else self._chat_template.source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it count as such, as everywhere in the field;
        `add_special_tokens` adds those that the model wants around a text (a BOS, where it has one).

        A byte that the vocabulary lacks is left out, as in the `tokenizers` library.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, wanted a str")
        try:
            text.encode("utf-8")  # the library's own complaint is that it wants a str
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds half of a surrogate pair at index {error.start}; wanted valid Unicode"
            ) from None
        with naming(self._source, "the tokenizer failed"):
            if self._growth is not None:
                self._growth.check(text)
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids outside of the vocabulary add nothing; bytes that are no UTF-8 become
        U+FFFD."""
        known = [int(token) for token in ids if 0 <= token <= _MAX_ID]
        with naming(self._source, "the tokenizer failed"):
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the text that the model was trained on. Encode it with
        `add_special_tokens=False`: a template writes its special tokens itself.

        Args:
            messages: dicts with at least "role" and "content", which is text, None (no text), or a list of parts
                {"type": "text", "text": ...} that are joined.
            add_generation_prompt: end with the header of the assistant's turn.
            variables: further names that the template may read (`tools`, `enable_thinking`, ...).

        The template runs in a process of its own (see `chat_template`), which starts with the first conversation.

        Raises ValueError when there is no template, when there are no messages, when a message holds something else
        than text, or when the template fails, refuses the messages or takes more than it may: 3 s of a processor,
        256 MiB, 16 MB of text. TypeError for variables that are no plain data.
        """
        if self._chat_template is None:
            raise ValueError("the tokenizer has no chat template; give the prompt as raw text")
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("messages must be a list of dicts such as {'role': 'user', 'content': 'Hi'}")
        if not messages:
            raise ValueError("messages is empty, wanted at least one message")
        messages = [_as_text(message) for message in messages]
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **variables}
        return self._chat_template.render(
            {**names, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def special_id(self, text: str) -> int | None:
        """The id of a special token, which `decode` leaves out of a text; None if the text is none."""
        token = self._backend.token_to_id(text)
        return token if token in self.special_ids else None

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a text is the concatenation of its tokens' bytes."""
        return isinstance(self._backend.decoder, decoders.ByteLevel)

    def token_bytes(self, token: int, *, skip_special_tokens: bool) -> bytes:
        """What one id of a byte-level vocabulary adds to a text; nothing for ids outside of it."""
        text = self.token_text(token)
        if text is None or (skip_special_tokens and token in self.special_ids):
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in text)
        except KeyError:  # an added token spelled in plain text
            return text.encode("utf-8")

    def token_text(self, token: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id outside of it."""
        return self._backend.id_to_token(token) if 0 <= token <= _MAX_ID else None

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja and the end ids of generation_config.json."""
        path = Path(path)
        with naming(path):
            return cls._from_folder(path)

    @classmethod
    def _from_folder(cls, path: Path) -> Tokenizer:
        file = path / "tokenizer.json"
        if not is_there(file):
            raise FileNotFoundError(
                f"{file}: no such file. Only the fast format is read; transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it from the others"
            )
        raw = read_bytes(file, MAX_JSON_BYTES)
        with naming(file, "not a tokenizer that the tokenizers library reads"):
            growth = Growth(json.loads(raw, object_pairs_hook=unique_keys))
            backend = Backend.from_buffer(raw)
        settings = _optional_json(path / "tokenizer_config.json")
        with naming(path / "tokenizer_config.json"):
            _add_missing(backend, settings.get("added_tokens_decoder"), path / "tokenizer_config.json", growth)
        fallback = _optional_json(path / "special_tokens_map.json")
        special = {}
        for name in _SPECIAL_NAMES:
            token = settings.get(name, fallback.get(name))
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                with naming(path / ("tokenizer_config.json" if name in settings else "special_tokens_map.json")):
                    token.encode("utf-8")  # half of a surrogate pair is no token
                special[name] = token
        template, origin = _folder_template(path, settings)
        end = _optional_json(path / "generation_config.json").get("eos_token_id")
        ends = end if isinstance(end, list) else [end]
        return cls(
            backend,
            special_tokens=special,
            eos_ids=[token for token in ends if type(token) is int and 0 <= token <= _MAX_ID],
            chat_template=None if template is None else ChatTemplate(template, str(origin)),
            source=str(file),
            growth=growth,
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], source: str = "") -> Tokenizer:
        """Builds the byte-level BPE that a GGUF's metadata describes. `fields` is `GgufFile.fields`, `source` the
        file's name for errors."""
        model = fields.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model != "gpt2":
            raise CheckpointError(
                f"tokenizer.ggml.model {short(model)} is not supported; only 'gpt2' (byte-level BPE) is"
            )
        tokens, merges = _strings(fields, "tokenizer.ggml.tokens"), _strings(fields, "tokenizer.ggml.merges")
        check_lengths(tokens)
        kinds = _token_kinds(fields, len(tokens))
        pre = fields.get("tokenizer.ggml.pre")
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        if pre is None:
            raise CheckpointError(
                "tokenizer.ggml.pre is missing: how the model splits a text is not said, and split in another way "
                "(numbers above all) a prompt becomes tokens that the model has not learned. Convert the model again, "
                f"or name the split with gguf-new-metadata --pre-tokenizer; supported: {known}"
            )
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            raise CheckpointError(f"tokenizer.ggml.pre {short(pre)} is not supported; supported: {known}")
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise CheckpointError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} tokens twice")
        wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
        if wrong is not None:
            raise CheckpointError(f"tokenizer.ggml.merges holds {wrong!r}, wanted two tokens with a space between")
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        is_llama3 = _PRE_TOKENIZERS[pre] is _LLAMA3
        with naming("tokenizer.ggml.merges", "does not fit the tokens"):
            backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=is_llama3))
        if _PRE_TOKENIZERS[pre] is _QWEN2:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _pre_tokenizer(_PRE_TOKENIZERS[pre])
        backend.decoder = decoders.ByteLevel()
        types = gguf_module("constants").TokenType
        backend.add_special_tokens(_added(tokens, kinds == types.CONTROL, special=True))
        backend.add_tokens(_added(tokens, kinds == types.USER_DEFINED, special=False))

        special = {}
        for name, key in _GGUF_SPECIAL_KEYS.items():
            token = fields.get(f"tokenizer.ggml.{key}_token_id")
            if token is not None:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
                    raise CheckpointError(
                        f"tokenizer.ggml.{key}_token_id is {short(token)}, outside of {len(tokens)} tokens"
                    )
                special[name] = tokens[token]
        before = special.get("bos_token") if _flag(fields, "tokenizer.ggml.add_bos_token", is_llama3) else None
        after = special.get("eos_token") if _flag(fields, "tokenizer.ggml.add_eos_token", False) else None
        if before or after:
            around = [(token, vocab[token]) for token in dict.fromkeys((before, after)) if token]
            single = [*([before] if before else []), "$A", *([after] if after else [])]
            with naming(f"the tokens around a text, {around},", "cannot be used"):
                backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
        template = fields.get("tokenizer.chat_template")
        if template is not None:
            _check_template(template, "tokenizer.chat_template")
        used = np.flatnonzero(kinds != types.UNUSED)
        return cls(
            backend,
            special_tokens=special,
            eos_ids=gguf_eos_ids(fields),
            chat_template=template,
            source=source,
            vocab_size=int(used[-1]) + 1 if len(used) else 0,
        )


class Detokenizer:
    """Turns ids into text as they come, never emitting half of a character.

    The concatenation of all `push` results and the final `flush` is exactly `tokenizer.decode` of all ids. A
    byte-level vocabulary costs constant time per id; any other decodes its whole text again at each push.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._emitted_chars = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain once `ids` have followed all earlier ones."""
        if self._tokenizer.is_byte_level:
            pieces = (self._tokenizer.token_bytes(int(token), skip_special_tokens=self._skip) for token in ids)
            return self._utf8.decode(b"".join(pieces))
        self._ids += [int(token) for token in ids]
        # A replacement character at the end may be the first bytes of a character.
        return self._emit(self._decode().rstrip("\ufffd")) if self._is_settled() else ""

    def flush(self) -> str:
        """What is left at the end of the text; an unfinished character becomes U+FFFD, as in `decode`."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._emit(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)

    def _emit(self, text: str) -> str:
        new = text[self._emitted_chars :]
        self._emitted_chars += len(new)
        return new

    def _is_settled(self) -> bool:
        """Whether no later id can change the text so far. A run of byte tokens decodes as a whole or not at
        all."""
        for token in reversed(self._ids):
            text = self._tokenizer.token_text(token)
            if text is not None and not (self._skip and token in self._tokenizer.special_ids):
                return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) is None
        return True


# --- GGUF vocabularies ------------------------------------------------------------------------------------

_GGUF_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# The splits are those of the models' own tokenizer.json files; llama.cpp names them by `tokenizer.ggml.pre`.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SMOLLM = (r"\p{N}", _GPT2)
_QWEN2 = (_WORDS.format(digits=""),)
_LLAMA3 = (_WORDS.format(digits="{1,3}"),)
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "smollm": _SMOLLM,
    "gpt-2": (_GPT2,),
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


def _pre_tokenizer(patterns: tuple[str, ...]) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value:
        raise CheckpointError(f"{key} is missing or not a list of strings")
    return value


def _flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{key} is {short(value)}, wanted true or false")
    return value


def _token_kinds(fields: Mapping[str, Any], count: int) -> np.ndarray:
    kinds = fields.get("tokenizer.ggml.token_type")
    if kinds is None:
        return np.full(count, gguf_module("constants").TokenType.NORMAL)
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != count:
        raise CheckpointError(f"tokenizer.ggml.token_type does not give one type to each of the {count} tokens")
    return kinds


def _added(tokens: list[str], chosen: np.ndarray, *, special: bool) -> list[AddedToken]:
    return [AddedToken(tokens[i], special=special, normalized=False) for i in np.flatnonzero(chosen) if tokens[i]]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: those that are printable as they are, the rest from
    U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF_CHAR = _byte_of_char()

# --- chat templates ---------------------------------------------------------------------------------------


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text, as the OpenAI API defines it: None is no text, text parts are joined."""
    content = message.get("content", "")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'a message holds a part of type {kind!r}, wanted {{"type": "text", "text": ...}}')
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a message is a {type(content).__name__}, wanted text or a list of parts")
    return {**message, "content": content or ""} if "content" in message else dict(message)


def _add_missing(backend: Backend, added: Any, file: Path, growth: Growth) -> None:
    """Tokens that tokenizer_config.json alone names: transformers adds them, so they are one id each."""
    if not isinstance(added, dict):
        return
    numbered = {int(i): token for i, token in added.items() if re.fullmatch(r"\d{1,9}", i) and isinstance(token, dict)}
    missing: dict[str, tuple[int, AddedToken]] = {}  # added in one call, since each call looks at all of them again
    for token_id, token in sorted(numbered.items()):
        content = token.get("content")
        if not isinstance(content, str) or not content or backend.token_to_id(content) is not None:
            continue
        check_lengths([content])
        kinds = {name: token.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        if kinds["normalized"]:
            growth.check(content)
        missing.setdefault(content, (token_id, AddedToken(content, **kinds)))
    backend.add_tokens([token for _, token in missing.values()])
    for content, (token_id, _) in missing.items():
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{file}: added_tokens_decoder gives {short(content)} the id {token_id}, but beside the vocabulary of "
                f"tokenizer.json it gets {backend.token_to_id(content)}"
            )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if is_there(path) else {}


def _folder_template(path: Path, settings: Mapping[str, Any]) -> tuple[str | None, Path]:
    """The template and the file that it is in: chat_template.jinja before tokenizer_config.json; of several named
    templates the default one."""
    file = path / "chat_template.jinja"
    if is_there(file):
        try:
            return read_bytes(file, _MAX_TEMPLATE_BYTES).decode("utf-8"), file
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8: {error}") from None
    file = path / "tokenizer_config.json"
    template = settings.get("chat_template")
    if isinstance(template, list):
        default = (entry for entry in reversed(template) if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(default, {}).get("template")
    if template is not None:
        _check_template(template, f"{file}: chat_template")
    return template, file


def _check_template(template: Any, name: str) -> None:
    if not isinstance(template, str):
        raise CheckpointError(f"{name} is not a string")
    if len(template) > _MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{name} is longer than {_MAX_TEMPLATE_BYTES} characters")
