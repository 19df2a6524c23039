"""How fast this CPU trains. One layer of the model is trained for half a second.

    speed = measure_speed(model, options, dtype, num_rows=8, length=120)
    seconds = operations / speed.operations + num_steps * num_trainable * speed.seconds_to_update

A bare matrix product would promise too much: with small matrices, most of the time passes between
the products.
"""

import copy
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch

from minisft.model.attention import attend
from minisft.model.families import position_factors
from minisft.model.gradient_checkpointing import recompute_in_backward
from minisft.model.reward import Model
from minisft.training.build import num_trainable
from minisft.training.operations import layer_operations
from minisft.training.optimizer import build_optimizer

SECONDS = 0.5
# A batch is shortened to about this many operations, so that a large layer takes no minute.
MAX_OPERATIONS, MIN_TOKENS = 2e10, 32


class Speed(NamedTuple):
    """The speed of training on this CPU, now."""

    operations: float  # a second, in the forward and backward passes of a layer
    seconds_to_update: float  # a trained parameter, in the optimizer


def measure_speed(
    model: Model, options: Namespace, dtype: torch.dtype, num_rows: int, length: int
) -> Speed:
    """Train the first layer on rows of random states.

    model: on the meta device; its layer gets random weights. dtype: of the matrix products.
    num_rows, length: of the usual micro-batch.
    """
    config, decoder = model.config, model.model
    layer = copy.deepcopy(decoder.layers[0]).to_empty(device="cpu").train()
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0.0, config.initializer_range)
        else:
            tensor.data.zero_()
    per_token = layer_operations(model, length, options.gradient_checkpointing)
    num_tokens = max(MIN_TOKENS, min(num_rows * length, int(MAX_OPERATIONS / per_token)))
    length = min(length, num_tokens)
    num_rows = max(1, num_tokens // length)
    states = torch.randn(num_rows, length, config.hidden_size)
    states = states.to(decoder.embed_tokens.weight.dtype).requires_grad_()
    factors = position_factors(config, torch.arange(length), states.dtype)
    arguments = states, factors, attend, None, 0
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def forward_and_backward() -> None:
        with autocast:
            if options.gradient_checkpointing:
                result = recompute_in_backward(layer, *arguments)
            else:
                result = layer(*arguments)
        result.sum().backward()

    speed = num_rows * length * per_token / _fastest(forward_and_backward)
    if num_trainable(layer) == 0:
        return Speed(speed, 0.0)
    seconds = _fastest(build_optimizer(layer, options).step, SECONDS / 5)
    return Speed(speed, seconds / num_trainable(layer))


def _fastest(function: Callable[[], object], seconds: float = SECONDS) -> float:
    """The seconds of the fastest call; the others waited for other work. At least two calls."""
    fastest, num_calls, end = math.inf, 0, time.perf_counter() + seconds
    while num_calls < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        function()
        fastest, num_calls = min(fastest, time.perf_counter() - began), num_calls + 1
    return fastest
