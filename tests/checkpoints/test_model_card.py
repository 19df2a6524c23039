"""The model card, the base of an adapter, and hints for folders of the wrong kind."""

import json
import shlex

import peft
import pytest
import yaml
from huggingface_hub import ModelCard

from minisft.checkpoints import hub
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.hub import base_model, resolve, resolve_adapter
from minisft.checkpoints.model_card import write_model_card
from minisft.common.errors import UserError
from minisft.model.lora import LoraConfig, add_lora

OPTIONS = {
    "stage": "sft",
    "dataset": "rows.json,owner/data",
    "template": "chatml",
    "default_system": "Be\nbrief | kind.",
    "learning_rate": 1e-4,
    "packing": False,
    "cutoff_len": 512,
}
METRICS = [{"step": 1, "loss": 2.5}, {"step": 9, "loss": 1.5}, {"step": 9, "eval_loss": 1.7}]


def test_the_card_is_what_the_hub_reads(tmp_path):
    write_model_card(tmp_path, OPTIONS, "owner/base", METRICS, is_adapter=True)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.datasets) == (
        "owner/base",
        "peft",
        ["owner/data"],
    )
    assert data.license is None and data.pipeline_tag == "text-generation"
    text = (tmp_path / "README.md").read_text()
    assert "| system prompt | Be brief \\| kind. |" in text and "packing" not in text
    assert "| loss | 1.5 | 9 |" in text and "| eval_loss | 1.7 | 9 |" in text
    assert "The evaluation covers at most the first 512 tokens of a row." in text
    assert f"chat.py --adapter path/to/{tmp_path.name}\n" in text  # no folder of this machine


