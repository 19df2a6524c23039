"""On a GPU: the same numbers as on the CPU, to the rounding of its types. Skipped without one."""

import copy

import pytest
import torch
from conftest import CONFIG

from minisft.config import ModelConfig
from minisft.generate import Sampling, generate
from minisft.lora import LoraConfig, add_lora
from minisft.model import CausalLM
from minisft.objective import next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def models():
    """The same random model on the CPU and on the GPU, both in float32."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    add_lora(model, LoraConfig(rank=4))
    torch.backends.cuda.matmul.allow_tf32 = False
    return model, copy.deepcopy(model).cuda()


def batch(device):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG["vocab_size"], (3, 40), generator=generator)
    return tokens.to(device), (torch.arange(40) > 10).expand(3, 40).to(device)


def test_loss_and_gradients(models):
    results = []
    for model in models:
        device = next(model.parameters()).device
        loss, _ = next_token_loss(model, *batch(device))
        loss.backward()
        grads = {name: one.grad.cpu() for name, one in model.named_parameters()
                 if one.grad is not None}
        results.append((loss.item(), grads))
    (cpu_loss, cpu_grads), (gpu_loss, gpu_grads) = results
    assert abs(cpu_loss - gpu_loss) < 1e-4 * cpu_loss
    for name, grad in cpu_grads.items():
        torch.testing.assert_close(gpu_grads[name], grad, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast_is_close(models):
    _, model = models
    exact, _ = next_token_loss(model, *batch("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = next_token_loss(model, *batch("cuda"))
    assert abs(exact - rounded) < 0.02 * exact


def test_generates_the_same(models):
    prompts = [[1, 5, 9], [1, 7, 8, 9, 10, 11], [1]]
    sampling = Sampling(max_new_tokens=20, greedy=True)
    cpu, gpu = (generate(model.eval(), prompts, sampling, {2}) for model in models)
    assert cpu == gpu
