"""Text from a message never becomes a control token; control tokens of the template always do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import fitting, load_tokenizer, transformers_tokenizer

from minisft.common.errors import UserError
from minisft.text.template_choice import NAMES, get_template
from minisft.text.tokenizer import Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")


def control_ids(template, messages, tools=None):
    """The control tokens of every example, in order."""
    controls = set(template.tokens.ids.values())
    return [
        [id for id in example.ids if id in controls] for example in template.encode(messages, tools)
    ]


def conversation(question, answer, system="Be kind."):
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_message_that_spells_control_tokens(tiny_tokenizer_dir, name):
    template = get_template(name, Tokenizer.load(tiny_tokenizer_dir))
    usual = control_ids(template, conversation("q", "a"))
    for token in template.tokens.ids:
        for text in (token, f"x{token}", f"{token} y", f" x {token}{token} y "):
            for messages in (
                conversation(text, "a"),
                conversation("q", text),
                conversation("q", "a", text),
            ):
                assert control_ids(template, messages) == usual
                [example] = template.encode(messages)
                decoded = template.tokenizer.decode(example.ids, skip_special_tokens=False)
                assert text.strip() in decoded


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer_dir):
    return get_template("chatml", Tokenizer.load(tiny_tokenizer_dir))


PARTS = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<|", "|>", "im_end", "<", ">", "\n", " ", "cat"]
)


@settings(max_examples=150, deadline=None)
@given(question=st.lists(PARTS, min_size=1), answer=st.lists(PARTS, min_size=1))
def test_any_message(chatml, question, answer):
    texts = "".join(question), "".join(answer)
    if not all(text.strip() for text in texts):
        return
    assert control_ids(chatml, conversation(*texts)) == control_ids(chatml, conversation("q", "a"))


def test_tools_that_spell_control_tokens(tiny_tokenizer_dir):
    template = get_template("qwen3", Tokenizer.load(tiny_tokenizer_dir))

    def messages(text):
        tool = {"name": f"f{text}", "description": text, "parameters": {text: {"type": text}}}
        call = {"name": f"f{text}", "arguments": {f"{text} a": [text, {text: text}]}}
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": text},
            {"role": "assistant", "content": "a"},
        ]
        return control_ids(template, turns, [tool])

    assert messages("<|im_end|>") == messages("x")


def test_a_template_that_changes_its_messages(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content.startswith('<') %}(tag) {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    template = get_template("auto", tokenizer)
    assert template.encode(conversation("<b>", "a"))  # no control token: nothing to confuse
    with pytest.raises(UserError, match="cannot be separated from the template's"):
        template.encode(conversation("<|im_end|>", "a"))


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_transformers_where_nothing_is_spelled(shared_data, name):
    """The ids of the rendered text, cut where an answer begins."""
    for tokenizer in fitting(shared_data, name):
        oracle = transformers_tokenizer(tokenizer.model_dir)
        template = get_template(name, tokenizer)
        for text in ("Name a colour.", "  你好\t👋  ", "\nTwo\n\nlines", "a<b>c [x]"):
            messages = conversation(text, "Red.")
            prompt = template.render(messages[:-1], add_generation_prompt=True)
            expected = oracle(prompt, add_special_tokens=False).input_ids
            assert template.encode_prompt(messages[:-1]) == expected
            [example] = template.encode(messages)
            assert example.ids[: len(expected)] == expected


def test_an_answer_is_tokenised_after_its_prompt(shared_data):
    """Where the two are tokenised together, the last token of the prompt merges with the answer."""
    from real_tokenizers import TINYLLAMA

    template = get_template("alpaca", load_tokenizer(shared_data / TINYLLAMA))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ":)"}]
    [example] = template.encode(messages)
    prompt = template.encode_prompt(messages[:1])
    assert example.ids[: len(prompt)] == prompt
    text = template.render(messages)
    together = template.tokens.encode(text, 0, len(text), template.tokens.find(text))
    assert together != example.ids
