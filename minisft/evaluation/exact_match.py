"""How many held-out rows a model answers word for word, while it is in training.

    share = exact_match(model, examples, template, batch_size=8)

For tasks whose answers can be checked: their loss may fall long before or after they come right.
"""

from itertools import takewhile

import numpy as np

from minisft.common import processes
from minisft.generation.generate import Sampling, generate

# Another spelling of the right answer, in tokens, may be that much longer.
MARGIN = 8


def exact_match(model, examples, template, batch_size):
    """Share of Examples whose last answer comes out the same, greedily, over all processes.

    White space around an answer does not count. An answer that the length limit has cut is
    compared as it is.
    """
    model.eval()
    stop_ids, decode = template.stop_token_ids(), template.tokenizer.decode
    split = [split_last_answer(example) for example in examples]
    split = sorted(split, key=lambda one: len(one[0]))[processes.rank() :: processes.world_size()]
    right = 0
    for start in range(0, len(split), batch_size):
        prompts, references = zip(*split[start : start + batch_size], strict=True)
        sampling = Sampling(max_new_tokens=max(map(len, references)) + MARGIN, greedy=True)
        for answer, ids in zip(
            generate(model, prompts, sampling, stop_ids), references, strict=True
        ):
            reference = list(takewhile(lambda id: id not in stop_ids, ids))
            right += decode(answer).strip() == decode(reference).strip()
    device = model.model.embed_tokens.weight.device
    right, count = processes.sum_over_ranks([right, len(split)], device)
    return right / count


def split_last_answer(example):
    """(ids before the last answer, its ids), where the mask of what is learned says it is."""
    end = int(np.flatnonzero(example.supervised)[-1]) + 1
    before = np.flatnonzero(~example.supervised[:end])
    start = int(before[-1]) + 1 if len(before) else 1  # something must stand before an answer
    return example.ids[:start].tolist(), example.ids[start:end].tolist()
