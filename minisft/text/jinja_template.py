"""A chat template as a program: conversations to text.

    template = JinjaTemplate(text, {"bos_token": "<s>"}, tokens)
    [prompt, text] = template.render(
        messages, tools, [(1, {"add_generation_prompt": True}), (2, {})]
    )
    template.facts.end        # see template_facts.py

The program runs in a sandbox, see rendering.py.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from minisft.common.errors import UserError
from minisft.text.control_tokens import ControlTokens
from minisft.text.conversation import Conversation, written_fields
from minisft.text.marks import (
    Span,
    hold_written_texts,
    marks_are_paired,
    texts_of,
    with_marks,
    without_marks,
)
from minisft.text.rendering import Renderer, TemplateError
from minisft.text.template_facts import ASSISTANT, USER, TemplateFacts
from minisft.text.thoughts import WITHOUT_THOUGHTS


class JinjaTemplate:
    """A template's text with the values of its variables.

    variables: bos_token and the like. enable_thinking: True for prompts that ask for thoughts. now:
    the date and time that the template sees, in ISO format. thinking: the variables that ask for
    thoughts, or for none.
    """

    def __init__(
        self,
        text: str,
        variables: dict[str, Any],
        tokens: ControlTokens,
        enable_thinking: bool | None,
        now: str,
    ):
        self.tokens, self.now = tokens, now
        self._renderer = Renderer(text)
        self._always = {"add_generation_prompt": False, **variables}
        self.thinking: dict[str, Any] = {"enable_thinking": True}
        if not enable_thinking:
            self.thinking = self._variables_without_thoughts()
        self.facts = TemplateFacts(self.write, tokens)

    @cached_property
    def has_blocks(self) -> bool:
        """True if the template puts answers into {% generation %} blocks."""
        try:
            text = self.render([USER, ASSISTANT], self.facts.empty_tools, [(None, {})])[0]
        except TemplateError:
            return False
        return bool(without_marks(text)[2])

    def write(self, messages: list, tools: list | None, **variables: Any) -> str:
        """The text of messages, without the marks of {% generation %} blocks."""
        return without_marks(self.render(messages, tools, [(None, variables)])[0])[0]

    def render(
        self,
        messages: list,
        tools: list | None,
        renders: Sequence[tuple[int | None, dict[str, Any]]],
    ) -> list[str]:
        """The texts of the first messages, for every (number of messages, variables).

        Marks surround the {% generation %} blocks.
        """
        always = {**self._always, **self.thinking}
        return self._renderer.render(messages, tools, always, self.now, renders)

    def begin(
        self,
        messages: list,
        tools: list | None,
        renders: Sequence[tuple[int | None, dict[str, Any]]],
    ) -> None:
        """Start, in the background, the texts that `render` returns next."""
        always = {**self._always, **self.thinking}
        self._renderer.begin(messages, tools, always, self.now, renders)

    def message_spans(
        self, text: str, conversation: Conversation, count: int | None, variables: dict[str, Any]
    ) -> list[Span]:
        """The spans of the first messages' texts in `text`, the render of these messages.

        Only texts that might spell a control token count. UserError if one does, and the template
        changes it so that it cannot be located.
        """
        if not conversation.spells_controls:
            return []
        messages, tools = conversation.messages[:count], conversation.tools
        written = [*texts_of(written_fields(messages)), *texts_of(tools or [])]
        marked = [
            {**message, **{name: self._marked(value) for name, value in fields.items()}}
            for message, fields in zip(messages, written_fields(messages), strict=True)
        ]
        try:
            marked_tools = with_marks(tools, self.tokens.could_be_spelled)
            rendered = self.render(marked, marked_tools, [(None, variables)])[0]
            plain, spans, _ = without_marks(rendered)
            is_same = marks_are_paired(rendered) and plain == without_marks(text)[0]
            if is_same and hold_written_texts(spans, plain, written):
                return spans
        except TemplateError:
            pass  # the template inspects its messages, and the marks interfere
        if spelled := self.tokens.spelled_by(written, text):
            raise UserError(
                f"a message contains {spelled!r}, a control token of this tokenizer or a part of "
                "one, and the template changes the message, so the message's text cannot be "
                "separated from the template's. Remove it from the row"
            )
        return []

    def _marked(self, field: Any) -> Any:
        """A field of a message with marks around its texts."""
        # A name may be the middle of a token: <|{{ message.name }}|>. Tool calls have fixed words
        # such as "function", which marks would change.
        tokens = self.tokens
        is_text = isinstance(field, str)
        return with_marks(field, tokens.could_be_part if is_text else tokens.could_be_spelled)

    def _variables_without_thoughts(self) -> dict[str, Any]:
        """The first of WITHOUT_THOUGHTS with which an answer follows its prompt."""
        for variables in WITHOUT_THOUGHTS:
            self.thinking = variables
            try:
                if TemplateFacts(self.write, self.tokens).answer is not None:
                    return variables
            except TemplateError:
                continue
        return {}
