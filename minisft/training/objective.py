"""What is minimised: the negative log-likelihood of the supervised tokens, as a sum.

    loss_sum, num_tokens = next_token_loss(model, tokens, supervised)
    (loss_sum / num_tokens).backward()

A sum, because the mean over a step's tokens is only known when all micro-batches and processes
have counted theirs; a mean of means would weigh the tokens of short batches more.
"""

import math

import torch

from minisft.common import processes
from minisft.data.batching import collate, micro_batches
from minisft.model.loss import next_token_loss


@torch.inference_mode()
def mean_loss(model, examples, batch_size, collate=collate):
    """Loss per supervised token of held-out Examples, over all processes; every row once.

    collate: how Examples become a batch: `collate` or `pack` of batching.py.
    """
    model.eval()
    device = model.model.embed_tokens.weight.device
    examples = sorted(examples, key=lambda example: len(example.ids))
    loss_sum, num_targets = 0.0, 0
    # As many batches on every process, some perhaps empty: those of a sharded model go together.
    for batch in micro_batches(examples, batch_size, processes.rank(), processes.world_size()):
        loss, count = next_token_loss(model, *collate(batch, device))
        loss_sum, num_targets = loss_sum + loss.item(), num_targets + count
    loss_sum, num_targets = processes.sum_over_ranks([loss_sum, num_targets], device)
    return loss_sum / num_targets


class NextToken:
    """The objective of --stage sft and pt: the mean loss of the supervised tokens of a step."""

    collate = staticmethod(collate)

    def __init__(self, model):
        self.model = model

    def count(self, batches):
        """[supervised tokens of these batches]: what the sums of a step are divided by."""
        return [sum(int(supervised[:, 1:].sum()) for _, supervised, _ in batches)]

    def __call__(self, wrapped, batch, totals):
        """{"loss": sum over tokens}; `wrapped`: the model, or what averages its gradients."""
        return {"loss": next_token_loss(wrapped, *batch, logits=self.model.logits)[0]}

    def evaluate(self, examples, batch_size, collate):
        """{figure: mean} over held-out Examples."""
        loss = mean_loss(self.model, examples, batch_size, collate)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
