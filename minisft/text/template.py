"""Conversations to token ids, and which of them the model learns to write.

    template = get_template("auto", tokenizer)      # or one of TEMPLATES by name; see template.name
    ids, supervised = template.encode([
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
    ])
    print(template.show(ids, supervised))           # supervised text in green

A template is a few strings (`Format`). One pass over a conversation cuts it into segments: control
tokens, which become ids directly, and runs of text. An answer is a run of its own, encoded as the
continuation of its prompt. So in training the ids before an answer are exactly the prompt's ids in
chat, and only the answer with its end-of-turn token is supervised.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from minisft.common.errors import UserError
from minisft.text.tokenizer import StreamDecoder, Tokenizer
from minisft.text.tool_calls import call_text, merge_tool_messages, offer


@dataclass(frozen=True)
class Format:
    """The strings of a template. `{bos}` and `{eos}` are the tokenizer's tokens."""

    user: str  # a user turn
    answer: str  # what the model writes, its end-of-turn token included: the supervised part
    assistant: str = ""  # opens the assistant's turn; the last thing in a prompt
    after: str = ""  # follows every answer
    between: str = ""  # precedes every user turn but the first
    begin: str = ""  # opens the conversation
    system: str = ""  # the system prompt as a turn of its own ...
    system_in_user: str = ""  # ... or as it is put before the first user's words
    user_with_input: str = ""  # a user turn with Alpaca's second field
    default_system: str = ""  # for conversations without a system prompt
    default_system_with_input: str = ""
    control: tuple[str, ...] = ()  # tokens that the vocabulary must have
    strip: bool = False  # remove white space around a message
    markers: tuple[str, ...] = ()  # a chat template with all of these is this one ...
    foreign: tuple[str, ...] = ()  # ... unless it has one of these


# "auto" tries their markers in this order.
TEMPLATES = {
    "llama3": Format(
        begin="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{content}<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
        markers=("<|start_header_id|>", "<|eot_id|>"),
    ),
    "chatml": Format(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        answer="{content}<|im_end|>",
        after="\n",
        control=("<|im_start|>", "<|im_end|>"),
        markers=("<|im_start|>", "<|im_end|>"),
        foreign=("<|im_sep|>", "<|im_middle|>"),
    ),
    "llama2": Format(
        system_in_user="<<SYS>>\n{content}\n<</SYS>>\n\n",
        user="{bos}[INST] {content} [/INST]",
        answer=" {content} {eos}",
        strip=True,
        markers=("[INST]", "[/INST]", "<<SYS>>"),
    ),
    "mistral": Format(
        begin="{bos}",
        system_in_user="{content}\n\n",
        user="[INST] {content} [/INST]",
        answer="{content}{eos}",
        markers=("[INST] ", " [/INST]"),
        foreign=("[AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]"),
    ),
    "zephyr": Format(
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        assistant="<|assistant|>\n",
        answer="{content}{eos}",
        after="\n",
        markers=("<|user|>", "<|assistant|>", "eos_token"),
        foreign=("<|end|>", "[gMASK]", "<|endoftext|>"),
    ),
    "vicuna": Format(
        system="{content} ",
        user="USER: {content} ",
        assistant="ASSISTANT:",
        answer=" {content}{eos}",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        markers=("USER: ", "ASSISTANT:"),
    ),
    "alpaca": Format(
        system="{content}\n\n",
        between="\n\n",
        user="### Instruction:\n{content}\n\n",
        user_with_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
        assistant="### Response:",
        answer="{content}{eos}",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        default_system_with_input="Below is an instruction that describes a task, paired with an "
        "input that provides further context. "
        "Write a response that appropriately completes the request.",
        markers=("### Instruction:", "### Response:"),
    ),
    "plain": Format(system="{content}\n", user="{content}\n", answer="{content}{eos}"),
}

# The default system prompt in the source of a chat template: as chat_template.py writes it, and in
# Qwen's chatml.
OUR_SYSTEM = re.compile(
    r'\{%- set system = ("(?:[^"\\\x00-\x1f]|\\["\\nrtbf]|\\u[0-9a-f]{4})*") -%}'
)
CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^<>{}'\"\\]+)<\|im_end\|>")

