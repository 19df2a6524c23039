"""Score rows with a reward model, for score.py --mode reward.

    scorer = RewardScorer(template)
    plan = scorer.plan(0, row)                     # a pass for every answer of the row
    rewards = scorer.compute(model, plan.passes)
    scorer.score(plan, rewards).record             # {"index": 0, "reward": 1.25, ...}

The reward comes from the hidden state of a conversation's last token (model/reward.py). A row with
several answers (chosen and rejected) gets the numbers that train.py --stage rm logs.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from minisft.common.devices import send
from minisft.data.batching import collate
from minisft.data.dataset import Row
from minisft.data.encode_preferences import unique_texts
from minisft.data.encoding import Example, encode_row
from minisft.model.reward import RewardModel
from minisft.selection.passes import Pass, Plan, Score, answer_spans, num_tokens, rounded, too_long
from minisft.selection.score_files import PREFERENCE_FIELDS
from minisft.selection.shared_prefix import hidden_states
from minisft.text.chat_template import ChatTemplate


class RewardScorer:
    """Scores rows by their reward, and by the difference of the rewards of several answers."""

    parts = ("reward",)

    def __init__(
        self, template: ChatTemplate, cutoff_len: int = 512, vocab_size: int | None = None
    ) -> None:
        self.template, self.cutoff_len, self.vocab_size = template, cutoff_len, vocab_size

    def plan(self, index: int, row: Row) -> Plan:
        """A pass for every answer, the best first. As in training, repeated answers count once."""
        conversations = [replace(row, messages=messages) for messages in row.rejected]
        encoded = []
        for conversation in [row, *conversations]:
            conversation = with_last_answer(conversation)
            texts = encode_row(conversation, self.template, self.cutoff_len, self.vocab_size)
            encoded.append(texts[-1])  # the complete conversation
        best = encoded[0]
        answers = answer_spans(self.template, best.ids, best.supervised)
        plan = Plan(index, num_tokens(answers))
        texts = unique_texts(encoded)
        plan.num_tokens = max(len(text.ids) for text in texts)
        reasons = [too_long(text.ids, self.cutoff_len) for text in texts]
        if row.rejected and len(texts) == 1:
            reasons.append("the answers are the same")
        plan.reason = next(filter(None, reasons), None)
        if not plan.reason:
            plan.passes = [Pass(text.ids, text.supervised) for text in texts]
        return plan

    @torch.inference_mode()
    def compute(self, model: RewardModel, passes: Sequence[Pass]) -> list[float]:
        """Run a batch of conversations; returns their rewards."""
        device = model.score.weight.device
        tokens, *_ = collate([Example(item.ids, item.is_answer) for item in passes])  # (B, T)
        last = send(torch.tensor([len(item.ids) - 1 for item in passes]), device)
        hidden = hidden_states(model, tokens)  # (B, T, D)
        return model.rewards(hidden[torch.arange(len(passes), device=device), last]).tolist()

    def score(self, plan: Plan, rewards: Sequence[float]) -> Score:
        """The reward of a single answer, or PREFERENCE_FIELDS of several; null without a score."""
        fields: dict[str, Any] = dict.fromkeys(("reward", *PREFERENCE_FIELDS))
        reason = plan.reason
        if not all(map(math.isfinite, rewards)):
            reason = "the reward is not a finite number"
        elif len(rewards) == 1:
            fields = {"reward": rounded(rewards[0])}
        elif len(rewards) > 1:
            fields = preference_fields(rewards)
        counts = {"num_answer_tokens": plan.num_answer_tokens, "num_tokens": plan.num_tokens}
        return Score(plan.index, {"index": plan.index, **fields, **counts, "reason": reason})


def with_last_answer(row: Row) -> Row:
    """The row with its last answer learned, because encode_row ends with the last such answer."""
    *history, last = row.messages
    flags = ("weight", "train", "mask")
    last = {name: value for name, value in last.items() if name not in flags}
    return replace(row, messages=[*history, last])


def preference_fields(rewards: Sequence[float]) -> dict[str, float]:
    """Means over all pairs of a better and a worse answer. rewards: that of the best first."""
    pairs = list(combinations(rewards, 2))
    chosen, rejected = (fmean(side) for side in zip(*pairs, strict=True))
    accuracy = fmean(better > worse for better, worse in pairs)
    values = (accuracy, chosen - rejected, chosen, rejected)
    return dict(zip(PREFERENCE_FIELDS, map(rounded, values), strict=True))


def mean_preference_fields(path: str | Path) -> tuple[int, dict[str, float]]:
    """(number of preferences in a file of scores, {field: mean over them})."""
    count, sums = 0, Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record.get("margin") is not None:
                count += 1
                sums.update({name: record[name] for name in PREFERENCE_FIELDS})
    return count, {name: total / count for name, total in sums.items()}
