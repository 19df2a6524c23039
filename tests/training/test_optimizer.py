"""The learning-rate schedules and the decayed parameters equal those of transformers."""

import re

import pytest
import torch
import transformers
from run_builder import training_options
from transformers import Trainer, TrainingArguments

from minisft.common.errors import UserError
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.training.optimizer import build_optimizer
from minisft.training.run import build_schedule
from minisft.training.schedule_settings import SETTINGS, check_settings
from minisft.training.schedules import build_rate

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WSD = "warmup_stable_decay"
SCHEDULES = [
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("polynomial", {"lr_end": 0.0}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 13}),
    (WSD, {"num_decay_steps": 12}),
    (WSD, {"num_decay_steps": 12, "num_stable_steps": 5, "decay_type": "1-sqrt"}),
    (WSD, {"num_decay_steps": 9, "warmup_type": "cosine", "decay_type": "linear"}),
    (WSD, {"num_decay_steps": 50, "warmup_type": "1-sqrt", "min_lr_ratio": 0.1, "num_cycles": 2}),
]


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize(("schedule", "settings"), SCHEDULES)
def test_rates_equal_transformers(schedule, settings, warmup_steps):
    peak, total = 3e-4, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = transformers.get_scheduler(schedule, optimizer, warmup_steps, total, settings)
    check_settings(schedule, settings)
    ours = build_rate(schedule, peak, total, warmup_steps, settings)
    for step in range(total + 1):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_a_run_of_one_step_has_no_warm_up():
    """The first step of a warm-up has rate 0: a share of one step would leave nothing to learn."""
    schedule = build_schedule(training_options(max_steps=1, learning_rate=1e-3), 10, 10)
    assert schedule.learning_rate(0) == 1e-3
    assert build_schedule(training_options(max_steps=2), 10, 10).warmup_steps == 1


def test_a_warm_up_longer_than_the_run_is_reported():
    lines = []
    build_schedule(training_options(max_steps=20, warmup_steps=19), 100, 10, lines.append)
    assert not lines
    build_schedule(training_options(max_steps=20, warmup_steps=20), 100, 10, lines.append)
    assert lines[0].startswith("--warmup_steps 20: the run has 20 steps, so the learning rate")


def test_every_schedule_is_compared():
    assert {name for name, _ in SCHEDULES} == set(SETTINGS)
    assert set(SETTINGS) < {kind.value for kind in transformers.SchedulerType}


def test_rate_of_a_run():
    settings = '{"min_lr": 1e-5}'
    name = "cosine_with_min_lr"
    options = training_options(
        lr_scheduler_type=name, lr_scheduler_kwargs=settings, max_steps=20, warmup_steps=4
    )
    rate = build_schedule(options, 100, 10).learning_rate
    assert rate(2) == pytest.approx(0.5e-4) and rate(20) == pytest.approx(1e-5)
    options = training_options(lr_scheduler_type="polynomial", lr_end=2e-5, max_steps=20)
    assert build_schedule(options, 100, 10).learning_rate(20) == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosine", '{"min_lr": 1}', '"min_lr" is not a setting of the schedule cosine. It has num'),
        ("linear", '{"power": 1}', "It has none"),
        ("polynomial", '{"power": "2"}', "must be a number of at least 0, not '2'"),
        ("polynomial", '{"power": NaN}', "NaN is not a number in JSON"),
        ("cosine_with_min_lr", "{}", "needs a lowest rate"),
        ("cosine_with_min_lr", '{"min_lr": 0, "min_lr_rate": 0}', "not both"),
        (WSD, "{}", "num_decay_steps"),
        (WSD, '{"num_decay_steps": 1, "decay_type": "up"}', "one of linear, cosine, 1-sqrt"),
        ("cosine", "[]", "not a JSON object"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        training_options(lr_scheduler_type=name, lr_scheduler_kwargs=settings)


def test_a_constant_rate_has_no_warm_up():
    with pytest.raises(UserError, match="constant_with_warmup"):
        training_options(lr_scheduler_type="constant", warmup_steps=3)


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
