"""The libraries behind tokenizer.py, `tokenizers` and `sentencepiece`, with one interface.

    engine = TokenizersEngine(Path("TinyLlama-1.1B-Chat-v0.6/tokenizer.json"), config={})
    engine.encode("the rest of a line", continuation=True)

An engine reads one file and knows its vocabulary and special tokens. Tokenizer adds the settings in
the files beside it. No text is ever encoded as a special token.
"""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.lfs_pointers import refuse_pointer

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class TokenizersEngine:
    """A `tokenizer.json`, read by the tokenizers library."""

    def __init__(self, path: Path, config: dict[str, Any]):
        """config: the content of tokenizer_config.json. UserError if the file cannot be read."""
        content = read_json(path)
        try:
            spec = as_transformers_reads_it(content, config)
            # Load before looking inside: the library checks the file more strictly than we do.
            if spec is content:
                self._at_start = tokenizers.Tokenizer.from_file(str(path))
            else:
                self._at_start = tokenizers.Tokenizer.from_str(json.dumps(spec))
            mid_line, self.prefix_after_special = without_leading_space(spec)
            self._mid_line = self._at_start
            if mid_line is not None:
                self._mid_line = tokenizers.Tokenizer.from_str(json.dumps(mid_line))
        except BaseException as error:
            # The library raises plain Exception, and its panics derive from BaseException only.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"{path}: tokenizers cannot read it ({error}). Download the file again, or update "
                "the library."
            ) from error
        for backend in (self._at_start, self._mid_line):
            backend.encode_special_tokens = True  # spell special tokens out, as any other text
            backend.no_truncation()
            backend.no_padding()
        decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
        self.byte_level = '"ByteLevel"' in decoder
        if not self.byte_level and SPACE not in decoder:
            raise UserError(
                f"{path}: not supported. Its decoder must be byte-level or SentencePiece's."
            )
        metaspace = '"Metaspace"' in decoder and '"never"' not in decoder
        self.strips_space = metaspace or '"Strip"' in decoder
        self.vocab_size = self._at_start.get_vocab_size(with_added_tokens=True)
        added = spec.get("added_tokens") or []
        self.added_text: dict[int, str] = {token["id"]: token["content"] for token in added}
        self.special_ids: set[int] = {token["id"] for token in added if token["special"]}
        self.strips: dict[int, tuple[bool, bool]] = {
            token["id"]: (bool(token.get("lstrip")), bool(token.get("rstrip"))) for token in added
        }
        self.default_ids: dict[str, int] = {}
        self._post_processor = json.dumps(spec.get("post_processor"))

    def encode(self, text: str, continuation: bool) -> list[int]:
        """The ids of a text; with `continuation` without a leading space."""
        backend = self._mid_line if continuation else self._at_start
        return backend.encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact text; None if there is no such token."""
        return self._at_start.token_to_id(token)

    def token_text(self, id: int) -> str | None:
        """The text of a token as the vocabulary spells it; None for an unknown id."""
        return self._at_start.id_to_token(id)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token; empty for an unknown id."""
        if id in self.added_text:
            return self.added_text[id].encode()
        token = self._at_start.id_to_token(id)
        if token is None:
            return b""
        if self.byte_level:
            table = byte_of_character()
            return b"".join([table.get(character, character.encode()) for character in token])
        return piece_bytes(token)

    def adds_bos(self, bos_token_id: int | None) -> bool:
        """True if the file's post-processor puts BOS before a text."""
        return f'"ids": [{bos_token_id}]' in self._post_processor


