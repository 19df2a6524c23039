"""Memory of a training step, computed from shapes. Nothing is loaded or allocated.

    model = model_on_meta(options, ModelConfig.load("Meta-Llama-3-8B"), torch.bfloat16)
    step = Step(num_tokens=4 * 2048, num_supervised=4 * 1500, dtype=torch.bfloat16, device="cuda")
    peak = max(phases(model, step), key=lambda phase: phase.total)
    print(peak.name, peak.parts)

A step holds weights, gradients, AdamW's moments, activations (what autograd keeps of the forward
pass) and logits. At the loss all activations and the logits are in memory; in the backward pass
gradients replace activations. `phases` adds up what is held where the sum can be largest.
activation_memory.py has the activations. Sizes are in bytes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from minisft.model.baichuan import NormHead
from minisft.model.loss import chunk_size
from minisft.model.reward import Model
from minisft.training.activation_memory import (
    FLOAT32,
    Step,
    backward_bytes,
    layer_bytes_per_token,
    logit_bytes,
    loss_bytes,
    output_module,
    stream_itemsize,
)
from minisft.training.build import num_trainable, trained_parameters
from minisft.training.low_memory_adamw import moment_bytes, update_bytes

MATRICES = (nn.Linear, nn.Embedding, NormHead)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


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
    layers, head = model.model.layers, output_module(model)
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

    # Copies of weights in the type of the products
    of_layer, of_head = cast_bytes(layers[-1], step), cast_bytes(head, step)
    of_layers = 0 if step.checkpointing else len(layers) * of_layer

    # Gradients and logits
    all_gradients, head_gradient = gradient_bytes(model), gradient_bytes(head)
    largest = max(gradient_bytes(module) for module in layers[-1].modules() if is_leaf(module))
    chunk = chunk_size(model.config.vocab_size)
    num_logits = min(step.num_supervised, chunk) * model.config.vocab_size
    # Every chunk of logits adds to the gradient of the output matrix.
    from_chunks = head_gradient if step.num_supervised > chunk else 0
    # The gradient of a row's length needs the scores before and after, and a product of both.
    scaled = 1 if isinstance(head, NormHead) and head_gradient else 0

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
            finished=gradients_before_first_layer(model),
            computing=largest,
            casts=of_layer,
        ),
        "the gradient of the embedding": held(
            activations=stream,
            finished=all_gradients,
            computing=embedding_gradient_bytes(model, step),
        ),
        "the update": held(finished=all_gradients, updating=optimizer_bytes(model, step)),
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


def memory_held(
    model: Model,
    step: Step,
    finished: int,
    activations: int = 0,
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


def gradient_bytes(module: nn.Module) -> int:
    """Gradients of all trained parameters, in their type."""
    return sum(parameter.nbytes for parameter in trained_parameters(module))


def gradients_before_first_layer(model: Model) -> int:
    """Gradients that are finished when the backward pass reaches the first layer."""
    embedding, layer = model.model.embed_tokens, model.model.layers[-1]
    finished = gradient_bytes(model) - gradient_bytes(layer)
    return finished - (0 if output_module(model) is embedding else gradient_bytes(embedding))


def embedding_gradient_bytes(model: Model, step: Step) -> int:
    """Memory to compute it: a tied one is the sum of two, and is added to a kept gradient."""
    is_tied = output_module(model) is model.model.embed_tokens
    return gradient_bytes(model.model.embed_tokens) * (2 * is_tied + step.keeps_gradients)


def optimizer_bytes(model: Model, step: Step) -> int:
    """Temporary memory of AdamW's update. The fused kernel needs none."""
    if not (step.eight_bit or step.pure_bf16):
        return 0
    is_cpu, matrices = step.device == "cpu", trained_parameters(model)
    return max(update_bytes(matrix, step.eight_bit, is_cpu) for matrix in matrices)


def is_leaf(module: nn.Module) -> bool:
    """True if the module contains no others."""
    return not any(module.children())


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
