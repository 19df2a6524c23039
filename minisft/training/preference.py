"""Learning from preferences: of two answers to a prompt, the better one is to score higher.

    objective = Reward(model)                            # --stage rm; model: a RewardModel
    objective = DirectPreference(model, beta=0.1)        # --stage dpo
    batch = objective.collate(examples)
    totals = objective.count([batch])
    (objective(model, batch, totals)["loss"] / totals[0]).backward()

With s the score of an answer, the loss of a pair is

    -log sigmoid(s(chosen) - s(rejected))                                   (Bradley-Terry)

Reward: s is what the head says of the conversation's last token (arXiv 2203.02155).
DirectPreference: s = beta (log p(answer | prompt) - log p_reference(answer | prompt)), where the
reference is the model before training (arXiv 2305.18290, equation 7).

A row of K answers, best first, has K (K - 1) / 2 pairs and is the mean over them, so that every
row weighs the same (arXiv 2203.02155, equation 1). The loss of a step is the mean over its rows.
"""

import hashlib
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minisft.checkpoints.reward_models import choose_padding
from minisft.common import processes
from minisft.data import batching
from minisft.model.lora_tools import frozen_copy
from minisft.model.loss import token_losses
from minisft.training.objective import NextToken


@dataclass
class Answers:
    """A batch of rows to compare: all answers of all rows, each behind its prompt.

    reference: (B,) the reference's log-probability of each answer, where it was computed before.
    """

    tokens: torch.Tensor  # (B, T) int64, padded on the right
    supervised: torch.Tensor  # (B, T) bool, True for the answer's own tokens
    last: torch.Tensor  # (B,) where each conversation ends
    best: torch.Tensor  # (rows,) numbers of the rows' best answers
    chosen: torch.Tensor  # (P,) numbers of the better answer of each pair ...
    rejected: torch.Tensor  # (P,) ... and of the worse
    weights: torch.Tensor  # (P,) float32, the pair's share of its row
    reference: torch.Tensor | None = None


def collate(examples, device="cpu", pad_multiple=batching.PAD_MULTIPLE, reference=None):
    """Examples of several texts -> Answers. No examples give a row of padding and no pair.

    reference: {fingerprint of an Example: log-probability of each of its texts}.
    """
    texts = [text for example in examples for text in example.texts()]
    tokens, supervised, _ = batching.collate(texts, device, pad_multiple)
    counts = [len(example.lengths) for example in examples]
    best = [sum(counts[:row]) for row in range(len(counts))]
    pairs = [
        (start + better, start + worse, 2 / (count * (count - 1)))
        for start, count in zip(best, counts, strict=True)
        for better, worse in combinations(range(count), 2)
    ]
    chosen, rejected, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
    last = [len(text.ids) - 1 for text in texts] or [0]
    numbers = [
        torch.tensor(one, dtype=torch.int64, device=device)
        for one in (last, best, chosen, rejected)
    ]
    if reference is not None:
        known = [one for example in examples for one in reference[fingerprint(example)]]
        reference = torch.tensor(known or [0.0], device=device)
    return Answers(tokens, supervised, *numbers, torch.tensor(weights, device=device), reference)


def fingerprint(example):
    """A short text that tells an Example from others, wherever and whenever it is encoded."""
    content = [example.ids.tobytes(), example.supervised.tobytes(), repr(example.lengths).encode()]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def compare(scores, batch, label_smoothing=0.0):
    """{figure: sum over the rows of a batch} of the answers' scores (B,); "loss" has a gradient.

    label_smoothing: the share of pairs that may have been judged the wrong way round; their loss
    is that of the pair turned round (https://ericmitchell.ai/cdpo.pdf).
    """
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    losses = -(1 - label_smoothing) * F.logsigmoid(
        chosen - rejected
    ) - label_smoothing * F.logsigmoid(rejected - chosen)
    figures = {
        "loss": losses,
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: (values * batch.weights).sum() for name, values in figures.items()}


def answer_log_probs(model, logits, batch):
    """log p(answer | prompt) of every answer (B,) in float32: the sum over its tokens.

    model: gives hidden states; logits: hidden states -> scores of the vocabulary. Logits are
    computed for the answers' tokens only, a chunk at a time.
    """
    learned = batch.supervised[:, 1:]
    states = model(batch.tokens)[:, :-1][learned]  # (N, D)
    if len(states) == 0:  # no rows: a sum of nothing, yet connected to every parameter
        return logits(states).float().sum() * batch.last.new_zeros(len(learned))
    losses = token_losses(logits, states, batch.tokens[:, 1:][learned])
    answers = learned.nonzero()[:, 0]  # which of them each token is of
    return losses.new_zeros(len(learned)).index_add(0, answers, -losses)


class Reward:
    """The objective of --stage rm, for a RewardModel."""

    def __init__(self, model):
        self.model, self.collate = model, collate

    def count(self, batches):
        """[rows of these batches]: what the sums of a step are divided by."""
        return [sum(len(batch.best) for batch in batches)]

    def __call__(self, wrapped, batch, totals):
        """{figure: sum over rows}; `wrapped`: the model, or what averages its gradients."""
        hidden = wrapped(batch.tokens)
        answers = torch.arange(len(hidden), device=hidden.device)
        return compare(self.model.rewards(hidden[answers, batch.last]), batch)

    def evaluate(self, examples, batch_size, collate):
        """{figure: mean} over held-out Examples."""
        return mean_figures(self, examples, batch_size, collate, [len(examples)])


