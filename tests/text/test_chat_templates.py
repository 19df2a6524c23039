"""Real chat templates: the ids of transformers, and a mask that covers the answers.

Run with -s to see the table of all templates.
"""

import functools
import json
import re
import shutil

import pytest
from conftest import ROOT

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate
from minisft.text.template_choice import get_template
from minisft.text.template_facts import with_call_form
from minisft.text.tokenizer import Tokenizer

FOLDER = ROOT.parent / "shared/data/chat_templates"
FILES = sorted(FOLDER.glob("*.jinja"))
# How templates spell control tokens. Each becomes a special token of a small tokenizer.
CONTROL = re.compile(
    r"<\|[\w/ .-]+\|>|</?s>|\[/?INST\]|</?(?:start|end)_of_(?:turn|sentence)>|<｜[^｜]{1,40}｜>"
    r"|\[/?(?:SYSTEM_PROMPT|THINK|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<bos>|<sep>"
    r"|<SPECIAL_\d+>|<seed:[\w_]+>|</?assistant>|\]?<\]|\[e~\[|<turn\|>|<\|turn>"
)
QUESTIONS = [
    ("Hi there", "Hello."),
    ("And 2+2?", "It is four."),
    ("Write a poem", "Roses  are\nred <b>"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def conversation(num_turns, system=False):
    messages = [{"role": "system", "content": "Be kind."}] if system else []
    for question, answer in QUESTIONS[:num_turns]:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


@functools.cache
def checkpoint(path, folder):
    """A folder with a small tokenizer that has the control tokens of a chat template."""
    target = folder / path.stem
    shutil.copytree(ROOT.parent / "shared/data/models/stories260K", target)
    (target / "tokenizer.model").unlink()
    text = path.read_text()
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    config = json.loads((target / "tokenizer_config.json").read_text())
    known = {token["content"] for token in tokenizer["added_tokens"]}
    next_id = max(tokenizer["model"]["vocab"].values()) + 1
    for id, word in enumerate(sorted(set(CONTROL.findall(text)) - known), start=next_id):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer["added_tokens"].append({"id": id, "content": word, "special": True, **flags})
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.pop("added_tokens_decoder", None)
    config["chat_template"] = text
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """path of a Jinja file -> (our template, transformers' tokenizer)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def load(path):
        target = checkpoint(path, folder)
        oracle = transformers.AutoTokenizer.from_pretrained(target)
        return get_template("auto", Tokenizer.load(target)), oracle

    return load


def oracle_ids(oracle, messages, tools=None, **variables):
    """transformers' ids; with an empty list of tools where the template fails without any."""
    apply = functools.partial(oracle.apply_chat_template, messages, tokenize=True, **variables)
    try:
        out = apply(tools=tools)
    except TypeError:
        out = apply(tools=tools or [])
    return list(out["input_ids"] if hasattr(out, "keys") else out)


def supervised_text(oracle, example):
    ids = [id for id, learned in zip(example.ids, example.supervised, strict=True) if learned]
    return oracle.decode(ids)


def check(template: ChatTemplate, oracle, messages, tools=None, shaped=None):
    """Compare with transformers; "exact" or "one example per answer". UserError for a refusal.

    shaped: the messages as transformers needs them, where it cannot read the usual form.
    """
    shaped = shaped or messages
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    examples = template.encode(messages, tools)
    assert len(examples) in (1, len(answers))
    for k in answers:
        prompt = template.encode_prompt(messages[:k], tools)
        wanted = [
            oracle_ids(oracle, shaped[:k], tools, add_generation_prompt=True, **variables)
            for variables in ({}, {"enable_thinking": False})
        ]
        assert prompt in wanted, oracle.decode(prompt)
        example = examples[0] if len(examples) == 1 else examples[answers.index(k)]
        assert example.ids[: len(prompt)] == prompt
        assert not any(example.supervised[: len(prompt)]) or len(examples) == 1
        assert example.supervised[len(prompt)] or not example.supervised[len(prompt) - 1]
    for example, k in zip(examples, answers[-len(examples) :], strict=True):
        wanted = [
            oracle_ids(oracle, shaped[: k + 1], tools, **variables)
            for variables in ({}, {"enable_thinking": False})
        ]
        end = template.tokens.ids.get(template.facts.end or "")
        # Where only the next message writes the end of an answer, it is appended; and a
        # conversation ends with its last answer, whatever the template says after it.
        assert any(example.ids in (ids, [*ids, end]) for ids in wanted) or (
            template.name == "auto" and moved_system(example, wanted)
        ), oracle.decode(example.ids)
        text = supervised_text(oracle, example)
        learned = [k] if len(examples) > 1 else answers
        for number in range(len(messages)):
            content = messages[number]["content"]
            if content:
                assert ("".join(content.split()) in "".join(text.split())) == (number in learned)
        last = max(place for place, learned in enumerate(example.supervised) if learned)
        if end is not None and not messages[k].get("tool_calls"):
            assert example.ids[last] == end
    return "exact" if len(examples) == 1 else "one example per answer"


def moved_system(example, wanted):
    """Mistral-Nemo writes the system prompt only into the last question."""
    return len(example.ids) > max(map(len, wanted))


def outcome(load, path):
    """(a word for the table, whether it trains) of one template."""
    try:
        template, oracle = load(path)
    except UserError as error:
        return f"refused: {error}", False
    words = set()
    for num_turns in (1, 3):
        for system in (False, True):
            messages = conversation(num_turns, system)
            try:
                oracle_ids(oracle, messages[:-1], add_generation_prompt=True)
            except Exception as error:  # whatever the template raises
                words.add(f"{'no system prompt' if system else 'refused'}: {error}")
                with pytest.raises(UserError):
                    template.encode(messages)
                continue
            try:
                words.add(check(template, oracle, messages))
            except UserError as error:
                words.add(f"refused: {error}")
    if template.facts.knows_tools and template.facts.call_form:
        words.add(with_tools(template, oracle))
    return ", ".join(sorted(words)), not any(word.startswith("refused") for word in words)


def with_tools(template, oracle):
    """A conversation with a tool call, in the form that the template wants."""
    messages = [
        {"role": "user", "content": "The weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "It rains."},
        {"role": "assistant", "content": "Take an umbrella."},
    ]
    shaped = with_call_form(messages, template.facts.call_form)
    try:
        return f"tools {check(template, oracle, messages, [TOOL], shaped)}"
    except UserError as error:
        return f"tools refused: {error}"


@pytest.mark.skipif(not FILES, reason="needs ../shared/data/chat_templates")
def test_no_real_template_is_silently_different(load):
    table = {path.stem: outcome(load, path) for path in FILES}
    for name, (word, _) in table.items():
        print(f"{name:<50} {word}")
    assert len(table) == 55
    assert sum(trains for _, trains in table.values()) >= 45
