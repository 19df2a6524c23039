"""Facts about a chat template, found by rendering a few words.

    facts = TemplateFacts(render, tokens)
    facts.end               the token that ends an answer
    facts.knows_tools       True if the template writes tools, calls of them, and their results

A template is a program, so we do not read it; we look at what it writes.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property
from os.path import commonprefix
from typing import Any

from minisft.text.call_form import CallForm, with_call_form
from minisft.text.control_tokens import ControlTokens
from minisft.text.rendering import TemplateError
from minisft.text.thoughts import (
    COMMON_MARKS,
    NO_THINK,
    WITHOUT_THOUGHTS,
    ThoughtMarks,
    empty_thought,
    opening_mark,
)

# The words of the probes. No template contains them.
QUESTION, ANSWER, NEXT = "Probequestion", "Probeanswer", "Probenext"
THOUGHT, TOOL, RESULT, INPUT = "Probethought", "probe_tool", "Proberesult", "Probeinput"
USER = {"role": "user", "content": QUESTION}
ASSISTANT = {"role": "assistant", "content": ANSWER}
THOUGHTFUL = {**ASSISTANT, "reasoning_content": THOUGHT, "thinking": THOUGHT}
TOOL_OFFER = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

# render(messages, tools, **variables) -> text
Render = Callable[..., str]


class TemplateFacts:
    """Facts about a template. Each takes a few renders at its first use."""

    def __init__(self, render: Render, tokens: ControlTokens):
        self._render, self._tokens = render, tokens

    @cached_property
    def empty_tools(self) -> list | None:
        """The `tools` that the template accepts if there are none: None or an empty list."""
        try:
            self._render([USER], None)
        except TemplateError:
            try:
                self._render([USER], [])
            except TemplateError:
                return None
            return []
        return None

    @cached_property
    def has_thinking_switch(self) -> bool:
        """True if `enable_thinking` changes the prompt."""
        on, off = (self._prompt_or_none(enable_thinking=value) for value in (True, False))
        return on != off

    @cached_property
    def prompt(self) -> str:
        """The text that the template writes before an answer."""
        return self._prompt()

    @cached_property
    def opening(self) -> str:
        """The text that opens an answer: the generation prompt, or the text after the question."""
        prompt, text = self.prompt, self._render([USER], self.empty_tools)
        if prompt.startswith(text) and len(prompt) > len(text):
            return prompt[len(text) :]
        return prompt.rpartition(QUESTION)[2]

    @cached_property
    def answer(self) -> str | None:
        """The template's text of an answer, after its prompt; None if it changes the prompt."""
        prompt = self.prompt
        text = self._render([USER, ASSISTANT], self.empty_tools)
        return text[len(prompt) :] if text.startswith(prompt) else None

    @cached_property
    def _end(self) -> tuple[str | None, bool]:
        """(the control token that ends an answer, True if only the next message writes it)."""
        end = self._end_of(ASSISTANT)
        if end[0] is None and self.answer is None and self.knows_thoughts:
            return self._end_of(THOUGHTFUL, enable_thinking=True)
        return end

    def _end_of(self, answer: dict[str, Any], **variables: Any) -> tuple[str | None, bool]:
        prompt, tools = self._prompt(**variables), self.empty_tools
        text = self._render([USER, answer], tools, **variables)
        after = text.rfind(ANSWER) + len(ANSWER)
        if not text.startswith(prompt) or after < len(prompt):
            return None, False
        following = {"role": "user", "content": NEXT}
        try:
            longer = self._render([USER, answer, following], tools, **variables)
        except TemplateError:
            longer = text
        ends = [match for match in self._tokens.find(text) if match.start >= after]
        if ends:
            # Phi-3.5 writes EOS after the end of the last answer, and only there.
            shared = len(commonprefix([text, longer]))
            kept = [match for match in ends if match.end <= shared]
            return self._tokens.spellings[(kept[-1] if kept else ends[0]).id], False
        follows = self._opening_token(text, longer)
        return follows, follows is not None

    def _opening_token(self, text: str, longer: str) -> str | None:
        """The control token with which the message after `text` begins in the longer text."""
        if longer.startswith(text):
            opening = [match for match in self._tokens.find(longer) if match.start >= len(text)]
            if opening and not longer[len(text) : opening[0].start].strip():
                return self._tokens.spellings[opening[0].id]
        return None

    @property
    def end(self) -> str | None:
        """The control token that ends an answer; None if there is none."""
        return self._end[0]

    @property
    def end_follows(self) -> bool:
        """True if `end` is written only when another message follows."""
        return self._end[1]

    @cached_property
    def end_of_calls(self) -> str | None:
        """The control token that ends an answer with tool calls, where only their result writes it.

        GLM-4.6 ends an answer with <|user|>, but calls with <|observation|>.
        """
        if not self.end_follows or self.call_form is None:
            return None
        messages, tools = self._probe_of_calls(self.call_form)
        try:
            text, longer = (self._render(turns, tools) for turns in (messages[:-1], messages))
        except TemplateError:  # for a row that ends with calls, too
            return None
        return self._opening_token(text, longer)

    @property
    def note(self) -> str | None:
        """A warning about the end of answers; None if there is nothing to warn about."""
        if self.end or self.answer is None:
            return None
        return (
            f"the template ends an answer with {self.answer.rpartition(ANSWER)[2]!r}, which is not "
            "a token of this tokenizer; generation stops only at the EOS of the checkpoint"
        )

    @cached_property
    def knows_system(self) -> bool:
        """True if the template writes a system message."""
        system = {"role": "system", "content": RESULT}
        return self._writes(RESULT, [system, USER], self.empty_tools)

    @cached_property
    def has_own_system(self) -> bool:
        """True if the template writes less after an empty system message than after none."""
        messages = [{"role": "system", "content": ""}, USER]
        try:
            emptied, text = (self._render(turns, self.empty_tools) for turns in (messages, [USER]))
        except TemplateError:
            return False
        return len(emptied) < len(text)

    @cached_property
    def knows_opening(self) -> bool:
        """True if the template writes a turn of the assistant before the first question."""
        return self._writes(ANSWER, [ASSISTANT, USER], self.empty_tools)

    @cached_property
    def default_system(self) -> str:
        """The system prompt that the template writes if a conversation has none."""
        if not self.knows_system:
            return ""
        system = {"role": "system", "content": RESULT}
        before, _, after = self._render([system, USER], self.empty_tools).partition(RESULT)
        text = self._render([USER], self.empty_tools)
        if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
            return text[len(before) : len(text) - len(after)]
        return ""

    @cached_property
    def knows_input(self) -> bool:
        """True if the template supports Alpaca's `input`."""
        return self._writes(INPUT, [{**USER, "input": INPUT}], self.empty_tools)

    @cached_property
    def knows_thoughts(self) -> bool:
        """True if the template writes the thoughts of an answer."""
        return self._writes(THOUGHT, [USER, THOUGHTFUL], self.empty_tools, enable_thinking=True)

    @cached_property
    def thought_marks(self) -> ThoughtMarks | None:
        """The marks that separate thoughts from answers; None if the template has no thoughts."""
        on, off = (
            self._prompt_or_none(enable_thinking=value, thinking=value) or ""
            for value in (True, False)
        )
        if not self.knows_thoughts:  # the template omits the thoughts of finished turns
            openings = (on + off).replace(QUESTION, "")
            return next((marks for marks in COMMON_MARKS if marks.opening in openings), None)
        text = self._render([USER, THOUGHTFUL], self.empty_tools, enable_thinking=True)
        before, _, after = text.partition(THOUGHT)
        closing = after.partition(ANSWER)[0].strip() if ANSWER in after else ""
        opening = opening_mark(before, (on, off))
        return ThoughtMarks(opening, closing) if opening and closing else None

    @cached_property
    def empty_thought(self) -> re.Pattern[str]:
        """Matches an empty thought at the beginning of an answer."""
        return empty_thought(self.thought_marks)

    @cached_property
    def asks_for_thoughts(self) -> bool:
        """True if an answer with thoughts has the same prompt as others."""
        return self._prompt_or_none(enable_thinking=True) == self.prompt

    @cached_property
    def option_without_thoughts(self) -> str | None:
        """The option of train.py with which answers without thoughts directly follow the prompt."""
        for variables in filter(None, WITHOUT_THOUGHTS):
            if self._is_free_of_thoughts([USER], **variables):
                if variables == {"enable_thinking": False}:
                    return "--enable_thinking false"
                return f"--template_kwargs '{json.dumps(variables)}'"
        if self._is_free_of_thoughts([{"role": "system", "content": NO_THINK}, USER]):
            return f"--default_system {NO_THINK}"
        return None

    def opens_thoughts(self, prompt: str) -> bool:
        """True if a prompt ends with the mark before thoughts."""
        marks = self.thought_marks
        return marks is not None and prompt.rstrip().endswith(marks.opening)

    def _is_free_of_thoughts(self, messages: list, **variables: Any) -> bool:
        """True if a prompt opens no thoughts and an answer follows it without an empty thought."""
        tools = self.empty_tools
        try:
            prompt = self._render(messages, tools, add_generation_prompt=True, **variables)
            text = self._render([*messages, ASSISTANT], tools, **variables)
        except TemplateError:
            return False
        answer = text.removeprefix(prompt)
        follows = answer != text and self.empty_thought.match(answer) is None
        return follows and not self.opens_thoughts(prompt)

    @cached_property
    def _writes_offers(self) -> bool:
        return self._writes(TOOL, [USER], [TOOL_OFFER])

    @property
    def knows_tools(self) -> bool:
        """True if the template writes tools that are offered, calls of them, and their results.

        DeepSeek-V3.1 writes only calls, and LFM2 only offers. A model that is offered tools in one
        form should not learn to call them in another.
        """
        return self._writes_offers and self.call_form is not None

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template writes tool calls and their results; None if it cannot."""
        for form in (CallForm(text, ids) for ids in (False, True) for text in (False, True)):
            messages, tools = self._probe_of_calls(form)
            words = (TOOL, RESULT + "1", RESULT + "2")
            try:
                text = self._render(messages, tools, add_generation_prompt=True)
            except TemplateError:
                continue
            if all(word in text.rpartition(QUESTION)[2] for word in words):
                return form
        return None

    def _probe_of_calls(self, form: CallForm) -> tuple[list[dict[str, Any]], list | None]:
        """(a question, a tool call and its result; the tools that are offered)."""
        function = {"name": TOOL, "arguments": {"at": RESULT + "1"}}
        call = {"type": "function", "function": function}
        messages = [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": RESULT + "2"},
        ]
        tools = [TOOL_OFFER] if self._writes_offers else self.empty_tools
        return with_call_form(messages, form), tools

    def changes_tools(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """True if a conversation has tools or calls of tools that become text."""
        has_calls = any(
            message.get("role") in ("tool", "function")
            or message.get("tool_calls")
            or message.get("function_call")
            for message in messages
        )
        is_offer_text = bool(tools) and not self.knows_tools
        return is_offer_text or (has_calls and self.call_form is None)

    def _prompt(self, **variables: Any) -> str:
        return self._render([USER], self.empty_tools, add_generation_prompt=True, **variables)

    def _prompt_or_none(self, **variables: Any) -> str | None:
        """The prompt; None if the template refuses these variables."""
        try:
            return self._prompt(**variables)
        except TemplateError:
            return None

    def _writes(self, word: str, messages: list, tools: list | None, **variables: Any) -> bool:
        try:
            return word in self._render(messages, tools, **variables)
        except TemplateError:
            return False
