"""Batches: every row once, little padding, an order that differs and repeats."""

import numpy as np
import pytest
import torch

from minisft.batching import (
    PAD_MULTIPLE,
    Example,
    collate,
    encode_rows,
    encode_texts,
    micro_batches,
    steps_of_epoch,
)
from minisft.dataset import load_rows
from minisft.template import get_template
from minisft.tokenizer import Tokenizer

LENGTHS = np.random.default_rng(0).integers(5, 500, 1003)


def flat(steps):
    return [int(row) for step in steps for row in step]


def test_every_row_once_in_another_order_every_epoch():
    epochs = [steps_of_epoch(LENGTHS, 16, seed=1, epoch=epoch) for epoch in (0, 1)]
    for steps in epochs:
        assert sorted(flat(steps)) == list(range(1003))
        assert sorted(map(len, steps))[0] == 1003 % 16 and len(steps) == -(-1003 // 16)
    assert flat(epochs[0]) != flat(epochs[1])
    first, second = ({frozenset(map(int, step)) for step in steps} for steps in epochs)
    assert len(first & second) < 0.1 * len(first)  # other rows meet, too
    assert flat(epochs[1]) == flat(steps_of_epoch(LENGTHS, 16, seed=1, epoch=1))
    assert flat(epochs[1]) != flat(steps_of_epoch(LENGTHS, 16, seed=2, epoch=1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_a_step(world_size):
    rows = np.arange(23)
    parts = [micro_batches(rows, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(flat(batch for part in parts for batch in part)) == list(range(23))


def padding_share(lengths, batch_size):
    total = 0
    for step in steps_of_epoch(lengths, batch_size, seed=0, epoch=0):
        longest = max(lengths[row] for row in step)
        total += len(step) * -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    return 1 - sum(lengths) / total


def test_little_padding_on_real_rows(shared_data):
    """alpaca_en_demo at batch size 8: fewer than 4 % of the tokens are padding."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "TinyLlama-1.1B-Chat-v0.6")
    rows = load_rows(shared_data / "instruct" / "alpaca_en_demo.json")
    examples, _ = encode_rows(rows, get_template("alpaca", tokenizer), 2048)
    lengths = [len(example.ids) for example in examples]
    assert padding_share(lengths, 8) < 0.04
    in_file_order = 1 - sum(lengths) / sum(
        8 * max(lengths[at : at + 8]) for at in range(0, len(lengths), 8))
    assert in_file_order > 0.2  # what grouping saves


def test_collate_pads_on_the_right():
    examples = [Example(np.array([1, 2, 3], np.int32), np.array([False, True, True])),
                Example(np.arange(9, dtype=np.int32), np.ones(9, bool))]
    tokens, supervised = collate(examples)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert tokens[0, :3].tolist() == [1, 2, 3] and tokens[1, :9].tolist() == list(range(9))
    assert supervised.sum() == 11 and not supervised[0, 3:].any() and not supervised[1, 9:].any()
    assert collate([])[1].sum() == 0


class Letters:
    """A template and tokenizer of one token a letter."""

    add_bos_token, bos_token_id, eos_token_id = True, 0, 1

    def encode(self, messages, tools=None):
        if isinstance(messages, str):
            return [ord(letter) for letter in messages]
        prompt, answer = (message["content"] for message in messages)
        ids = [ord(letter) for letter in prompt + answer] + [self.eos_token_id]
        return ids, [False] * len(prompt) + [True] * (len(answer) + 1)


class Conversation:
    tools = None

    def __init__(self, prompt, answer):
        self.messages = [{"content": prompt}, {"content": answer}]


def test_long_rows_are_cut_and_counted():
    rows = [Conversation("aa", "bb"), Conversation("aa", "b" * 20), Conversation("a" * 30, "b")]
    examples, report = encode_rows(rows, Letters(), cutoff_len=8)
    assert report.num_cut == 2 and report.num_dropped == 1
    assert examples[0].ids[-1] == Letters.eos_token_id
    assert examples[1].ids.tolist() == [97, 97] + [98] * 6  # a cut answer has no end


def test_texts_become_blocks():
    blocks = encode_texts(["abc", "de"], Letters(), block_size=4)
    assert [block.ids.tolist() for block in blocks] == [[0, 97, 98, 99], [1, 0, 100, 101]]
    assert all(block.supervised.all() for block in blocks)
