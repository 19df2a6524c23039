"""Load matrices of a GGUF file in the blocks in which they are stored.

    place_blocks(model, stored, torch.bfloat16)     # before load_weights, which loads the rest

So the model takes about the memory of the file: Q4_0, Q4_1 and Q8_0 are multiplied as they are, and
the embedding stays in the file, which is mapped into memory. Other types (the K-quants) have blocks
of 16 or scales of scales, for which torch has no product; they are dequantised.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from minisft.checkpoints.tied_weights import EMBEDDING
from minisft.common.tensor_files import StoredTensor
from minisft.gguf.unpack import read_blocks
from minisft.model.decoder import CausalLM
from minisft.model.packed_weights import (
    ROWS_TOGETHER,
    Int4Linear,
    Int4PairLinear,
    StoredEmbedding,
)
from minisft.model.quantized import plain_linear


def place_blocks(model: CausalLM, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    """Replace the layers of a model on the meta device whose weights are stored in blocks.

    dtype: the type of a tied output matrix that is not stored in blocks. A tied embedding becomes
    two modules.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (weight := stored.get(f"{name}.weight")):
            if (layer := block_layer(weight, module.bias)) is not None:
                model.set_submodule(name, layer)
    embedding = stored[EMBEDDING]
    if embedding.unpack is None:
        return
    rows = StoredEmbedding(partial(read_rows, embedding), dtype)
    model.set_submodule("model.embed_tokens", rows)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        head = block_layer(embedding, None) or plain_linear(embedding.read().to(dtype), None)
        model.add_module("lm_head", head)


def block_layer(weight: StoredTensor, bias: nn.Parameter | None) -> nn.Module | None:
    """A linear layer with the blocks of a stored weight; None if there is no product for them."""
    blocks = read_blocks(weight) if weight.shape[0] % ROWS_TOGETHER == 0 else []
    if not blocks:
        return None
    if len(blocks) == 1:
        return Int4Linear.from_blocks(blocks[0], bias)
    high, low = (Int4Linear.from_blocks(part) for part in blocks)
    return Int4PairLinear(high, low, bias)


def read_rows(embedding: StoredTensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows (T, D) of a stored embedding."""
    return torch.cat([embedding.read(id, id + 1) for id in ids.tolist()])