# Llama 3.1 and 3.2 begin every system prompt with these lines. The second has the date that their
# chat template uses by default, so that training and chat agree.
LLAMA31_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# Control characters, which would change the terminal, are shown as text.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def get_template(name: str, tokenizer: Tokenizer, default_system: str | None = None) -> "Template":
    """The template `name`; "auto" recognises the checkpoint's chat template.

    default_system: the system prompt of conversations without one; "" for none; None for the
    template's own, which for chatml is in the checkpoint's chat template. UserError for an unknown
    name, or if the tokenizer lacks the template's tokens.
    """
    if name == "auto":
        name = recognise(tokenizer.chat_template)
    if name not in TEMPLATES:
        raise UserError(f"unknown template '{name}'; choose one of: auto, {', '.join(TEMPLATES)}")
    if default_system is None:
        default_system = stated_system(name, tokenizer.chat_template)
    has_dates = LLAMA31_DATES.split("\n")[0] in (tokenizer.chat_template or "")
    preface = LLAMA31_DATES if name == "llama3" and has_dates else ""
    return Template(name, tokenizer, default_system, preface)


def stated_system(name: str, chat_template: str | None) -> str | None:
    """The default system prompt in a chat template; None if it has none of its own."""
    text = chat_template or ""
    if (ours := OUR_SYSTEM.match(text)) and is_form(text, name):
        stated = json.loads(ours[1])
        return None if stated == TEMPLATES[name].default_system else stated
    own = CHATML_SYSTEM.search(text) if name == "chatml" else None
    return own and own[1]


def is_form(chat_template: str | None, name: str) -> bool:
    """True if a checkpoint's chat template is our template of this name."""
    try:
        return recognise(chat_template) == name
    except UserError:
        return False


def recognise(chat_template: str | None) -> str:
    """The name of the template that has the markers of a chat template, which is not executed."""
    names = ", ".join(TEMPLATES)
    if not chat_template:
        raise UserError(f"the checkpoint has no chat template; choose --template from: {names}")
    for name, form in TEMPLATES.items():
        has_all = form.markers and all(marker in chat_template for marker in form.markers)
        if has_all and not any(marker in chat_template for marker in form.foreign):
            return name
    raise UserError(f"the checkpoint's chat template is not known; choose --template from: {names}")