class DirectPreference:
    """The objective of --stage dpo, for a CausalLM as it is before training.

    sft_weight: of the loss that --stage sft would have on the best answers, which is added. known:
    {fingerprint of an Example: the reference's log-probabilities}, instead of a reference. That is
    a frozen copy; of a sharded model, its rows of before.
    """

    def __init__(
        self, model, beta=0.1, label_smoothing=0.0, sft_weight=0.0, known=None, is_sharded=False
    ):
        self.model, self.beta = model, beta
        self.label_smoothing, self.sft_weight = label_smoothing, sft_weight
        self.reference = reference_of(model, is_sharded) if known is None else None
        self.collate = partial(collate, reference=known)

    def count(self, batches):
        """[rows of these batches, tokens of their best answers]."""
        return [
            sum(len(batch.best) for batch in batches),
            sum(int(batch.supervised[batch.best, 1:].sum()) for batch in batches),
        ]

    def __call__(self, wrapped, batch, totals):
        """{figure: sum over rows}, of which totals[0] is the number of rows in the whole step."""
        reference = batch.reference
        if reference is None:
            with torch.no_grad(), self.reference as before:
                reference = answer_log_probs(before, before.logits, batch)
        log_probs = answer_log_probs(wrapped, self.model.logits, batch)
        sums = compare(self.beta * (log_probs - reference), batch, self.label_smoothing)
        if self.sft_weight:
            # Per token of the step, and so that dividing by its rows makes this the mean.
            num_rows, num_tokens = totals
            sums["sft_loss"] = -log_probs[batch.best].sum() * (num_rows / max(1, num_tokens))
            sums["loss"] = sums["loss"] + self.sft_weight * sums["sft_loss"]
        return sums

    def evaluate(self, examples, batch_size, collate):
        """{figure: mean} over held-out Examples."""
        num_tokens = sum(int(one.texts()[0].supervised[1:].sum()) for one in examples)
        return mean_figures(self, examples, batch_size, collate, [len(examples), num_tokens])


def reference_of(model, is_sharded):
    """A context in which there is the model as it is now, whatever training makes of it."""
    if not is_sharded:
        return nullcontext(frozen_copy(model))
    from minisft.training import fsdp

    return fsdp.Before(model)


@torch.inference_mode()
def mean_figures(objective, examples, batch_size, collate, totals):
    """{figure: mean over the rows} of held-out Examples, over all processes; every row once."""
    model, sums = objective.model.eval(), Counter()
    device = model.model.embed_tokens.weight.device
    examples = sorted(examples, key=lambda example: len(example.ids))
    # As many batches on every process, some perhaps empty: those of a sharded model go together.
    for batch in batching.micro_batches(
        examples, batch_size, processes.rank(), processes.world_size()
    ):
        found = objective(model, collate(batch, device), totals)
        sums.update({name: value.item() for name, value in found.items()})
    values = processes.sum_over_ranks(list(sums.values()), device)
    return {name: value / totals[0] for name, value in zip(sums, values, strict=True)}


@torch.no_grad()
def log_probs_of(model, examples, batch_size):
    """{fingerprint: log-probability of each text} of this process's share of the Examples."""
    model.eval()
    device, known = model.model.embed_tokens.weight.device, {}
    for part in batching.micro_batches(
        examples, batch_size, processes.rank(), processes.world_size()
    ):
        values = answer_log_probs(model, model.logits, collate(part, device)).tolist()
        for example in part:
            count = len(example.lengths)
            known[fingerprint(example)], values = values[:count], values[count:]
    return known


def precompute(run, batches, held_out):
    """Complete run.reference: the log-probabilities of all rows, of training and held out.

    By the model as it is now. What a resumed run has brought with it is not computed again.
    """
    began, found, batch_size = time.monotonic(), {}, run.options.per_device_eval_batch_size
    rows = batch_size * processes.world_size()
    epoch = batches.steps(rows, 0, batches.steps_per_epoch(rows))
    silent = not (processes.rank() == 0 and sys.stderr.isatty())
    for examples in tqdm(chain(epoch, [held_out or []]), "reference", unit="step", disable=silent):
        new = [example for example in examples if fingerprint(example) not in run.reference]
        if new:
            with run.autocast:
                found |= log_probs_of(run.model, new, batch_size)
    batches.take_report()  # it is the first epoch's to tell
    before = len(run.reference)
    for others in processes.all_gather(found):
        run.reference |= others
    processes.print_rank0(
        f"reference: log-probabilities of {len(run.reference):,} rows, {before:,} of them "
        f"from the checkpoint, {time.monotonic() - began:.0f} s"
    )


def build(run, template, batches, held_out):
    """The objective of --stage; `run.model` is what training starts from."""
    options, model = run.options, run.model
    if options.stage in ("sft", "pt"):
        return NextToken(model)
    if options.stage == "rm":
        choose_padding(
            model, template.tokenizer, template.stop_token_ids(model.config.eos_token_ids)
        )
        return Reward(model)
    if options.precompute_reference:
        precompute(run, batches, held_out)
    return DirectPreference(
        model,
        options.dpo_beta,
        options.dpo_label_smoothing,
        options.dpo_ftx,
        run.reference if options.precompute_reference else None,
        run.is_sharded,
    )
