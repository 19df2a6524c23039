"""Stages rm and dpo: several processes, with FSDP or DDP, train the same as one."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import as_flags
from parallel_runs import (
    assert_equal_runs,
    assert_like_one_process,
    final,
    flags,
    logged,
    resumed,
    train_forked,
    write_bases,
)
from run_builder import training_options
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from minisft.checkpoints.reward_models import load_reward_model
from minisft.data.encoding import Example
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training import fsdp
from minisft.training.build import load_trainable
from minisft.training.preference import answer_log_probs, collate
from minisft.training.reference import ShardedReference

# The fixture costs much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("fsdp_preference")

BEST = "the cat sat on the mat"
HELD_OUT = {"validation_split": 5, "eval_steps": 2, "per_device_eval_batch_size": 1}
# Eighteen ragged rows, every third with three answers, twice in steps of eight.
KINDS = {
    "dpo full": as_flags(
        model_name_or_path="tied",
        stage="dpo",
        finetuning_type="full",
        dpo_ftx=0.5,
        gradient_checkpointing=True,
        load_best_model_at_end=True,
        **HELD_OUT,
    ),
    "dpo lora": as_flags(
        model_name_or_path="plain",
        stage="dpo",
        lora_rank=3,
        modules_to_save="lm_head",
        validation_split=5,
    ),
    "dpo known": as_flags(
        model_name_or_path="plain",
        stage="dpo",
        finetuning_type="full",
        precompute_reference=True,
        **HELD_OUT,
    ),
    "rm full": as_flags(model_name_or_path="tied", stage="rm", finetuning_type="full", **HELD_OUT),
    "rm lora": as_flags(model_name_or_path="plain", stage="rm", lora_rank=3, validation_split=5),
}
SHORT = {
    "dpo adapter": as_flags(model_name_or_path="plain", stage="dpo", adapter="dpo lora/2"),
    "rm adapter": as_flags(model_name_or_path="plain", stage="rm", adapter="rm lora/2"),
    "rm again": as_flags(model_name_or_path="rm full/2", stage="rm", lora_rank=2),
    "dpo baichuan": as_flags(
        model_name_or_path="baichuan-7B", stage="dpo", finetuning_type="full", dpo_ftx=0.5
    ),
    "dpo baichuan, lora": as_flags(
        model_name_or_path="baichuan-13B", stage="dpo", modules_to_save="lm_head"
    ),
    "dpo bfloat16": as_flags(
        model_name_or_path="plain", stage="dpo", finetuning_type="full", dtype="bfloat16"
    ),
}


DROPPED = as_flags(
    model_name_or_path="plain",
    stage="dpo",
    adapter="dpo lora/2",
    lora_dropout=0.9,
    dpo_ftx=1,
    dataset="pairs.json",
    max_steps=3,
)


def planned():
    for name, words in KINDS.items():
        keep = ["--save_steps", 2, "--save_total_limit", 9]
        yield flags(1, f"{name}/1", *words)
        yield flags(2, f"{name}/2", *words, *keep)
        more = 4 if name.endswith("full") else 1  # sharded by other processes, or whole again
        yield resumed(more, f"{name}/resumed", *words, f"{name}/2/checkpoint-2")
    for name in ("dpo lora", "rm full"):
        yield flags(2, f"{name}/ddp", *KINDS[name], kind="ddp")
    for name, words in SHORT.items():
        for processes in (1, 2):
            yield flags(processes, f"{name}/{processes}", *words, "--max_steps", 3)
    for processes in (1, 2):
        yield flags(processes, f"dropped/{processes}", *DROPPED)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer_dir):
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("preferences")
    write_bases(folder, tiny_tokenizer_dir)
    rows = [
        {
            "instruction": f"go {number}",
            "output": [
                f"yes {number}" * (1 + number % 5),
                "the cat sat " * (1 + 7 * number % 4),
                "no",
            ][: 3 if number % 3 == 0 else 2],
        }
        for number in range(23)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    rows = [
        {"instruction": f"go {number}", "output": [BEST, "no " * (1 + number % 5)]}
        for number in range(18)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    train_forked(folder, planned())
    return folder


@pytest.mark.parametrize(
    "name, other",
    [
        *((name, other) for name in KINDS for other in ("2", "resumed")),
        ("dpo lora", "ddp"),
        ("rm full", "ddp"),
    ],
)
def test_any_number_of_processes_trains_as_one(name, other, runs):
    """Equal metrics, gradient norms, weights and head; resumed with more or fewer."""
    rows = [row for row in logged(runs / name / "1") if "loss" in row]
    assert len(rows) == 6 and {"accuracy", "margin", "reward_chosen"} < rows[0].keys()
    assert_equal_runs(runs / name / "1", runs / name / other, near=1e-5)
    assert ("dpo" in name) == (rows[0]["margin"] == pytest.approx(0, abs=1e-5))
    assert abs(rows[-1]["margin"]) > 1e-2


@pytest.mark.parametrize("name", SHORT)
def test_other_ways_to_train(name, runs):
    """Training continues from a trained adapter or head; in half precision."""
    assert_like_one_process(runs / name, near=1e-5)


def test_the_reference_has_no_dropout(runs, tiny_tokenizer_dir):
    """Compute its log-probability of the best answers from the logged metrics:

    sft_loss is the loss of the model per token, and reward_chosen is beta times the log-ratio.
    """
    logs = [logged(runs / "dropped" / number) for number in "12"]
    template = get_template("plain", Tokenizer.load(tiny_tokenizer_dir))
    [example] = template.encode(
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": BEST}]
    )
    supervised = example.supervised
    found = [
        [-sum(supervised) * row["sft_loss"] - row["reward_chosen"] / 0.1 for row in log]
        for log in logs
    ]
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], abs=2e-4)
    dropped = [[row["sft_loss"] for row in log] for log in logs]
    assert dropped[1] != pytest.approx(dropped[0], abs=1e-3)  # the model has dropout


def test_a_head_that_was_sharded_is_loaded(runs):
    """The head has one row, which only one process held."""
    model = load_reward_model(runs / "rm full/resumed")
    assert torch.equal(model.score.weight, final(runs / "rm full/resumed")["score.weight"])
    start = load_file(runs / "rm full/2/checkpoint-2/model.safetensors")["score.weight"]
    assert not torch.equal(model.score.weight, start)


def test_the_reference_is_the_initial_model(runs):
    """The reference does not follow training; a process copies only its own rows."""
    options = training_options(parallel="fsdp", adapter=runs / "dpo lora/2")
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        model, config = load_trainable(options, runs / "plain", torch.float32, torch.device("meta"))
        fsdp.distribute(model, config, options, runs / "plain", torch.float32, torch.device("cpu"))
        batch = collate([Example(np.arange(3, 40), np.arange(37) % 20 > 8, [20, 17])])
        with torch.no_grad():
            expected = answer_log_probs(model, model, batch)
            reference = ShardedReference(model)
            for parameter in fsdp.trainable_parameters(model).values():
                parameter.to_local().add_(0.1)
        held = reference.snapshot.rows
        assert held.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
        assert 0 < sum(one.numel() for one in held.values()) < 20_000
        assert torch.equal(reference(batch), expected)
        with torch.no_grad():
            assert not torch.allclose(answer_log_probs(model, model, batch), expected)
    finally:
        dist.destroy_process_group()