class SentencePieceEngine:
    """A `tokenizer.model` without a tokenizer.json, read by the sentencepiece library."""

    byte_level = False

    def __init__(self, path: Path, config: dict[str, Any]):
        """config: the content of tokenizer_config.json. UserError if the file cannot be read."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size: int = self._processor.vocab_size()
            ids = range(self.vocab_size)
            self._pieces = [self._processor.id_to_piece(id) for id in ids]
        except (RuntimeError, OSError, ValueError) as error:
            refuse_pointer(path)
            raise UserError(
                f"{path}: not a SentencePiece model. Download the file again (or, for Llama 3, its "
                "tokenizer.json)."
            ) from error
        self.strips_space = self._processor.normalize("a").startswith(SPACE)
        self.prefix_after_special = bool(config.get("legacy", False))
        is_control, is_unknown = self._processor.is_control, self._processor.is_unknown
        self.added_text: dict[int, str] = {}
        self.strips: dict[int, tuple[bool, bool]] = {}
        self.special_ids = {id for id in ids if is_control(id) or is_unknown(id)}
        named = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self._processor.eos_id(),
            "unk_token": self._processor.unk_id(),
        }
        self.default_ids: dict[str, int] = {name: id for name, id in named.items() if id >= 0}
        self._guard = self._find_guard(path)
        self._guard_length = len(self._processor.encode(self._guard))

    def _find_guard(self, path: Path) -> str:
        """A character that merges with nothing after it.

        The library adds a leading space to every text. To encode text without it, we put the guard
        before the text and drop the guard's ids.
        """
        for guard in ("\n", "\x01", "\x02"):
            merges = any(guard in piece and piece != guard for piece in self._pieces)
            if not merges and guard in self._processor.normalize(guard):
                return guard
        raise UserError(
            f"{path}: this model cannot encode text without a leading space. Convert it to "
            "tokenizer.json."
        )

    def encode(self, text: str, continuation: bool) -> list[int]:
        """The ids of a text; with `continuation` without a leading space."""
        if continuation:
            return self._processor.encode(self._guard + text)[self._guard_length :]
        return self._processor.encode(text)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact text; None if there is no such token."""
        id = self._processor.piece_to_id(token)
        return id if self._processor.id_to_piece(id) == token else None

    def token_text(self, id: int) -> str | None:
        """The text of a token as the vocabulary spells it; None for an unknown id."""
        return self._pieces[id] if id < self.vocab_size else None

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token; empty for an unknown id."""
        return piece_bytes(self._pieces[id]) if id < self.vocab_size else b""

    def adds_bos(self, bos_token_id: int | None) -> bool:
        """True: Llama's tokenizers put BOS before a text unless the config says otherwise."""
        return True


def as_transformers_reads_it(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json as transformers 5 reads it for the class `LlamaTokenizer`.

    transformers adds one leading space unless the text begins with a space, and adds it after
    special tokens only if the config says `legacy`. The files from the time of Llama 2, read
    literally, would always add a space.
    """
    name = str(config.get("tokenizer_class") or "")
    byte_level = "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if name.removesuffix("Fast") != "LlamaTokenizer" or byte_level:
        return spec
    scheme = "always" if config.get("legacy", False) else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
    return {**spec, "normalizer": None, "pre_tokenizer": {**metaspace, "split": False}}


def without_leading_space(spec: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """(a tokenizer.json that adds no leading space, True if `spec` adds it after special tokens).

    The first is None if `spec` adds no leading space.
    """
    adds_space, after_special = False, True
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        adds_space = True
        normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = copy.deepcopy(spec.get("pre_tokenizer")) or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        scheme = step.get("prepend_scheme", "always")
        if step.get("type") == "Metaspace" and scheme != "never":
            adds_space, after_special = True, scheme == "always"
            step.update(prepend_scheme="never", add_prefix_space=False)
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            adds_space = True
            step["add_prefix_space"] = False
    changed = {"normalizer": normalizer or None, "pre_tokenizer": pre_tokenizer or None}
    return ({**spec, **changed} if adds_space else None), after_special


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `<0xE4>` is a byte, and U+2581 is a space."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


@cache
def byte_of_character() -> dict[str, bytes]:
    """The alphabet of byte-level BPE (GPT-2): which character represents which byte.

    A printable character represents its own byte. The 68 other bytes are U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
