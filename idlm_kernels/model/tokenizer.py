"""Text to token ids and back, chat templates, and text that comes out token by token.

The work is done by the `tokenizers` library, from a tokenizer.json or from a vocabulary that a GGUF carries.
What a GGUF does not say, the pre-tokenizer's regular expressions, is named by a key and written out below.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ._files import MAX_JSON_BYTES, read_json_object
from .errors import CheckpointError
from .gguf import eos_ids as gguf_eos_ids
from .gguf import gguf_module

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_TEMPLATE_OUTPUT = 1 << 24  # characters, of the whole and of any string or list that a template multiplies
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
        chat_template: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`special_tokens` maps names such as "bos_token" to their text, as chat templates see them."""
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
        self._chat_template = chat_template
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
        with _refusing("the tokenizer failed", ValueError):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids outside of the vocabulary add nothing; bytes that are no UTF-8 become
        U+FFFD."""
        known = [int(token) for token in ids if 0 <= token <= _MAX_ID]
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

        Raises ValueError when there is no template, when there are no messages, when a message holds something else
        than text, or when the template fails, refuses the messages or writes more than 16 MB.
        """
        if self._chat_template is None:
            raise ValueError("the tokenizer has no chat template; give the prompt as raw text")
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("messages must be a list of dicts such as {'role': 'user', 'content': 'Hi'}")
        if not messages:
            raise ValueError("messages is empty, wanted at least one message")
        messages = [_as_text(message) for message in messages]
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return _bounded(
                self._compiled_template.generate(
                    messages=messages, add_generation_prompt=add_generation_prompt, **names
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template failed: {error}") from error
        except Exception as error:  # a template is a stranger's program
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error

    def special_id(self, text: str) -> int | None:
        """The id of a special token, which `decode` leaves out of a text; None if the text is none."""
        token = self._backend.token_to_id(text)
        return token if token in self.special_ids else None

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        assert self._chat_template is not None
        return _template_environment().from_string(self._chat_template)

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
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file. Only the fast format is read; transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it from the others"
            )
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_JSON_BYTES >> 20} MiB, which no vocabulary is")
        with _refusing(f"{file}: not a tokenizer that the tokenizers library reads", CheckpointError):
            backend = Backend.from_file(str(file))
        settings = _optional_json(path / "tokenizer_config.json")
        _add_missing(backend, settings.get("added_tokens_decoder"), path / "tokenizer_config.json")
        fallback = _optional_json(path / "special_tokens_map.json")
        special = {}
        for name in _SPECIAL_NAMES:
            token = settings.get(name, fallback.get(name))
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
        end = _optional_json(path / "generation_config.json").get("eos_token_id")
        ends = end if isinstance(end, list) else [end]
        return cls(
            backend,
            special_tokens=special,
            eos_ids=[token for token in ends if isinstance(token, int) and not isinstance(token, bool)],
            chat_template=_folder_template(path, settings),
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """Builds the byte-level BPE that a GGUF's metadata describes. `fields` is `GgufFile.fields`."""
        model = fields.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise CheckpointError(f"tokenizer.ggml.model {model!r} is not supported; only 'gpt2' (byte-level BPE) is")
        tokens, merges = _strings(fields, "tokenizer.ggml.tokens"), _strings(fields, "tokenizer.ggml.merges")
        kinds = _token_kinds(fields, len(tokens))
        pre = fields.get("tokenizer.ggml.pre", "default")
        if pre not in _PRE_TOKENIZERS:
            raise CheckpointError(
                f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(sorted(_PRE_TOKENIZERS))}"
            )
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise CheckpointError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} tokens twice")
        wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
        if wrong is not None:
            raise CheckpointError(f"tokenizer.ggml.merges holds {wrong!r}, wanted two tokens with a space between")
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        is_llama3 = _PRE_TOKENIZERS[pre] is _LLAMA3
        with _refusing("tokenizer.ggml.merges does not fit the tokens", CheckpointError):
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
                if not isinstance(token, int) or not 0 <= token < len(tokens):
                    raise CheckpointError(
                        f"tokenizer.ggml.{key}_token_id is {token!r}, outside of {len(tokens)} tokens"
                    )
                special[name] = tokens[token]
        before = special.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", is_llama3) else None
        after = special.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token", False) else None
        if before or after:
            around = [(token, vocab[token]) for token in dict.fromkeys((before, after)) if token]
            single = [*([before] if before else []), "$A", *([after] if after else [])]
            try:
                backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
            except ValueError as error:
                raise CheckpointError(f"the tokens around a text, {around}, cannot be used: {error}") from error
        template = fields.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CheckpointError("tokenizer.chat_template is not a string")
        used = np.flatnonzero(kinds != types.UNUSED)
        return cls(
            backend,
            special_tokens=special,
            eos_ids=gguf_eos_ids(dict(fields)),
            chat_template=template,
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


@contextmanager
def _refusing(what: str, kind: type[ValueError]) -> Iterator[None]:
    """Turns whatever the tokenizers library raises, a panic of its Rust code included, into one kind of error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{what}: {error}") from error


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


def _bounded(pieces: Iterator[str]) -> str:
    """The pieces of a text, unless there are too many."""
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > _MAX_TEMPLATE_OUTPUT:
            raise ValueError(f"it writes more than {_MAX_TEMPLATE_OUTPUT} characters")
        kept.append(piece)
    return "".join(kept)


def _add_missing(backend: Backend, added: Any, file: Path) -> None:
    """Tokens that tokenizer_config.json alone names: transformers adds them, so they are one id each."""
    if not isinstance(added, dict):
        return
    numbered = {int(i): token for i, token in added.items() if re.fullmatch(r"\d{1,9}", i) and isinstance(token, dict)}
    for token_id, token in sorted(numbered.items()):
        content = token.get("content")
        if not isinstance(content, str) or not content or backend.token_to_id(content) is not None:
            continue
        kinds = {name: token.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([AddedToken(content, **kinds)])
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{file}: added_tokens_decoder gives {content!r} the id {token_id}, but beside the vocabulary of "
                f"tokenizer.json it gets {backend.token_to_id(content)}"
            )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _folder_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja before tokenizer_config.json; of several named templates the default one."""
    file = path / "chat_template.jinja"
    if file.is_file():
        raw = file.read_bytes()
        if len(raw) > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{file}: larger than {_MAX_TEMPLATE_BYTES} bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: chat_template is not a string")
    return template


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """A template cannot make a value that its own size does not justify."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and not (numbers and abs(right) <= 64 and abs(left) <= 2**64):
            raise SecurityError(f"{left!r:.40} ** {right!r:.40} is beyond what a chat template may compute")
        for one, times in ((left, right), (right, left)):
            if hasattr(one, "__len__") and isinstance(times, int) and len(one) * times > _MAX_TEMPLATE_OUTPUT:
                raise SecurityError(f"a {type(one).__name__} times {times} is longer than {_MAX_TEMPLATE_OUTPUT}")
        return super().call_binop(context, operator, left, right)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Templates are a stranger's code: sandboxed, with the globals and filters that transformers gives
    them."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = tojson
    return environment
