"""Rows for new tokens: the embedding and the output matrix grow, and new rows start at the mean.

    resize_vocabulary(model, 515)
    start_at_mean(model, range(512, 515))       # each new row is the mean of the rows before it

So a new token starts as an average token with an average score. Random rows would have other
lengths than trained ones, and zeros would give a new token the score zero, often the highest of
all. A head that normalises its rows (Baichuan2) scales the mean up, so there the score starts above
average.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minisft.model.decoder import CausalLM
from minisft.model.reward import Model

BLOCK_ROWS = 4096  # rows that are in memory as float64 at a time


def vocabulary_modules(model: Model) -> list[str]:
    """The modules with a row for each token: the embedding, and an untied output matrix."""
    has_head = isinstance(model, CausalLM) and not model.config.tie_word_embeddings
    return ["model.embed_tokens", *(["lm_head"] if has_head else [])]


def resize_vocabulary(model: Model, num_rows: int) -> None:
    """Give the model rows for `num_rows` tokens. In place. The values of new rows are undefined."""
    for name in vocabulary_modules(model):
        module = model.get_submodule(name)
        old = module.weight
        assert isinstance(old, nn.Parameter)
        new = old.new_empty((num_rows, old.shape[1]))
        num_kept = min(num_rows, len(old))
        new[:num_kept] = old.detach()[:num_kept]
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        kind = "out_features" if name == "lm_head" else "num_embeddings"
        setattr(module, kind, num_rows)
    model.config.vocab_size = num_rows


@torch.no_grad()
def start_at_mean(model: Model, new_rows: range) -> None:
    """Set new rows of the embedding and the output matrix to the mean of the rows before them."""
    for name in vocabulary_modules(model) if new_rows else ():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        if not weight.is_meta:
            mean = mean_of_rows(lambda begin, end, weight=weight: weight[begin:end], new_rows.start)
            weight[new_rows.start : new_rows.stop] = mean.to(weight)


def mean_of_rows(read: Callable[[int, int], Tensor], num_rows: int) -> Tensor:
    """The mean (D,) of the first rows of a matrix, in float64 on the CPU.

    read(begin, end): returns the rows from begin to end - 1.
    """
    starts = range(0, num_rows, BLOCK_ROWS)
    blocks = (read(begin, min(begin + BLOCK_ROWS, num_rows)) for begin in starts)
    sums = [block.to("cpu", torch.float64).sum(dim=0) for block in blocks]
    return torch.stack(sums).sum(dim=0) / num_rows


def read_with_new_rows(
    read: Callable[[int, int], Tensor], num_stored: int, new_rows: range
) -> Callable[[int, int], Tensor]:
    """`start_at_mean` for a matrix that is read in parts, by the ranks of a sharded model.

    read(begin, end): returns the rows from begin to end - 1 of the `num_stored` rows of the file.
    """
    mean = mean_of_rows(read, new_rows.start).float()

    def read_new(begin: int, end: int) -> Tensor:
        """Rows begin to end - 1 (end - begin, D) of the larger matrix."""
        rows = mean.repeat(end - begin, 1)
        known = range(begin, min(end, num_stored))
        rows[: len(known)] = read(known.start, max(known.start, known.stop)).float()
        rows[max(0, new_rows.start - begin) : max(0, new_rows.stop - begin)] = mean
        return rows

    return read_new
