"""A message may spell a control token. It stays text, or the row is refused by name."""

import copy
import functools
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate
from minisft.text.template_choice import NAMES, get_template
from minisft.text.tokenizer import Tokenizer

# The fixture costs much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("spelled")

# Places in a conversation (and its tools) that a row fills with text.
PLAIN_SLOTS = ("system", "question", "answer", "first answer", "thoughts", "name")
TOOL_SLOTS = ("argument", "key", "call name", "id", "result", "tool", "description", "property")


@pytest.fixture(scope="module")
def templates(shared_data, tmp_path_factory) -> dict[str, ChatTemplate]:
    """The templates of the shared folder that work, and ours."""
    base, folder = shared_data / "models/stories260K", tmp_path_factory.mktemp("spelled")
    found = {}
    for path in sorted((shared_data / "chat_templates").glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if "fireworks" not in path.stem:  # this template needs more than messages
            found[path.stem] = load("auto", build_checkpoint(base, text, folder / path.stem))
    controls = "<|im_start|><|im_end|><|start_header_id|><|end_header_id|><|eot_id|>[INST][/INST]"
    controls += "<reserved_106><reserved_107>"
    ours = build_checkpoint(base, controls, folder / "ours")
    return {**found, **{name: load(name, ours) for name in NAMES}}


def load(name: str, folder: Path) -> ChatTemplate:
    """A template with its checkpoint."""
    return get_template(name, Tokenizer.load(folder), now="2026-01-02T03:04:05")


def row(slot: str, text: str) -> tuple[list, list | None]:
    """A conversation and its tools with `text` in a slot."""

    def say(name: str, usual: str) -> str:
        return text if slot == name else usual

    messages = [
        {"role": "system", "content": say("system", "Be kind.")},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": say("first answer", "Hello.")},
        {"role": "user", "content": say("question", "And then?")},
        {"role": "assistant", "content": say("answer", "Nothing.")},
    ]
    if slot == "system":
        messages[2:4] = []
        messages[1:] = [messages[1], messages[-1]]
    else:
        messages.pop(0)
    if slot == "thoughts":
        messages[-1]["reasoning_content"] = text
    if slot == "name":
        messages[-2]["name"] = text
    if slot not in TOOL_SLOTS:
        return messages, None
    function = {
        "name": say("call name", "look"),
        "arguments": {say("key", "at"): say("argument", "b")},
    }
    property = {say("property", "at"): {"type": "string", "description": "What."}}
    schema = {"type": "object", "properties": property, "required": []}
    offer = {
        "name": say("tool", "look"),
        "description": say("description", "Looks."),
        "parameters": schema,
    }
    messages = [
        {"role": "user", "content": "Is it cold?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "id": say("id", "call00000"), "function": function}
            ],
        },
        {
            "role": "tool",
            "content": say("result", "3 degrees"),
            "tool_call_id": say("id", "call00000"),
        },
        {"role": "assistant", "content": "Rather."},
    ]
    return messages, [{"type": "function", "function": offer}]


@functools.cache
def usual_controls(template: ChatTemplate, slot: str) -> list | None:
    """The control tokens of a row without any spelled; None if the template refuses it."""
    try:
        return controls(template, slot, "plain")
    except UserError:
        return None


def controls(template: ChatTemplate, slot: str, text: str) -> list[list[int]]:
    """The control ids of each example and of the prompt."""
    messages, tools = row(slot, text)
    sent = copy.deepcopy([messages, tools])
    ids = [example.ids for example in template.encode(messages, tools)]
    ids.append(template.encode_prompt(messages[:-1], tools))
    assert [messages, tools] == sent, "the row is changed"
    special = template.tokens.spellings
    return [[id for id in example if id in special] for example in ids]


def check(template: ChatTemplate, slot: str, text: str) -> bool:
    """True if the row is encoded, False if it is refused."""
    usual = usual_controls(template, slot)
    if usual is None:
        return False
    try:
        got = controls(template, slot, text)
    except UserError:
        return False
    assert got == usual, f"{template.name}: {text!r} as {slot}"
    return True


def test_every_template_and_slot(templates):
    """Control tokens at the start, in the middle, at the end, alone, and in what is cut."""
    encoded = refused = 0
    for template in templates.values():
        tokens = sorted(template.tokens.ids, key=lambda token: token != template.facts.end)
        for slot in (*PLAIN_SLOTS, *TOOL_SLOTS):
            for number, token in enumerate(tokens[: 30 if slot in ("question", "answer") else 2]):
                texts = [token, f"{token} a", f"a {token} b", f"a{token}"]
                # Many templates keep of an earlier answer only what follows </think>.
                texts += [f"a</think>b {token} c"] * slot.endswith("answer")
                # The first token at all places, the others at one place each.
                for text in texts if number == 0 else [texts[number % len(texts)]]:
                    if check(template, slot, text):
                        encoded += 1
                    elif usual_controls(template, slot) is not None:
                        refused += 1
    print(f"{encoded} rows are encoded, {refused} refused")
    assert encoded > 20 * refused


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mixture(templates, data):
    """Tokens, halves of tokens, words and white space in any order."""
    template = templates[data.draw(st.sampled_from(sorted(templates)))]
    tokens = sorted(template.tokens.ids)
    halves = [token[:n] for token in tokens for n in (1, 2, len(token) - 1)]
    halves += [token[n:] for token in tokens for n in (1, len(token) - 2, len(token) - 1)]
    pieces = st.sampled_from([*tokens, *halves, " ", "\n", "a", '"', "\\", "</think>", "<think>"])
    text = "".join(data.draw(st.lists(pieces, min_size=1, max_size=6)))
    assume(text.strip())  # some templates leave out a system prompt of white space
    check(template, data.draw(st.sampled_from((*PLAIN_SLOTS, *TOOL_SLOTS))), text)


def test_a_middle_of_a_control_token(tiny_tokenizer_dir, tmp_path):
    """The template writes the rest of the token around a message's text."""
    path = tmp_path / "names.jinja"
    path.write_text(
        "{% for m in messages %}<|{{ m.name }}|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = get_template(str(path), Tokenizer.load(tiny_tokenizer_dir))
    say = {"role": "user", "content": "Hi"}
    for name, count in (("im_start", 2), ("bob", 2)):
        ids = template.encode_prompt([{**say, "name": name}])
        assert sum(id in template.tokens.spellings for id in ids) == count, name
