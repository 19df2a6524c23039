"""How rows mark the answers to learn, and which messages are refused."""

import json

import pytest

from minisft.common.errors import UserError
from minisft.data.formats import parse_conversation
from minisft.data.row_values import BadRow
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

DEEP = '{"a":' * 5000 + "1" + "}" * 5000
TOOL = {"name": "add", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def template(tiny_tokenizer_dir):
    return get_template("qwen3", Tokenizer.load(tiny_tokenizer_dir))


def learned_texts(template, messages, tools=None):
    """The supervised text of every example."""
    texts = []
    for example in template.encode(messages, tools):
        ids = [id for id, learned in zip(example.ids, example.supervised, strict=True) if learned]
        texts.append(template.tokenizer.decode(ids, skip_special_tokens=False))
    return texts


def chat(*answers):
    """Questions with these answers, each a message without its role."""
    messages = []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", **answer}]
    return messages


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"mask": True}])
def test_an_answer_that_is_not_learned(template, mark):
    messages = chat({"content": "one", **mark}, {"content": "two"})
    assert learned_texts(template, messages) == ["two<|im_end|>"]
    assert learned_texts(template, messages[:2]) == []


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"mask": False}])
def test_an_answer_that_is_learned(template, mark):
    assert learned_texts(template, chat({"content": "one", **mark})) == ["one<|im_end|>"]


def test_spellings_of_the_same_conversation(template):
    plain = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    spelled = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": ["c"]},
    ]
    assert template.encode(spelled) == template.encode(plain)


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "id": "x", "function": CALL}]},
        {"tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
        {"function_call": CALL},
        {"tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
        {"tool_calls": [{"type": "tool_call", "id": "x", "name": "add", "args": {"a": 1}}]},
        {"tool_calls": [{"type": "tool_use", "name": "add", "input": {"a": 1}, "arguments": None}]},
    ],
)
@pytest.mark.parametrize("role", ["tool", "function"])
@pytest.mark.parametrize("result", ['{"sum": 2}', {"sum": 2}])
def test_spellings_of_a_call(template, call, role, result):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, **call},
        {"role": role, "content": result},
        {"role": "assistant", "content": "2"},
    ]
    text = template.render(messages, [TOOL])
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert '<tool_response>\n{"sum": 2}\n</tool_response>' in text
    assert learned_texts(template, messages, [TOOL])[-1] == "2<|im_end|>"


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_a_call_without_arguments(template, arguments):
    call = {"name": "add", "arguments": arguments}
    messages = chat({"content": "", "tool_calls": [call]})
    assert '{"name": "add", "arguments": {}}' in template.render(messages)


def test_a_call_with_arguments_of_another_name(template):
    messages = chat({"content": "", "tool_calls": [{"name": "add", "kwargs": {"a": 1}}]})
    with pytest.raises(UserError, match="the call of add has kwargs in place of arguments"):
        template.encode(messages)
    with pytest.raises(BadRow, match="turn 2: tool_calls: the call of add has kwargs"):
        parse_conversation({"messages": messages})


