"""The losses of loss.token_losses_in_chunks, and their gradients, with less memory and time.

torch holds three tensors with the shape of the logits in the backward pass of a cross-entropy: the
log-probabilities, their gradient, and the gradient of the logits. Here there is one.

Measured and left aside: torch's F.linear_cross_entropy sums bfloat16 losses in bfloat16, which
makes the sum 0.5 % wrong, and it is new in torch 2.13.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Logits = Callable[[Tensor], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """F.cross_entropy without reduction. The log-probabilities become the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses (N,) of logits (N, V) in float32 and targets (N,)."""
        log_probs = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs, targets)
        return -log_probs.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient (N, V) of the logits, from that of the losses (N,)."""
        (weights,) = gradients
        log_probs, targets = ctx.saved_tensors
        return _softmax_minus_one(log_probs, targets).mul_(weights[:, None]), None


def _softmax_minus_one(log_probs: Tensor, targets: Tensor) -> Tensor:
    """d loss / d logits (N, V): the probabilities, minus 1 for the target. In place."""
    gradient = log_probs.exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return gradient


def token_losses_trained_head(logits: Logits, states: Tensor, targets: Tensor, size: int) -> Tensor:
    """token_losses_in_chunks, where the output matrix has a gradient too."""

    def losses(states: Tensor, targets: Tensor) -> Tensor:
        return _CrossEntropy.apply(logits(states).float(), targets)

    if len(states) > size:
        losses = partial(checkpoint, losses, use_reentrant=False)
    chunks = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([losses(*chunk) for chunk in chunks])


def token_losses_frozen_head(logits: Logits, states: Tensor, targets: Tensor, size: int) -> Tensor:
    """token_losses_in_chunks, where only the states have a gradient. Logits are computed once."""
    return _FrozenHead.apply(states, logits, targets, size)


class _FrozenHead(torch.autograd.Function):
    """Computes the gradient of the states (N, D) in the forward pass, while the logits are there.

    This is possible because the loss of a token depends on its own state only: the backward pass
    multiplies its gradient by the weight of the token.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, logits: Logits, targets: Tensor, size: int) -> Tensor:
        """Losses (N,) in float32."""
        losses, gradient = [], torch.empty_like(states)
        for start in range(0, len(states), size):
            chunk = slice(start, start + size)
            with torch.enable_grad():
                chunk_states = states[chunk].detach().requires_grad_()
                chunk_losses = _CrossEntropy.apply(logits(chunk_states).float(), targets[chunk])
                (gradient[chunk],) = torch.autograd.grad(chunk_losses.sum(), chunk_states)
            losses.append(chunk_losses.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the states, from that of the losses (N,)."""
        (weights,), (gradient,) = gradients, ctx.saved_tensors
        return gradient * weights.to(gradient.dtype)[:, None], None, None, None
