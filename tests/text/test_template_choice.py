"""Sources of a template's text: names, files, settings, and the template of a training."""

import json

import pytest
import transformers
from conftest import without_bos
from real_tokenizers import LLAMA3, MISTRAL, QWEN, TINYLLAMA, load_tokenizer
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.text.render_process import MAX_TEMPLATE
from minisft.text.template_choice import get_template, trained_template
from minisft.text.tokenizer import Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")

SYSTEM = {"role": "system", "content": "Be brief.\nBe kind."}
QUESTION = [{"role": "user", "content": "Hi"}]


def test_default_system_prompt(shared_data, tiny_tokenizer_dir, tmp_path):
    """The system prompt is written into the text, so that other programs render it as well."""
    question, tail = QUESTION, "<|im_start|>user\nHi<|im_end|>\n"
    qwen = load_tokenizer(shared_data / QWEN)
    assert "You are Qwen" in get_template("auto", qwen).render(question)
    assert get_template("auto", qwen, default_system="").render(question).endswith(tail)
    assert get_template("chatml", qwen).render(question) == tail
    text = 'Say "你好" \\o/,\n\tthen {{ go }} {% on %}.'
    small = Tokenizer.load(without_bos(tiny_tokenizer_dir, tmp_path / "small"))
    for name, tokenizer in (("auto", qwen), ("chatml", small), ("qwen3", small)):
        template = get_template(name, tokenizer, default_system=text)
        expected = f"<|im_start|>system\n{text}<|im_end|>\n{tail}"
        assert template.render(question) == expected
        assert template.render([SYSTEM, *question]) != expected
        tokenizer.save(tmp_path / name, template.text)
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert hf.apply_chat_template(question, tokenize=False) == expected
        # A second time, and read back: the lines are written once.
        again = get_template("auto", Tokenizer.load(tmp_path / name), default_system=text)
        assert again.text == template.text
    with pytest.raises(UserError, match="--default_system contains '<.im_end.>', a control"):
        get_template("chatml", qwen, default_system="a <|im_end|>")
    with pytest.raises(UserError, match="default_system: the template auto supports no"):
        get_template("auto", load_tokenizer(shared_data / MISTRAL), default_system="Be kind.")


def test_an_empty_default_system(shared_data, tmp_path):
    """It removes the system prompt of the template and that of the training, and writes no turn."""
    question, qwen = QUESTION, load_tokenizer(shared_data / QWEN)
    small = str(shared_data / "chat_templates/Mistral-Small-3.2-24B-Instruct-2506.jinja")
    assert "You are Mistral" in get_template(small, qwen).render(question)
    emptied = get_template(small, qwen, default_system="").render(question)
    assert emptied.endswith("[SYSTEM_PROMPT][/SYSTEM_PROMPT][INST]Hi[/INST]")
    # These have none. gemma and Mistral 7B refuse a system message.
    for tokenizer, name in (
        (qwen, str(shared_data / "chat_templates/Qwen-Qwen3-0.6B.jinja")),
        (qwen, str(shared_data / "chat_templates/google-gemma-2-2b-it.jinja")),
        (load_tokenizer(shared_data / MISTRAL), "auto"),
    ):
        emptied = get_template(name, tokenizer, default_system="").render(question)
        assert emptied == get_template(name, tokenizer).render(question)
    chatml = (shared_data / "chat_templates/classic-chatml.jinja").read_text(encoding="utf-8")
    path = tmp_path / "chat_template.jinja"
    path.write_text(chatml, encoding="utf-8")
    own = get_template(str(path), qwen)
    path.write_text(get_template(str(path), qwen, "Be kind.").text, encoding="utf-8")
    (tmp_path / "options.toml").write_text('template = "x"\ndefault_system = "Be kind."\n')
    assert "Be kind." in trained_template("auto", qwen, tmp_path).render(question)
    emptied = trained_template("auto", qwen, tmp_path, default_system="")
    assert emptied.render(question) == own.render(question)
    assert "Be brief." in emptied.render([SYSTEM, *question])


