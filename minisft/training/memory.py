"""Memory of a training step, computed from shapes. Nothing is loaded or allocated.

    model = model_on_meta(options, ModelConfig.load("Meta-Llama-3-8B"), torch.bfloat16)
    step = Step(num_tokens=4 * 2048, num_supervised=4 * 1500, dtype=torch.bfloat16, device="cuda")
    peak = max(phases(model, step), key=lambda phase: phase.total)
    print(peak.name, peak.parts)

A step holds weights, gradients, AdamW's moments, activations (what autograd keeps of the forward
pass) and logits. At the loss all activations and the logits are in memory; in the backward pass
gradients replace activations. `phases` adds up what is held where the sum can be largest.

D is the width of the model, Q and K are the widths of all queries and of all keys. Sizes are in
bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from minisft.model.alibi import ALIBI_WIDTH
from minisft.model.baichuan import NormHead
from minisft.model.lora import LoRALinear
from minisft.model.loss import chunk_size
from minisft.model.memory_saving_loss import rows_of_piece
from minisft.model.quantized import PIECE, QuantizedLinear
from minisft.model.reward import Model, RewardModel
from minisft.training.build import num_trainable
from minisft.training.low_memory_adamw import moment_bytes, update_bytes

FLOAT32, INT64, BOOL = 4, 8, 1
MATRICES = (nn.Linear, nn.Embedding, NormHead)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


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


@dataclass
class Phase:
    """A point in the step, and the bytes of each of PARTS there."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


def phases(model: Model, step: Step) -> list[Phase]:
    """The points of a step where the most memory can be in use."""
    layers, head, embedding = model.model.layers, output_module(model), model.model.embed_tokens
    held = partial(memory_held, model, step)

    # Activations
    stream = step.num_tokens * model.config.hidden_size * stream_itemsize(model, step)
    layer = step.num_tokens * layer_bytes_per_token(model, step)
    if step.checkpointing:  # the input of every layer, and one layer that is computed again
        kept, recomputed, first = len(layers) * stream, layer - stream, stream
    else:
        kept, recomputed, first = len(layers) * layer, 0, layer
    at_loss = kept + loss_bytes(model, step)
    backward = recomputed + backward_bytes(model, step)

    # Logits
    chunk = chunk_size(model.config.vocab_size)
    num_logits = min(step.num_supervised, chunk) * model.config.vocab_size

    # Copies of weights in the type of the products
    of_layer, of_head = cast_bytes(layers[-1], step), cast_bytes(head, step)
    of_layers = 0 if step.checkpointing else len(layers) * of_layer

    # Gradients
    all_gradients, head_gradient = gradient_bytes(model), gradient_bytes(head)
    embedding_gradient = gradient_bytes(embedding)
    largest = max(gradient_bytes(module) for module in layers[-1].modules() if is_leaf(module))
    # Every chunk of logits adds to the gradient of the output matrix.
    from_chunks = head_gradient if step.num_supervised > chunk else 0
    # The gradient of a row's length needs the scores before and after, and a product of both.
    scaled = 1 if isinstance(head, NormHead) and head_gradient else 0
    is_tied = head is embedding
    before_first_layer = all_gradients - gradient_bytes(layers[-1])
    if not is_tied:
        before_first_layer -= embedding_gradient
    # The gradient of a tied embedding is the sum of two. It is added to a kept gradient.
    of_embedding = embedding_gradient * (2 * is_tied + step.keeps_gradients)
    # AdamW's fused kernel needs no memory.
    updating = 0
    if step.eight_bit or step.pure_bf16:
        updating = max(update_bytes(one, step.eight_bit) for one in trained_parameters(model))

    points = {
        "the loss": held(
            activations=at_loss,
            finished=from_chunks,
            logits=logit_bytes(num_logits, model, step) + 2 * scaled * num_logits * FLOAT32,
            casts=of_layers + of_head,
        ),
        "the last layer, backward": held(
            activations=kept + backward,
            finished=head_gradient,
            computing=largest,
            casts=max(of_layers, of_layer),
        ),
        "the first layer, backward": held(
            activations=first + backward,
            finished=before_first_layer,
            computing=largest,
            casts=of_layer,
        ),
        "the gradient of the embedding": held(
            activations=stream, finished=all_gradients, computing=of_embedding
        ),
        "the update": held(activations=0, finished=all_gradients, updating=updating),
    }
    if head_gradient:
        points["the gradient of the output matrix"] = held(
            activations=at_loss,
            finished=from_chunks,
            computing=(1 + scaled) * head_gradient,
            logits=(1 + scaled) * num_logits * FLOAT32,
            casts=of_layers + of_head,
        )
    return [Phase(name, parts) for name, parts in points.items()]


