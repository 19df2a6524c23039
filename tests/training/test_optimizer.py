"""The learning-rate schedules and the decayed parameters equal those of transformers."""

import pytest
import torch
import transformers
from run_builder import training_options
from transformers import Trainer, TrainingArguments

from minisft.common.command_line import SCHEDULES
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.training.optimizer import build_optimizer, learning_rate_at

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# All our schedules warm up. transformers has a separate name for "constant" with warm-up.
THEIRS = {"constant": "constant_with_warmup"}


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_equal_transformers(schedule, warmup_steps):
    peak, end, total = 3e-4, 1e-5 if schedule == "polynomial" else 0.0, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = transformers.get_scheduler(
        THEIRS.get(schedule, schedule),
        optimizer,
        warmup_steps,
        total,
        {"lr_end": end} if schedule == "polynomial" else {},
    )
    for step in range(total):
        ours = learning_rate_at(step, total, peak, schedule, warmup_steps, end)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_what_is_decayed_equals_trainer(tmp_path):
    model = CausalLM(ModelConfig.from_dict(CONFIG)).requires_grad_(True)
    options = training_options(weight_decay="0.1")
    optimizer = build_optimizer(model, options)
    names = {id(one): name for name, one in model.named_parameters()}
    decayed = {
        names[id(one)]
        for group in optimizer.param_groups
        for one in group["params"]
        if group["weight_decay"] == 0.1
    }
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**CONFIG))
    trainer = Trainer(theirs, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert decayed == set(trainer.get_decay_parameter_names(theirs))
    assert 0 < len(decayed) < len(names)