@pytest.mark.parametrize("folder", ["runs/a", "my runs/b"])
def test_the_command_of_the_card_works_where_the_run_was_made(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    write_model_card(folder, OPTIONS, "owner/base", is_adapter=True)
    command = (tmp_path / folder / "README.md").read_text().split("```")[1].splitlines()[1]
    *_, flag, path = shlex.split(command)
    assert flag == "--adapter" and (tmp_path / path / "README.md").is_file()


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_base_that_was_quantised_is_quantised_again(is_adapter, tmp_path):
    """The full base may not fit into memory. A complete model is no longer quantised."""
    options = {**OPTIONS, "quantization_bit": 4}
    write_model_card(tmp_path, options, "owner/base", is_adapter=is_adapter)
    command = (tmp_path / "README.md").read_text().split("```")[1].splitlines()[1]
    assert command.endswith(" --quantization_bit 4") == is_adapter


def settings(folder):
    """The table of settings in a card, as a dict."""
    text = (folder / "README.md").read_text().partition("## Metrics")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return dict(cells[1:])


@pytest.mark.parametrize(
    "options, expected, absent",
    [
        ({"cutoff_len": 1024}, {"cutoff_len": "512"}, ["block_size"]),
        ({"cutoff_len": 64}, {"cutoff_len": "64"}, []),
        ({"cutoff_len": "x", "stage": ["y"]}, {"cutoff_len": "x"}, []),  # edited by hand
        ({"dtype": "auto", "template": "auto"}, {"template": "the base's own"}, ["dtype"]),
        ({"dtype": "auto", "bf16": True}, {"dtype": "bfloat16"}, []),
        ({"replace": "name=A", "validation_split": 20}, {"replace": "name=A"}, []),
        ({"validation_split": 20}, {"validation_split": "20"}, []),
        ({"validation_split": 20, "eval_dataset": "x"}, {}, ["validation_split"]),
        ({"num_train_epochs": 3.0}, {"num_train_epochs": "3.0"}, ["max_steps"]),
        ({"num_train_epochs": 3.0, "max_steps": 7}, {"max_steps": "7"}, ["num_train_epochs"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": "5"}, ["warmup_ratio"]),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, {}, ["warmup_ratio"]),
        ({"finetuning_type": "full", "lora_rank": 8, "lora_target": "all"}, {}, ["lora_rank"]),
        (
            {"seed": 0, "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0},
            {"seed": "0", "warmup_steps": "0", "max_grad_norm": "0.0"},
            ["weight_decay"],
        ),
        (
            {"train_from_scratch": True, "optim": "adamw_8bit", "mix": "/home/me/more.json:0.2"},
            {"train_from_scratch": "True", "optim": "adamw_8bit", "mix": "more.json:0.2"},
            [],
        ),
        ({"enable_thinking": False}, {"enable_thinking": "false"}, []),
        (
            {"finetuning_type": "lora", "adapter": "/home/me/first", "lora_rank": 8},
            {"adapter": "first"},
            ["lora_rank"],
        ),
        (
            {"stage": "pt", "cutoff_len": 99, "block_size": 2048, "template": "chatml"},
            {"block_size": "512"},
            ["cutoff_len", "template"],
        ),
    ],
)
def test_the_card_states_what_was_used(options, expected, absent, tmp_path):
    write_model_card(tmp_path, options, "owner/base", context_length=512)
    stated = settings(tmp_path)
    assert expected.items() <= stated.items() and not stated.keys() & set(absent)


def test_the_limit_of_the_evaluation_is_that_of_the_model(tmp_path):
    write_model_card(tmp_path, OPTIONS, "owner/base", METRICS, context_length=128)
    assert "at most the first 128 tokens of a row" in (tmp_path / "README.md").read_text()
    options = {"stage": "pt", "dataset": "rows.txt", "block_size": 64}
    write_model_card(tmp_path, options, "owner/base", METRICS, context_length=128)
    assert "The evaluation covers blocks of 64 tokens." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "options, is_reward_model, tags, task",
    [
        ({}, False, ["minisft"], "text-generation"),
        ({}, True, ["minisft"], "text-classification"),
        ({"stage": "dpo"}, False, ["minisft", "dpo"], "text-generation"),
        ({"seed": 1}, False, ["minisft", "sft"], "text-generation"),
    ],
)
def test_the_tags_claim_no_training_that_is_not_known(
    options, is_reward_model, tags, task, tmp_path
):
    write_model_card(tmp_path, options, "owner/base", is_reward_model=is_reward_model)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.tags, data.pipeline_tag) == (tags, task)
    assert ("chat.py" in (tmp_path / "README.md").read_text()) == (not is_reward_model)


def test_a_card_of_somebody_else_is_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("mine")
    write_model_card(tmp_path, OPTIONS, "owner/base")
    assert path.read_text() == "mine"
    path.unlink()
    for base in ("owner/first", str(tmp_path)):  # our own is written again
        write_model_card(tmp_path, {}, base)
    front = path.read_text().split("---")[1]
    assert "base_model" not in yaml.safe_load(front)  # a folder is no name on the hub
    assert str(tmp_path.parent) not in path.read_text()


def test_the_base_of_an_adapter(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda name, patterns, offline: asked.append(name))
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    config = adapter / "adapter_config.json"
    for name, found in ((str(base), str(base)), ("owner/name", "owner/name")):
        config.write_text(json.dumps({"base_model_name_or_path": name}))
        assert base_model(adapter) == found
    config.write_text(json.dumps({"base_model_name_or_path": "../base"}))
    assert resolve_adapter(base_model(adapter) + "/../adapter") is not None
    for name in ("/no/where/at/all", None):
        config.write_text(json.dumps({"base_model_name_or_path": name}))
        with pytest.raises(UserError, match="Give it as --model_name_or_path"):
            base_model(adapter)
    assert asked == ["owner/name"]  # mistakes show before anything else is read


def test_a_relative_base_is_not_taken_for_a_model_on_the_hub(tmp_path, monkeypatch):
    """Adapters of older versions and of PEFT have `examples/base`. The error names the file."""

    def fail(name, patterns, offline):
        raise UserError(f"download of {name} failed (it is not in the cache)")

    monkeypatch.setattr(hub, "download", fail)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "examples/no_base"})
    )
    with pytest.raises(UserError) as error:
        base_model(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/adapter_config.json names the base model examples/no_b")
    assert "no such folder" in message and message.endswith("Or give --model_name_or_path.")
    assert base_model(tmp_path, offline=True) == "examples/no_base"  # --dry_run downloads nothing


def test_a_saved_adapter_works_from_every_folder(checkpoint, tmp_path, monkeypatch):
    """Its base is an absolute path; the name of a model on the hub stays."""
    model, config = load_model(checkpoint), LoraConfig(rank=2)
    add_lora(model, config)
    monkeypatch.chdir(checkpoint.parent)
    save_adapter(model, "runs/a", config, checkpoint.name)
    save_adapter(model, "runs/hub", config, "owner/name")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    runs = checkpoint.parent / "runs"
    assert base_model(runs / "a") == str(checkpoint)
    assert base_model(runs / "hub", offline=True) == "owner/name"
    assert peft.PeftConfig.from_pretrained(runs / "a").base_model_name_or_path == str(checkpoint)
    load_adapter(load_model(base_model(runs / "a")), runs / "a")


def test_a_folder_of_the_wrong_kind_gets_the_next_step(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter: give it as --adapter"):
        resolve(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="holds a model, not an adapter"):
        resolve_adapter(tmp_path)
    (tmp_path / "config.json").unlink()
    for step in (9, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/adapter_config.json").write_text("{}")
    for find in (resolve, resolve_adapter):
        with pytest.raises(UserError, match="--adapter .*checkpoint-14 can be used"):
            find(tmp_path)
