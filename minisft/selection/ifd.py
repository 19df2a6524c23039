"""Instruction-Following Difficulty: how much a row's instruction helps to predict its answer.

    encoder = Encoder(rows, template, max_length=512)
    for scores in score(model, encoder, numbers=range(len(rows)), batch_tokens=2048):
        print(scores[0].as_dict())

    ifd = s(A|Q) / s(A)                      (arXiv 2308.12032)
    ifd_ppl = exp(s(A|Q)) / exp(s(A))        (arXiv 2402.00530)

s is the mean negative log-likelihood of the answer's tokens: s(A|Q) behind the prompt, s(A) behind
the answer marker alone. A conversation has several answers, each given its history; s is then the
mean over the tokens of all of them. The end-of-turn token is not counted: it is not the answer's.
Above 1 the instruction does not help; the highest below 1 are the rows to learn from.

The embedding of a row is the mean of the last hidden states over the prompt of its last answer.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from minisft.common import processes
from minisft.common.errors import UserError
from minisft.data.batching import PAD_MULTIPLE, collate
from minisft.data.encoding import Example, encode_row
from minisft.data.row_values import BadRow
from minisft.data.workers import read_ahead
from minisft.model.cache import KeyValueCache
from minisft.model.loss import token_losses

# Rows that are read, sorted by length and cut into batches together.
WINDOW_ROWS = 1024
# Rows go into batches of their own where so many of a window begin with the same so many tokens,
# and the beginning of a batch is computed once where it has at least this many.
COMMON_ROWS, COMMON_TOKENS, SHARED_TOKENS = 32, 24, 16


@dataclass
class Sequence:
    """One pass through the model: ids (T,) int32, and which of them are of the answer (T,) bool.

    prompt_length: over how many tokens the embedding is taken, 0 for none.
    """

    ids: np.ndarray
    answer: np.ndarray
    prompt_length: int = 0
    conditioned: bool = True


@dataclass
class Score:
    """What is found out about a row; losses are summed up until `as_dict` takes the means."""

    index: int
    num_answer_tokens: int = 0
    reason: str | None = None  # why there is no IFD
    sequences: list = field(default_factory=list)  # still to be computed
    conditioned: float = 0.0  # summed losses
    direct: float = 0.0
    prompt: float = 0.0
    prompt_length: int = 0
    embedding: np.ndarray | None = None  # (D,) float32

    def as_dict(self):
        """The JSON object of the row: mean losses in nats per token, their ratios, or a reason."""
        conditioned = direct = ifd = ifd_ppl = None
        reason = self.reason
        if reason is None:
            conditioned, direct = (
                loss / self.num_answer_tokens for loss in (self.conditioned, self.direct)
            )
            if not math.isfinite(conditioned + direct):
                conditioned, direct, reason = None, None, "the loss is not a finite number"
            elif direct == 0:
                reason = "the loss without the instruction is zero"
            else:
                ifd, ifd_ppl = conditioned / direct, _exponential(conditioned - direct)
                if math.isinf(ifd_ppl):  # which JSON has no number for
                    ifd_ppl = None
        values = dict(loss_conditioned=conditioned, loss_direct=direct, ifd=ifd, ifd_ppl=ifd_ppl)
        return {
            "index": self.index,
            **{name: value and float(f"{value:.8g}") for name, value in values.items()},
            "num_answer_tokens": self.num_answer_tokens,
            "reason": reason,
        }

    def add_row(self, row, encoder):
        """The passes that the row needs, or why it has no score.

        The prompt's states are those of the pass with the answer, since a causal model has not seen
        the answer there.
        """
        ids, _, spans, self.reason = encoder.encode(row)
        self.num_answer_tokens = sum(end - start for start, end in spans)
        if not self.num_answer_tokens:
            self.reason = self.reason or "the answer has no tokens"
        if "embed" in encoder.parts:
            self.prompt_length = min(spans[-1][0], encoder.max_length)
        if "ifd" not in encoder.parts or self.reason:
            if self.prompt_length:
                ids = ids[: self.prompt_length]
                self.sequences = [Sequence(ids, np.zeros(len(ids), bool), self.prompt_length)]
            return
        answer = np.zeros(len(ids), bool)
        for start, end in spans:
            answer[start:end] = True
        last = spans[-1][1]
        self.sequences = [Sequence(ids[:last], answer[:last], self.prompt_length)]
        for start, end in spans:
            alone = np.array([*encoder.marker, *ids[start:end]], np.int32)
            of_answer = np.arange(len(alone)) >= len(encoder.marker)
            self.sequences.append(Sequence(alone, of_answer, conditioned=False))

    def perplexity(self):
        """Of the prompt, without its first token; inf where there is no other."""
        predicted = self.prompt_length - 1
        return _exponential(self.prompt / predicted) if predicted > 0 else math.inf


def _exponential(value):
    """exp, inf beyond what float32 holds."""
    return math.exp(value) if value < 88 else math.inf


def longest_row(config):
    """How many tokens a row may have.

    With dynamic rotary scaling, beyond the positions that the model was trained on, all angles
    depend on the longest row of a batch, padding included: there a row has no score of its own.
    """
    if (config.rope_scaling or {}).get("rope_type") == "dynamic":
        return config.max_position_embeddings // PAD_MULTIPLE * PAD_MULTIPLE
    return config.context_length


class Encoder:
    """Row numbers -> Scores to be computed. It can be handed to a worker process.

    parts: of "ifd" and "embed", what is wanted. Rows that cannot be scored get a reason: those
    longer than `max_length`, those that num_samples in dataset_info.json leaves out (False in
    `drawn`, bool (rows,)), and broken ones if `rows` were opened to skip them. What makes the
    embedding is cut to `max_length`. kind: Score, or that of reward_scores.py.
    """

    def __init__(
        self, rows, template, max_length, vocab_size=None, parts=("ifd",), drawn=None, kind=Score
    ):
        self.rows, self.template, self.parts = rows, template, parts
        self.max_length, self.vocab_size = max_length, vocab_size
        self.drawn, self.kind = drawn, kind
        self.marker = template.encode_marker()
        if "ifd" in parts and not self.marker:
            raise UserError(
                f"template {template.name}: nothing of what opens an answer is left by "
                "this tokenizer, so no answer can be scored alone; choose another"
            )

    def __getitem__(self, numbers):
        """A list of Scores, or the UserError that stops the run (a worker cannot raise it)."""
        try:
            return [self._score(int(number)) for number in numbers]
        except UserError as error:
            return UserError(str(error))

    def _score(self, number):
        try:
            row = self.rows[number]
        except BadRow as error:
            if not self.rows.skip_bad_rows:
                raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
            return self.kind(number, reason=f"broken: {error}")
        if self.drawn is not None and not self.drawn[number]:
            return self.kind(number, reason="not drawn: num_samples")
        score = self.kind(number)
        score.add_row(row, self)
        return score

    def encode(self, row):
        """(ids, supervised, bounds of the answers, why it cannot be scored or None) of a Row."""
        example = encode_row(row, self.template, self.vocab_size)
        ids, supervised = example.ids, example.supervised
        reason = None
        if len(ids) > self.max_length:
            reason = f"longer than max_length: {len(ids)} tokens, of {self.max_length}"
        return ids, supervised, answer_spans(self.template, ids, supervised), reason


def answer_spans(template, ids, supervised):
    """[start, end) of every answer, without the token that ends its turn."""
    edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
    control = template.control_ids.values()
    return [
        (start, end - (int(ids[end - 1]) in control))
        for start, end in edges.reshape(-1, 2).tolist()
    ]


def score(model, encoder, numbers, batch_tokens, num_workers=0, compute=None):
    """Yield a list of finished Scores for every batch; this process's share of the rows `numbers`.

    batch_tokens: the largest number of tokens, with padding, that go through the model together.
    compute: what does a batch, `compute_losses` if None. UserError for a row that cannot be read or
    encoded.
    """
    compute = compute or compute_losses
    numbers = numbers[processes.rank() :: processes.world_size()]
    tasks = [numbers[start : start + WINDOW_ROWS] for start in range(0, len(numbers), WINDOW_ROWS)]
    for window in read_ahead(encoder, tasks, num_workers):
        if isinstance(window, UserError):
            raise window
        yield [one for one in window if not one.sequences]
        passes = [(sequence, one) for one in window for sequence in one.sequences]
        for family in group_by_prefix(passes):
            for batch in cut(family, batch_tokens):
                yield compute(model, batch)


def group_by_prefix(passes):
    """(Sequence, Score) pairs -> lists of those that begin alike, which `states` makes use of.

    Those behind the answer marker alone, those of each common beginning (such as the text that
    precedes every instruction in a template), and the rest.
    """
    groups = defaultdict(list)
    for one in passes:
        sequence = one[0]
        groups[sequence.ids[:COMMON_TOKENS].tobytes() if sequence.conditioned else None].append(one)
    rest = [one for group in groups.values() if len(group) < COMMON_ROWS for one in group]
    return [*(group for group in groups.values() if len(group) >= COMMON_ROWS), rest]


def cut(passes, batch_tokens):
    """(Sequence, Score) pairs -> batches of similar length, none above `batch_tokens` if it can."""
    passes = sorted(passes, key=lambda one: len(one[0].ids))
    batch = []
    for one in passes:
        width = -(-len(one[0].ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def compute_losses(model, batch):
    """Add what a batch of (Sequence, Score) gives to the Scores; those then finished, as a list."""
    sequences, scores = zip(*batch, strict=True)
    answers, prompts, embeddings = measure(model, sequences)
    finished = []
    for number, (sequence, one) in enumerate(batch):
        if sequence.conditioned:
            one.conditioned += answers[number]
        else:
            one.direct += answers[number]
        if sequence.prompt_length:
            one.prompt, one.embedding = prompts[number], embeddings[number]
        # Compared by identity: equality of arrays is not a yes or no.
        one.sequences = [other for other in one.sequences if other is not sequence]
        if not one.sequences:
            finished.append(one)
    return finished


@torch.inference_mode()
def measure(model, sequences):
    """Summed losses of answers and of prompts (lists of float), and embeddings (B, D) float32.

    Logits are computed only where the next token counts.
    """
    device = model.model.embed_tokens.weight.device
    tokens, answer, *_ = collate(
        [Example(one.ids, one.answer) for one in sequences], device
    )  # (B, T)
    lengths = torch.tensor([one.prompt_length for one in sequences], device=device)
    prompt = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    hidden = hidden_states_with_shared_prefix(model, tokens)  # (B, T, D)
    counted = (answer | prompt)[:, 1:]
    losses = torch.zeros(counted.shape, device=device)
    losses[counted] = token_losses(model.logits, hidden[:, :-1][counted], tokens[:, 1:][counted])
    embeddings = [None] * len(sequences)
    if lengths.any():
        pooled = (prompt.float()[:, None] @ hidden.float()).squeeze(1)
        embeddings = (pooled / lengths.clamp(min=1)[:, None]).cpu().numpy()
    sums = [(losses * of[:, 1:]).sum(1, dtype=torch.float64).tolist() for of in (answer, prompt)]
    return *sums, embeddings


def hidden_states_with_shared_prefix(model, tokens):
    """Hidden states (B, T, D) of tokens (B, T); what all rows begin with goes through once."""
    alike = int((tokens == tokens[:1]).all(0).int().cumprod(0).sum())
    alike = min(alike, tokens.shape[1] - 1)
    if alike < SHARED_TOKENS or len(tokens) == 1:
        return model(tokens)
    cache = KeyValueCache(model.config)
    beginning = model(tokens[:1, :alike], cache=cache)
    cache.select([0] * len(tokens))
    rest = model(tokens[:, alike:], cache=cache)
    return torch.cat([beginning.expand(len(tokens), -1, -1), rest], 1)
