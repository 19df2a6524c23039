"""Multiple-choice questions: which letter does the model find most likely after the prompt?

    score(letter) = sum of log p(token | prompt, earlier tokens of the letter) over its tokens

    predictions = answer_subject(model, builder, subject, num_fewshot=5)
    accuracy = sum(row.is_right for row in predictions) / len(predictions)

The prompts of a subject begin with the same heading and demonstrations. This prefix goes through
the model once, and its keys and values stay in the cache. Then several questions follow one another
in one row of tokens, each at the positions that it would have alone. The mask lets a token see the
prefix and its own question:

                  prefix    question 1    question 2
    question 1      yes       causal          no
    question 2      yes         no          causal

So nothing is padded, and nothing is copied. Shapes are explained in decoder.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from minisft.common.devices import send
from minisft.common.errors import UserError
from minisft.evaluation.benchmarks import LETTERS, Subject
from minisft.evaluation.choice_prompts import (
    Prompt,
    PromptBuilder,
    choose_demonstrations,
    shared_prefix_length,
)
from minisft.evaluation.predictions import Prediction
from minisft.model.cache import KeyValueCache
from minisft.model.decoder import CausalLM
from minisft.model.loss import token_losses
from minisft.text.tokenizer import check_vocabulary

# Called with the number of questions that were answered since the last call.
Advance = Callable[[int], object]


def answer_subject(
    model: CausalLM,
    builder: PromptBuilder,
    subject: Subject,
    num_fewshot: int,
    run: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    advance: Advance = lambda count: None,
) -> list[Prediction]:
    """A prediction for every question of the subject, in order.

    run: number of the repetition; repetitions after 0 draw their demonstrations with `seed`.
    batch_size: questions that go through the model at once.
    """
    demonstrations = choose_demonstrations(subject, num_fewshot, run, seed)
    prompts = []
    for question in subject.questions:
        prompt = builder.build(subject, demonstrations, question)
        try:
            check_vocabulary(prompt.ids, model.config.vocab_size)
        except UserError as error:
            raise UserError(f"{subject.key}, question {question.id}: {error}") from error
        prompts.append(prompt)
    predictions = []
    scores = log_likelihoods(model, prompts, batch_size, advance)
    for question, prompt, values in zip(subject.questions, prompts, scores, strict=True):
        letter = LETTERS[max(range(len(LETTERS)), key=values.__getitem__)]
        predictions.append(
            Prediction(
                run,
                question.id,
                question.digest,
                question.answer,
                letter,
                values,
                prompt.num_fewshot,
                prompt.is_cut,
            )
        )
    return predictions


@torch.inference_mode()
def log_likelihoods(
    model: CausalLM,
    prompts: Sequence[Prompt],
    batch_size: int = 8,
    advance: Advance = lambda count: None,
) -> list[list[float]]:
    """log p(option | prompt) of every option of every prompt, with the natural logarithm."""
    scores: list[list[float]] = [[] for _ in prompts]
    # Prompts with the same demonstrations share a long prefix; truncated prompts share none.
    kinds = [(prompt.num_fewshot, prompt.is_cut) for prompt in prompts]
    for kind in sorted(set(kinds)):
        places = [place for place, other in enumerate(kinds) if other == kind]
        group = [prompts[place] for place in places]
        group_scores = _scores_of_group(model, group, batch_size, advance)
        for place, values in zip(places, group_scores, strict=True):
            scores[place] = values
    return scores


def _scores_of_group(
    model: CausalLM, prompts: Sequence[Prompt], batch_size: int, advance: Advance
) -> list[list[float]]:
    """The log-likelihoods of prompts, with their common prefix computed once."""
    prefix_length = min(
        shared_prefix_length([prompt.ids for prompt in prompts]),
        min(len(prompt.ids) for prompt in prompts) - 1,
    )
    if model.config.has_dynamic_rope:
        # All angles depend on the length of the text, so a prompt goes through the model alone.
        prefix_length, batch_size = 0, 1
    cache = KeyValueCache(model.config)
    device = next(model.parameters()).device
    if prefix_length:
        model(torch.tensor([prompts[0].ids[:prefix_length]], device=device), cache=cache)
    longest = max(
        len(prompt.ids) - prefix_length + max(map(len, prompt.options)) for prompt in prompts
    )
    window = model.config.sliding_window
    if window and prefix_length + batch_size * longest > window:
        # A window counts the tokens of the row. For a single question they are its own.
        batch_size = 1
    scores = [[0.0] * len(LETTERS) for _ in prompts]
    segments = list(_segments(prompts, prefix_length))
    for start in range(0, len(segments), batch_size):
        batch = segments[start : start + batch_size]
        for segment, values in zip(batch, _scores_of_row(model, batch, cache), strict=True):
            for option, value in zip(segment.options, values, strict=True):
                scores[segment.question][option] = value
        cache.truncate(prefix_length)
        advance(sum(0 in segment.options for segment in batch))
    return scores


@dataclass
class _Segment:
    """The tokens that score some options of a question: all ids after the common prefix."""

    question: int
    ids: list[int]
    start: int  # the place in `ids` whose state predicts the first token of an option
    options: list[int]  # numbers of the options
    targets: list[list[int]]  # their ids


def _segments(prompts: Sequence[Prompt], prefix_length: int) -> Iterator[_Segment]:
    """Options that differ only in their last token share a segment: usually all four."""
    for number, prompt in enumerate(prompts):
        ids = prompt.ids[prefix_length:]
        by_inputs: dict[tuple[int, ...], _Segment] = {}
        for option, target in enumerate(prompt.options):
            inputs = target[:-1]
            segment = by_inputs.setdefault(
                tuple(inputs), _Segment(number, ids + inputs, len(ids) - 1, [], [])
            )
            segment.options.append(option)
            segment.targets.append(target)
        yield from by_inputs.values()


def _scores_of_row(
    model: CausalLM, segments: Sequence[_Segment], cache: KeyValueCache
) -> list[list[float]]:
    """For every segment the log-likelihoods of its options. All segments form one row of tokens."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(segment.ids) for segment in segments])
    owner = torch.arange(len(segments)).repeat_interleave(lengths)  # (T,)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(owner))
    positions = send(place - starts[owner] + cache.length, device)
    owner, place = send(owner, device), send(place, device)
    # (T, S): a token sees the prefix, and what comes before it in its own segment.
    own = (owner[:, None] == owner) & (place[:, None] >= place)
    mask = torch.cat((own.new_ones(len(owner), cache.length), own), dim=1)
    tokens = torch.tensor([[id for segment in segments for id in segment.ids]])
    hidden = model(send(tokens, device), positions, mask, cache)[0]  # (T, D)

    # The state before each token of each option predicts it.
    rows, targets, counts = [], [], []
    for segment, first in zip(segments, starts.tolist(), strict=True):
        for ids in segment.targets:
            rows += range(first + segment.start, first + segment.start + len(ids))
            targets += ids
            counts.append(len(ids))
    states = hidden[send(torch.tensor(rows), device)]  # (N, D)
    values = -token_losses(model.logits, states, send(torch.tensor(targets), device)).cpu()  # (N,)
    if not values.isfinite().all():
        raise UserError(
            "the scores of the model are not finite: its weights are damaged, or too large for "
            "this number type. Try --dtype float32."
        )
    totals = iter([float(part.sum()) for part in values.split(counts)])
    return [[next(totals) for _ in segment.targets] for segment in segments]
