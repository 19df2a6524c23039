"""The chat template that is saved with a model: in transformers it gives our prompt ids."""

import json

import pytest
import transformers
from chat_templates import byte_level, control_tokens
from conftest import CONVERSATIONS, without_bos

from minisft.common.errors import UserError
from minisft.text.saved_form import saved_form, saved_text
from minisft.text.template_choice import (
    CHAT_TEMPLATE,
    FOLDER,
    NAMES,
    get_template,
    trained_template,
)
from minisft.text.template_settings import (
    fixed_setting,
    setting,
    split_settings,
    system_setting,
    unfixed_setting,
    with_settings,
)
from minisft.text.tokenizer import Tokenizer

SYSTEM = 'Say "你好" \\o/ in 100 %} of cases,\n\tthen stop.'
QWEN3 = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")


def ids_in_transformers(folder, messages, **variables):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **variables
    )


@pytest.fixture
def qwen3(tmp_path):
    """A tokenizer with the template and the control tokens of Qwen 3."""
    byte_level(tmp_path / "qwen3", control_tokens(QWEN3))
    (tmp_path / "qwen3" / CHAT_TEMPLATE).write_text(QWEN3, encoding="utf-8")
    return Tokenizer.load(tmp_path / "qwen3")


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"qwen3"}))
def test_a_saved_template_in_transformers(name, has_bos, tiny_tokenizer_dir, tmp_path):
    folder = tiny_tokenizer_dir if has_bos else without_bos(tiny_tokenizer_dir, tmp_path / "qwen")
    tokenizer = Tokenizer.load(folder)
    for system in (None, "", SYSTEM):
        template = get_template(name, tokenizer, system)
        tokenizer.save(tmp_path / "saved", saved_text(template))
        for messages in CONVERSATIONS[:2]:
            ids = template.encode_prompt(messages)
            assert ids_in_transformers(tmp_path / "saved", messages) == ids
        saved = Tokenizer.load(tmp_path / "saved")
        text = template.render(CONVERSATIONS[0], add_generation_prompt=True)
        again = get_template("auto", saved)
        assert again.render(CONVERSATIONS[0], add_generation_prompt=True) == text
        assert system in text if system else True


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("alpaca", "TinyLlama-1.1B-Chat-v0.6"),
        ("llama2", "TinyLlama-1.1B-Chat-v0.6"),
        ("llama2", "Mistral-7B-Instruct-v0.2"),
        ("vicuna", "Mistral-7B-Instruct-v0.2"),
        ("auto", "TinyLlama-1.1B-Chat-v0.6"),
    ],
)
def test_ids_in_transformers(name, folder, shared_data, tmp_path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / folder)
    template = get_template(name, tokenizer, "Be kind.")
    tokenizer.save(tmp_path / "saved", saved_text(template))
    for messages in CONVERSATIONS:
        assert ids_in_transformers(tmp_path / "saved", messages) == template.encode_prompt(messages)


