"""The reference of DPO: log-probabilities of answers under the model before training.

reference = FrozenReference(model)                  # ShardedReference with --parallel fsdp
reference = PrecomputedReference(log_probs)         # with --precompute_reference
log_probs = reference(batch)                        # (B,), without gradient
"""

import hashlib
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minisft.common import processes
from minisft.common.devices import send
from minisft.common.progress import ProgressBar
from minisft.data.batching import Batches, micro_batches
from minisft.data.encoding import Example
from minisft.model.decoder import CausalLM
from minisft.model.lora_tools import frozen_copy
from minisft.training.fsdp import Snapshot
from minisft.training.objective import Objective
from minisft.training.preference import Answers, answer_log_probs, collate

# {fingerprint of a row: log-probability of each of its answers}
LogProbs = dict[str, list[float]]


class FrozenReference:
    """A copy of the model. It shares the parameters that are not trained."""

    def __init__(self, model: CausalLM):
        self.model = frozen_copy(model)

    @torch.no_grad()
    def __call__(self, batch: Answers) -> Tensor:
        """log p(answer | prompt) of the answers (B,)."""
        return answer_log_probs(self.model, self.model, batch)


class ShardedReference:
    """For a sharded model: a copy of this rank's trainable shards, swapped in to compute."""

    def __init__(self, model: CausalLM):
        self.snapshot = Snapshot(model)

    @torch.no_grad()
    def __call__(self, batch: Answers) -> Tensor:
        """log p(answer | prompt) of the answers (B,)."""
        with self.snapshot as model:
            return answer_log_probs(model, model, batch)


class PrecomputedReference:
    """Log-probabilities that were computed before training; no second model is in memory."""

    def __init__(self, log_probs: LogProbs):
        self.log_probs = log_probs

    def __call__(self, batch: Answers) -> Tensor:
        """log p(answer | prompt) of the answers (B,)."""
        rows = [self.log_probs[fingerprint(example)] for example in batch.examples]
        values = list(chain.from_iterable(rows)) or [0.0]  # without rows there is one padding text
        return send(torch.tensor(values), batch.tokens.device)


def build_reference(
    options: Namespace,
    model: CausalLM,
    batches: Batches,
    eval_examples: list[Example] | None,
    autocast: torch.autocast,
    log_probs: LogProbs,
) -> Callable[[Answers], Tensor]:
    """The reference of a run whose model has not been trained yet.

    log_probs: precomputed log-probabilities from the checkpoint of a resumed run; else empty.
    """
    if options.precompute_reference:
        batch_size = options.per_device_eval_batch_size
        log_probs = dict(log_probs)
        precompute(log_probs, model, batches, eval_examples, batch_size, autocast)
        return PrecomputedReference(log_probs)
    return ShardedReference(model) if options.parallel == "fsdp" else FrozenReference(model)


def precompute(
    log_probs: LogProbs,
    model: CausalLM,
    batches: Batches,
    eval_examples: list[Example] | None,
    batch_size: int,
    autocast: torch.autocast,
) -> None:
    """Add the log-probabilities of all rows to `log_probs`. Every rank calls it.

    Rows that are in it already, from a checkpoint, are not computed again.
    """
    began, num_known = time.monotonic(), len(log_probs)
    rows_per_step = batch_size * processes.world_size()
    num_steps = batches.steps_per_epoch(rows_per_step)
    epoch = batches.steps(rows_per_step, 0, num_steps)
    computed: LogProbs = {}
    with ProgressBar(num_steps + 1, "step", "reference") as bar:
        for examples in chain(epoch, [eval_examples or []]):
            new = [example for example in examples if fingerprint(example) not in log_probs]
            if new:
                with autocast:
                    computed |= compute_log_probs(model, new, batch_size)
            bar.update(1)
    if isinstance(model, FSDPModule):
        # The forward pass leaves the root group gathered, but the optimizer needs the shards.
        model.reshard()
    batches.take_report()  # the first epoch of training reports these rows again
    for part in processes.all_gather(computed):
        log_probs |= part
    processes.print_rank0(
        f"reference: log-probabilities of {len(log_probs):,} rows, {num_known:,} of them from the "
        f"checkpoint, in {time.monotonic() - began:.0f} s"
    )


@torch.no_grad()
def compute_log_probs(model: CausalLM, examples: list[Example], batch_size: int) -> LogProbs:
    """The log-probabilities of this rank's share of the rows."""
    model.eval()
    device = model.model.embed_tokens.weight.device
    log_probs: LogProbs = {}
    for part in micro_batches(examples, batch_size, processes.rank(), processes.world_size()):
        values = answer_log_probs(model, model, collate(part, device)).tolist()
        for example in part:
            num_answers = len(example.texts())
            log_probs[fingerprint(example)] = values[:num_answers]
            values = values[num_answers:]
    return log_probs


def fingerprint(example: Example) -> str:
    """A hash of the tokens of a row, equal on all ranks and in all epochs."""
    content = [example.ids.tobytes(), example.supervised.tobytes(), repr(example.lengths).encode()]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def saved_log_probs(objective: Objective) -> LogProbs:
    """The precomputed log-probabilities, for a checkpoint; empty without --precompute_reference."""
    reference = getattr(objective, "reference", None)
    return reference.log_probs if isinstance(reference, PrecomputedReference) else {}
