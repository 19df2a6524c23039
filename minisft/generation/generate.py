"""Text generation: predict the next token, append it, repeat.

    answers = generate(model, [[5, 17, 3], [8]], Sampling(max_new_tokens=64), stop_ids={2})
    for token in stream(model, [5, 17, 3], Sampling(greedy=True), stop_ids={2}):
        print(token)

The first call of the model, the prefill, computes the keys and values of the prompts and stores
them in a cache. Each later call is a decoding step: it adds one token to every row. Prompts of a
batch are padded on the left, so that the last column has the newest token of every row:

    column      0   1   2     3   4
    row 0       5  17   3  |  9  12
    row 1       -   -   8  |  4   1

Shapes are explained in decoder.py.

The tour explains it: docs/tour/10_generate.md.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.common.devices import send
from minisft.generation.checks import check_logits, check_prompts
from minisft.generation.language_model import LanguageModel
from minisft.generation.sampling import Sampling, choose_tokens, random_generator, seen_tokens
from minisft.model.cache import KeyValueCache


class Step(NamedTuple):
    """The next token of every prompt whose answer has not ended; a stop id ends it."""

    rows: list[int]  # the numbers of these prompts
    tokens: list[int]
    logits: Tensor  # (B, V), from which the tokens were chosen


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """The answers to prompts of token ids, as token ids without the stop id.

    rows: a number for each prompt, by default 0, 1, ... With a seed, the same prompt with the same
    number gets the same answer in every batch.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate_steps(model, prompts, sampling, stop_ids, rows):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token not in stop_ids:
                answers[row].append(token)
    return answers


def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    cache: KeyValueCache | None = None,
) -> Iterator[int]:
    """Yield the token ids of the answer to one prompt; the stop id ends it and is not yielded.

    cache: holds the first `cache.length` ids of the prompt, but not all of them. The prefill
    computes the others. At the end it holds all ids except the last chosen one.
    """
    for step in generate_steps(model, [prompt], sampling, stop_ids, cache=cache):
        if step.tokens[0] not in stop_ids:
            yield step.tokens[0]


@torch.inference_mode()
def generate_steps(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Collection[int],
    rows: Sequence[int] | None = None,
    cache: KeyValueCache | None = None,
) -> Iterator[Step]:
    """Yield a Step for the prefill and for every decoding step, until all answers have ended."""
    if not prompts:
        return
    cache = KeyValueCache(model.config) if cache is None else cache
    check_prompts(prompts, cache.length, model.config.vocab_size)
    device = next(model.parameters()).device
    active = list(range(len(prompts)))
    generators = [
        random_generator(sampling.seed, row) for row in (active if rows is None else rows)
    ]
    tokens, padding = pad_left([ids[cache.length :] for ids in prompts], device)  # (B, T), (B,)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = seen_tokens(prompts, model.config.vocab_size, device)  # (B, V)

    for number in range(sampling.max_new_tokens):
        positions, mask = positions_and_mask(padding, tokens.shape[1], cache.length)
        hidden = model(tokens, positions, mask, cache)  # (B, T, D)
        logits = model.logits(hidden[:, -1])  # (B, V)
        if number == 0:
            check_logits(logits, cache)
        chosen = choose_tokens(logits, sampling, generators, seen)  # (B,)
        step = Step(active, chosen.tolist(), logits)
        yield step

        # Rows whose answer has ended leave the batch.
        kept = [place for place, token in enumerate(step.tokens) if token not in stop_ids]
        if not kept:
            return
        if len(kept) < len(active):
            active = [active[place] for place in kept]
            generators = [generators[place] for place in kept]
            places = send(torch.tensor(kept), device)
            cache.select(places)
            chosen = chosen[places]
            padding = None if padding is None else padding[places]
            seen = None if seen is None else seen[places]
        tokens = chosen[:, None]  # (B, 1)
        if seen is not None:
            seen.scatter_(1, tokens, True)


def pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(tokens (B, T), number of padded columns (B,) or None without padding)."""
    T = max(map(len, prompts))
    rows = [[0] * (T - len(ids)) + list(ids) for ids in prompts]
    padding = torch.tensor([T - len(ids) for ids in prompts])
    return send(torch.tensor(rows), device), send(padding, device) if padding.any() else None


def positions_and_mask(
    padding: Tensor | None, T: int, past: int
) -> tuple[Tensor | None, Tensor | None]:
    """Positions (B, T) and mask (B, 1, T, S) of T columns after `past` others; S = past + T.

    None without padding, when the model's own positions and causal mask are right.
    """
    if padding is None:
        return None, None
    keys = torch.arange(past + T, device=padding.device)  # (S,)
    queries = keys[past:, None]  # (T, 1)
    visible = (keys >= padding[:, None])[:, None] & (keys <= queries)  # (B, T, S)
    # A padding query sees itself, because softmax over no keys gives NaN.
    mask = visible | (keys == queries)
    positions = (keys[past:] - padding[:, None]).clamp(min=0)
    return positions, mask[:, None]
