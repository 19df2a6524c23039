"""Generation: the next token again and again, with a cache, for one prompt or a ragged batch.

    sampling = Sampling(max_new_tokens=64, greedy=True)
    answers = generate(model, [[1, 403, 407], [1, 5]], sampling, stop_ids={2})
    answers, scores = generate_scored(model, [[1, 403, 407], [1, 5]], sampling, stop_ids={2})
    for token in stream(model, [1, 403, 407], sampling, stop_ids={2}):
        print(token)

Prompts of a batch are padded on the left, so that the last column holds every row's newest token.
What is padding is known by its place, never by its id. The model is in evaluation mode; shapes are
named as in model.py.
"""

import random
from dataclasses import dataclass

import torch

from minisft.common.errors import UserError
from minisft.model.cache import KeyValueCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the terms of transformers' `generate`.

    temperature 0 means greedy; top_k 0 and top_p 1 switch those filters off; seed None draws
    differently every time. Raises UserError for a value that makes no sense.
    """

    max_new_tokens: int = 512
    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self):
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1: off)"),
        ):
            if not valid:
                raise UserError(f"--{name} must be {wanted}, not {getattr(self, name)}")

    @property
    def takes_best(self):
        """Whether the most probable token is taken, without drawing."""
        return self.greedy or self.temperature < 1e-6  # dividing by less would overflow


def generate(model, prompts, sampling, stop_ids=(), rows=None):
    """The answers to `prompts` (non-empty lists of ids), as lists of ids without the stop id.

    rows: the number of each prompt, which chooses its random stream (default 0, 1, ...). With a
    seed, a prompt of the same number gets the same answer in any batch.
    """
    answers = [[] for _ in prompts]
    for step in _steps(model, prompts, sampling, stop_ids, KeyValueCache(model.config), rows):
        for row, token in step:
            answers[row].append(token)
    return answers


def generate_scored(model, prompts, sampling, stop_ids=(), rows=None, limits=None):
    """Like `generate`, with scores -> (answers, the mean log-probability of each).

    The mean goes over all ids that were chosen, the stop id included, in the model's distribution
    as it is, before penalty, temperature and filters: how sure the model is of what it says.
    limits: the longest answer to each prompt, where not all may have `max_new_tokens`.
    """
    answers, chosen = [[] for _ in prompts], [[] for _ in prompts]
    cache = KeyValueCache(model.config)
    for step in _steps(model, prompts, sampling, stop_ids, cache, rows, limits, chosen):
        for row, token in step:
            answers[row].append(token)
    return answers, [sum(one) / len(one) for one in chosen]


def stream(model, prompt_ids, sampling, stop_ids=(), cache=None, decoder=None):
    """Yield the ids of one answer as they are chosen; the stop id ends it and is not yielded.

    cache: a KeyValueCache holding the first `cache.length` ids of the prompt, fewer than all of
    them; only the rest is computed. Afterwards it holds the prompt and the answer's ids that were
    used: the first `cache.length` of both together. decoder: a CompiledDecoder, to which the cache
    belongs and in whose capacity there is room for prompt and answer.
    """
    cache = KeyValueCache(model.config) if cache is None else cache
    for ((_, token),) in _steps(model, [prompt_ids], sampling, stop_ids, cache, decoder=decoder):
        yield token


@torch.inference_mode()
def generate_naive(model, prompt_ids, sampling, stop_ids=(), row=0):
    """One answer by the whole sequence through the model for every token: slow, and plain to see.

    What `generate` and `stream` are tested against.
    """
    device = next(model.parameters()).device
    ids, streams = list(prompt_ids), _random_streams(sampling, [row])
    while len(ids) < len(prompt_ids) + sampling.max_new_tokens:
        logits = model.logits(model(torch.tensor([ids], device=device))[:, -1])
        seen = _seen([ids], logits.shape[-1], device)
        token = next_tokens(logits, sampling, seen, streams).item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


@torch.inference_mode()
def _steps(
    model, prompts, sampling, stop_ids, cache, rows=None, limits=None, scores=None, decoder=None
):
    """Yield, for every step, the list of (row, id) of the rows that are still writing.

    scores: a list for each prompt, to which go the log-probabilities of all ids chosen. decoder:
    what computes every step of a single row but the first.
    """
    for row, ids in enumerate(prompts):
        if len(ids) <= cache.length:
            raise UserError(f"prompt {row} is empty: there is nothing to go on from")
        if max(ids) >= model.config.vocab_size:
            raise UserError(
                f"prompt {row}: token {max(ids)} is outside the model's vocabulary of "
                f"{model.config.vocab_size}; the tokenizer belongs to another model"
            )
    if not prompts:
        return
    batch = _Batch(model, prompts, sampling, cache, rows)
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    for step in range(1, max(limits) + 1):
        if step == 1 or decoder is None:
            logits = model.logits(batch.advance(model)[:, -1])
        else:
            logits = decoder(batch.tokens, cache)
        if step == 1 and not logits.isfinite().all():
            cache.truncate(0)  # nothing is to go on from what it holds
            raise UserError(
                "the model's scores are not finite numbers: its weights are damaged, "
                "or too large for this type; try --dtype float32"
            )
        tokens = next_tokens(logits, sampling, batch.seen, batch.streams)
        chosen = tokens.tolist()
        if scores is not None:
            certain = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            for row, score in zip(batch.rows, certain.tolist(), strict=True):
                scores[row].append(score)
        writing = [place for place, token in enumerate(chosen) if token not in stop_ids]
        if writing:
            yield [(batch.rows[place], chosen[place]) for place in writing]
        writing = [place for place in writing if step < limits[batch.rows[place]]]
        if not writing:
            return
        batch.extend(tokens, writing)


class _Batch:
    """The rows that are still writing: their new tokens, what they may see, what they have seen."""

    def __init__(self, model, prompts, sampling, cache, rows):
        self.cache, device = cache, next(model.parameters()).device
        self.rows = list(range(len(prompts)))
        self.streams = _random_streams(sampling, self.rows if rows is None else rows)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = _seen(prompts, model.config.vocab_size, device)
        suffixes = [ids[cache.length :] for ids in prompts]
        longest = max(map(len, suffixes))
        padding = torch.tensor([longest - len(ids) for ids in suffixes], device=device)
        self.tokens = torch.tensor(
            [[0] * (longest - len(ids)) + ids for ids in suffixes], device=device
        )
        # Without padding, positions and mask are what the model assumes by itself.
        self.positions = self.visible = self.mask = None
        if padding.any():
            columns = torch.arange(longest + sampling.max_new_tokens, device=device)
            self.visible = columns >= padding[:, None]  # (B, S), for as long as it can become
            self.positions = (columns[:longest] - padding[:, None]).clamp(min=0)
            self.mask = _padded_causal(self.visible[:, :longest])

    def advance(self, model):
        """Hidden states (B, T, D) of the new tokens; the cache then holds them."""
        return model(self.tokens, self.positions, self.mask, self.cache)

    def extend(self, tokens, writing):
        """Go on with `tokens` (B,) in the rows at the places `writing`; let the others go."""
        if len(writing) < len(self.rows):
            self.rows = [self.rows[place] for place in writing]
            self.streams = [self.streams[place] for place in writing]
            places = torch.tensor(writing, device=tokens.device)
            self.cache.select(places)
            tokens = tokens[places]
            for name in ("seen", "visible", "positions"):
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name)[places])
        self.tokens = tokens[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens, True)
        if self.visible is not None:
            self.positions = self.positions[:, -1:] + 1
            self.mask = self.visible[:, None, None, : self.cache.length + 1]


def _padded_causal(visible):
    """(B, 1, T, T): causal, without the padding. Padding sees itself, since a softmax over nothing
    has no value."""
    T = visible.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=visible.device)
    return ((causal & visible[:, None, :]) | itself)[:, None]


def next_tokens(logits, sampling, seen=None, streams=()):
    """Choose one id for each row of logits (B, V); returns (B,) int64.

    seen (B, V): True for the ids that the repetition penalty counts: prompt and answer so far.
    streams: one random.Random per row. The draw inverts the cumulative distribution, so that a row
    takes exactly one number of its own stream per token, on any device.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.takes_best:
        return logits.argmax(-1)
    probabilities, candidates = distribution(logits, sampling)
    drawn = torch.tensor([[one.random()] for one in streams], dtype=torch.float64)
    cumulative = probabilities.double().cumsum(-1)
    place = torch.searchsorted(cumulative, drawn.to(logits.device) * cumulative[:, -1:], right=True)
    place = place.clamp(max=candidates.shape[-1] - 1)  # where rounding leaves nothing above it
    return candidates.gather(-1, place).squeeze(-1)


def penalize(logits, seen, penalty):
    """Seen ids become less likely: logits / penalty above zero, * below (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def distribution(logits, sampling):
    """Temperature, then top-k, then top-p (arXiv 1904.09751) on logits (B, V) in float32.

    Returns probabilities and the ids they belong to, both (B, candidates). With a filter the
    candidates stand in falling order, those that top-p leaves out with probability 0.
    """
    logits, V = logits / sampling.temperature, logits.shape[-1]
    if not sampling.top_k and sampling.top_p == 1:
        return logits.softmax(-1), torch.arange(V, device=logits.device).expand_as(logits)
    logits, candidates = logits.topk(min(sampling.top_k, V) or V)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= sampling.top_p, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, candidates


def _random_streams(sampling, rows):
    if sampling.seed is None:
        return [random.Random() for _ in rows]
    return [random.Random(f"{sampling.seed} {row}") for row in rows]


def _seen(prompts, vocab_size, device):
    """(B, V): which ids occur in each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, torch.tensor(ids, device=device)] = True
    return seen
