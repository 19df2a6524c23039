"""Text to token ids and back, for `tokenizer.json` and `tokenizer.model`.

    tokenizer = Tokenizer.load("TinyLlama-1.1B-Chat-v0.6")
    ids = tokenizer.encode("Hello </s>")        # "</s>" is encoded as text
    tokenizer.decode(ids)                       # "Hello </s>"
    tokenizer.token_id("</s>")                  # 2

Special tokens. `encode` never produces one, whatever the text spells; they are inserted by id. So a
user cannot end the turn by typing `<|im_end|>`. Added tokens that are *not* marked special (Qwen's
`<tool_call>`) and USER_DEFINED pieces (Baichuan's `<img>`) are ordinary vocabulary: they match
wherever a text spells them, as in pre-training, in transformers and in sentencepiece.

Leading space. SentencePiece tokenizers of the Llama kind add a space before a text. Its first word
then gets the same token as in the middle of a sentence. Text that continues a line must not get the
space: `encode(text, continuation=True)`.

The tour explains it: docs/tour/03_tokens.md.
"""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.outputs import atomic_write
from minisft.common.words import valid_text
from minisft.text.engines import SentencePieceEngine, TokenizersEngine
from minisft.text.long_texts import parts_of
from minisft.text.tokenizer_files import (
    FILES,
    read_added_tokens,
    read_chat_template,
    special_token_id,
    state_special_tokens,
    write_chat_template,
)
from minisft.text.turn_tokens import split_turn_tokens, turn_template, turn_token_ids


class Tokenizer:
    """A checkpoint's tokenizer with its special tokens and chat template.

    named_ids: {"bos_token": id, ...}, without tokens that it lacks. add_bos_token: True if a text
    gets BOS. special_ids: ids that `encode` never produces. turn_ids: those of turn_tokens.py among
    them. leading_space: True if a text gets a leading space. prefix_after_special: True if text
    after a special token gets it too (Llama's "legacy" behaviour). source: the folder that messages
    name; model_dir may be a temporary copy of it.
    """

    def __init__(self, model_dir: str | Path):
        self.model_dir = self.source = Path(model_dir)
        self.config = read_json(self.model_dir / "tokenizer_config.json", missing={})
        self.engine = self._open_engine()
        # For `save`: the folder may be gone at the end of a long training.
        paths = {name: self.model_dir / name for name in FILES}
        self._files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        # Special tokens that only the files beside the engine's file list.
        self._added = {
            id: text
            for id, text in read_added_tokens(self.model_dir, self.config).items()
            if self.engine.token_id(text) is None
        }
        self._added_ids = {text: id for id, text in self._added.items()}
        self.vocab_size = self.engine.vocab_size + len(self._added)

        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        named = {name: self._special_id(name) for name in names}
        self.named_ids = {name: id for name, id in named.items() if id is not None}
        self.bos_token_id = self.named_ids.get("bos_token")
        self.eos_token_id = self.named_ids.get("eos_token")
        self.pad_token_id = self.named_ids.get("pad_token", self.eos_token_id or 0)
        ends = {id for name, id in self.named_ids.items() if name != "pad_token"}
        self.turn_ids = turn_token_ids(self.token_id)
        self.special_ids = self.engine.special_ids | ends | self._added.keys() | self.turn_ids

        adds_bos = self.config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self.engine.adds_bos(self.bos_token_id)
        self.add_bos_token = bool(adds_bos) and self.bos_token_id is not None
        self.prefix_after_special = self.engine.prefix_after_special
        self.leading_space = self.encode("a") != self.encode("a", continuation=True)
        self._stored_template = read_chat_template(self.model_dir, self.config)
        self.chat_template = self._stored_template
        if self.turn_ids and not self.chat_template:
            self.chat_template = turn_template()

    @classmethod
    def load(cls, model_dir: str | Path) -> "Tokenizer":
        """Read the tokenizer in a folder; UserError names the file that is missing or broken."""
        return cls(model_dir)

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        """The ids of a text, without BOS and EOS.

        continuation: the text continues a line, so it gets no leading space.
        """
        if not text:
            return []
        text, ids = valid_text(text), []  # the engines accept no lone surrogate
        for part in split_turn_tokens(text) if self.turn_ids else [text]:
            for piece in parts_of(part):
                ids += self.engine.encode(piece, continuation)
                continuation = True
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Invalid UTF-8 becomes U+FFFD; unknown ids are skipped."""
        stream = StreamDecoder(self, skip_special_tokens)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact text, such as `<|im_end|>`; None if there is none."""
        return self._added_ids.get(token, self.engine.token_id(token))

    def token_text(self, id: int) -> str | None:
        """The text of a token as the vocabulary spells it; None for an unknown id."""
        return self._added[id] if id in self._added else self.engine.token_text(id)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token, possibly only a part of a character."""
        if id in self._added:
            return self._added[id].encode()
        return self.engine.token_bytes(id)

    def save(self, output_dir: str | Path, chat_template: str | None = None) -> None:
        """Write the tokenizer's files to a folder, in place of any other tokenizer's.

        chat_template: written in place of the tokenizer's own.
        """
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if output_dir.resolve() == self.model_dir.resolve():
            return
        for name in FILES:
            (output_dir / name).unlink(missing_ok=True)
            if name in self._files:
                (output_dir / name).parent.mkdir(exist_ok=True)
                with atomic_write(output_dir / name, "wb") as file:
                    file.write(self._files[name])
        texts = {name: self.token_text(id) for name, id in self.named_ids.items()}
        config = state_special_tokens(output_dir, self.config, texts)
        if chat_template is not None and chat_template != self._stored_template:
            write_chat_template(output_dir, config, chat_template)

    def _open_engine(self) -> TokenizersEngine | SentencePieceEngine:
        json_path = self.model_dir / "tokenizer.json"
        model_path = self.model_dir / "tokenizer.model"
        if json_path.is_file():
            return TokenizersEngine(json_path, self.config)
        if model_path.is_file():
            return SentencePieceEngine(model_path, self.config)
        hint = "Copy one from the checkpoint that the model was made from."
        if (self.model_dir / "merges.txt").is_file():
            hint = "vocab.json and merges.txt are not enough; download tokenizer.json as well."
        raise UserError(f"{self.model_dir}: no tokenizer.json and no tokenizer.model. {hint}")

    def _special_id(self, name: str) -> int | None:
        return special_token_id(
            self.model_dir,
            name,
            token_id=lambda token: self.token_id(valid_text(token)),
            default=self.engine.default_ids.get(name),
        )


class StreamDecoder:
    """Decodes ids one by one, for text that appears while it is generated.

    The pieces join to what `decode` returns. A character of several tokens is held back until it is
    complete. The leading space that a SentencePiece tokenizer adds is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else set()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.engine.strips_space  # until the first text

    def push(self, id: int) -> str:
        """The text that this id completes; empty in the middle of a character."""
        if id in self._skipped:
            return ""
        return self._without_leading_space(self._utf8.decode(self._tokenizer.token_bytes(id)))

    def flush(self) -> str:
        """The rest of the text; U+FFFD if the last character is incomplete."""
        return self._without_leading_space(self._utf8.decode(b"", final=True))

    def _without_leading_space(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def check_vocabulary(ids: Sequence[int], vocab_size: int | None) -> None:
    """UserError if the model has no embedding for an id. vocab_size: None if it is not known."""
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(ids)}, but the model's vocabulary has {vocab_size}; "
            "is it the tokenizer of this checkpoint? If it is, train.py --resize_vocab adds rows."
        )
