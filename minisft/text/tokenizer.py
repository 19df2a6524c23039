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
import shutil
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, read_json, token_ids, write_json
from minisft.text.engines import SentencePieceEngine, TokenizersEngine

FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


class Tokenizer:
    """A checkpoint's tokenizer, with its special ids, BOS policy and chat template."""

    def __init__(self, model_dir):
        self.model_dir = Path(model_dir)
        self.config = self._neighbour("tokenizer_config.json")
        self.engine = self._open_engine()
        self._added = self._tokens_added_by_config()
        self._added_ids = {text: id for id, text in self._added.items()}
        self.vocab_size = self.engine.vocab_size + len(self._added)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        pad_ids = (self._named_id("pad_token"), self.eos_token_id, 0)
        self.pad_token_id = next(id for id in pad_ids if id is not None)
        named = {self.bos_token_id, self.eos_token_id, self._named_id("unk_token")} - {None}
        self.special_ids = self.engine.special_ids | named | self._added.keys()
        self.add_bos_token = self._bos_policy()
        self.chat_template = self._read_chat_template()
        # Whether text after a control token gets the leading space too (Llama's "legacy" way).
        self.prefix_after_special = self.engine.prefix_after_special

    @property
    def leading_space(self):
        """Whether a text gets a space in front, as SentencePiece models of the Llama kind do it."""
        return self.encode("a") != self.encode("a", continuation=True)

    @classmethod
    def load(cls, model_dir):
        """From a local folder; UserError names the file that is missing or broken."""
        return cls(model_dir)

    def encode(self, text, continuation=False):
        """str -> ids, without BOS and EOS; with `continuation` as the text stands in mid-line."""
        return self.engine.encode(_whole_characters(text), continuation) if text else []

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
        if id in self._added:
            return self._added[id].encode("utf-8", "replace")
        return self.engine.token_bytes(id)

    def save(self, output_dir, chat_template=None):
        """Copy the tokenizer's files, byte for byte, into an existing or new folder.

        Another tokenizer's files that are there go: who loads the folder would read those too.
        chat_template: one to write instead of the tokenizer's own.
        """
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if output_dir.resolve() == self.model_dir.resolve():
            return
        for path in (self.model_dir / name for name in FILES):
            (output_dir / path.name).unlink(missing_ok=True)
            if path.is_file():
                shutil.copyfile(path, output_dir / path.name)
        if chat_template not in (None, self.chat_template):
            (output_dir / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
            if "chat_template" in self.config:  # which is all that old programs read
                write_json(
                    {**self.config, "chat_template": chat_template},
                    output_dir / "tokenizer_config.json",
                )

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

    def _neighbour(self, name):
        """What a JSON file of the folder says; {} where there is none."""
        return read_json(self.model_dir / name, missing={})

    def _tokens_added_by_config(self):
        """Control tokens the engine's file does not have but its neighbours list: id -> text."""
        listed = self.config.get("added_tokens_decoder") or {}
        try:
            added = {id: text for text, id in self._neighbour("added_tokens.json").items()}
            added |= {int(id): entry["content"] for id, entry in listed.items()}
            if not all(is_integer(id, most=2**31 - 1) for id in added):
                raise ValueError("an id is not a whole number that fits 31 bits")
            return {id: text for id, text in added.items() if self.engine.token_id(text) is None}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.model_dir}: added_tokens.json or added_tokens_decoder in "
                f"tokenizer_config.json lists no tokens ({error!r})"
            ) from error

    def _named_id(self, name):
        """The id of `bos_token` and the like, from the first file that says."""
        for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
            content = self._neighbour(file_name)
            if name in content:
                token = content[name]
                token = token.get("content") if isinstance(token, dict) else token
                if not isinstance(token, str | None):
                    raise UserError(
                        f"{self.model_dir / file_name}: {name} must be text, not {token!r}"
                    )
                return None if token is None else self.token_id(_whole_characters(token))
        for file_name in ("config.json", "generation_config.json"):
            stated = self._neighbour(file_name).get(f"{name}_id")
            if ids := token_ids(stated, self.model_dir / file_name, f"{name}_id"):
                return ids[0]
        return self.engine.default_ids.get(name)

    def _bos_policy(self):
        stated = self.config.get("add_bos_token")
        policy = self.engine.adds_bos(self.bos_token_id) if stated is None else stated
        return bool(policy) and self.bos_token_id is not None

    def _read_chat_template(self):
        path = self.model_dir / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        template = self._neighbour("chat_template.json").get("chat_template")
        template = self.config.get("chat_template") or template
        if isinstance(template, list):  # several named ones: [{"name": ..., "template": ...}]
            named = [entry for entry in template if isinstance(entry, dict)]
            named = [entry.get("template") for entry in named if entry.get("name") == "default"]
            template = named[-1] if named else None
        return template if isinstance(template, str) else None


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
        """The text that one more id completes, "" while a character is in parts."""
        if id in self.skip:
            return ""
        return self._trim(self.utf8.decode(self.tokenizer.token_bytes(int(id))))

    def flush(self):
        """The end of the text; a character that never became whole is U+FFFD."""
        return self._trim(self.utf8.decode(b"", final=True))

    def _trim(self, text):
        if self.at_start and text:
            self.at_start = False
            return text.removeprefix(" ")
        return text


def _whole_characters(text):
    """Half a surrogate pair becomes "?"; the engines take none."""
    return text.encode("utf-8", "replace").decode()


def check_vocabulary(ids, vocab_size):
    """UserError where the model's vocabulary (None: not known) has no place for an id."""
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(ids)}, the model's vocabulary has "
            f"{vocab_size}; is it the tokenizer of this checkpoint?"
        )
