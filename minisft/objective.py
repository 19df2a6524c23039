"""What is minimised: the negative log-likelihood of the supervised tokens, as a sum.

    loss_sum, num_tokens = next_token_loss(model, tokens, supervised)
    (loss_sum / num_tokens).backward()

A sum, because the mean over a step's tokens is only known when all micro-batches and processes
have counted theirs; a mean of means would weigh the tokens of short batches more.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minisft import parallel
from minisft.batching import collate

# Rows of logits held at a time: with a vocabulary of 128k a chunk takes 0.5 GB in float32, and
# about three times that while its gradient is computed.
CHUNK_SIZE = 1024


def next_token_loss(model, tokens, supervised, lengths=None, logits=None):
    """The summed cross-entropy (a scalar in float32) of supervised tokens, and their count.

    model: gives hidden states (B, T, D) of tokens (B, T). logits: hidden states -> scores,
    `model.logits` unless the model is wrapped.
    supervised: bool (B, T), True where the token itself is to be learned. The state before it
    predicts it, so the first token of a row never is. lengths: of the rows, in a packed batch.
    """
    logits = logits or model.logits
    hidden = model(tokens, lengths=lengths)
    learned = supervised[:, 1:]
    chosen, targets = hidden[:, :-1][learned], tokens[:, 1:][learned]  # (N, D), (N,)
    if len(targets) == 0:
        # Nothing to learn: exactly zero, yet connected to every parameter.
        return (logits(hidden[:, :1]).float() * 0.0).sum(), 0
    return cross_entropy_sum(logits, chosen, targets), len(targets)


def cross_entropy_sum(logits, hidden, targets):
    """Sum of -log softmax(logits(hidden))[target] over N states (N, D), a chunk at a time.

    The logits of a chunk are computed again for its gradient instead of kept.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, wanted in zip(hidden.split(CHUNK_SIZE), targets.split(CHUNK_SIZE), strict=True):
        if torch.is_grad_enabled() and len(hidden) > CHUNK_SIZE:
            total = total + checkpoint(_chunk_loss, logits, chunk, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(logits, chunk, wanted)
    return total


def _chunk_loss(logits, hidden, targets):
    return F.cross_entropy(logits(hidden).float(), targets, reduction="sum")


@torch.inference_mode()
def mean_loss(model, examples, batch_size, collate=collate):
    """Loss per supervised token of held-out Examples, over all processes; every row once.

    collate: how Examples become a batch: `collate` or `pack` of batching.py.
    """
    model.eval()
    device = model.model.embed_tokens.weight.device
    rows = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    rows = rows[parallel.rank() :: parallel.world_size()]
    loss_sum, num_targets = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = [examples[row] for row in rows[start : start + batch_size]]
        loss, count = next_token_loss(model, *collate(batch, device))
        loss_sum, num_targets = loss_sum + loss.item(), num_targets + count
    loss_sum, num_targets = parallel.sum_over_processes([loss_sum, num_targets], device)
    return loss_sum / num_targets
