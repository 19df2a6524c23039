"""The two libraries behind tokenizer.py: `tokenizer.json` and `tokenizer.model`, as one interface.

    engine = TokenizersEngine(Path("TinyLlama-1.1B-Chat-v0.6/tokenizer.json"), config={})
    engine.encode("in mid-line", continuation=True)

An engine knows the vocabulary and the control tokens of its file, and nothing of the files beside
it. Text never becomes a control token here.
"""

import copy
import json
import re
from functools import cache

from minisft.common.errors import UserError
from minisft.common.json_files import read_json

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class TokenizersEngine:
    """`tokenizer.json` through the tokenizers library."""

    def __init__(self, path, config):
        import tokenizers

        spec = read_json(path)
        try:
            in_file, spec = spec, as_transformers_reads_it(spec, config)
            # First as it is, for what the library refuses need not be taken apart.
            self.start = self.inside = (
                tokenizers.Tokenizer.from_file(str(path))
                if spec is in_file
                else tokenizers.Tokenizer.from_str(json.dumps(spec))
            )
            inside, self.prefix_after_special = without_prefix(spec)
            if inside:
                self.inside = tokenizers.Tokenizer.from_str(json.dumps(inside))
        except BaseException as error:
            # The library raises plain Exception, and where it panics not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            way_out = "download it again, or update the library"
            raise UserError(f"{path}: tokenizers cannot read it ({error}); {way_out}") from error
        for backend in (self.start, self.inside):
            backend.encode_special_tokens = True
            backend.no_truncation()
            backend.no_padding()
        decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
        self.byte_level = '"ByteLevel"' in decoder
        if not self.byte_level and SPACE not in decoder:
            raise UserError(f"{path}: neither byte-level nor SentencePiece-style; not supported")
        metaspace = '"Metaspace"' in decoder and '"never"' not in decoder
        self.strips_space = '"Strip"' in decoder or metaspace
        self.vocab_size = self.start.get_vocab_size(with_added_tokens=True)
        added = spec.get("added_tokens") or []
        self.added_text = {token["id"]: token["content"] for token in added}
        self.special_ids = {token["id"] for token in added if token["special"]}
        self.default_ids = {}
        self.post_processor = json.dumps(spec.get("post_processor"))

    def encode(self, text, continuation):
        """str -> ids; with `continuation` without a leading space."""
        backend = self.inside if continuation else self.start
        return backend.encode(text, add_special_tokens=False).ids

    def token_id(self, token):
        """The id of a token by its exact text, None where there is none."""
        return self.start.token_to_id(token)

    def token_text(self, id):
        """The text of a token as the vocabulary spells it, None for an unknown id."""
        return self.start.id_to_token(id)

    def token_bytes(self, id):
        """The UTF-8 bytes that a token stands for, none for an unknown id."""
        if id in self.added_text:
            return self.added_text[id].encode()
        token = self.start.id_to_token(id)
        if token is None:
            return b""
        if self.byte_level:
            table = byte_of_character()
            return b"".join([table.get(character, character.encode()) for character in token])
        return piece_bytes(token)

    def adds_bos(self, bos_token_id):
        """Whether a text gets BOS in front, where tokenizer_config.json does not say."""
        return f'"ids": [{bos_token_id}]' in self.post_processor


class SentencePieceEngine:
    """A bare `tokenizer.model` through the sentencepiece library."""

    def __init__(self, path, config):
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = self.processor.vocab_size()
            self.pieces = [self.processor.id_to_piece(id) for id in range(self.vocab_size)]
        except (RuntimeError, OSError, ValueError) as error:
            way_out = "download it again (or, for Llama 3, the tokenizer.json)"
            raise UserError(f"{path}: not a SentencePiece model; {way_out}") from error
        self.strips_space = self.processor.normalize("a").startswith(SPACE)
        self.prefix_after_special = bool(config.get("legacy", False))
        is_control, is_unknown = self.processor.is_control, self.processor.is_unknown
        every_id = range(self.vocab_size)
        self.special_ids = {id for id in every_id if is_control(id) or is_unknown(id)}
        ids = {name: getattr(self.processor, name)() for name in ("bos_id", "eos_id", "unk_id")}
        self.default_ids = {name[:3] + "_token": id for name, id in ids.items() if id >= 0}
        self.guard = self._find_guard(path)
        self.guard_length = len(self.processor.encode(self.guard))

    def _find_guard(self, path):
        """A character to encode mid-line text behind: one that merges with nothing after it."""
        for guard in ("\n", "\x01", "\x02"):
            alone = not any(guard in piece and piece != guard for piece in self.pieces)
            if alone and guard in self.processor.normalize(guard):
                return guard
        raise UserError(f"{path}: cannot encode text in mid-line; convert it to tokenizer.json")

    def encode(self, text, continuation):
        """str -> ids; with `continuation` without a leading space."""
        if continuation:
            return self.processor.encode(self.guard + text)[self.guard_length :]
        return self.processor.encode(text)

    def token_id(self, token):
        """The id of a token by its exact text, None where there is none."""
        id = self.processor.piece_to_id(token)
        return id if self.processor.id_to_piece(id) == token else None

    def token_text(self, id):
        """The text of a token as the vocabulary spells it, None for an unknown id."""
        return self.pieces[id] if id < self.vocab_size else None

    def token_bytes(self, id):
        """The UTF-8 bytes that a token stands for, none for an unknown id."""
        return piece_bytes(self.pieces[id]) if id < self.vocab_size else b""

    def adds_bos(self, bos_token_id):
        """Whether a text gets BOS in front, where tokenizer_config.json does not say."""
        return True  # Llama's convention, where nothing else is stated


def as_transformers_reads_it(spec, config):
    """tokenizer.json as transformers 5 reads it for a `LlamaTokenizer`.

    It puts one leading space unless the text has one, and after control tokens only when `legacy`;
    the files of Llama 2's time, taken by the letter, add it always.
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


def without_prefix(spec):
    """(the same tokenizer adding no leading space, whether `spec` adds it after control tokens).

    The first is None where `spec` adds none anyway.
    """
    inside, found, after_special = copy.copy(spec), False, True
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        found = True
        inside["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    inside["pre_tokenizer"] = copy.deepcopy(spec.get("pre_tokenizer"))
    pre_tokenizer = inside["pre_tokenizer"] or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        scheme = step.get("prepend_scheme", "always")
        if step.get("type") == "Metaspace" and scheme != "never":
            after_special = scheme == "always"
            step.update(prepend_scheme="never", add_prefix_space=False)
            found = True
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            step["add_prefix_space"] = False
            found = True
    return (inside if found else None), after_special


def piece_bytes(piece):
    """The bytes of a SentencePiece piece: `<0xE4>` is one byte, the low block a space."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


@cache
def byte_of_character():
    """Byte-level BPE's alphabet: a printable character stands for its own byte.

    GPT-2's table: the 68 bytes that do not print are written as U+0100, U+0101, ... in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
