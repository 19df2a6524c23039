"""Rows become batches: encoded, cut, grouped by length, padded to their own longest row.

    examples, report = encode_rows(rows, template, cutoff_len=1024)
    for step_rows in steps_of_epoch([len(one.ids) for one in examples], 32, seed=0, epoch=0):
        tokens, supervised = collate([examples[row] for row in step_rows])
"""

from dataclasses import dataclass

import numpy as np
import torch

# Lengths are rounded up to a multiple: fewer shapes to prepare kernels for, aligned rows.
PAD_MULTIPLE = 8
# Rows are shuffled, then sorted by length within windows of this many steps.
WINDOW_STEPS = 128


@dataclass
class Example:
    """One row: token ids (T,) int32 and whether each is to be learned (T,) bool."""

    ids: np.ndarray
    supervised: np.ndarray


@dataclass
class EncodeReport:
    """How many rows were cut to the length limit, and how many had nothing left to learn."""

    num_cut: int = 0
    num_dropped: int = 0


def encode_rows(rows, template, cutoff_len):
    """Conversations -> (list of Example, EncodeReport). A cut answer ends without EOS."""
    examples, report = [], EncodeReport()
    for row in rows:
        ids, supervised = template.encode(row.messages, row.tools)
        if len(ids) > cutoff_len:
            report.num_cut += 1
        example = Example(
            np.asarray(ids[:cutoff_len], np.int32), np.asarray(supervised[:cutoff_len], bool)
        )
        if example.supervised[1:].any():
            examples.append(example)
        else:
            report.num_dropped += 1
    return examples, report


def encode_texts(texts, tokenizer, block_size):
    """Plain texts -> Examples of `block_size` tokens, every token learned.

    Texts follow one another, each between BOS (where the tokenizer adds one) and EOS, and are cut
    into blocks; the last block is shorter.
    """
    stream = []
    for text in texts:
        if tokenizer.add_bos_token:
            stream.append(tokenizer.bos_token_id)
        stream.extend(tokenizer.encode(text))
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    stream = np.asarray(stream, np.int32)
    blocks = [stream[start : start + block_size] for start in range(0, len(stream), block_size)]
    return [Example(block, np.ones(len(block), bool)) for block in blocks if len(block) > 1]


def steps_of_epoch(lengths, rows_per_step, seed, epoch):
    """The rows of every optimizer step of an epoch: a list of arrays of row numbers.

    Each row comes once; rows of a step have similar lengths and are sorted by them. The order
    depends on seed and epoch alone, not on how a step is split into micro-batches or processes.
    """
    padded = -(-np.asarray(lengths) // PAD_MULTIPLE)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(padded))
    window = rows_per_step * WINDOW_STEPS
    steps = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        # Rows of one padded length stay shuffled, so that other rows meet in every epoch.
        rows = rows[np.argsort(padded[rows], kind="stable")]
        steps += [rows[at : at + rows_per_step] for at in range(0, len(rows), rows_per_step)]
    return [steps[index] for index in generator.permutation(len(steps))]


def micro_batches(step_rows, batch_size, rank=0, world_size=1):
    """Split a step's rows into this process's micro-batches, as many on every process.

    Processes take turns along the sorted rows, so that their batches are equally long. A batch may
    be empty where the rows do not go round.
    """
    stride = batch_size * world_size
    return [step_rows[start : start + stride][rank::world_size]
            for start in range(0, len(step_rows), stride)]


def collate(examples, device="cpu"):
    """Examples -> tokens (B, T) int64 and supervised (B, T) bool, padded on the right.

    Padding is never supervised, and a row's own tokens never see it; its id is of no importance.
    No examples give one row of padding.
    """
    longest = max([len(one.ids) for one in examples], default=1)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = torch.zeros(max(1, len(examples)), width, dtype=torch.int64)
    supervised = torch.zeros_like(tokens, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.from_numpy(example.ids)
        supervised[row, : len(example.ids)] = torch.from_numpy(example.supervised)
    return tokens.to(device, non_blocking=True), supervised.to(device, non_blocking=True)
