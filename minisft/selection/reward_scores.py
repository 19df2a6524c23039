"""The reward of every row of a data set, for score.py --mode reward.

    encoder = ifd.Encoder(rows, template, max_length=512, parts=("reward",), kind=Score)
    for scores in ifd.score(model, encoder, numbers, batch_tokens=2048, compute=compute_rewards):
        print(scores[0].as_dict())         # {"index": 0, "reward": 1.25, ...}

The reward is what the model's head says of the last token of the conversation (reward.py). A row
with several answers has that of each, and the figures that train.py --stage rm logs.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean

import torch

from minisft.data.batching import collate
from minisft.data.encode_preferences import unique_texts
from minisft.data.encoding import Example
from minisft.selection import ifd

FIGURES = ("accuracy", "margin", "reward_chosen", "reward_rejected")


@dataclass
class Score:
    """What is found out about a row."""

    index: int
    num_answer_tokens: int = 0  # of the best answer
    reason: str | None = None  # why there is no reward
    sequences: list = field(default_factory=list)  # all answers, the best first, until computed
    rewards: dict = field(default_factory=dict)  # {place of the answer: its reward}
    has_several: bool = False

    def add_row(self, row, encoder):
        """The passes that the row needs, one for every answer, unless there is a reason against it.

        As in training an answer that comes again counts once.
        """
        answers = [
            encoder.encode(replace(row, messages=messages))
            for messages in (row.messages, *row.rejected)
        ]
        self.num_answer_tokens = sum(end - start for start, end in answers[0][2])
        self.has_several = bool(row.rejected)
        texts = unique_texts([Example(ids, supervised) for ids, supervised, *_ in answers])
        self.reason = next((reason for *_, reason in answers if reason), None)
        if self.has_several and len(texts) == 1:
            self.reason = self.reason or "the answers are the same"
        if not self.reason:
            self.sequences = [ifd.Sequence(text.ids, text.supervised) for text in texts]

    def add(self, sequence, reward):
        """Take in the reward of one of the sequences; returns whether it was the last."""
        place = [other is sequence for other in self.sequences].index(True)
        self.rewards[place] = reward
        if is_finished := len(self.rewards) == len(self.sequences):
            self.sequences = []
        return is_finished

    def as_dict(self):
        """The JSON object of the row: its reward or those of its answers, or a reason."""
        figures, reason = dict.fromkeys(FIGURES if self.has_several else ["reward"]), self.reason
        if self.rewards:
            found = figures_of([self.rewards[place] for place in range(len(self.rewards))])
            if all(map(math.isfinite, found.values())):
                figures = {name: float(f"{value:.8g}") for name, value in found.items()}
            else:
                reason = "the reward is not a finite number"
        return {
            "index": self.index,
            **figures,
            "num_answer_tokens": self.num_answer_tokens,
            "reason": reason,
        }


def figures_of(rewards):
    """{figure: value} of the rewards of a row's answers, the best first, or of its only one.

    Of more than two the means over all pairs of a better and a worse one, as preference.compare.
    """
    if len(rewards) == 1:
        return {"reward": rewards[0]}
    pairs = list(combinations(rewards, 2))
    chosen, rejected = map(fmean, zip(*pairs, strict=True))
    accuracy = fmean(better > worse for better, worse in pairs)
    return dict(zip(FIGURES, (accuracy, chosen - rejected, chosen, rejected), strict=True))


@torch.inference_mode()
def compute_rewards(model, batch):
    """Give the Scores of a batch of (Sequence, Score) their rewards; those then finished."""
    sequences, scores = zip(*batch, strict=True)
    device = model.score.weight.device
    tokens, *_ = collate([Example(one.ids, one.answer) for one in sequences], device)
    last = torch.tensor([len(one.ids) - 1 for one in sequences], device=device)
    hidden = ifd.hidden_states_with_shared_prefix(model, tokens)[
        torch.arange(len(tokens), device=device), last
    ]  # (B, D)
    rewards = model.rewards(hidden).tolist()
    return [
        one
        for one, sequence, reward in zip(scores, sequences, rewards, strict=True)
        if one.add(sequence, reward)
    ]


def mean_figures(path):
    """(how many rows of a file of scores have several answers, {figure: mean over them})."""
    count, sums = 0, Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            score = json.loads(line)
            if score.get("margin") is not None:
                count += 1
                sums.update({name: score[name] for name in FIGURES})
    return count, {name: total / count for name, total in sums.items()}
