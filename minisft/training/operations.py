"""Arithmetic operations of training.

A token needs 2 operations, a multiplication and an addition, for each weight it is multiplied by.
The backward pass needs 2 more for the gradient of the input, and 2 for that of the weight if it is
trained. Checkpointing repeats the forward pass. Attention adds its own.
"""

from minisft.model.parameters import count_parameters
from minisft.model.reward import Model
from minisft.training.build import num_trainable


def training_operations(model: Model, length: float, checkpointing: bool = False) -> float:
    """Operations to train on a token of a row of this length."""
    num_trained = num_trainable(model)
    if model.model.embed_tokens.weight.requires_grad:
        num_trained -= num_looked_up(model)
    num_weights = count_parameters(model) - num_looked_up(model)
    attention = attention_operations(model, length)
    return _operations(num_weights, num_trained, attention, checkpointing)


def layer_operations(model: Model, length: float, checkpointing: bool = False) -> float:
    """The part of the first decoder layer in training_operations."""
    layer = model.model.layers[0]
    attention = attention_operations(model, length) / model.config.num_hidden_layers
    return _operations(count_parameters(layer), num_trainable(layer), attention, checkpointing)


def _operations(num_weights: int, num_trained: int, attention: float, checkpointing: bool) -> float:
    forward = 2 * num_weights + attention
    to_inputs = forward + attention  # attention has two inputs
    return forward * (2 if checkpointing else 1) + to_inputs + 2 * num_trained


def forward_operations(model: Model, length: float) -> float:
    """Operations of the forward pass for a token of a row of this length."""
    num_weights = count_parameters(model) - num_looked_up(model)
    return 2 * num_weights + attention_operations(model, length)


def attention_operations(model: Model, length: float) -> float:
    """Products of queries, keys and values: a token sees half of its row on average."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length


def num_looked_up(model: Model) -> int:
    """Embedding weights that multiply nothing; 0 if they also compute the logits."""
    is_tied = model.config.tie_word_embeddings
    return 0 if is_tied else model.model.embed_tokens.weight.numel()
