"""Text to token ids and back: one interface over `tokenizer.json` and `tokenizer.model`.

    tokenizer = Tokenizer.load("TinyLlama-1.1B-Chat-v0.6")
    ids = tokenizer.encode("Hello </s>")        # "</s>" stays text
    tokenizer.decode(ids)                           # "Hello </s>"
    tokenizer.token_id("</s>")                  # 2: control tokens are had by id only

What text can become. A token marked special in `tokenizer.json`, or a CONTROL piece of a
SentencePiece model, is never made from text. Added tokens *not* marked special (Qwen's
`<tool_call>`) and USER_DEFINED pieces (Baichuan's `<reserved_106>`) are ordinary vocabulary that is
matched wherever it is spelled, as it was in pre-training and is in transformers and sentencepiece.

Leading space. SentencePiece models of the Llama kind put a space before a text, so that its first
word is the same token as in mid-sentence. Text that continues a line must not get it:
`encode(text, continuation=True)`.
"""

import codecs
import copy
import json
import re
import shutil
from functools import cache
from pathlib import Path

from minisft.options import UserError

FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """A checkpoint's tokenizer, with its special ids, BOS policy and chat template."""

    def __init__(self, model_dir):
        self.model_dir = Path(model_dir)
        self.config = read_json(self.model_dir / "tokenizer_config.json")
        self.engine = self._open_engine()
        self._added = self._tokens_added_by_config()
        self._added_ids = {text: id for id, text in self._added.items()}
        self.vocab_size = self.engine.vocab_size + len(self._added)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token") or self.eos_token_id or 0
        named = {self.bos_token_id, self.eos_token_id, self._named_id("unk_token")} - {None}
        self.special_ids = self.engine.special_ids | named | self._added.keys()
        self.add_bos_token = self._bos_policy()
        self.chat_template = self._read_chat_template()
        # Whether text after a control token gets the leading space too (Llama's "legacy" way).
        self.prefix_after_special = self.engine.prefix_after_special

    @classmethod
    def load(cls, model_dir):
        """From a local folder; UserError names the file that is missing or broken."""
        return cls(model_dir)

    def encode(self, text, continuation=False):
        """str -> ids, without BOS and EOS; with `continuation` as the text stands in mid-line."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
        return self.engine.encode(text, continuation) if text else []

    def decode(self, ids, skip_special_tokens=True):
        """ids -> str; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        stream = StreamDecoder(self, skip_special_tokens)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def token_id(self, token):
        """The id of a token by its exact text, such as `<|im_end|>`; None where there is none."""
        return self._added_ids.get(token, self.engine.token_id(token))

    def token_text(self, id):
        """The text of one token as the vocabulary spells it, control tokens included."""
        return self._added[id] if id in self._added else self.engine.token_text(id)

    def token_bytes(self, id):
        """The UTF-8 bytes, possibly part of a character, that one token stands for."""
        return self._added[id].encode() if id in self._added else self.engine.token_bytes(id)

    def save(self, output_dir):
        """Copy the tokenizer's files, byte for byte, into an existing or new folder."""
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if output_dir.resolve() == self.model_dir.resolve():
            return
        for path in (self.model_dir / name for name in FILES):
            if path.is_file():
                shutil.copyfile(path, output_dir / path.name)

    def _open_engine(self):
        json_path, model_path = self.model_dir / FILES[0], self.model_dir / FILES[1]
        if json_path.is_file():
            return TokenizersEngine(json_path, self.config)
        if model_path.is_file():
            return SentencePieceEngine(model_path, self.config)
        if (self.model_dir / "merges.txt").is_file():
            way_out = (
                "vocab.json and merges.txt are not enough; download its tokenizer.json as well"
            )
        else:
            way_out = "copy one from the checkpoint that the model was made from"
        raise UserError(f"{self.model_dir}: no tokenizer.json and no tokenizer.model; {way_out}")

    def _tokens_added_by_config(self):
        """Control tokens the engine's file does not have but its neighbours list: id -> text."""
        listed = self.config.get("added_tokens_decoder") or {}
        added = {id: text for text, id in read_json(self.model_dir / "added_tokens.json").items()}
        added |= {int(id): entry["content"] for id, entry in listed.items()}
        return {id: text for id, text in added.items() if self.engine.token_id(text) is None}

    def _named_id(self, name):
        """The id of `bos_token` and the like, from the first file that says."""
        for source in (self.config, read_json(self.model_dir / "special_tokens_map.json")):
            if name in source:
                token = source[name]
                token = token["content"] if isinstance(token, dict) else token
                return None if token is None else self.token_id(token)
        for file_name in ("config.json", "generation_config.json"):
            ids = read_json(self.model_dir / file_name).get(f"{name}_id")
            if ids is not None:
                return ids[0] if isinstance(ids, list) else ids
        return self.engine.default_ids.get(name)

    def _bos_policy(self):
        stated = self.config.get("add_bos_token")
        policy = self.engine.adds_bos(self.bos_token_id) if stated is None else stated
        return bool(policy) and self.bos_token_id is not None

    def _read_chat_template(self):
        path = self.model_dir / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = read_json(self.model_dir / "chat_template.json").get("chat_template")
        template = self.config.get("chat_template") or template
        if isinstance(template, list):  # several named ones: [{"name": ..., "template": ...}]
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template


