"""Small training runs on the embedded model, for the tour's snippets and figures.

    model, losses = fine_tune(examples, num_steps=100)
    written = answers(model, template, rows)

Chapter 8 explains the loop in `fine_tune`. Until then it is a tool: rows go in, a model comes out.
"""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from minisft import Sampling, Tokenizer, generate, get_template, load_model
from minisft.data.batching import Batch, Batches, collate, micro_batches
from minisft.data.dataset import Row, load_rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Example, encode_rows
from minisft.model.decoder import CausalLM
from minisft.model.loss import next_token_loss
from minisft.selection.ifd import IfdScorer
from minisft.selection.passes import Score
from minisft.text.chat_template import ChatTemplate

ROOT = Path(__file__).resolve().parents[2]
# The micro-batches of a step -> its loss.
StepLoss = Callable[[CausalLM, Sequence[Batch]], Tensor]
BASE, DATA = ROOT / "examples/base", ROOT / "examples/data"


def base_template(name: str = "chatml") -> ChatTemplate:
    """A chat template with the tokenizer of the embedded model."""
    return get_template(name, Tokenizer.load(BASE))


def good_rows(name: str = "train.json") -> list[Row]:
    """The rows of examples/data with a correct answer."""
    labels = [record["quality"] for record in json.loads((DATA / name).read_text("utf-8"))]
    rows = load_rows(DATA / name)
    return [row for row, label in zip(rows, labels, strict=True) if label == "good"]


def step_of_tokens(model: CausalLM, batches: Sequence[Batch]) -> Tensor:
    """The loss of a step: the mean over all its supervised tokens."""
    parts = [next_token_loss(model, *batch) for batch in batches]
    total = torch.stack([loss for loss, _ in parts]).sum()
    return total / sum(count for _, count in parts)


def mean_of_means(model: CausalLM, batches: Sequence[Batch]) -> Tensor:
    """What chapter 6 warns of: the mean of the micro-batches' means."""
    parts = [next_token_loss(model, *batch) for batch in batches]
    return torch.stack([loss / count for loss, count in parts]).mean()


@torch.no_grad()
def token_loss(model: CausalLM, examples: Sequence[Example]) -> float:
    """The mean loss of the supervised tokens of these examples."""
    longest_last = sorted(examples, key=lambda example: len(example.ids))
    batches = [collate(part) for part in micro_batches(longest_last, batch_size=64)]
    return step_of_tokens(model, batches).item()


def train_all(model: CausalLM) -> None:
    """Full fine-tuning: every weight is trained."""
    model.requires_grad_(True)


def fine_tune(
    examples: Sequence[Example],
    num_steps: int,
    step_loss: StepLoss = step_of_tokens,
    to_batch: Callable[[Sequence[Example]], Batch] = collate,
    batch_size: int = 32,
    rows_per_step: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    watch: Callable[[CausalLM], None] = lambda model: None,
    prepare: Callable[[CausalLM], None] = train_all,
) -> tuple[CausalLM, list[float]]:
    """Train the embedded model; (the model, the loss of each step).

    to_batch: examples -> a micro-batch. seed: of the order of the rows.
    watch: called before every step. prepare: changes the base, and says what is trained.
    """
    torch.manual_seed(seed)
    model = load_model(BASE, torch.float32).train()
    prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98))
    batches = Batches(examples, lambda rows: (list(rows), EncodeReport()), seed)
    losses = []
    for step, rows in enumerate(batches.steps(rows_per_step, 0, num_steps)):
        watch(model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / num_steps)
        loss = step_loss(model, [to_batch(part) for part in micro_batches(rows, batch_size)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def train_steps(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    first_step: int,
    last_step: int,
    rows_per_step: int = 32,
) -> list[float]:
    """Take the steps first_step..last_step-1 of a run; their losses."""
    batches, losses = Batches(examples, lambda rows: (list(rows), EncodeReport()), 0), []
    for rows in batches.steps(rows_per_step, first_step, last_step):
        loss = step_of_tokens(model, [collate(rows)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def answers(
    model: CausalLM, template: ChatTemplate, rows: Sequence[Row], max_new_tokens: int = 40
) -> list[tuple[str, bool]]:
    """(text, True if it ended by itself) of the greedy answer to each row's question."""
    prompts = [template.encode_prompt(row.messages[:-1]) for row in rows]
    stop_ids = template.stop_token_ids()
    sampling = Sampling(max_new_tokens=max_new_tokens, greedy=True)
    written = generate(model, prompts, sampling, stop_ids)
    decode = template.tokenizer.decode
    return [(decode(ids), len(ids) < max_new_tokens) for ids in written]


def num_right(written: Sequence[tuple[str, bool]], rows: Sequence[Row]) -> int:
    """The number of answers, from `answers`, that equal those of the rows."""
    right = [row.messages[-1]["content"] for row in rows]
    return sum(text == answer for (text, _), answer in zip(written, right, strict=True))


def ifd_scores(model: CausalLM, template: ChatTemplate, rows: Sequence[Row]) -> list[Score]:
    """The IFD of each row, and the embedding of its prompt."""
    scorer, scores = IfdScorer(template, parts=("ifd", "embed")), []
    for start in range(0, len(rows), 64):
        plans = [scorer.plan(start + n, row) for n, row in enumerate(rows[start : start + 64])]
        results = iter(scorer.compute(model, [item for plan in plans for item in plan.passes]))
        for plan in plans:
            scores.append(scorer.score(plan, list(islice(results, len(plan.passes)))))
    return scores


def encoded(rows: Sequence[Row], template: ChatTemplate) -> list[Example]:
    """The examples of rows."""
    return encode_rows(rows, template, cutoff_len=512)[0]
