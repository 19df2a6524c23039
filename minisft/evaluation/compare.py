"""The same questions to several models: their answers, and how near these are to references.

    items = read_items(open_rows("compare.json"))
    answers = answer_items(assistant, items, Sampling(greedy=True), batch_size=8)
    losses = reference_losses(assistant, items, batch_size=8)
    report = measure(items, answers, losses)

An answer depends on its question, the seed and its number, not on the batch it was in.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minisft.checkpoints import hub
from minisft.common import tensor_files
from minisft.common.errors import UserError
from minisft.data.batching import collate
from minisft.data.dataset import Row
from minisft.data.encoding import encode_rows
from minisft.evaluation.confidence import mcnemar, mean_interval, wilson
from minisft.evaluation.text_metrics import corpus_bleu2, row_scores
from minisft.generation.generate import generate
from minisft.text.tokenizer import check_vocabulary

MEASURES = ("bleu_2", "rouge_1", "rouge_2", "rouge_l", "exact_match")


@dataclass(frozen=True)
class Item:
    """A conversation up to a question, and the answer that its data set gives."""

    messages: list
    reference: str
    tools: list | None = None

    @property
    def question(self):
        """The conversation as one text, for people and judges."""
        if len(self.messages) == 1:
            last = self.messages[0]
            return "\n".join(filter(None, [last["content"], last.get("input")]))
        return "\n".join(f"{one['role']}: {one['content']}" for one in self.messages)


def read_items(rows):
    """Rows of a data set -> Items: the last turn is the reference."""
    return [Item(row.messages[:-1], row.messages[-1]["content"], row.tools) for row in rows]


def fingerprint(items):
    """A short text that is another one for other questions or references."""
    content = [[item.messages, item.reference, item.tools] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def parse_models(texts):
    """What --models says -> [(name, model, adapter or None)], each of which is there."""
    models = [parse_model(one) for one in texts]
    if len({name for name, _, _ in models}) < len(models):
        raise UserError("--models: two have the same name")
    for _, model, adapter in models:
        check_model(model, adapter)
    return models


def parse_model(text):
    """`NAME=DIR` or `NAME=DIR+ADAPTER` -> (name, model, adapter or None)."""
    name, _, place = text.partition("=")
    model, adapter = split_adapter(place)
    if (
        not name[:1].isalnum()
        or not model
        or not all(one.isalnum() or one in "-_." for one in name)
    ):
        raise UserError(
            f"--models {text}: write NAME=DIR or NAME=DIR+ADAPTER, the name of "
            "letters, digits, '-', '_' and '.'"
        )
    return name, model, adapter


def split_adapter(place):
    """`DIR` or `DIR+ADAPTER` -> (model, adapter or None); a folder may have a + in its name."""
    model, _, adapter = (place, "", "") if Path(place).exists() else place.partition("+")
    return model, adapter or None


def check_model(model, adapter):
    """UserError where there is no such model, or no such adapter."""
    hub.resolve(model)
    if adapter:
        hub.resolve(adapter, tensor_files.ADAPTER_CONFIG)


def answer_items(assistant, items, sampling, batch_size, advance=lambda count: None):
    """Every Item answered, as {"answer", "num_tokens", "is_cut", "is_skipped"}.

    A question that leaves no room for `sampling.max_new_tokens` in the context is skipped: its
    answer is empty. Cut is an answer that had to end for want of tokens.
    """
    template, tokenizer = assistant.template, assistant.tokenizer
    prompts = [template.encode_prompt(item.messages, item.tools) for item in items]
    for ids in prompts:
        check_vocabulary(ids, assistant.model.config.vocab_size)
    limit = assistant.max_length - sampling.max_new_tokens
    results = [{"answer": "", "num_tokens": 0, "is_cut": False, "is_skipped": True} for _ in items]
    # Similar lengths together; the number of the row goes along, which chooses its random stream.
    order = sorted(
        (row for row, ids in enumerate(prompts) if len(ids) <= limit),
        key=lambda row: len(prompts[row]),
    )
    advance(len(items) - len(order))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        answers = generate(
            assistant.model, [prompts[row] for row in rows], sampling, assistant.stop_ids, rows
        )
        for row, ids in zip(rows, answers, strict=True):
            results[row] = {
                "answer": tokenizer.decode(ids).strip(),
                "num_tokens": len(ids),
                "is_cut": len(ids) == sampling.max_new_tokens,
                "is_skipped": False,
            }
        advance(len(rows))
    return results


@torch.inference_mode()
def reference_losses(assistant, items, batch_size):
    """(summed loss in nats, number of tokens) of every reference as the answer; None if cut.

    The tokens are those that training would learn, the end of the turn included.
    """
    model, device = assistant.model, assistant.device
    examples = []
    for item in items:
        messages = [*item.messages, {"role": "assistant", "content": item.reference}]
        found, report = encode_rows(
            [Row(messages, item.tools)], assistant.template, assistant.max_length
        )
        examples.append(found[0] if found and not report.num_truncated else None)
    order = sorted(
        (row for row, one in enumerate(examples) if one is not None),
        key=lambda row: len(examples[row].ids),
    )
    losses = [None] * len(items)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens, supervised, _ = collate([examples[row] for row in rows], device)
        learned = supervised[:, 1:]
        logits = model.logits(model(tokens)[:, :-1][learned])
        each = F.cross_entropy(logits.float(), tokens[:, 1:][learned], reduction="none")
        for row, part in zip(rows, each.split(learned.sum(1).tolist()), strict=True):
            losses[row] = (float(part.sum()), len(part))
    return losses


def measure(items, answers, losses):
    """A model's figures: {"rows": scores of every Item, "mean": with intervals, and counts}.

    `bleu_2` is that of all rows together and has no interval. Perplexity is per token, and can be
    compared only between models with the same tokenizer; bits per character between all.
    """
    rows = [
        row_scores(one["answer"], item.reference) for one, item in zip(answers, items, strict=True)
    ]
    for row, loss in zip(rows, losses, strict=True):
        row["perplexity"] = _exp(loss[0] / loss[1]) if loss else None
    mean = {}
    for name in MEASURES[1:]:
        middle, low, high = mean_interval([row[name] for row in rows], 0, 1)
        mean[name] = {"mean": middle, "interval": (low, high)}
    mean["exact_match"]["interval"] = wilson(mean["exact_match"]["mean"], len(rows))
    mean["bleu_2"] = {
        "mean": corpus_bleu2([one["answer"] for one in answers], [item.reference for item in items])
    }
    read = [(loss, item) for loss, item in zip(losses, items, strict=True) if loss]
    nats, tokens = (sum(loss[place] for loss, _ in read) for place in (0, 1))
    characters = sum(len(item.reference) for _, item in read)
    return {
        "mean": mean,
        "rows": rows,
        "perplexity": _exp(nats / tokens) if read else None,
        "bits_per_character": nats / math.log(2) / characters if characters else None,
        "answer_characters": sum(len(one["answer"]) for one in answers) / len(answers),
        "answer_tokens": sum(one["num_tokens"] for one in answers) / len(answers),
        "answers_cut": sum(one["is_cut"] for one in answers),
        "questions_without_room": sum(one["is_skipped"] for one in answers),
        "references_without_room": losses.count(None),
    }


def _exp(value):
    """None where the number is too large, for which JSON has no word."""
    return math.exp(value) if value < 700 else None


def differences(first, other):
    """What `other` has more than `first` in every measure, by pairs of rows, with intervals.

    For exact match also McNemar's p-value.
    """
    found = {}
    for name in MEASURES:
        pairs = [
            (one[name], two[name]) for one, two in zip(first["rows"], other["rows"], strict=True)
        ]
        middle, low, high = mean_interval([two - one for one, two in pairs], -1, 1)
        found[name] = {"mean": middle, "interval": (low, high)}
    # `pairs` are now those of the last measure, the exact match.
    lost, gained = (sum(pair == wanted for pair in pairs) for wanted in ((1.0, 0.0), (0.0, 1.0)))
    found["exact_match"]["p_value"] = mcnemar(lost, gained)
    return found
