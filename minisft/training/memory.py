"""The memory of a training step, computed from shapes: nothing is loaded and nothing allocated.

    model = skeleton(ModelConfig.load("Meta-Llama-3-8B"), torch.bfloat16)
    add_lora(model, LoraConfig(rank=8))                             # or model.requires_grad_(True)
    step = Step(num_tokens=4 * 2048, num_learned=4 * 1500, dtype=torch.bfloat16, device="cuda")
    peak = max(moments(model, step), key=lambda moment: moment.total)
    print(peak.name, peak.parts)

A training step holds the weights, the optimizer's state and, in the course of it, more and less of
three other things: activations (what autograd keeps of the forward pass to go back through it),
logits, gradients. `kept_in_layer` is the list of the activations. Which of the three stand together
is a matter of when: `moments` goes through the step and adds up what is held at each of the few
points where the sum can be largest.

The letters of the shapes are those of model.py; sizes are bytes.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import nn

from minisft.model.decoder import CausalLM
from minisft.model.lora import LoRALinear
from minisft.model.loss import chunk_size
from minisft.model.quantized import PIECE, QuantizedLinear, convert_parameters

FLOAT32, INT64 = 4, 8
# While the loss of a chunk is computed: logits and log-probabilities.
LOGIT_COPIES = 2
# AdamW's mean and mean square of every trained number.
ADAM_STATES = 2
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


@dataclass
class Step:
    """What the memory of a step depends on beside the model: one process's largest micro-batch.

    num_tokens: rows times padded length, or the packed length. num_learned: how many of them are
    supervised, and so have logits. accumulating: a step has several micro-batches. sharded: FSDP,
    not DDP. num_copied: numbers that are kept as they were beside the model, in float32.
    """

    num_tokens: int
    num_learned: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    checkpointing: bool = False
    packed: bool = False
    accumulating: bool = False
    num_processes: int = 1
    sharded: bool = False
    num_copied: int = 0


@dataclass
class Moment:
    """A point of the step, and the bytes that each of PARTS has there."""

    name: str
    parts: dict = field(default_factory=dict)

    @property
    def total(self):
        """All parts together."""
        return sum(self.parts.values())


def skeleton(config, dtype, quantization_bit=None, build=CausalLM):
    """A model as load_model would load it, frozen, but without its numbers (on the meta device)."""
    with torch.device("meta"):
        model = build(dataclasses.replace(config))
        for name, module in list(model.model.layers.named_modules()) if quantization_bit else ():
            if isinstance(module, nn.Linear):
                owner, _, child = name.rpartition(".")
                layer = QuantizedLinear(
                    module.in_features, module.out_features, quantization_bit, module.bias
                )
                setattr(model.model.layers.get_submodule(owner), child, layer)
    model.requires_grad_(False)
    convert_parameters(model, dtype)
    return model


def bytes_of(module):
    """Of all parameters and buffers."""
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def trained_numbers(module):
    """How many of its numbers are trained."""
    return sum(one.numel() for one in module.parameters() if one.requires_grad)


def kept_in_layer(model, step):
    """{what autograd keeps of a layer's forward pass: bytes per token}.

    An operation keeps what its gradient is made of. A sum keeps nothing; a product keeps both
    factors, but not one whose partner is frozen: the input of a linear layer is kept only where
    that layer, or an adapter beside it, is trained.
    """
    config, layer = model.config, model.model.layers[-1]
    D, inner = config.hidden_size, config.intermediate_size
    Q, K = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    number, stream = step.dtype.itemsize, stream_bytes(model, step)
    attention, mlp = layer.self_attn, layer.mlp
    kept = {
        "input, for its norm": norm_bytes(layer.input_layernorm, D, stream, step),
        "normed input of q, k, v": inputs_kept(
            (attention.q_proj, attention.k_proj, attention.v_proj), D, number, stream
        ),
        "queries, keys, values": (Q + 2 * K) * number,
        "answer of attention": Q * number,
        "log of the attention's sums": config.num_attention_heads * FLOAT32,
        "input of the MLP, for its norm": norm_bytes(
            layer.post_attention_layernorm, D, stream, step
        ),
        "normed input of gate, up": inputs_kept((mlp.gate_proj, mlp.up_proj), D, number, stream),
        "gate, silu(gate), up": 3 * inner * number,
        "their product": inputs_kept((mlp.down_proj,), inner, number, number),
        "low-rank states": sum(
            one.lora_A.out_features * number
            for one in layer.modules()
            if isinstance(one, LoRALinear)
        ),
    }
    if attention.q_norm is not None:
        kept["queries and keys before their norms"] = sum(
            norm_bytes(norm, width, number, step, groups=width // config.head_dim)
            for norm, width in ((attention.q_norm, Q), (attention.k_norm, K))
        )
    if step.packed and step.device == "cpu":  # each row's answer, and all rows' in one piece
        kept["answers of attention in a row"] = inputs_kept((attention.o_proj,), Q, number, number)
    elif dropout_of(attention.o_proj):
        kept["dropped answer of attention"] = inputs_kept((attention.o_proj,), Q, number, number)
    return kept


def stream_bytes(model, step):
    """Bytes of a number of the residual stream: it has the type that the embedding is held in."""
    if step.sharded:
        return step.dtype.itemsize
    held = model.model.embed_tokens.weight.dtype.itemsize
    return max(held, step.dtype.itemsize)


def norm_bytes(norm, width, number, step, groups=1):
    """A norm keeps its input and a factor for each token (or head, `groups` of them)."""
    if step.device != "cpu":
        return width * number + groups * FLOAT32
    # There it is made of smaller operations, in float32: a trained weight keeps what it multiplies.
    return (1 + norm.weight.requires_grad) * width * FLOAT32 + groups * FLOAT32


def inputs_kept(linears, width, number, stream):
    """What these linear layers keep of the input (..., width) that they share.

    They share one copy, unless each converts it from the stream's type or drops parts of it.
    """
    learning = [one for one in linears if trained_numbers(one)]
    dropped = [one for one in learning if dropout_of(one)]
    if dropped:
        return len(dropped) * width * (number + number)  # what is left, and the mask
    copies = len(learning) if stream > number else min(1, len(learning))
    return copies * width * number


def dropout_of(linear):
    """The share that an adapter drops of its input."""
    return isinstance(linear, LoRALinear) and getattr(linear.dropout, "p", 0.0)


def moments(model, step):
    """The Moments of a step at which most can be held, in their order."""
    kept, working, gradient = activations(model, step), working_bytes(model, step), gradients(model)
    cast = cast_bytes(model.model.layers[-1], step)
    casts = cast * (0 if step.checkpointing else len(model.model.layers))
    cast_of_head = cast_bytes(output_module(model), step)
    size = chunk_size(model.config.vocab_size)
    chunk = min(step.num_learned, size) * model.config.vocab_size * FLOAT32
    # A trained output matrix has a gradient from every chunk: their sum, and the new one beside it.
    head = gradient["head"] * (step.num_learned > size)
    yield moment(
        model,
        step,
        "the loss",
        kept["layers"] + kept["loss"],
        head,
        logits=LOGIT_COPIES * chunk,
        casts=casts + cast_of_head,
    )
    if gradient["head"]:
        yield moment(
            model,
            step,
            "the output matrix's gradient",
            kept["layers"] + kept["loss"],
            head,
            gradient["head"],
            chunk,
            casts + cast_of_head,
        )
    yield moment(
        model,
        step,
        "back through the last layer",
        kept["layers"] + kept["again"] + working,
        gradient["head"],
        gradient["largest"],
        casts=max(cast, casts),
    )
    tied = model.config.tie_word_embeddings
    earlier = gradient["all"] - gradient["layer"] - (0 if tied else gradient["embedding"])
    yield moment(
        model,
        step,
        "back through the first layer",
        kept["first layer"] + kept["again"] + working,
        earlier,
        gradient["largest"],
        casts=cast,
    )
    # A tied embedding's is a sum, made beside both summands; to one of before another is added.
    yield moment(
        model,
        step,
        "the embedding's gradient",
        kept["stream"],
        gradient["all"],
        gradient["embedding"] * (2 * tied + keeps_gradients(step)),
    )


def moment(model, step, name, activations, done, new=0, logits=0, casts=0):
    """A Moment: to what comes and goes, what is always there is added.

    done: bytes of the gradients that this pass back has left. new: of the one that it makes.
    casts: of weights in another type.
    """
    averages, parts = ADAM_STATES * gradients(model)["all"], 1
    weights = bytes_of(model) + FLOAT32 * step.num_copied
    if step.sharded:
        whole_weights, new = gathered_bytes(model, step)
        casts, parts = casts + whole_weights, step.num_processes
    if keeps_gradients(step):  # to which the new one is added
        done = gradients(model)["all"]
    return Moment(
        name,
        {
            "weights": weights // parts + casts,
            "gradients": done // parts + new,
            "optimizer": averages // parts,
            "activations": activations,
            "logits": logits,
        },
    )


def gradients(model):
    """Bytes of the gradients: of all, of the ends of the model, of a layer, of its largest one."""
    layer = model.model.layers[-1]
    sizes = {
        name: trained_numbers(part)
        for name, part in (
            ("all", model),
            ("embedding", model.model.embed_tokens),
            ("head", output_module(model)),
            ("layer", layer),
        )
    }
    sizes["largest"] = max([0, *(one.numel() for one in layer.parameters() if one.requires_grad)])
    return {name: FLOAT32 * size for name, size in sizes.items()}


def keeps_gradients(step):
    """Whether gradients outlive a micro-batch: those of the one before, or DDP's buckets."""
    return step.accumulating or step.num_processes > 1 and not step.sharded


def gathered_bytes(model, step):
    """(weights, gradients) that fsdp.py has whole for the moment, in the type that is computed in.

    The weights of the layer at work and of the next one, which is on its way; embedding and output
    matrix until the end of the step. The gradients of a layer, in float32 to be averaged, and those
    of embedding and output matrix.
    """
    if not step.sharded:
        return 0, 0
    layer = model.model.layers[-1]
    ends = {model.model.embed_tokens, output_module(model)}  # one module where they are tied
    number = step.dtype.itemsize
    weights = 2 * sum(one.numel() for one in layer.parameters())
    weights += sum(one.weight.numel() for one in ends)
    gradients = (number + FLOAT32) * trained_numbers(layer)
    return number * weights, gradients + number * sum(map(trained_numbers, ends))


def activations(model, step):
    """Bytes of what is kept, by how far back it is needed."""
    tokens, stream = step.num_tokens, model.config.hidden_size * stream_bytes(model, step)
    layer, count = tokens * sum(kept_in_layer(model, step).values()), len(model.model.layers)
    if step.checkpointing:  # of each layer its input
        layers, again, first = count * tokens * stream, layer, tokens * stream
        if step.device != "cpu" or stream_bytes(model, step) == FLOAT32:
            again -= tokens * stream  # which is what its first norm keeps
    else:
        layers, again, first = count * layer, 0, layer
    # With a frozen embedding nothing is computed back to the first norm.
    if not (step.checkpointing or model.model.embed_tokens.weight.requires_grad):
        layers -= tokens * norm_bytes(
            model.model.norm, model.config.hidden_size, stream_bytes(model, step), step
        )
    end = tokens * norm_bytes(
        model.model.norm, model.config.hidden_size, stream_bytes(model, step), step
    )
    # The states of learned tokens, and their gradients where the output matrix is frozen.
    chosen = step.num_learned * stream * (1 if trained_numbers(output_module(model)) else 2)
    return {
        "stream": tokens * stream,
        "layers": layers,
        "again": again,
        "first layer": first,
        "loss": end + tokens * stream + chosen + tokens * (INT64 + 1),
    }


def working_bytes(model, step):
    """What the backward pass of a layer holds beside what was kept: gradients of activations.

    Most in the MLP: the gradient of the product (from both paths where there is an adapter), or of
    its two factors; and those of the residual stream. A quantised weight is there as a whole.
    """
    config = model.config
    inner = 2 * config.intermediate_size * step.dtype.itemsize
    stream = 2 * config.hidden_size * stream_bytes(model, step)
    quantized = max(
        [
            dequantized_bytes(one, step.dtype.itemsize)
            for one in model.model.layers[-1].modules()
            if isinstance(one, QuantizedLinear)
        ],
        default=0,
    )
    return step.num_tokens * (inner + stream) + quantized


def dequantized_bytes(layer, number):
    """While a quantised weight is made anew: the weight, and what it is made of, in float32."""
    count = layer.in_features * layer.out_features
    if layer.bits == 8:
        return count * (FLOAT32 if number == FLOAT32 else FLOAT32 + number)
    return count * number + min(count, PIECE) * (2 + 2 * FLOAT32)  # an int32 for two numbers


def output_module(model):
    """The module whose weight gives the logits, or the reward."""
    if hasattr(model, "score"):
        return model.score
    tied = model.config.tie_word_embeddings
    return model.model.embed_tokens if tied else model.lm_head


def cast_bytes(module, step):
    """Bytes of the copies, in the type of the activations, of what is trained in float32.

    module: a layer, or that of the output matrix. Copies live until they have been gone back
    through; with checkpointing those of a layer go with it, and are made again.
    """
    if step.sharded or step.dtype.itemsize == FLOAT32:
        return 0
    return step.dtype.itemsize * sum(
        trained_numbers(one)
        for one in module.modules()
        if isinstance(one, (nn.Linear, nn.Embedding))
    )
