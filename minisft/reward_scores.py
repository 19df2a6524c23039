"""The reward of every row of a data set, for score.py --mode reward.

    encoder = ifd.Encoder(rows, template, max_length=512, parts=("reward",), kind=Score)
    for scores in ifd.score(model, encoder, numbers, batch_tokens=2048, compute=compute_rewards):
        print(scores[0].as_dict())         # {"index": 0, "reward": 1.25, ...}

The reward is what the model's head says of the last token of the conversation (reward.py).
"""

import math
from dataclasses import dataclass, field

import torch

from minisft import ifd
from minisft.batching import collate
from minisft.encoding import Example


@dataclass
class Score:
    """What is found out about a row."""

    index: int
    num_answer_tokens: int = 0
    reason: str | None = None  # why there is no reward
    sequences: list = field(default_factory=list)  # the one still to be computed
    reward: float | None = None

    def add_sequences(self, ids, supervised, _spans, _encoder):
        """The one pass that the row needs, unless there is a reason against it."""
        if not self.reason:
            self.sequences = [ifd.Sequence(ids, supervised)]

    def as_dict(self):
        """The JSON object of the row: its reward, or a reason."""
        reward, reason = self.reward, self.reason
        if reward is not None and not math.isfinite(reward):
            reward, reason = None, "the reward is not a finite number"
        return {"index": self.index, "reward": reward and float(f"{reward:.8g}"),
                "num_answer_tokens": self.num_answer_tokens, "reason": reason}


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
