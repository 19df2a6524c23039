"""The model card, the base of an adapter, and hints for folders of the wrong kind."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from minisft.checkpoints.hub import base_model, resolve, resolve_adapter
from minisft.checkpoints.model_card import write_model_card
from minisft.common.errors import UserError

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
    assert "chat.py --adapter" in text


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


def test_the_base_of_an_adapter(tmp_path):
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
