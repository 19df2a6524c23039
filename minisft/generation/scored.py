"""Answers with scores: how confident the model is in them.

answers, scores = generate_scored(model, [[5, 17, 3], [8]], Sampling(greedy=True), stop_ids={2})
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from minisft.common.devices import send
from minisft.generation.generate import generate_steps
from minisft.generation.language_model import LanguageModel
from minisft.generation.sampling import Sampling


def generate_scored(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    rows: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[float]]:
    """generate with scores: (answers, mean log-probability of each answer's tokens).

    The mean includes the stop id. Probabilities are those of the model, before the rules of
    sampling. limits: the maximum length of each answer, if it is not max_new_tokens for all.
    """
    limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
    sampling = replace(sampling, max_new_tokens=max(limits, default=1))
    answers: list[list[int]] = [[] for _ in prompts]
    log_probabilities: list[list[float]] = [[] for _ in prompts]
    for step in generate_steps(model, prompts, sampling, stop_ids, rows):
        chosen = send(torch.tensor(step.tokens), step.logits.device)[:, None]  # (B, 1)
        values = step.logits.float().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
        for row, token, value in zip(step.rows, step.tokens, values, strict=True):
            if len(log_probabilities[row]) < limits[row]:
                log_probabilities[row].append(value)
                if token not in stop_ids:
                    answers[row].append(token)
    return answers, [sum(values) / len(values) for values in log_probabilities]
