"""The cross-entropy of loss.py, with a backward pass that takes less memory and time.

torch holds three tensors with the shape of the logits in the backward pass of a cross-entropy: the
log-probabilities, their gradient, and the gradient of the logits. Here there is one.

torch's F.linear_cross_entropy was measured and is not used: with bfloat16 states it sums in
bfloat16, so that the sum of 5,000 losses was 0.3 % wrong. It also needs the weight of the output
matrix, which an adapter may change.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Hidden states (N, D) -> scores (N, V).
Logits = Callable[[Tensor], Tensor]
# Logits (N, V) and targets (N,) -> losses (N,) in float32.
CrossEntropy = Callable[[Tensor, Tensor], Tensor]
# Logits that are in float32 at a time. On a CPU, more do not fit into its cache, and their memory
# has to come from the operating system each time, which takes longer than the computation.
PIECE_ON_CPU, PIECE_ON_GPU = 2**19, 2**24
# States whose logits are in memory at a time if there is no gradient. On CPUs with AVX2 and with
# AVX-512, 256 took 0.77 to 0.93 of the time of 1,365 to 2,048. 1,024 states and a vocabulary of
# 128,000 are 256 MB in bfloat16.
STATES_ON_CPU, STATES_ON_GPU = 256, 1024


def token_losses_without_gradient(
    logits: Logits, states: Tensor, targets: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """loss.token_losses for scores: nothing is kept for a backward pass."""
    size = STATES_ON_CPU if states.is_cpu else STATES_ON_GPU
    chunks = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([by_rows(cross_entropy, logits(chunk), tokens) for chunk, tokens in chunks])


def by_rows(cross_entropy: CrossEntropy, logits: Tensor, targets: Tensor) -> Tensor:
    """cross_entropy(logits, targets), a few rows at a time."""
    return torch.cat([cross_entropy(*rows) for rows in in_pieces(logits, targets)])


def in_pieces(logits: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """logits (N, V) and another tensor (N, ...), a few rows at a time."""
    size = rows_of_piece(logits.shape[-1], logits.is_cpu)
    return zip(logits.split(size), other.split(size), strict=True)


def rows_of_piece(vocab_size: int, is_cpu: bool) -> int:
    """The number of rows that are in float32 at a time."""
    return max(1, (PIECE_ON_CPU if is_cpu else PIECE_ON_GPU) // vocab_size)


def cross_entropy_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """loss.cross_entropy, whose log-probabilities become the gradient of the logits in place."""
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses (N,); keeps the log-probabilities (N, V), in float32."""
        log_probs = torch.empty_like(logits, dtype=torch.float32)
        for rows, target in in_pieces(logits, log_probs):
            target.copy_(F.log_softmax(rows.float(), dim=-1))
        ctx.dtype = logits.dtype
        ctx.save_for_backward(log_probs, targets)
        return -log_probs.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits (N, V), in the memory of the log-probabilities."""
        log_probs, targets = ctx.saved_tensors
        gradient = gradient_in_place(log_probs, targets).mul_(gradients[0][:, None])
        return gradient.to(ctx.dtype), None


def gradient_in_place(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the logits (N, V), in the memory of their log-probabilities."""
    gradient = log_probs.exp_()  # softmax(logits), minus 1 for the target
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return gradient


def token_losses_frozen_head(logits: Logits, states: Tensor, targets: Tensor, size: int) -> Tensor:
    """loss.token_losses_in_chunks, where only the states have a gradient.

    The loss of a token depends on its own state only. So its gradient can be computed while the
    logits are in memory, and the backward pass multiplies it by the weight of the token.
    """
    return _FrozenHead.apply(states, logits, targets, size)


def losses_and_gradient(logits: Logits, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (N,) of states (N, D), and the gradient of each with respect to its state."""
    losses = []
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        scores = logits(states)
    gradient = scores.detach()  # in the memory of the scores
    for rows, row_targets in in_pieces(gradient, targets):
        log_probs = F.log_softmax(rows.float(), dim=-1)
        losses.append(-log_probs.gather(-1, row_targets[:, None])[:, 0])
        rows.copy_(gradient_in_place(log_probs, row_targets))
    return torch.cat(losses), torch.autograd.grad(scores, states, gradient)[0]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, logits: Logits, targets: Tensor, size: int) -> Tensor:
        """The losses (N,); keeps the gradient of each with respect to its state (N, D)."""
        losses, gradients = [], []
        for chunk in zip(states.split(size), targets.split(size), strict=True):
            chunk_losses, gradient = losses_and_gradient(logits, *chunk)
            losses.append(chunk_losses)
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the states (N, D)."""
        (gradient,) = ctx.saved_tensors
        # In float32: rounded to bfloat16, the weights of all tokens would be wrong by up to 0.4 %.
        product = gradient * gradients[0][:, None]
        return product.to(gradient.dtype), None, None, None
