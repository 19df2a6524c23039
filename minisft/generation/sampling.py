"""Sampling: which token comes next, given the model's scores of all tokens.

    sampling = Sampling(temperature=0.8, top_p=0.9, seed=1)
    tokens = choose_tokens(logits, sampling, [random_generator(sampling.seed, row=0)])

The scores z, the logits, go through these steps:

    repetition penalty r    z / r where z > 0, z * r where z < 0, for tokens that occurred before
    temperature t           z / t: below 1 makes likely tokens likelier
    top-k                   keep the k tokens with the largest z
    nucleus sampling        p = softmax(z); keep the smallest set with a total probability of top_p
    draw                    one of the tokens that are left; greedy decoding takes the most probable

The tour explains it: docs/tour/10_generate.md.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minisft.common.devices import in_float64, send
from minisft.generation.checks import check_sampling


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, with the names and meanings of transformers' `generate`.

    temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 turn these rules off; seed
    None draws differently every time. UserError for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(asdict(self))

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is always chosen."""
        return self.greedy or self.temperature < 1e-6  # dividing by less would overflow


def choose_tokens(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[random.Random],
    seen: Tensor | None = None,
) -> Tensor:
    """The next token of every row, int64 (B,), from logits (B, V).

    seen: bool (B, V), True for the tokens of prompt and answer, for the repetition penalty. Each
    row draws one number from its own generator, so its answer depends on no other row.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.is_greedy:
        return logits.argmax(-1)
    probabilities, candidates = distribution(logits, sampling)
    # Draw by inverting the cumulative distribution, in float64 for the sake of large vocabularies.
    cumulative = in_float64(probabilities).cumsum(-1)
    numbers = [[generator.random()] for generator in generators]
    drawn = send(torch.tensor(numbers, dtype=cumulative.dtype), cumulative.device)
    drawn = drawn * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, drawn, right=True)
    place = place.clamp(max=candidates.shape[-1] - 1)  # rounding may leave nothing above `drawn`
    return candidates.gather(-1, place.to(logits.device)).squeeze(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that are `seen` (B, V) less likely (arXiv 1909.05858)."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, token ids), both (B, candidates): temperature, top-k, nucleus sampling.

    Nucleus sampling (arXiv 1904.09751) gives a token the probability 0 if the tokens before it,
    the most probable first, have a total of top_p already.
    """
    logits, V = logits / sampling.temperature, logits.shape[-1]
    if not sampling.top_k and sampling.top_p == 1:
        return logits.softmax(-1), torch.arange(V, device=logits.device).expand_as(logits)
    logits, candidates = logits.topk(min(sampling.top_k, V) or V)  # the largest first
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        total_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(total_before >= sampling.top_p, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, candidates


def random_generator(seed: int | None, row: int) -> random.Random:
    """The random numbers of one row; without a seed, different ones every time."""
    return random.Random() if seed is None else random.Random(f"{seed} {row}")


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """(B, V), True for the tokens that occur in each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        seen[row, torch.tensor(ids)] = True
    return send(seen, device)