def test_template_kwargs_are_written_into_the_text(shared_data, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{{ bos_token }}{{ mood }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    tokenizer = load_tokenizer(shared_data / MISTRAL)
    kwargs = {"mood": {"of": ["glad", None, 1.5, True, 'a "b"\n']}}
    template = get_template(str(path), tokenizer, template_kwargs=kwargs)
    text = template.render([*QUESTION, {"role": "assistant", "content": "Yes"}])
    assert text == "<s>" + str(kwargs["mood"]) + "Hi</s>Yes</s>"
    assert "mood" in template.text and template.name == str(path)
    for bad in ({"not a name": 1}, {"x-y": 1}, {"if": 1}):
        with pytest.raises(UserError, match="--template_kwargs: .* is not a variable name"):
            get_template(str(path), tokenizer, template_kwargs=bad)
    for name in ("bos_token", "eos_token", "messages", "tools", "add_generation_prompt", "range"):
        with pytest.raises(UserError, match=f"--template_kwargs: {name} cannot be set: it comes"):
            get_template(str(path), tokenizer, template_kwargs={name: ""})
    for value, message in (
        (float("nan"), "a template cannot hold the number nan"),
        ({"of": [float("inf")]}, "a template cannot hold the number inf"),
        ({1, 2}, "a value of type set cannot be written"),
    ):
        with pytest.raises(UserError, match=f"--template_kwargs: mood: {message}"):
            get_template(str(path), tokenizer, template_kwargs={"mood": value})


def test_a_file_with_a_byte_order_mark(tiny_tokenizer_dir, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "\ufeff{% for m in messages %}{{ m.content }}</s>{% endfor %}", encoding="utf-8"
    )
    template = get_template(str(path), Tokenizer.load(tiny_tokenizer_dir))
    assert template.render(QUESTION) == "Hi</s>" and "\ufeff" not in template.text


def test_templates_that_do_not_fit_are_refused(shared_data, tmp_path):
    llama2, llama3 = load_tokenizer(shared_data / TINYLLAMA), load_tokenizer(shared_data / LLAMA3)
    with pytest.raises(UserError, match="llama3 ends an answer with '<.eot_id.>'"):
        get_template("llama3", llama2)
    with pytest.raises(UserError, match="unknown template 'lama'; choose one of auto, alpaca, .*"):
        get_template("lama", llama2)
    with pytest.raises(UserError, match="no chat template.*alpaca"):
        get_template("auto", llama3)
    with pytest.raises(UserError, match="there is no such file"):
        get_template("nothing.jinja", llama3)
    big = tmp_path / "big.jinja"
    big.write_text("a" * (MAX_TEMPLATE + 1))
    with pytest.raises(UserError, match="1,048,577 characters; 1,048,576 is the limit"):
        get_template(str(big), llama3)


def test_the_template_of_a_training(shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / QWEN)
    text = get_template("alpaca", tokenizer, "Be kind.").text
    (tmp_path / "options.toml").write_text('template = "alpaca"\ndefault_system = "Be kind."\n')
    expected = get_template("alpaca", tokenizer, "Be kind.")
    for _ in range(2):  # by its name, then by its text
        template = trained_template("auto", tokenizer, tmp_path)
        assert template.text == text and template.encode_prompt(QUESTION) == expected.encode_prompt(
            QUESTION
        )
        (tmp_path / "chat_template.jinja").write_text(text)
    assert (
        trained_template("chatml", tokenizer, tmp_path)
        .render(QUESTION)
        .startswith("<|im_start|>system\nBe kind.<|im_end|>")
    )


@pytest.mark.parametrize("form", ["list", "files"])
def test_a_template_for_conversations_with_tools(form, shared_data, tmp_path):
    """transformers chooses `tool_use` if there are tools, from the checkpoint and when saved."""
    qwen = shared_data / "chat_templates/Qwen-Qwen2.5-7B-Instruct.jinja"
    for_tools = "\n" + qwen.read_text(encoding="utf-8")
    build_checkpoint(shared_data / "models/stories260K", for_tools, tmp_path / "base")
    config = json.loads((tmp_path / "base/tokenizer_config.json").read_text(encoding="utf-8"))
    default = "\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    default += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
    if form == "list":
        texts = {"default": default, "tool_use": for_tools, "rag": "x"}
        config["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    else:
        (tmp_path / "base/chat_template.jinja").write_text(default)
        (tmp_path / "base/additional_chat_templates").mkdir()
        (tmp_path / "base/additional_chat_templates/tool_use.jinja").write_text(for_tools)
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path / "base")
    template = get_template("auto", tokenizer)
    changed = get_template("auto", tokenizer, template_kwargs={"mood": "glad"})
    tokenizer.save(tmp_path / "same", template.text)
    tokenizer.save(tmp_path / "changed", changed.text)
    function = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    for folder in ("base", "same", "changed"):
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        ours = get_template("auto", Tokenizer.load(tmp_path / folder))
        for offered in (None, tools):
            theirs = hf.apply_chat_template(
                QUESTION, offered, add_generation_prompt=True, return_dict=False
            )
            assert theirs == template.encode_prompt(QUESTION, offered)
            assert theirs == ours.encode_prompt(QUESTION, offered)
            assert ("<tools>" in hf.decode(theirs)) == bool(offered)
