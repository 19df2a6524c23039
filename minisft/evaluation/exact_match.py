"""Exact match during training: how many held-out rows the model answers word for word.

    share = exact_match(model, examples, template, batch_size=8)

For tasks with one right answer. Their loss may fall long before, or after, answers become right.
"""

from collections.abc import Sequence
from itertools import takewhile

from minisft.common import processes
from minisft.common.sequences import batches_by_length, true_spans
from minisft.data.encoding import Example
from minisft.generation.generate import generate
from minisft.generation.sampling import Sampling
from minisft.model.decoder import CausalLM
from minisft.text.chat_template import ChatTemplate

# A right answer may have this many tokens more than the reference, if it is spelled differently.
MARGIN = 8


def exact_match(
    model: CausalLM, examples: Sequence[Example], template: ChatTemplate, batch_size: int
) -> float:
    """Share of the examples whose last answer is generated exactly, greedily, over all ranks.

    White space around an answer does not count. If an answer was truncated, the model must begin
    with the part that is left.
    """
    model.eval()
    stop_ids, decode = template.stop_token_ids(), template.tokenizer.decode
    share = examples[processes.rank() :: processes.world_size()]
    prompts, references = [], []
    for prompt, reference in map(split_last_answer, share):
        prompts.append(prompt)
        references.append(reference)
    num_right = 0
    for rows in batches_by_length([len(ids) for ids in prompts], batch_size):
        longest = max(len(references[row]) for row in rows)
        sampling = Sampling(max_new_tokens=longest + MARGIN, greedy=True)
        answers = generate(model, [prompts[row] for row in rows], sampling, stop_ids)
        for row, answer in zip(rows, answers, strict=True):
            reference = list(takewhile(lambda id: id not in stop_ids, references[row]))
            if len(reference) == len(references[row]):  # truncated: it has no end
                answer = answer[: len(reference)]
            num_right += decode(answer).strip() == decode(reference).strip()
    device = next(model.parameters()).device
    num_right, count = processes.sum_over_ranks([num_right, len(share)], device)
    return num_right / count


def split_last_answer(example: Example) -> tuple[list[int], list[int]]:
    """(ids before the last answer, its ids), by the tokens that are supervised."""
    start, end = true_spans(example.supervised.tolist())[-1]
    start = max(1, start)  # generation needs at least one token
    return example.ids[:start].tolist(), example.ids[start:end].tolist()