class Template:
    """A `Format` with a tokenizer: renders and encodes conversations."""

    def __init__(
        self, name: str, tokenizer: Tokenizer, default_system: str | None = None, preface: str = ""
    ):
        self.name, self.tokenizer, self.form = name, tokenizer, TEMPLATES[name]
        self.default_system, self.preface = default_system, preface
        self.control_ids: dict[str, Any] = {
            token: tokenizer.token_id(token) for token in self.form.control
        }
        if "{eos}" in self.form.answer:
            self.control_ids["{eos}"] = tokenizer.eos_token_id
        for token, id in self.control_ids.items():
            if id is None:
                wanted = "an eos_token" if token == "{eos}" else f"the token {token}"
                raise UserError(
                    f"template {name} needs {wanted}, which the tokenizer of "
                    f"{tokenizer.model_dir} does not have; choose another --template"
                )
        self.control_ids["{bos}"] = tokenizer.bos_token_id  # None, as in Qwen: none is written
        self.writes_bos = "{bos}" in self.form.begin + self.form.user
        fields = ["{content}", "{input}", *self.control_ids]
        self.fields = re.compile("(" + "|".join(map(re.escape, fields)) + ")")

    def encode(self, messages: list, tools: list | None = None) -> tuple[list, list]:
        """(ids, supervised), lists of equal length; True where the model learns to write the id."""
        return self._encode(self._segments(messages, tools))

    def encode_prompt(self, messages: list, tools: list | None = None) -> list[int]:
        """The ids before the answer to messages that end with a user's or a tool's turn."""
        if messages and messages[-1].get("role") == "assistant":
            raise UserError("a prompt ends with a user's or a tool's message, not the assistant's")
        ids, _ = self._encode(self._segments(messages, tools, add_generation_prompt=True))
        return ids

    def encode_marker(self) -> list[int]:
        """The ids of BOS and of the text before an answer: `### Response:` for alpaca."""
        marker = self.form.assistant or self.form.user.rpartition("{content}")[2].lstrip(" ")
        begin = "{bos}" if self.writes_bos else ""
        return self._encode([*self._fill(begin), *self._fill(marker)])[0]

    def render(
        self, messages: list, tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text, with control tokens spelled out."""
        segments = self._segments(messages, tools, add_generation_prompt)
        spell: Any = self.tokenizer.token_text
        return "".join([spell(self.control_ids[t]) if control else t for t, control, _ in segments])

    def stop_token_ids(self, generation_config_eos: list[int] | int | None = None) -> set[int]:
        """The tokens that end an answer: end of turn, EOS, and those of generation_config.json."""
        listed = generation_config_eos
        listed = listed if isinstance(listed, list) else [listed]
        end_of_turn = [token for token in self.fields.split(self.form.answer) if token][-1]
        ids = (self.control_ids[end_of_turn], self.tokenizer.eos_token_id, *listed)
        return {id for id in ids if id is not None}

    def show(self, ids: list[int], supervised: list[bool]) -> str:
        """The text of a row for a terminal: supervised in green, control characters as `\\x0d`."""
        stream = StreamDecoder(self.tokenizer, skip_special_tokens=False)
        shown, was_learned = "", False
        for id, learned in zip(ids, supervised, strict=True):
            if learned != was_learned:
                shown += "\033[32m" if learned else "\033[0m"
            shown, was_learned = shown + stream.push(id).translate(VISIBLE), learned
        return shown + stream.flush() + ("\033[0m" if was_learned else "")

    def _encode(self, segments: Iterable) -> tuple[list[Any], list[bool]]:
        """The single pass over segments: control tokens by id, consecutive text joined."""
        tokenizer, ids, supervised = self.tokenizer, [], []
        if tokenizer.add_bos_token and not self.writes_bos:
            ids, supervised = [tokenizer.bos_token_id], [False]
        for (control, learned), run in groupby(segments, key=itemgetter(1, 2)):
            texts = [text for text, _, _ in run]
            for text in texts if control else ["".join(texts)]:
                new = [self.control_ids[text]] if control else self._text(text, ids)
                ids += new
                supervised += [learned] * len(new)
        return ids, supervised

    def _text(self, text, ids):
        """The ids of a text after `ids`. It gets a leading space only at the start."""
        at_start = not ids or ids[-1] == self.tokenizer.bos_token_id
        after_control = ids and ids[-1] in self.control_ids.values()
        prefixed = at_start or (after_control and self.tokenizer.prefix_after_special)
        return self.tokenizer.encode(text, continuation=not prefixed)

    def _segments(self, messages, tools=None, add_generation_prompt=False):
        """Yield (text, is a control token, is supervised) in the order of the conversation."""
        form = self.form
        system, turns = self._turns(messages, tools)
        yield from self._fill(form.begin)
        if system and form.system:
            yield from self._fill(form.system, content=system)
        for index, turn in enumerate(turns):
            content = turn["content"]
            if turn["role"] == "assistant":
                yield from self._fill(form.assistant)
                yield from self._fill(form.answer, learned=True, content=content)
                yield from self._fill(form.after)
                continue
            if index > 0:
                yield from self._fill(form.between)
            elif system and form.system_in_user:
                content = form.system_in_user.replace("{content}", system) + content
            has_input = turn["input"] and form.user_with_input
            pattern = form.user_with_input if has_input else form.user
            yield from self._fill(pattern, content=content, input=turn["input"])
        if add_generation_prompt:
            yield from self._fill(form.assistant)

    def _fill(self, pattern, learned=False, content="", input=""):
        """Cut a pattern at its fields. Values are text, whatever they spell."""
        for part in self.fields.split(pattern):
            if part in ("{content}", "{input}"):
                yield (content if part == "{content}" else input), False, learned
            elif part and self.control_ids.get(part, part) is not None:
                yield part, part in self.control_ids, learned

    def _turns(self, messages, tools):
        """Messages -> (system prompt, turns with role, content and input), checked."""
        messages = [self._cleaned(message, number) for number, message in enumerate(messages, 1)]
        system = None
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        turns = merge_tool_messages(messages)
        check_alternation(turns)
        if system is None:
            system = self.default_system
        if system is None:
            with_input = turns[0]["input"] and self.form.default_system_with_input
            system = with_input or self.form.default_system
        system = self.preface + system
        if tools:
            system = offer(system, tools)
        return system, turns

    def _cleaned(self, message, number):
        """A checked message, with its calls of functions as text."""
        role, content = message.get("role"), message.get("content") or ""
        if role not in ("system", "user", "assistant", "tool"):
            known = "system, user, assistant, tool"
            raise UserError(f"message {number} has the role {role!r}; known are {known}")
        if not isinstance(content, str):
            raise UserError(f"message {number} ({role}): content is not text")
        calls = [call_text(call, number) for call in message.get("tool_calls") or []]
        if calls:
            content = "\n".join([content] * bool(content) + calls)
        second = message.get("input") or ""
        if second and not self.form.user_with_input:
            content, second = f"{content}\n{second}" if content else second, ""
        if self.form.strip:
            content = content.strip()
        return {"role": role, "content": content, "input": second}


def check_alternation(turns: list[dict[str, Any]]) -> None:
    """UserError unless user (or tool) and assistant take turns, the user first."""
    if not turns:
        raise UserError("a conversation needs at least one user message")
    for index, turn in enumerate(turns):
        if turn["role"] == "system":
            raise UserError("a system message can only be the first")
        if (turn["role"] == "assistant") != (index % 2 == 1):
            order = " ".join(turn["role"] for turn in turns[: index + 1])
            raise UserError(f"user (or tool) and assistant must alternate, user first: {order}")
