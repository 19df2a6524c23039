"""load_for_inference: the model that load_model and load_adapter give, faster."""

import pytest
import torch
from torch import nn

from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.inference import load_for_inference
from minisft.model.decoding_layers import DecodingLinear
from minisft.model.joined_layers import has_joined_layers
from minisft.model.lora import LoraConfig, LoRALinear, add_lora
from minisft.model.packed_weights import can_pack_weights

CPU = torch.device("cpu")


def logits(model):
    """Logits (1, T, V) of a few tokens."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor([[5, 6, 7, 8]]))).float()


@pytest.fixture
def adapter_dir(checkpoint, tmp_path):
    """An adapter that changes the model."""
    model, config = load_model(checkpoint), LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", config, str(checkpoint))
    return tmp_path / "adapter"


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_added_or_merged(merge, checkpoint, adapter_dir):
    expected = load_model(checkpoint, torch.float32)
    load_adapter(expected, adapter_dir)
    model = load_for_inference(checkpoint, adapter_dir, torch.float32, CPU, merge=merge)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert merge != any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(expected.eval()), rtol=1e-4, atol=1e-5)
    if merge:  # every merged layer is a fast one, too
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert {type(layer) for layer in layers} == {DecodingLinear}


@pytest.mark.parametrize("pack", [False, True])
def test_joined_and_packed_where_there_are_kernels(pack, checkpoint):
    plain = load_model(checkpoint, torch.bfloat16)
    model = load_for_inference(checkpoint, None, torch.bfloat16, CPU, pack=pack)
    assert has_joined_layers(model) == (pack and can_pack_weights(torch.bfloat16, CPU))
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02 * expected.std())
