"""Arithmetic operations of training.

A token needs 2 operations, a multiplication and an addition, for each weight it is multiplied by.
The backward pass needs 2 more for the gradient of the input, and 2 for that of the weight if it is
trained. Checkpointing repeats the forward pass. Attention adds its own.
"""

import math
import time

import torch

from minisft.model.quantized import count_parameters
from minisft.model.reward import Model
from minisft.training.build import num_trainable


def training_operations(model: Model, length: float, checkpointing: bool = False) -> float:
    """Operations to train on a token of a row of this length."""
    forward = forward_operations(model, length)
    to_inputs = forward + attention_operations(model, length)  # attention has two inputs
    to_weights = 2 * num_trainable(model)
    if model.model.embed_tokens.weight.requires_grad:
        to_weights -= 2 * num_looked_up(model)
    return forward * (2 if checkpointing else 1) + to_inputs + to_weights


def forward_operations(model: Model, length: float) -> float:
    """Operations of the forward pass for a token of a row of this length."""
    num_weights = count_parameters(model) - num_looked_up(model)
    return 2 * num_weights + attention_operations(model, length)


def attention_operations(model: Model, length: float) -> float:
    """Products of queries, keys and values: a token sees half of its row on average."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length


def measure_speed(width: int, inner_width: int, dtype: torch.dtype) -> float:
    """Operations a second of this CPU, in products of the size of an MLP. Takes about 0.3 seconds.

    The fastest of them counts: the others waited for other work.
    """
    inputs, weight = (
        torch.ones(256, width, dtype=dtype),
        torch.ones(width, inner_width, dtype=dtype),
    )
    fastest, end = math.inf, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        began = time.perf_counter()
        inputs @ weight
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * inputs.numel() * inner_width / fastest


def num_looked_up(model: Model) -> int:
    """Embedding weights that multiply nothing; 0 if they also compute the logits."""
    is_tied = model.config.tie_word_embeddings
    return 0 if is_tied else model.model.embed_tokens.weight.numel()
