"""Cross-entropy over the tokens that a model should learn.

    loss_sum, num_tokens = next_token_loss(model, tokens, supervised)
    (loss_sum / num_tokens).backward()

The loss is a sum, not a mean. The mean of an optimizer step is known only after all micro-batches
and ranks have counted their tokens. A mean of their means would give the tokens of short batches
more weight.

The tour explains it: docs/tour/06_loss.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisft.common.devices import send
from minisft.model.decoder import CausalLM
from minisft.model.memory_saving_loss import (
    CrossEntropy,
    Logits,
    cross_entropy_in_place,
    token_losses_frozen_head,
    token_losses_without_gradient,
)

# Logits that are in memory at a time in training: 256 MB in float32.
CHUNK_LOGITS = 2**26


def next_token_loss(
    model: nn.Module,
    tokens: Tensor,
    supervised: Tensor,
    lengths: list[int] | None = None,
    logits: Logits | None = None,
) -> tuple[Tensor, int]:
    """The sum of -log p(token) over the supervised tokens (float32), and their number.

    tokens: ids (B, T). supervised: bool (B, T), True for tokens that the model should learn to
    write; on the CPU. The state at t predicts the token at t + 1, so the first token of a row is
    never a target. lengths: the lengths of the rows of a packed batch. logits: the model's method
    `logits`, if `model` is a wrapper without it, such as DDP.
    """
    if logits is None:
        assert isinstance(model, CausalLM)
        logits = model.logits
    hidden = model(tokens, lengths=lengths).flatten(0, 1)  # (B * T, D)
    places = send(target_places(supervised), tokens.device)  # (N,)
    if len(places) == 0:
        # Zero, but connected to all parameters: DDP waits for a gradient of each.
        return (logits(hidden[:1]).float() * 0.0).sum(), 0
    states, targets = hidden[places - 1], tokens.flatten()[places]  # (N, D), (N,)
    return token_losses(logits, states, targets).sum(), len(places)


def target_places(supervised: Tensor) -> Tensor:
    """Where the targets are in the flattened batch: (N,), from `supervised` (B, T).

    Both are on the CPU. On a GPU, the CPU would wait until it knows the number N.
    """
    is_target = supervised.clone()
    is_target[:, 0] = False
    return is_target.flatten().nonzero()[:, 0]


def token_losses(logits: Logits, states: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits(states))[target] of states (N, D) and targets (N,): (N,) in float32.

    With a vocabulary of 128,000, the logits of a batch would take more memory than the model.
    Therefore only a chunk of them is in memory at a time.
    """
    if not torch.is_grad_enabled():
        return token_losses_without_gradient(logits, states, targets, cross_entropy)
    # Logits of zero states show the size of the vocabulary, and whether the output matrix is
    # trained.
    no_logits = logits(states[:0].detach())  # (0, V)
    size = chunk_size(no_logits.shape[-1])
    if no_logits.requires_grad:
        return token_losses_in_chunks(logits, states, targets, size, cross_entropy_in_place)
    return token_losses_frozen_head(logits, states, targets, size)


def token_losses_in_chunks(
    logits: Logits, states: Tensor, targets: Tensor, size: int, cross_entropy: CrossEntropy
) -> Tensor:
    """token_losses by chunks of `size` states. The backward pass computes the logits again."""

    def losses(states: Tensor, targets: Tensor) -> Tensor:
        """The losses of a chunk."""
        return cross_entropy(logits(states), targets)

    if len(states) <= size:
        return losses(states, targets)
    chunks = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of logits (N, V) and targets (N,): (N,) in float32."""
    # float32 so that a sum over 100,000 tokens keeps its digits
    return F.cross_entropy(logits.float(), targets, reduction="none")


def chunk_size(vocab_size: int) -> int:
    """The number of states in a chunk: a multiple of 64, so that matrix products stay large."""
    return max(1, CHUNK_LOGITS // vocab_size // 64) * 64
