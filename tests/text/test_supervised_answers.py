"""Which part of a rendered text is the answer: real and small templates that make it difficult."""

import re

import pytest
from real_tokenizers import LLAMA3, QWEN, load_tokenizer
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}


def conversation(*texts: str) -> list[dict]:
    """Questions and answers in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


def learned(template: ChatTemplate, messages: list[dict], tools: list | None = None) -> list[str]:
    """The supervised text of every example."""
    return [
        template.tokenizer.decode(
            [id for id, learn in zip(example.ids, example.supervised, strict=True) if learn],
            skip_special_tokens=False,
        ).strip()
        for example in template.encode(messages, tools)
    ]


@pytest.mark.parametrize(
    "texts",
    [
        ("Hi", "Hi there!"),
        ("Paris", "The capital is Paris."),
        ("Hi", "Hi[ /INST] Hi"),
        ("Hi", "Yes", "Hi", "Hi"),
    ],
)
def test_an_answer_repeats_the_question(texts, shared_data, tmp_path):
    """Mistral-Nemo moves the system prompt into the last question, so it is found by its text."""
    name = "mistralai-Mistral-Nemo-Instruct-2407"
    text = (shared_data / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    folder = build_checkpoint(shared_data / "models/stories260K", text, tmp_path / name)
    template = get_template("auto", Tokenizer.load(folder))
    answers = [f"{answer}</s>" for answer in texts[1::2]]
    assert learned(template, [SYSTEM, *conversation(*texts)]) == answers


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_answer(tiny_tokenizer_dir, answer: str) -> ChatTemplate:
    """ChatML that writes answers in this way."""
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    tokenizer.chat_template = CHATML.replace("ANSWER", answer)
    return get_template("auto", tokenizer)


@pytest.mark.parametrize(
    "answer",
    [
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}",
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}"
        "{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}{{ '\n' }}",
    ],
)
def test_generation_blocks_agree_with_the_mask(answer, tiny_tokenizer_dir):
    template = with_answer(tiny_tokenizer_dir, answer)
    messages = conversation("one", "two", "three", "four")
    assert learned(template, messages) == ["two<|im_end|>four<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", "leave out '<.im_end.>'"),
        (
            "{% generation %}{{ m.content[:1] }}{% endgeneration %}{{ m.content[1:] }}<|im_end|>",
            "leave out 'wo<",
        ),
        (
            "{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}",
            "leave out 'two",
        ),
        (
            "{% generation %}{{ m.content }}<|im_end|> End.{% endgeneration %}",
            "contain ' End.' after",
        ),
        ("{{ m.content }}<|im_end|>", None),
        (
            "{% if loop.index > 2 %}{{ m.content }}<|im_end|>{% else %}{% generation %}"
            "{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}",
            "leave out 'four<",
        ),
    ],
)
def test_generation_blocks_that_contradict_the_mask(answer, message, tiny_tokenizer_dir):
    template = with_answer(tiny_tokenizer_dir, answer)
    messages = conversation("one", "two", "three", "four")
    if message is None:
        assert learned(template, messages) == ["two<|im_end|>four<|im_end|>"]
        return
    with pytest.raises(UserError, match=message):
        template.encode(messages)
    # A row that teaches nothing needs no blocks.
    assert template.encode([messages[0], {**messages[1], "weight": 0}]) == []


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def asking(*calls: dict) -> list[dict]:
    """A question, an answer with these calls, and their results."""
    messages = conversation("Is it cold?", "")
    messages[-1]["tool_calls"] = list(calls)
    return messages + [{"role": "tool", "content": f"{n} degrees"} for n, _ in enumerate(calls)]


def real_template(shared_data, tmp_path, name: str) -> ChatTemplate:
    text = (shared_data / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    folder = build_checkpoint(shared_data / "models/stories260K", text, tmp_path / name)
    return get_template("auto", Tokenizer.load(folder))


@pytest.mark.parametrize("name", ["openai-gpt-oss-120b", "GigaChat3.1-10B-A1.8B"])
def test_a_template_that_writes_one_call_per_answer(name, shared_data, tmp_path):
    template = real_template(shared_data, tmp_path, name)
    assert "Oslo" in learned(template, asking(call("fone", city="Oslo")))[0]
    for second in (call("ftwo", town="Bergen"), call("fone", city="Bergen")):
        second_name = second["function"]["name"]
        with pytest.raises(UserError, match=f"message 2 .assistant.: .* its call of {second_name}"):
            template.encode(asking(call("fone", city="Oslo"), second))


@pytest.mark.parametrize("num_messages", [2, 3])
def test_calls_end_with_the_token_before_their_result(num_messages, shared_data, tmp_path):
    """A model that did not learn it would go on after a call, and invent the result."""
    template = real_template(shared_data, tmp_path, "GLM-4.6")
    messages = asking(call("fone", city="Oslo"))[:num_messages]
    assert learned(template, messages)[0].endswith("</tool_call><|observation|>")
    assert learned(template, conversation("Hi", "Hello."))[0].endswith("Hello.<|user|>")
    ends = {template.tokens.ids[token] for token in ("<|user|>", "<|observation|>")}
    assert ends <= template.stop_token_ids()


ARGUMENTS = {
    "city": 'Os"lo\n<é>',
    "n": 1.0,
    "big": 10**17,
    "ok": True,
    "nothing": None,
    "list": [1, "zwei"],
    "object": {"k": {"deep": False}},
    "empty": "",
}


@pytest.mark.parametrize(
    "name",
    [  # JSON, JSON in JSON, Python, XML
        "meetkai-functionary-medium-v3.1",
        "meetkai-functionary-medium-v3.2",
        "GLM-4.6",
        "MiniMax-M3",
        "Qwen-Qwen3-0.6B",
        "upstage-Solar-Open-100B",
    ],
)
def test_arguments_in_the_forms_of_real_templates(name, shared_data, tmp_path):
    template = real_template(shared_data, tmp_path, name)
    assert template.encode(asking(call("fone", **ARGUMENTS), call("ftwo", **ARGUMENTS)))


def test_a_template_that_cuts_a_question(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    text = CHATML.replace("ANSWER", "{{ m.content }}<|im_end|>\n")
    tokenizer.chat_template = text.replace(
        "{% else %}{{ m.content }}",
        "{% else %}{{ m.content[1:] if loop.index > 1 else m.content }}",
    )
    template = get_template("auto", tokenizer)
    assert template.encode(conversation("one", "two"))
    with pytest.raises(UserError, match=r"message 3 \(user\): .* content: 'three'"):
        template.encode(conversation("one", "two", "three", "four"))


OFFER = [{"name": "fone", "description": "Find it.", "parameters": {"type": "object"}}]


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("deepseek-ai-DeepSeek-V3.1", "<｜tool▁call▁begin｜>"),
        ("LFM2-8B-A1B", "<|tool_list_start|>"),
        ("ibm-granite-granite-3.3-2B-Instruct", "<|start_of_role|>available_tools"),
    ],
)
def test_tools_and_calls_have_one_form(name, native, shared_data, tmp_path):
    """These templates know only calls, or only tools."""
    template = real_template(shared_data, tmp_path, name)
    messages = asking(call("fone", city="Oslo"))
    assert template.facts.changes_tools(messages, OFFER)
    text = template.render(messages, OFFER)
    for mark in ("<tools>", "<tool_call>", "<tool_response>"):
        assert mark in text
    assert native not in text
    # The prompt for the call offers the tools in the same way.
    prompt = template.render(messages[:1], OFFER, add_generation_prompt=True)
    assert "<tools>" in prompt and native not in prompt
    assert learned(template, messages, OFFER)[0].startswith("<tool_call>\n")


def test_flags_that_a_template_follows(shared_data, tmp_path):
    """Nemotron Nano v2 removes /no_think from a question; other words must be written."""
    template = real_template(shared_data, tmp_path, "NVIDIA-Nemotron-Nano-v2")
    assert template.encode(conversation("Hi /no_think", "Hello."))
    with pytest.raises(UserError, match="message 1 .user.: .* content: '/think/home Hi'"):
        template.encode(conversation("/think/home Hi", "/home Hello."))


@pytest.mark.parametrize("name", ["classic-chatml", "classic-phi-3", "llama-cpp-rwkv-world"])
def test_the_end_of_an_answer_is_text(name, shared_data):
    """Llama 3 has no token <|im_end|>, but tokens ">\\n" and "!\\n\\n": both merge at an end."""
    tokenizer = load_tokenizer(shared_data / LLAMA3)
    text = (shared_data / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    template = get_template("auto", tokenizer, text=text)
    messages = conversation("Who are you?", "I am good.\n\nBye!", "Why?", "So!", "Hm.", "Yes.")
    [example] = template.encode(messages)
    for place in (1, 3, 5):
        prompt = template.encode_prompt(messages[:place])
        assert prompt == example.ids[: len(prompt)] and example.supervised[len(prompt)]


def test_a_call_without_a_result(shared_data, tmp_path):
    """Each result has the id of a call of its own turn."""
    template = real_template(shared_data, tmp_path, "mistralai-Mistral-Nemo-Instruct-2407")
    first, second = asking(call("fone"), call("ftwo"))[:-1], asking(call("fthree"))
    text = template.render([*first, {"role": "assistant", "content": "A"}, *second])
    assert re.findall('"call_id": "(.*?)"', text) == ["call00000", "call00002"]


@pytest.mark.parametrize(
    "name, text", [("llama3", "<think>\n\n</think>\n\nYes."), ("qwen3", "Yes.")]
)
def test_an_empty_thought_of_the_row(name, text, shared_data):
    """It is part of the answer where the template knows no thoughts."""
    folder = {"llama3": LLAMA3, "qwen3": QWEN}[name]
    template = get_template(name, load_tokenizer(shared_data / folder))
    [answer] = learned(template, conversation("Well?", "<think>\n\n</think>\n\nYes."))
    assert answer.removesuffix(template.facts.end) == text
