"""Next-token prediction: the objective of supervised fine-tuning and of pre-training.

    loss of a step = - sum of log p(token | tokens before it) over its N supervised tokens / N

An objective returns sums, not means; model/loss.py says why.

The tour explains it: docs/tour/06_loss.md.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minisft.common import processes
from minisft.data.batching import Batch, collate, micro_batches
from minisft.data.encoding import Example
from minisft.model.decoder import CausalLM
from minisft.model.loss import next_token_loss


class Objective(Protocol):
    """The interface of an objective: the loss that the training loop minimises."""

    model: Any

    @property
    def collate(self) -> Callable[..., Any]:
        """(examples, device, pad_multiple) -> a batch."""

    def count(self, batches: Iterable[Any]) -> int:
        """Number of tokens (or rows, if answers are compared) that the loss is a sum over."""

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """{metric: sum over the batch}. "loss" has a gradient; the others are for the log.

        model: self.model, or the DDP wrapper around it.
        """


class NextToken:
    """Objective of --stage sft and pt."""

    collate = staticmethod(collate)

    def __init__(self, model: CausalLM):
        self.model = model

    def count(self, batches: Iterable[Batch]) -> int:
        """Number of supervised tokens. The first token of a row is never a target."""
        return sum(int(supervised[:, 1:].sum()) for _, supervised, _ in batches)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{"loss": sum over the supervised tokens} of a batch from `collate` or `pack`."""
        tokens, supervised, lengths = batch
        loss, _ = next_token_loss(model, tokens, supervised, lengths, self.model.logits)
        return {"loss": loss}


@torch.inference_mode()
def mean_metrics(
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
    collate: Callable[[Sequence[Example]], Any],
    device: torch.device,
) -> dict[str, float]:
    """{metric: mean} over held-out examples. Every rank calls it and computes its share.

    collate: examples -> a batch on `device`.
    """
    model = objective.model.eval()
    examples = sorted(examples, key=lambda example: len(example.ids))
    # All ranks get equally many batches, some perhaps empty: a sharded model needs all of them.
    parts = micro_batches(examples, batch_size, processes.rank(), processes.world_size())
    (count,) = processes.sum_over_ranks([objective.count(map(collate, parts))], device)
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in objective.sums(model, collate(part)).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    totals = processes.sum_over_ranks(list(sums.values()), device)
    return {name: total / count for name, total in zip(sums, totals, strict=True)}


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that overflows. NaN stays NaN."""
    return math.inf if loss > 700 else math.exp(loss)
