"""Learn from preferences: the better of two answers to a prompt should get the higher score.

With s the score of an answer, the loss of a pair is (Bradley-Terry)

    -log sigmoid(s(chosen) - s(rejected))

Reward, for --stage rm: s is the output of a reward head at the last token (arXiv 2203.02155).
DirectPreference, for --stage dpo: s = beta (log p(answer | prompt) - log p_ref(answer | prompt)),
with the model before training as the reference (arXiv 2305.18290, equation 7).

A row of K ranked answers has K (K - 1) / 2 pairs. Its loss is the mean over them, so that every
row has the same weight (arXiv 2203.02155, equation 1). The loss of a step is the mean over rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.common import processes
from minisft.common.devices import send
from minisft.data import batching
from minisft.data.encoding import Example
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.loss import target_places, token_losses
from minisft.model.reward import RewardModel


@dataclass
class Answers:
    """A batch of rows with ranked answers. Each of the B texts is a prompt and an answer.

    Indices count the texts of the batch; there are R rows and P pairs.
    """

    examples: Sequence[Example]
    tokens: Tensor  # (B, T) int64, padded on the right
    supervised: Tensor  # (B, T) bool on the CPU, True for the tokens of the answer
    last: Tensor  # (B,) position of the last token of each text
    best: Tensor  # (R,) index of the best answer of each row
    chosen: Tensor  # (P,) index of the better answer of each pair
    rejected: Tensor  # (P,) index of the worse answer
    weights: Tensor  # (P,) float32, 1 / number of pairs of the row


def collate(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    pad_multiple: int = batching.PAD_MULTIPLE,
) -> Answers:
    """Rows of several texts -> Answers. Without rows: one text of padding, and no pair."""
    texts: list[Example] = []
    best, chosen, rejected, weights = [], [], [], []
    for example in examples:
        best.append(len(texts))
        answers = range(len(texts), len(texts) + len(example.texts()))
        pairs = list(combinations(answers, 2))  # the answers of a row are ordered, best first
        chosen += [better for better, _ in pairs]
        rejected += [worse for _, worse in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        texts += example.texts()
    tokens, supervised, _ = batching.collate(texts, device, pad_multiple)
    last = [len(text.ids) - 1 for text in texts] or [0]
    indices = [
        send(torch.tensor(numbers, dtype=torch.int64), device)
        for numbers in (last, best, chosen, rejected)
    ]
    return Answers(
        examples, tokens, supervised, *indices, weights=send(torch.tensor(weights), device)
    )


def compare(scores: Tensor, batch: Answers, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """{metric: sum over the rows of a batch} of the scores (B,) of its answers.

    label_smoothing: probability that the label of a pair is wrong; the loss then also counts the
    swapped pair, with this weight (https://ericmitchell.ai/cdpo.pdf).
    """
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    losses = -(1 - label_smoothing) * F.logsigmoid(chosen - rejected)
    losses = losses - label_smoothing * F.logsigmoid(rejected - chosen)
    metrics = {
        "loss": losses,
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: (values * batch.weights).sum() for name, values in metrics.items()}


def own_positions(config: ModelConfig, batch: Answers) -> Tensor | None:
    """Positions (B, T) that end with each text, for dynamic rotary scaling; else None.

    Its angles depend on the length of a text, which padding must not change.
    """
    if not config.has_dynamic_rope:
        return None
    positions = torch.arange(batch.tokens.shape[1], device=batch.last.device)  # (T,)
    return positions.minimum(batch.last[:, None])


def answer_log_probs(model: nn.Module, plain: CausalLM, batch: Answers) -> Tensor:
    """log p(answer | prompt) of every answer, (B,) float32: the sum over its tokens.

    model: `plain` or its DDP wrapper. Logits are computed for the tokens of the answers only, a
    chunk at a time.
    """
    logits = plain.logits
    num_texts, T = batch.tokens.shape
    places = send(target_places(batch.supervised), batch.tokens.device)  # (N,)
    hidden = model(batch.tokens, own_positions(plain.config, batch))  # (B, T, D)
    states = hidden.flatten(0, 1)[places - 1]  # (N, D)
    if len(states) == 0:  # zero, but connected to every parameter, as DDP needs
        return logits(states).float().sum() * batch.last.new_zeros(num_texts)
    losses = token_losses(logits, states, batch.tokens.flatten()[places])  # (N,)
    answers = places // T  # (N,) which answer a token belongs to
    return losses.new_zeros(num_texts).index_add(0, answers, -losses)


class Reward:
    """Objective of --stage rm."""

    collate = staticmethod(collate)

    def __init__(self, model: RewardModel):
        self.model = model

    def count(self, batches: Iterable[Answers]) -> int:
        """Number of rows."""
        return sum(len(batch.best) for batch in batches)

    def sums(self, model: nn.Module, batch: Answers) -> dict[str, Tensor]:
        """{metric: sum over the rows}; model: self.model or its DDP wrapper."""
        hidden = model(batch.tokens, own_positions(self.model.config, batch))  # (B, T, D)
        texts = torch.arange(len(hidden), device=hidden.device)
        return compare(self.model.rewards(hidden[texts, batch.last]), batch)


class DirectPreference:
    """Objective of --stage dpo.

    reference: a batch -> log p_ref(answer | prompt) of its answers (B,); see reference.py.
    sft_weight: weight of an additional next-token loss on the best answers.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        model: CausalLM,
        reference: Callable[[Answers], Tensor],
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
    ):
        self.model, self.reference = model, reference
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight
        self.rows_per_token = 0.0

    def count(self, batches: Iterable[Answers]) -> int:
        """Number of rows. Every rank calls it.

        All sums of a step are divided by its rows. `sums` multiplies the next-token loss by the
        rows per token of all ranks, so that the quotient is a mean over tokens.
        """
        num_rows = num_tokens = 0
        for batch in batches:
            num_rows += len(batch.best)
            best = [example.texts()[0].supervised for example in batch.examples]
            num_tokens += sum(int(supervised[1:].sum()) for supervised in best)
        if self.sft_weight:
            device = self.model.model.embed_tokens.weight.device
            all_rows, all_tokens = processes.sum_over_ranks([num_rows, num_tokens], device)
            self.rows_per_token = all_rows / max(1, all_tokens)
        return num_rows

    def sums(self, model: nn.Module, batch: Answers) -> dict[str, Tensor]:
        """{metric: sum over the rows}; model: self.model or its DDP wrapper."""
        reference = self.reference(batch)
        log_probs = answer_log_probs(model, self.model, batch)
        sums = compare(self.beta * (log_probs - reference), batch, self.label_smoothing)
        if self.sft_weight:
            sums["sft_loss"] = -log_probs[batch.best].sum() * self.rows_per_token
            sums["loss"] = sums["loss"] + self.sft_weight * sums["sft_loss"]
        return sums