def test_thinking_is_off_as_in_training(qwen3, tmp_path):
    """A program can still ask for thoughts. After training with thoughts, thinking is on."""
    [question, *_] = CONVERSATIONS
    thinks, answers = (get_template("auto", qwen3, enable_thinking=on) for on in (True, None))
    ids, others = thinks.encode_prompt(question), answers.encode_prompt(question)
    assert ids != others
    qwen3.save(tmp_path / "saved", saved_text(answers))
    assert ids_in_transformers(tmp_path / "saved", question) == others
    assert ids_in_transformers(tmp_path / "saved", question, enable_thinking=True) == ids
    qwen3.save(tmp_path / "saved", saved_text(thinks))
    assert ids_in_transformers(tmp_path / "saved", question) == ids
    # chat.py and another export read the same from the exported folder, which has no options.toml.
    saved = Tokenizer.load(tmp_path / "saved")
    again = trained_template("auto", saved, tmp_path / "saved")
    assert again.encode_prompt(question) == ids
    assert saved_form(saved, "auto", tmp_path / "saved", []).chat_template == saved_text(thinks)
    off = {"template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}
    for choices in off:
        again = trained_template("auto", saved, tmp_path / "saved", **choices)
        assert again.encode_prompt(question) == others
    # As a variable of the template, too.
    by_kwargs = get_template("auto", qwen3, template_kwargs={"enable_thinking": True})
    assert by_kwargs.encode_prompt(question) == ids


def test_saving_again_changes_nothing(qwen3, tmp_path):
    """A saved folder is trained again with the same options, and with another system prompt."""
    first = saved_text(get_template("auto", qwen3, "One.", {"x": [1, None, {"a": "%}"}]}))
    qwen3.save(tmp_path / "saved", first)
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved_text(get_template("auto", saved)) == first
    second = saved_text(get_template("auto", saved, "Two."))
    assert second == first.replace("One.", "Two.")


def test_settings_are_lines_that_are_recognised():
    settings = setting("a", {"b": [1.5, None, True, 'x"%}\n']}) | system_setting(SYSTEM)
    text = with_settings("\n{{ a }}", settings)
    assert split_settings(text) == (settings, "\n{{ a }}")
    assert len(text.splitlines()) == 4
    assert split_settings("{% set a = b %}{% set c = 1 %}\n") == (
        {},
        "{% set a = b %}{% set c = 1 %}\n",
    )
    for line in (None, setting("a", False)["a"]):
        [fixed] = fixed_setting("a", line).values()
        assert unfixed_setting("a", fixed) == ({} if line is None else {"a": line})
        assert split_settings(fixed) == ({"a": fixed}, "")


def test_bos_and_eos_are_stated_for_transformers(tiny_tokenizer_dir, tmp_path):
    """If only config.json names them, the saved tokenizer_config.json names them too."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((tiny_tokenizer_dir / "tokenizer.json").read_bytes())
    (source / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}'
    )
    tokenizer = Tokenizer.load(source)
    template = get_template("alpaca", tokenizer)
    tokenizer.save(tmp_path / "saved", saved_text(template))
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["padding_side"] == "left"
    assert ids_in_transformers(tmp_path / "saved", CONVERSATIONS[2])[0] == 0
    for messages in CONVERSATIONS:
        assert ids_in_transformers(tmp_path / "saved", messages) == template.encode_prompt(messages)


def test_which_form_is_written(tiny_chat_model_dir, qwen3, tmp_path):
    tokenizer = Tokenizer.load(tiny_chat_model_dir)
    own, record = tokenizer.chat_template, tmp_path / "options.toml"
    form = saved_form(tokenizer, "auto", tmp_path, [1])
    assert (form.chat_template, form.stop_ids, form.is_trained) == (own, [1, 3], False)
    text = saved_form(tokenizer, "alpaca", tmp_path, [1]).chat_template
    assert text == (FOLDER / "alpaca.jinja").read_text(encoding="utf-8")
    for recorded, expected, stops in (
        ("seed = 1", own, [1, 2, 3]),
        ('default_system = "x"', with_settings(own, system_setting("x")), [1, 2, 3]),
        ('template = "vicuna"', (FOLDER / "vicuna.jinja").read_text(encoding="utf-8"), [1, 2]),
    ):
        record.write_text(recorded)
        form = saved_form(tokenizer, "auto", tmp_path, [2])
        assert (form.chat_template, form.stop_ids, form.is_trained) == (expected, stops, True)
    (tmp_path / CHAT_TEMPLATE).write_text(own + "{# trained #}")
    assert saved_form(tokenizer, "auto", tmp_path, [2]).chat_template == own + "{# trained #}"
    with pytest.raises(UserError, match="unknown template"):
        saved_form(tokenizer, "nonsense", tmp_path, [2])
    # A checkpoint that was only published, and one that was trained on plain text.
    assert saved_form(qwen3, "auto", qwen3.model_dir, []).chat_template == QWEN3
    record.write_text('stage = "pt"')
    (tmp_path / CHAT_TEMPLATE).unlink()
    assert saved_form(qwen3, "auto", tmp_path, []).chat_template == QWEN3
    asked = saved_form(qwen3, "auto", tmp_path, [], enable_thinking=False).chat_template
    assert asked == with_settings(QWEN3, setting("enable_thinking", False))
    tokenizer.chat_template = None
    assert saved_form(tokenizer, "auto", tmp_path, [2]).chat_template is None


def test_it_replaces_the_base_models(tiny_chat_model_dir, tmp_path):
    Tokenizer.load(tiny_chat_model_dir).save(tmp_path, "{{ other }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ other }}"
    # Programs older than chat_template.jinja find it too, and all other entries are kept.
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = json.loads((tiny_chat_model_dir / "tokenizer_config.json").read_text())
    assert config == {**before, "chat_template": "{{ other }}"}