class TokenizersEngine:
    """`tokenizer.json` through the tokenizers library."""

    def __init__(self, path, config):
        import tokenizers

        spec = as_transformers_reads_it(read_json(path), config)
        inside, self.prefix_after_special = without_prefix(spec)
        try:
            self.start = self.inside = tokenizers.Tokenizer.from_str(json.dumps(spec))
            if inside:
                self.inside = tokenizers.Tokenizer.from_str(json.dumps(inside))
        except Exception as error:  # the library raises plain Exception
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
        backend = self.inside if continuation else self.start
        return backend.encode(text, add_special_tokens=False).ids

    def token_id(self, token):
        return self.start.token_to_id(token)

    def token_text(self, id):
        return self.start.id_to_token(id)

    def token_bytes(self, id):
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
        return f'"ids": [{bos_token_id}]' in self.post_processor


class SentencePieceEngine:
    """A bare `tokenizer.model` through the sentencepiece library."""

    def __init__(self, path, config):
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            way_out = "download it again (or, for Llama 3, the tokenizer.json)"
            raise UserError(f"{path}: not a SentencePiece model; {way_out}") from error
        self.vocab_size = self.processor.vocab_size()
        self.strips_space = self.processor.normalize("a").startswith(SPACE)
        self.prefix_after_special = bool(config.get("legacy", False))
        self.pieces = [self.processor.id_to_piece(id) for id in range(self.vocab_size)]
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
        if continuation:
            return self.processor.encode(self.guard + text)[self.guard_length :]
        return self.processor.encode(text)

    def token_id(self, token):
        id = self.processor.piece_to_id(token)
        return id if self.processor.id_to_piece(id) == token else None

    def token_text(self, id):
        return self.pieces[id] if id < self.vocab_size else None

    def token_bytes(self, id):
        return piece_bytes(self.pieces[id]) if id < self.vocab_size else b""

    def adds_bos(self, bos_token_id):
        return True  # Llama's convention, where nothing else is stated


class StreamDecoder:
    """Text from ids as they come: `push(id)` returns what has become complete, `flush()` the rest.

    The joined pieces are what `decode` gives for all the ids. A character split over several tokens
    is held back until its last byte; the leading space of a SentencePiece text is dropped.
    """

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer = tokenizer
        self.skip = tokenizer.special_ids if skip_special_tokens else set()
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.at_start = tokenizer.engine.strips_space

    def push(self, id):
        if id in self.skip:
            return ""
        return self._trim(self.utf8.decode(self.tokenizer.token_bytes(int(id))))

    def flush(self):
        return self._trim(self.utf8.decode(b"", final=True))

    def _trim(self, text):
        if self.at_start and text:
            self.at_start = False
            return text.removeprefix(" ")
        return text


def as_transformers_reads_it(spec, config):
    """tokenizer.json as transformers 5 reads it for a `LlamaTokenizer`.

    It puts one leading space unless the text has one, and after control tokens only when `legacy`;
    the files of Llama 2's time, taken by the letter, add it always.
    """
    name = config.get("tokenizer_class") or ""
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


def read_json(path):
    """A JSON object from a file; {} where there is no such file, UserError where it is broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content