def test_thoughts(template):
    """Thoughts are learned after the prompt that asks for them; an empty block carries no loss."""
    thought = chat({"content": "one", "reasoning_content": "hmm"}, {"content": "two"})
    texts = learned_texts(template, thought)
    assert texts == ["<think>\nhmm\n</think>\n\none<|im_end|>", "two<|im_end|>"]
    for name in ("thinking", "reasoning"):
        renamed = chat({"content": "one", name: "hmm"}, {"content": "two"})
        assert learned_texts(template, renamed) == texts
    first, second = template.encode(thought)
    prompt = template.encode_prompt(thought[:3])
    assert second.ids[: len(prompt)] == prompt
    assert template.tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    asking = get_template("qwen3", template.tokenizer, enable_thinking=True)
    assert asking.tokenizer.decode(asking.encode_prompt(thought[:3])).endswith("assistant\n")
    assert learned_texts(asking, chat({"content": "two"})) == ["two<|im_end|>"]


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"content": "x", "weight": 0.5}, r"message 2 \(assistant\): weight is 0.5"),
        ({"content": "x", "train": "no"}, "train is 'no'"),
        ({"content": "x", "images": ["a.png"]}, "has images; only text"),
        ({"content": [{"type": "image_url"}]}, "a part of type image_url; only text"),
        ({"content": 5}, "neither text nor"),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "{"}]}, "of f are not JSON"),
        (
            {"content": "", "tool_calls": [{"name": "f", "arguments": DEEP}]},
            "f are nested more than",
        ),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "must be a JSON obj"),
        ({"content": "", "tool_calls": ["f"]}, "a tool call needs a name"),
        ({"content": "x", "reasoning_content": 5}, "reasoning_content must be"),
        ({"content": "x\ufdd2"}, "U\\+FDD2, which is not a character"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(template, answer, message):
    with pytest.raises(UserError, match=message):
        template.encode(chat(answer))


def test_an_unknown_role(template):
    with pytest.raises(UserError, match=r"message 1 \(critic\): unknown role 'critic'"):
        template.encode([{"role": "critic", "content": "x"}])


def test_a_template_without_a_place_for_thoughts_or_a_system_prompt(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    chatml = get_template("chatml", tokenizer)
    with pytest.raises(UserError, match="message 2 has thoughts"):
        chatml.encode(chat({"content": "x", "thinking": "y"}))
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    dropping = get_template("auto", tokenizer)
    system = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(UserError, match=r"message 1 \(system\): the template supports no"):
        dropping.encode(system + chat({"content": "x"}))
    with pytest.raises(UserError, match="supports no system prompt"):
        get_template("auto", tokenizer, default_system="Be brief.")


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"content": None, "refusal": "No."}, r"message 2 \(assistant\): has a refusal"),
        ({"content": None}, r"message 2 \(assistant\): the answer is empty"),
        ({"content": " "}, "the answer is empty"),
        ({"content": "", "tool_calls": [CALL], "function_call": CALL}, "has tool_calls and func"),
        ({"content": "x", "extra": {1, 2}}, "a value of type set is not JSON"),
        ({"content": "x", "extra": ("<s>",)}, "a value of type tuple is not JSON"),
    ],
)
def test_answers_that_would_lose_something(template, answer, message):
    with pytest.raises(UserError, match=message):
        template.encode(chat(answer))


@pytest.mark.parametrize("arguments", [False, 0, [], "0", "[]", "false"])
def test_arguments_that_are_no_object(template, arguments):
    with pytest.raises(UserError, match="the arguments of add must be a JSON object"):
        template.encode(
            chat({"content": "", "tool_calls": [{"name": "add", "arguments": arguments}]})
        )


def test_keys_that_are_no_strings(template):
    call = {"name": "add", "arguments": {1: 2}}
    with pytest.raises(UserError, match=r"message 2 \(assistant\): the key 1 of an object is not"):
        template.encode(chat({"content": "", "tool_calls": [call]}))
    with pytest.raises(UserError, match="tool 1: the key 1 of an object is not a string"):
        template.encode(chat({"content": "x"}), [{**TOOL, "parameters": {1: 2}}])


@pytest.mark.parametrize(
    "mark, words", [({"weight": 1}, "weight is 1"), ({"train": True}, "train is true")]
)
def test_only_answers_are_learned(template, mark, words):
    messages = chat({"content": "x"})
    messages[0] |= mark
    with pytest.raises(UserError, match=rf"message 1 \(user\): {words}; only answers"):
        template.encode(messages)
    with pytest.raises(BadRow, match=f"turn 1: {words}; only answers"):
        parse_conversation({"messages": messages})


def test_rows_of_files_that_would_lose_something():
    question = {"from": "human", "value": "q"}
    for turn, message in (
        (
            {"from": "gpt", "value": "", "tool_calls": [CALL], "function_call": CALL},
            "turn 2: the gpt turn has tool_c",
        ),
        ({"from": "gpt", "value": "x", "refusal": "No."}, "turn 2: the gpt turn has a refusal"),
    ):
        with pytest.raises(BadRow, match=message):
            parse_conversation({"conversations": [question, turn]})
