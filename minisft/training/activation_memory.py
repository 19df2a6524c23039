"""Memory of the activations of a training step: what autograd keeps, and the logits.

memory.py adds weights, gradients and optimizer. Sizes are in bytes. D is the width of the model; Q
and K are the widths of all queries and of all keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minisft.model.alibi import ALIBI_WIDTH
from minisft.model.baichuan import NormHead
from minisft.model.lora_tools import adapted_modules
from minisft.model.memory_saving_loss import rows_of_piece
from minisft.model.quantized import PIECE, QuantizedLinear
from minisft.model.reward import Model, RewardModel
from minisft.training.build import num_trainable

FLOAT32, INT64, BOOL = 4, 8, 1


@dataclass
class Step:
    """A rank's largest micro-batch. With the model, it decides the memory of a step."""

    num_tokens: int  # with padding
    num_supervised: int  # tokens that have logits
    dtype: torch.dtype = torch.float32  # of matrix products
    device: str = "cpu"
    checkpointing: bool = False
    accumulating: bool = False  # a step has several micro-batches
    num_processes: int = 1
    is_sharded: bool = False  # FSDP, not DDP
    num_copied: int = 0  # trained numbers that the reference of DPO holds besides the model
    eight_bit: bool = False  # AdamW's moments
    pure_bf16: bool = False

    @property
    def keeps_gradients(self) -> bool:
        """True if gradients exist before a backward pass: accumulated, or in DDP's buffers."""
        return self.accumulating or (self.num_processes > 1 and not self.is_sharded)


def output_module(model: Model) -> nn.Module:
    """The module that computes the logits, or the reward."""
    if isinstance(model, RewardModel):
        return model.score
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def logit_bytes(num_logits: int, model: Model, step: Step) -> int:
    """Logits, and a piece of them in float32 with its softmax; all of that for a trained head."""
    head, vocab_size = output_module(model), model.config.vocab_size
    itemsize = FLOAT32 if isinstance(head, NormHead) else step.dtype.itemsize
    piece = min(num_logits, rows_of_piece(vocab_size, step.device == "cpu") * vocab_size)
    kept = num_logits if num_trainable(head) else 0
    return num_logits * itemsize + (kept + 2 * piece) * FLOAT32


def layer_bytes_per_token(model: Model, step: Step) -> int:
    """The bytes of one layer that autograd keeps for each token.

    An operation keeps what its gradient needs. A sum needs nothing; a product needs both factors,
    but a linear module with a frozen weight does not need its input.
    """
    config, itemsize = model.config, step.dtype.itemsize
    layer: Any = model.model.layers[-1]
    D, inner = config.hidden_size, config.intermediate_size
    head_dim = config.head_dim + (ALIBI_WIDTH if config.alibi else 0)
    Q, K = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    stream, attention, mlp = stream_itemsize(model, step), layer.self_attn, layer.mlp
    names = ("W_pack",) if config.fused_qkv else ("q_proj", "k_proj", "v_proj")
    projections = [getattr(attention, name) for name in names]
    kept = [
        norm_bytes(layer.input_layernorm, D, stream, step),
        input_bytes(projections, D, stream, step),
        (Q + 2 * K) * itemsize,  # queries, keys and values
        Q * itemsize,  # result of the attention, which o_proj shares
        norm_bytes(layer.post_attention_layernorm, D, stream, step),
        input_bytes((mlp.gate_proj, mlp.up_proj), D, stream, step),
        3 * inner * itemsize,  # gate, silu(gate) and up
        input_bytes((mlp.down_proj,), inner, itemsize, step),
    ]
    if attention.q_norm is not None:
        kept.append(norm_bytes(attention.q_norm, Q, itemsize, step))
        kept.append(norm_bytes(attention.k_norm, K, itemsize, step))
    if dropout_of(attention.o_proj) or config.alibi:  # o_proj cannot share the result
        width = config.num_attention_heads * config.head_dim
        kept.append(input_bytes((attention.o_proj,), width, itemsize, step))
    ranks = sum(module.lora_A.out_features for module in adapted_modules(layer).values())
    return sum(kept) + ranks * itemsize


def stream_itemsize(model: Model, step: Step) -> int:
    """Bytes of a number in the residual stream, which has the type of the embedding."""
    if step.is_sharded:
        return step.dtype.itemsize
    return max(model.model.embed_tokens.weight.dtype.itemsize, step.dtype.itemsize)


def norm_bytes(norm: nn.Module, width: int, itemsize: int, step: Step) -> int:
    """Input of a norm, per token. On the CPU it is computed in float32, by several operations."""
    if step.device != "cpu":
        return width * itemsize
    return (2 if num_trainable(norm) else 1) * width * FLOAT32


def input_bytes(linears: Iterable[nn.Module], width: int, itemsize: int, step: Step) -> int:
    """Input that linear modules keep, per token. itemsize: its type before they multiply.

    Trained ones share one copy, unless each converts the type or applies its own dropout, which
    keeps the result and the mask.
    """
    trained = [linear for linear in linears if num_trainable(linear)]
    product = step.dtype.itemsize
    if any(map(dropout_of, trained)):
        return len(trained) * width * 2 * product
    is_converted = itemsize > product
    return (len(trained) if is_converted else min(1, len(trained))) * width * product


def dropout_of(linear: nn.Module) -> float:
    """Dropout of an adapter's input; 0 without an adapter."""
    dropout = getattr(linear, "dropout", None)
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def loss_bytes(model: Model, step: Step) -> int:
    """Memory at the loss besides the activations of the layers and the logits."""
    D, itemsize = model.config.hidden_size, stream_itemsize(model, step)
    # States of supervised tokens; with a frozen output matrix, their gradients too.
    num_states = step.num_supervised * (1 if num_trainable(output_module(model)) else 2)
    states = (step.num_tokens + num_states) * D * itemsize
    norm = step.num_tokens * norm_bytes(model.model.norm, D, itemsize, step)
    return states + norm + step.num_tokens * (INT64 + BOOL)  # token ids and mask


def backward_bytes(model: Model, step: Step) -> int:
    """Gradients of activations in the backward pass of a layer, and a dequantised weight.

    Most are in the MLP: two of the inner width, and two of the residual stream.
    """
    inner = 2 * model.config.intermediate_size * step.dtype.itemsize
    stream = 2 * model.config.hidden_size * stream_itemsize(model, step)
    weights = [
        dequantized_bytes(module, step)
        for module in model.model.layers[-1].modules()
        if isinstance(module, QuantizedLinear)
    ]
    return step.num_tokens * (inner + stream) + max(weights, default=0)


def dequantized_bytes(layer: QuantizedLinear, step: Step) -> int:
    """A dequantised weight, and the float32 values that it is converted from."""
    count, itemsize = layer.in_features * layer.out_features, step.dtype.itemsize
    if layer.bits == 8:
        return count * (FLOAT32 if itemsize == FLOAT32 else FLOAT32 + itemsize)
    # 4 bits are converted in pieces: two values and half an int32 index for each number.
    return count * itemsize + min(count, PIECE) * (2 * FLOAT32 + 2)
