"""The same questions to several models: their answers, and the losses of the reference answers.

    items = read_items(open_rows("compare.json"))
    answers = answer_items(assistant, items, Sampling(greedy=True), batch_size=8)
    losses = reference_losses(assistant, items, batch_size=8)

measures.py computes the figures. An answer depends on its question, the seed and the number of the
question, never on its batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from minisft.common.devices import send
from minisft.common.errors import UserError
from minisft.common.sequences import batches_by_length
from minisft.data.batching import collate
from minisft.data.dataset import Row
from minisft.data.encoding import encode_rows
from minisft.data.formats import Tools
from minisft.generation.assistant import Assistant
from minisft.generation.generate import generate
from minisft.generation.sampling import Sampling
from minisft.generation.thoughts import decode_answer
from minisft.model.loss import target_places, token_losses
from minisft.text.chat_template import ChatTemplate
from minisft.text.messages import Message, with_thoughts_apart
from minisft.text.tokenizer import check_vocabulary

# The loss of a reference, summed over its tokens (nats), and the number of tokens.
ReferenceLoss = tuple[float, int]


@dataclass(frozen=True)
class Item:
    """A conversation that ends with a question, and the reference: the answer of the data set."""

    messages: list[Message]
    reference: str
    tools: Tools = None

    @property
    def question(self) -> str:
        """The conversation as a single text, for people and judges."""
        texts = [_text_with_calls(message) for message in self.messages]
        if len(texts) == 1:
            return texts[0]
        turns = zip(self.messages, texts, strict=True)
        return "\n".join(f"{message['role']}: {text}" for message, text in turns)


class Answer(TypedDict):
    """The answer of a model, as in results.json."""

    answer: str
    num_tokens: int
    is_cut: bool  # it has max_new_tokens tokens and may not be complete
    is_skipped: bool  # the question left no room for max_new_tokens; the answer is empty


def read_items(rows: Iterable[Row]) -> list[Item]:
    """Rows of a data set as items. The last turn of a row is the reference, without thoughts.

    UserError for a row that ends with a tool call, which no measure can compare.
    """
    items = []
    for row in rows:
        *messages, last = row.messages
        reference = with_thoughts_apart(last)["content"]
        if last.get("tool_calls") or not reference.strip():
            kind = "a tool call" if last.get("tool_calls") else "thoughts without an answer"
            raise UserError(
                f"{row.source}, row {row.index + 1}: ends with {kind}. compare needs the text of "
                "an answer; leave the row out."
            )
        items.append(Item(messages, reference, row.tools))
    return items


def _text_with_calls(message: Message) -> str:
    """The content of a message, with Alpaca's input and with tool calls as JSON."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
    parts: list[str] = [message["content"], message.get("input") or "", *calls]
    return "\n".join(part for part in parts if part)


def fingerprint(items: Sequence[Item]) -> str:
    """A hash of all questions and references."""
    content = [[item.messages, item.reference, item.tools] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def answer_items(
    assistant: Assistant,
    items: Sequence[Item],
    sampling: Sampling,
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """The answer to every item.

    advance: called with the number of items that were answered since the last call.
    """
    template = assistant.template
    prompts = [template.encode_prompt(item.messages, item.tools) for item in items]
    for ids in prompts:
        check_vocabulary(ids, assistant.model.config.vocab_size)
    limit = assistant.max_length - sampling.max_new_tokens
    numbers = [number for number, ids in enumerate(prompts) if len(ids) <= limit]
    results: list[Answer] = [
        {"answer": "", "num_tokens": 0, "is_cut": False, "is_skipped": True} for _ in items
    ]
    advance(len(items) - len(numbers))
    for places in batches_by_length([len(prompts[number]) for number in numbers], batch_size):
        # The number of an item selects its random numbers.
        rows = [numbers[place] for place in places]
        answers = generate(
            assistant.model, [prompts[row] for row in rows], sampling, assistant.stop_ids, rows
        )
        for row, ids in zip(rows, answers, strict=True):
            results[row] = {
                "answer": answer_text(template, prompts[row], ids),
                "num_tokens": len(ids),
                "is_cut": len(ids) == sampling.max_new_tokens,
                "is_skipped": False,
            }
        advance(len(rows))
    return results


def answer_text(template: ChatTemplate, prompt: list[int], ids: list[int]) -> str:
    """An answer without thoughts, also where the template does not know <think>."""
    _, text = decode_answer(template, prompt, ids)
    return with_thoughts_apart({"role": "assistant", "content": text})["content"].strip()


@torch.inference_mode()
def reference_losses(
    assistant: Assistant, items: Sequence[Item], batch_size: int
) -> list[ReferenceLoss | None]:
    """The loss of every reference as the answer; None if it does not fit in the context.

    It is the sum over the tokens that training with --mask_history would supervise: those of the
    last answer, with the end-of-turn token.
    """
    model = assistant.model
    examples, numbers = [], []
    for number, item in enumerate(items):
        messages = [*item.messages, {"role": "assistant", "content": item.reference}]
        encoded, report = encode_rows(
            [Row(messages, item.tools)],
            assistant.template,
            assistant.max_length,
            mask_history=True,
        )
        if encoded and not report.num_truncated:
            examples += encoded[-1:]  # the last of several has the reference
            numbers.append(number)
    losses: list[ReferenceLoss | None] = [None] * len(items)
    for places in batches_by_length([len(example.ids) for example in examples], batch_size):
        batch = [examples[place] for place in places]
        tokens, supervised, _ = collate(batch, assistant.device)  # (B, T), (B, T)
        target_at = send(target_places(supervised), tokens.device)  # (N,), in the flattened batch
        states, targets = model(tokens).flatten(0, 1)[target_at - 1], tokens.flatten()[target_at]
        values = token_losses(model.logits, states, targets).cpu()  # (N,)
        parts = values.split(supervised[:, 1:].sum(1).tolist())
        for place, part in zip(places, parts, strict=True):
            losses[numbers[place]] = (float(part.sum()), len(part))
    return losses
