"""New tokens for a model: --new_special_tokens, --add_tokens and --resize_vocab.

    tokenizer, config, new_rows = load_vocabulary(options, model_dir, adapter_dir, say)

Many checkpoints have more rows than tokens, because their embedding was padded. New tokens take
these rows first. If there are too few, the matrices grow to as many rows as the tokenizer has
tokens, which is what transformers and peft make of the base before they load the adapter.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minisft.checkpoints.adapter_forms import tokenizer_dir, vocabulary_size
from minisft.common.option_types import split_names
from minisft.data.row_values import BadRow
from minisft.model.config import ModelConfig
from minisft.text.marks import texts_of
from minisft.text.new_tokens import first_free_id, with_new_tokens
from minisft.text.tokenizer import Tokenizer
from minisft.text.tokenizer_files import has_tokenizer

SEARCHED_ROWS = 128  # rows that are searched for spelled special tokens


def load_vocabulary(
    options: Namespace,
    model_dir: Path,
    adapter_dir: Path | None,
    say: Callable[[str], None],
) -> tuple[Tokenizer, ModelConfig, range]:
    """(tokenizer with its new tokens, config with rows for all tokens, ids of the new rows).

    adapter_dir: the folder of --adapter, which may have new tokens itself. UserError if a token
    exists.
    """
    tokenizer = Tokenizer.load(tokenizer_dir(model_dir, adapter_dir))
    config = ModelConfig.load(model_dir)
    config.vocab_size = vocabulary_size(config, adapter_dir)
    special, ordinary = map(split_names, (options.new_special_tokens, options.add_tokens))
    if not (special or ordinary or options.resize_vocab):
        return tokenizer, config, range(0)
    num_rows, num_tokens = config.vocab_size, first_free_id(tokenizer)
    if special or ordinary:
        tokenizer = with_new_tokens(tokenizer, special, ordinary)
    new_rows = range(min(num_rows, num_tokens), first_free_id(tokenizer))
    config.vocab_size = max(num_rows, new_rows.stop)
    say(_describe(new_rows, num_rows, config.vocab_size))
    return tokenizer, config, new_rows


def planned_rows(options: Namespace, config: ModelConfig, model_dir: Path) -> range:
    """The new rows of a planned run. Without a tokenizer, every new token gets a new row."""
    names = split_names(options.new_special_tokens) + split_names(options.add_tokens)
    if has_tokenizer(model_dir) and (names or options.resize_vocab):
        return load_vocabulary(options, model_dir, None, print)[2]
    return range(config.vocab_size, config.vocab_size + len(names)) if names else range(0)


def _describe(new_rows: range, num_before: int, num_rows: int) -> str:
    if not new_rows:
        return f"--resize_vocab: {num_before:,} rows are enough for all tokens"
    ids = f"ids {new_rows[0]} to {new_rows[-1]}" if len(new_rows) > 1 else f"id {new_rows[0]}"
    text = f"new tokens: {ids}, whose rows start at the mean; "
    if num_rows == num_before:
        return text + f"the vocabulary has unused rows for them and keeps its {num_rows:,} rows"
    return text + f"the vocabulary grows from {num_before:,} to {num_rows:,} rows"


def note_on_spelled_tokens(rows: Sequence[Any], options: Namespace) -> str | None:
    """A note if rows spell new special tokens, which stay text there; else None."""
    tokens = split_names(options.new_special_tokens)
    num_searched = min(len(rows), SEARCHED_ROWS) if tokens else 0
    spelled, num_rows = set(), 0
    for number in range(num_searched):
        try:
            row = rows[number]
        except BadRow:
            continue
        content = row if isinstance(row, str) else [row.messages, row.rejected]
        found = {token for token in tokens for text in texts_of(content) if token in text}
        spelled |= found
        num_rows += bool(found)
    if not spelled:
        return None
    return (
        f"{num_rows} of the first {num_searched} rows spell {', '.join(sorted(spelled))}. It stays "
        "text there, because only a chat template writes special tokens. Tokens that match in a "
        "text: --add_tokens."
    )
