"""The learning rate that train.py chooses, and what it says about it."""

import pytest
from conftest import CONFIG
from run_builder import training_options

from minisft.training.defaults import choose_learning_rate, default_learning_rate


@pytest.mark.parametrize(
    "method, stage, hidden_size, rate",
    [
        ("lora", "sft", 4096, 2e-4),  # 7B: what QLoRA's authors and LLaMA-Factory's recipes use
        ("full", "sft", 4096, 2e-5),  # 7B: what Alpaca was trained with
        ("lora", "sft", 576, 1e-3),  # SmolLM2-135M: see docs/training.md
        ("full", "sft", 576, 1e-4),
        ("from_scratch", "pt", 2048, 3e-4),  # TinyLlama took 4e-4
        ("lora", "dpo", 4096, 1e-5),
        ("full", "dpo", 4096, 1e-6),
    ],
)
def test_rates(method, stage, hidden_size, rate):
    assert default_learning_rate(method, stage, hidden_size) == rate


def test_a_given_rate_stays():
    said = []
    options = training_options(learning_rate="3e-4")
    choose_learning_rate(options, 576, said.append)
    assert options.learning_rate == 3e-4 and said == []


@pytest.mark.parametrize(
    "words, rate, method",
    [
        ([], 1e-3, "LoRA"),
        (["--quantization_bit", "4"], 1e-3, "LoRA"),
        (["--finetuning_type", "full"], 1e-4, "all weights"),
        (["--finetuning_type", "full", "--train_from_scratch"], 1e-3, "random weights"),
        (["--stage", "dpo"], 5e-5, "DPO of LoRA"),
    ],
)
def test_a_chosen_rate_is_explained(words, rate, method):
    said = []
    options = training_options(*words)
    options.learning_rate = None
    choose_learning_rate(options, 576, said.append)
    assert options.learning_rate == rate
    [line] = said
    assert f"{rate:g}" in line and method in line and "hidden size 576" in line


def test_run_and_plan_choose_the_same(here, checkpoint, rows_file, tmp_path):
    """The line comes at the start, and options.toml holds the rate."""
    import train

    assert CONFIG["hidden_size"] == 32
    flags = dict(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="alpaca",
        output_dir=tmp_path / "o",
    )
    line = "--learning_rate: 0.01, the default for LoRA and hidden size 32"
    assert line in here(train, "--dry_run", **flags)
    assert line in here(train, max_steps=1, **flags)
    assert "learning_rate = 0.01" in (tmp_path / "o" / "options.toml").read_text()
