"""The chat template that goes along with a model: rendered elsewhere, it gives our prompts."""

import json

import jinja2
import pytest
import transformers
from conftest import CONVERSATIONS, without_bos
from minisft.text.template import TEMPLATES, Template, get_template, recognise

from minisft.common.errors import UserError
from minisft.text.chat_template import (
    ConversationForm,
    as_jinja,
    chat_template_text,
    conversation_form,
)
from minisft.text.tokenizer import Tokenizer


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_as_jinja(name, has_bos, tiny_tokenizer_dir, tmp_path):
    folder = tiny_tokenizer_dir if has_bos else without_bos(tiny_tokenizer_dir, tmp_path / "qwen")
    tokenizer = Tokenizer.load(folder)
    spelled = {"bos_token": "<s>"} if has_bos else {}
    for default_system, preface in ((None, ""), ("", "Date: {today}\n"), ('A "default".\n', "")):
        template = Template(name, tokenizer, default_system, preface)
        jinja = jinja2.Environment().from_string(as_jinja(template))
        begin = "<s>" * (has_bos and not template.writes_bos)
        for messages in CONVERSATIONS + [[{"role": "user", "content": " spaces "}]]:
            text = jinja.render(
                messages=messages, add_generation_prompt=True, eos_token="</s>", **spelled
            )
            assert text == begin + template.render(messages, add_generation_prompt=True)
    if name != "plain":  # what our own code takes it for, when it reads the file back
        assert recognise(as_jinja(template)) == name


@pytest.mark.parametrize("default_system", [None, "", 'Say "你好" \\o/,\n\tthen <|im_end|>.'])
@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"plain"}))
def test_our_jinja_is_read_back(name, default_system, tiny_tokenizer_dir):
    """A GGUF file has nothing else to say what the system prompt was in training."""
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    template = get_template(name, tokenizer, default_system)
    tokenizer.chat_template = as_jinja(template)
    back = get_template("auto", tokenizer)
    for messages in CONVERSATIONS:
        assert back.encode_prompt(messages) == template.encode_prompt(messages)
    both = [{"role": "user", "content": "Add.", "input": "1, 2"}]
    assert back.encode_prompt(both) == template.encode_prompt(both)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("alpaca", "TinyLlama-1.1B-Chat-v0.6"),
        ("llama2", "TinyLlama-1.1B-Chat-v0.6"),
        ("llama2", "Mistral-7B-Instruct-v0.2"),
        ("vicuna", "Mistral-7B-Instruct-v0.2"),
        ("llama2", "without BOS"),
        ("chatml", "without BOS"),
    ],
)
def test_ids_in_transformers(name, folder, shared_data, tiny_tokenizer_dir, tmp_path):
    """What apply_chat_template makes of a saved tokenizer's is what we ask the model."""
    source = shared_data / "tokenizers" / folder
    if folder == "without BOS":
        source = without_bos(tiny_tokenizer_dir, tmp_path / "source")
    tokenizer = Tokenizer.load(source)
    template = get_template(name, tokenizer, "Be kind.")
    tokenizer.save(tmp_path / "saved", chat_template_text(template, "Be kind."))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for messages in CONVERSATIONS:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == template.encode_prompt(messages)


def test_which_form_is_written(tiny_chat_model_dir, tmp_path):
    tokenizer = Tokenizer.load(tiny_chat_model_dir)
    own, record = tokenizer.chat_template, tmp_path / "options.toml"
    chatml = get_template("chatml", tokenizer)
    assert conversation_form(tokenizer, "auto", tmp_path, [1]) == ConversationForm(own, [1, 3])
    text = conversation_form(tokenizer, "alpaca", tmp_path, [1]).chat_template
    assert text.count("### Response:") == 2
    for recorded, expected in (
        ('template = "chatml"', own),
        ('default_system = "x"', None),
        ('template = "vicuna"', "ASSISTANT:"),
        ("seed = 1", own),
    ):
        record.write_text(recorded)
        form = conversation_form(tokenizer, "auto", tmp_path, [2])
        assert (
            expected in form.chat_template
            if expected
            else form.chat_template == as_jinja(get_template("chatml", tokenizer, "x"))
        )
        assert form.stop_ids == ([1, 2] if "vicuna" in recorded else [1, 2, 3])
    assert chat_template_text(chatml) == own
    tokenizer.chat_template = "one of its own"
    form = conversation_form(tokenizer, "auto", tmp_path, [2])
    assert form == ConversationForm("one of its own", [2])
    with pytest.raises(UserError, match="unknown template"):
        conversation_form(tokenizer, "nonsense", tmp_path, [2])


def test_it_replaces_the_base_models(tiny_chat_model_dir, tmp_path):
    Tokenizer.load(tiny_chat_model_dir).save(tmp_path, "{{ mine }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ mine }}"
    # Programs from before chat_template.jinja find it too, and what else was there.
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = json.loads((tiny_chat_model_dir / "tokenizer_config.json").read_text())
    assert config == {**before, "chat_template": "{{ mine }}"}
