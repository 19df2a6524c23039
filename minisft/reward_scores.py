"""The reward of every row of a data set, for score.py --mode reward.

    encoder = Encoder(rows, template, max_length=512)
    for scores in score(model, encoder, range(len(rows)), batch_tokens=2048):
        print(scores[0].as_dict())         # {"index": 0, "reward": 1.25, ...}

The reward is what the model's head says of the last token of the conversation (reward.py).
"""

import math
from dataclasses import dataclass, field

import torch

from minisft import ifd
from minisft.batching import collate
from minisft.encoding import Example
from minisft.formats import BadRow
from minisft.options import UserError


@dataclass
class Score:
    """What is found out about a row."""

    index: int
    num_answer_tokens: int = 0
    reason: str | None = None  # why there is no reward
    sequences: list = field(default_factory=list)  # the one still to be computed
    reward: float | None = None

    def as_dict(self):
        """The JSON object of the row: its reward, or a reason."""
        reward, reason = self.reward, self.reason
        if reward is not None and not math.isfinite(reward):
            reward, reason = None, "the reward is not a finite number"
        return {"index": self.index, "reward": reward and float(f"{reward:.8g}"),
                "num_answer_tokens": self.num_answer_tokens, "reason": reason}


class Encoder:
    """Row numbers -> Scores to be computed, as ifd.Encoder; rows that are too long get a reason."""

    def __init__(self, rows, template, max_length, vocab_size=None):
        self.rows, self.template = rows, template
        self.max_length, self.vocab_size = max_length, vocab_size

    def __getitem__(self, numbers):
        """A list of Score, or the UserError that stops the run (a worker cannot raise it)."""
        try:
            return [self._score(int(number)) for number in numbers]
        except UserError as error:
            return UserError(str(error))

    def _score(self, number):
        try:
            ids, supervised = ifd.encode_row(self.rows, number, self.template, self.vocab_size)
        except BadRow as error:
            return Score(number, reason=f"broken: {error}")
        spans = ifd.answer_spans(self.template, ids, supervised)
        score = Score(number, sum(end - start for start, end in spans))
        if len(ids) > self.max_length:
            score.reason = f"longer than max_length: {len(ids)} tokens, of {self.max_length}"
        else:
            score.sequences = [ifd.Sequence(ids, supervised)]
        return score


def score(model, encoder, numbers, batch_tokens, num_workers=0):
    """Yield a list of finished Scores for every batch, as ifd.score."""
    return ifd.score(model, encoder, numbers, batch_tokens, num_workers, compute_rewards)


@torch.inference_mode()
def compute_rewards(model, batch):
    """Give the Scores of a batch of (Sequence, Score) their rewards; all of them as a list."""
    sequences, scores = zip(*batch, strict=True)
    device = model.score.weight.device
    tokens, *_ = collate([Example(one.ids, one.answer) for one in sequences], device)
    last = torch.tensor([len(one.ids) - 1 for one in sequences], device=device)
    hidden = ifd.states(model, tokens)[torch.arange(len(tokens), device=device), last]  # (B, D)
    for one, reward in zip(scores, model.rewards(hidden).tolist(), strict=True):
        one.reward, one.sequences = reward, []
    return list(scores)
