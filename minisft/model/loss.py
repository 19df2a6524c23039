"""Cross-entropy over the tokens a model should learn."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Logits held at a time, whatever the vocabulary: in float32 a quarter of a GB, and as much again
# while they become log-probabilities.
CHUNK_LOGITS = 2**26


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
    return token_losses(logits, chosen, targets).sum(), len(targets)


def token_losses(logits, hidden, targets):
    """-log softmax(logits(hidden))[target] of N states (N, D) -> (N,) in float32.

    Only a chunk of logits is held at a time. With a frozen output matrix its gradient is computed
    at once; with a trained one the chunk is computed again in the backward pass.
    """
    none = logits(hidden[:0].detach())  # says how wide they are, and whether the matrix is trained
    size = chunk_size(none.shape[-1])
    if torch.is_grad_enabled() and not none.requires_grad:
        return _FrozenHead.apply(hidden, logits, targets, size)
    again = torch.is_grad_enabled() and len(hidden) > size
    compute = partial(checkpoint, _losses, use_reentrant=False) if again else _losses
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([compute(logits, chunk, wanted) for chunk, wanted in chunks])


def chunk_size(vocab_size):
    """How many states become logits at a time: some 64, so that products stay large."""
    return max(1, CHUNK_LOGITS // vocab_size // 64) * 64


def _losses(logits, hidden, targets):
    return _CrossEntropy.apply(logits(hidden).float(), targets)


class _CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of every row, with a gradient that takes the room of the log-probabilities.

    torch holds three of this size in the backward pass: log-probabilities, the gradient of those,
    and that of the logits.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        """Losses (N,) of logits (N, V) and targets (N,)."""
        log_probs = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs, targets)
        return -log_probs.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, weights):
        """The gradient (N, V) of the logits; weights (N,) of the losses."""
        log_probs, targets = ctx.saved_tensors
        gradient = log_probs.exp_()  # softmax(logits), less one where the target is
        gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
        return gradient.mul_(weights[:, None]), None


class _FrozenHead(torch.autograd.Function):
    """`token_losses` where only the states are trained.

    The loss of a token depends on its own state alone: so the gradients (N, D) that the backward
    pass has to weigh are known as soon as the chunk's logits are, and take the room of the states.
    """

    @staticmethod
    def forward(ctx, hidden, logits, targets, size):
        """Losses (N,) of states (N, D), by `size` of them at a time."""
        losses, gradients = [], torch.empty_like(hidden)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                chunk = hidden[part].detach().requires_grad_()
                each = _losses(logits, chunk, targets[part])
                (gradients[part],) = torch.autograd.grad(each.sum(), chunk)
            losses.append(each.detach())
        ctx.save_for_backward(gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, weights):
        """The gradient (N, D) of the states; weights (N,) of the losses."""
        (gradients,) = ctx.saved_tensors
        return gradients * weights.to(gradients.dtype)[:, None], None, None, None
