"""Encode plain texts as blocks of tokens for pre-training (--stage pt).

examples, report = encode_texts(texts, tokenizer, block_size=1024)
"""

from collections.abc import Iterable

import numpy as np

from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Example
from minisft.text.tokenizer import Tokenizer, check_vocabulary


def encode_texts(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    block_size: int,
    vocab_size: int | None = None,
    packing: bool = False,
) -> tuple[list[Example], EncodeReport]:
    """Concatenate the texts and cut them into blocks of `block_size` tokens, all supervised.

    Each text begins with BOS, if the tokenizer adds it, and ends with EOS. The last block is
    shorter. packing: blocks record where their texts end, so that attention stays inside a text.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = [bos] if tokenizer.add_bos_token and bos is not None else []
    end = [] if eos is None else [eos]
    pieces, report = [np.zeros(0, np.int32)], EncodeReport()
    for text in texts:
        ids = begin + tokenizer.encode(text) + end
        check_vocabulary(ids, vocab_size)
        pieces.append(np.asarray(ids, np.int32))
        report.num_rows += 1
    stream = np.concatenate(pieces)
    text_ends = np.cumsum([len(piece) for piece in pieces])
    examples = []
    for start in range(0, len(stream), block_size):
        block = stream[start : start + block_size]
        lengths = None
        if packing:
            inside = text_ends[(text_ends > start) & (text_ends < start + len(block))] - start
            lengths = np.diff([0, *np.unique(inside), len(block)]).tolist()
        if len(block) > 1:
            examples.append(Example(block, np.ones(len(block), bool), lengths))
    return examples, report
