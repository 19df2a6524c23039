"""Does the output matrix share the embedding's weights, if config.json and the tensors disagree?

    config.json says    stored                              the model
    tied                embedding                           tied
    tied                output matrix                       tied: it is the embedding as well
    tied                both, equal                         tied
    tied                both, different                     untied, as in transformers 5
    untied              both                                untied

PEFT's merge_and_unload followed by save_pretrained writes the fourth kind. The third comes from
programs that store shared tensors twice, and the second from those that store them once under the
first of their names, such as safetensors' save_model and accelerate.
"""

import torch

from minisft.common.tensor_files import StoredTensor
from minisft.model.config import ModelConfig

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_ROWS = 4096  # rows compared at a time


def settle_tie(config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    """Make the config and the tensors of a checkpoint agree. Both are changed in place."""
    if not config.tie_word_embeddings or OUTPUT not in stored:
        return
    if EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(OUTPUT)
    elif equal_tensors(stored[EMBEDDING], stored[OUTPUT]):
        del stored[OUTPUT]
    else:
        config.tie_word_embeddings = False


def equal_tensors(first: StoredTensor, second: StoredTensor) -> bool:
    """True if two stored tensors have the same shape and numbers. Stops at the first difference."""
    if first.shape != second.shape:
        return False
    num_rows = first.shape[0] if first.shape else 1
    for begin in range(0, num_rows, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, num_rows)
        if not torch.equal(first.read(begin, end).float(), second.read(begin, end).float()):
            return False
    return True