def logit_bytes(num_logits: int, model: Model, step: Step) -> int:
    """Logits, and a piece of them in float32 with its softmax; all of that for a trained head."""
    head, vocab_size = output_module(model), model.config.vocab_size
    itemsize = FLOAT32 if isinstance(head, NormHead) else step.dtype.itemsize
    piece = min(num_logits, rows_of_piece(vocab_size, step.device == "cpu") * vocab_size)
    kept = num_logits if num_trainable(head) else 0
    return num_logits * itemsize + (kept + 2 * piece) * FLOAT32


def memory_held(
    model: Model,
    step: Step,
    activations: int,
    finished: int,
    computing: int = 0,
    logits: int = 0,
    casts: int = 0,
    updating: int = 0,
) -> dict[str, int]:
    """The bytes of each of PARTS at a point of the step.

    finished: gradients that this backward pass has finished. computing: the gradient in progress.
    casts: copies of weights in the type of the products. updating: memory of the optimizer's step.
    """
    all_gradients = gradient_bytes(model)
    trained = trained_parameters(model)
    moments = sum(moment_bytes(parameter, step.eight_bit) for parameter in trained)
    held = {
        "weights": stored_bytes(model) + step.num_copied * trained[0].itemsize,
        "gradients": all_gradients if step.keeps_gradients else finished,
        "optimizer": moments,
    }
    if step.is_sharded:
        held = {part: size // step.num_processes for part, size in held.items()}
        casts += gathered_weight_bytes(model, step)
        computing = gathered_gradient_bytes(model, step)
    held["weights"] += casts
    held["gradients"] += computing
    held["optimizer"] += updating
    return {**held, "activations": activations, "logits": logits}


# Parameters


def stored_bytes(module: nn.Module) -> int:
    """All parameters and buffers, as the model holds them."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradient_bytes(module: nn.Module) -> int:
    """Gradients of all trained parameters, in their type."""
    return sum(parameter.nbytes for parameter in trained_parameters(module))


def is_leaf(module: nn.Module) -> bool:
    """True if the module contains no others."""
    return not any(module.children())


def output_module(model: Model) -> nn.Module:
    """The module that computes the logits, or the reward."""
    if isinstance(model, RewardModel):
        return model.score
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def cast_bytes(module: nn.Module, step: Step) -> int:
    """Copies of the trained weights in half precision, which autocast keeps.

    They live until their layer's backward pass; with checkpointing, only while it computes.
    """
    if step.is_sharded or step.pure_bf16 or step.dtype.itemsize == FLOAT32:
        return 0
    matrices = [part for part in module.modules() if isinstance(part, MATRICES)]
    return step.dtype.itemsize * sum(map(num_trainable, matrices))


def gathered_weight_bytes(model: Model, step: Step) -> int:
    """FSDP: gathered weights of two layers (FSDP prefetches the next), embedding and output."""
    layer = sum(parameter.numel() for parameter in model.model.layers[-1].parameters())
    ends: set[Any] = {model.model.embed_tokens, output_module(model)}  # one module if tied
    return step.dtype.itemsize * (2 * layer + sum(end.weight.numel() for end in ends))


def gathered_gradient_bytes(model: Model, step: Step) -> int:
    """FSDP: gradients of a layer, also in float32 to be averaged, of embedding and output."""
    ends = {model.model.embed_tokens, output_module(model)}
    layer = (step.dtype.itemsize + FLOAT32) * num_trainable(model.model.layers[-1])
    return layer + step.dtype.itemsize * sum(map(num_trainable, ends))


# Activations


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
    adapters = [module for module in layer.modules() if isinstance(module, LoRALinear)]
    ranks = sum(adapter.lora_A.out_features for adapter in adapters)
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
