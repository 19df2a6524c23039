"""Thinking in chat templates: marks, prompts that open thoughts, switches, flags in messages."""

import json
import shlex

import pytest
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.generation.thoughts import decode_answer
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "The answer."}
THOUGHTFUL = {**ANSWER, "reasoning_content": "Hm."}
# A template that refuses to be asked for thoughts.
NEVER_THINKS = """{% if enable_thinking %}{{ raise_exception('no thoughts') }}{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def template_of(shared_data, tmp_path):
    """A function: the name of a shared template, or a text -> the template of a checkpoint."""

    def load(template, **settings):
        path = shared_data / "chat_templates" / f"{template[:60]}.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else template
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        build_checkpoint(shared_data / "models/stories260K", text, folder)
        return get_template("auto", Tokenizer.load(folder), **settings)

    return load


def learned_ids(template, messages):
    """The supervised ids of a conversation with one example."""
    [example] = template.encode(messages)
    return [id for id, learned in zip(example.ids, example.supervised, strict=True) if learned]


def decoded(template, messages):
    """(thoughts, answer) of the last message, as training supervises it."""
    prompt = template.encode_prompt(messages[:-1])
    return decode_answer(template, prompt, learned_ids(template, messages))


def test_a_mark_that_is_the_end_of_the_prompt(template_of):
    """MiniMax-M3 without thoughts: the prompt ends with the mark after thoughts."""
    template = template_of("MiniMax-M3", template_kwargs={"thinking_mode": "disabled"})
    assert template.facts.thought_marks == ("<mm:think>", "</mm:think>")
    assert decoded(template, [QUESTION, ANSWER]) == ("", "The answer.")


@pytest.mark.parametrize("thinking", [True, False])
def test_words_between_the_control_tokens_after_an_answer(thinking, template_of):
    """Kimi K3 ends an answer with `<|close|>response<|sep|><|close|>message<|sep|>`."""
    template = template_of("Kimi-K3", template_kwargs={"thinking": thinking})
    answer = THOUGHTFUL if thinking else ANSWER
    messages = [QUESTION, {**answer, "content": "<|close|>response or <"}]
    expected = ("Hm." if thinking else "", "<|close|>response or <")
    assert decoded(template, messages) == expected
    prompt, ids = template.encode_prompt([QUESTION]), learned_ids(template, messages)
    for count in range(len(ids)):  # an answer that is cut short
        assert expected[1].startswith(decode_answer(template, prompt, ids[:count])[1])


def test_a_template_that_refuses_to_be_asked_for_thoughts(template_of):
    template = template_of(NEVER_THINKS)
    assert template.facts.thought_marks is None and template.facts.has_thinking_switch
    assert decoded(template, [QUESTION, ANSWER]) == ("", "The answer.")


@pytest.mark.parametrize("name", ["HuggingFaceTB-SmolLM3-3B", "NVIDIA-Nemotron-Nano-v2"])
@pytest.mark.parametrize("system", ["Be kind. /no_think", "/no_think\nBe kind.", "/no_think"])
def test_flags_in_a_system_prompt(name, system, template_of):
    """These templates follow the flag and remove it."""
    template = template_of(name)
    messages = [{"role": "system", "content": system}, QUESTION, ANSWER]
    thoughts, answer = decoded(template, messages)
    assert (thoughts, answer.strip()) == ("", "The answer.")
    [example] = template.encode(messages)
    prompt = template.encode_prompt(messages[:-1])
    assert example.ids[: len(prompt)] == prompt
    text = template.tokenizer.decode(example.ids, skip_special_tokens=False)
    assert "/no_think" not in text.partition("Hi")[0].replace("Reasoning Mode: /no_think", "")
    assert ("Be kind." in text) == ("Be kind." in system)


def test_a_system_prompt_that_is_changed_is_refused(template_of):
    template = template_of(NEVER_THINKS.replace("{{ m.content }}", "{{ m.content[:20] }}"))
    for content in ("Read /etc/hosts, and do be kind.", "x" * 21):
        system = {"role": "system", "content": content}
        with pytest.raises(UserError, match="the template changes or omits its content"):
            template.encode([system, QUESTION, ANSWER])


EMPTY = "after a prompt that lets the model think"
OPEN = "after a prompt that opens thoughts. The model learns to write these answers as thoughts"
MISPLACED = [
    ("Kimi-K3", None, ANSWER, EMPTY),
    ("MiniMax-M3", None, ANSWER, EMPTY),
    ("NVIDIA-Nemotron-Nano-v2", None, ANSWER, OPEN),
    ("Qwen-Qwen3-0.6B", True, ANSWER, EMPTY),
    ("deepseek-ai-DeepSeek-V3.1", True, ANSWER, EMPTY),
    ("Qwen-Qwen3-0.6B", None, THOUGHTFUL, "after the prompt that asks for thoughts, but chat.py"),
    ("GLM-4.6", None, THOUGHTFUL, "after the prompt that asks for thoughts, but chat.py"),
]


@pytest.mark.parametrize(("name", "enable_thinking", "answer", "problem"), MISPLACED)
def test_an_answer_that_does_not_follow_the_prompt_of_chat(
    name, enable_thinking, answer, problem, template_of
):
    """The note names an option, and with that option the answer follows the prompt of chat."""
    template = template_of(name, enable_thinking=enable_thinking)
    [example] = template.encode([QUESTION, answer])
    assert problem in example.note and example.note.endswith(" changes that")
    [text] = template.encode([QUESTION, {**answer, "train": False}, QUESTION, ANSWER])[-1:]
    assert answer is ANSWER or not text.note  # only answers to learn count
    option, value = shlex.split(example.note.rpartition("; ")[2])[:2]
    value = value if option == "--default_system" else json.loads(value)
    better = template_of(name, **{option.removeprefix("--"): value})
    [example] = better.encode([QUESTION, answer])
    assert not example.note
    prompt = better.encode_prompt([QUESTION])
    assert example.ids[: len(prompt)] == prompt and example.supervised[len(prompt)]


@pytest.mark.parametrize(
    "name", ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "ByteDance-Seed-OSS"]
)
def test_answers_that_follow_the_prompt_have_no_note(name, template_of):
    template = template_of(name)
    assert not any(text.note for text in template.encode([QUESTION, ANSWER, QUESTION, ANSWER]))
    if template.facts.knows_thoughts:
        template = template_of(name, enable_thinking=True)
        assert not template.encode([QUESTION, THOUGHTFUL])[0].note
