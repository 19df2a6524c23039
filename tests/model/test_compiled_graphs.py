"""--compile: every decoder layer is one graph, forward and backward, and so is a decoding step.

A graph break costs a return to Python, and the compiler fuses nothing across it. The graphs are
traced, not compiled to kernels: that needs no C++ compiler and takes a second.
"""

import numpy as np
import pytest
import torch
from conftest import CONFIG
from torch import nn

from minisft.data.batching import collate, pack
from minisft.data.encoding import Example
from minisft.generation.compiled import next_logits
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.families import position_factors
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.loss import next_token_loss
from minisft.model.quantized import QuantizedLinear

# The compiler is imported once, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("compiled")
EXAMPLES = [Example(np.arange(3, 3 + n), np.arange(n) > 2) for n in (7, 12, 9)]


def new_model(quantization_bit=None, lora=False, **fields):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, **fields}))
    model.initialize()
    if quantization_bit:
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                layer = QuantizedLinear.from_weight(module.weight, quantization_bit)
                model.model.set_submodule(name, layer)
    if lora:
        add_lora(model, LoraConfig(rank=2))
    return model


def gradients(model, batch):
    model.train()
    next_token_loss(model, *batch)[0].backward()
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


@pytest.mark.parametrize("to_batch", [collate, pack])
@pytest.mark.parametrize(
    ("fields", "checkpointing"),
    [
        ({}, False),
        ({"lora": True}, False),
        ({"lora": True}, True),
        ({"lora": True, "quantization_bit": 4}, False),
        ({"lora": True, "quantization_bit": 8}, True),
    ],
    ids=["full", "lora", "lora, checkpointed", "4 bits", "8 bits, checkpointed"],
)
def test_a_training_layer_is_one_graph(fields, checkpointing, to_batch):
    torch._dynamo.reset()
    batch, graphs = to_batch(EXAMPLES), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = gradients(new_model(**fields), batch)
    model = new_model(**fields)
    model.model.gradient_checkpointing = checkpointing
    model.model.compile_layers(fullgraph=True, backend=backend)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    # One for all layers: the lengths of a pack are no part of it. With LoRA the input of the first
    # layer has no gradient, so that layer has a graph of its own.
    assert len(graphs) == (2 if "lora" in fields else 1)


@torch.inference_mode()
def test_a_decoding_step_is_one_graph():
    """Also for a second position: it is a tensor, not a number in the graph."""
    torch._dynamo.reset()
    model, graphs = new_model(lora=True).eval(), []

    def backend(graph, inputs):
        graphs.append(graph)
        # A number among the inputs would be a part of a CUDA graph, which could not change it.
        assert all(isinstance(value, torch.Tensor) for value in inputs)
        return graph.forward

    step = torch.compile(next_logits, fullgraph=True, dynamic=False, backend=backend)
    cache = KeyValueCache(model.config, 32)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    factors = position_factors(model.config, torch.arange(32), torch.float32)
    for place in (3, 4):
        x = model.model.embed_tokens(torch.tensor([[9]]))
        arguments = x, torch.tensor([place]), factors, cache.pairs
        torch.testing.assert_close(step(model, *arguments), next_logits(model, *arguments))
    assert len(graphs) == 1
