"""How templates write thoughts: the marks around them, and the variables that ask for none.

    marks = ThoughtMarks("<think>", "</think>")
    empty_thought(marks).match("<think>\n\n</think>\n\nTwo.")

A template writes one mark before the thoughts and one after them. The prompt may have written the
first mark already: DeepSeek R1's ends with `<think>`.
"""

import re
from typing import Any, NamedTuple

# Variables that ask a template for a prompt without thoughts, in the order they are tried. The
# default of the template is the second: others change the prompt of transformers and vLLM.
WITHOUT_THOUGHTS: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {},
    {"thinking": False},
    {"thinking_mode": "disabled"},
)
NO_THINK = "/no_think"  # the same in a system prompt


class ThoughtMarks(NamedTuple):
    """opening comes before thoughts, closing between thoughts and answer, without white space
    around them. A prompt that ends with `opening` has opened the thoughts itself."""

    opening: str
    closing: str


# The marks of templates that omit the thoughts of finished turns, so that we cannot see them there.
COMMON_MARKS = (
    ThoughtMarks("<think>", "</think>"),
    ThoughtMarks("[THINK]", "[/THINK]"),
    ThoughtMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    ThoughtMarks("<|channel>thought", "<channel|>"),
)


def opening_mark(before: str, prompts: tuple[str, str]) -> str:
    """The mark at the end of `before`, the text in front of an answer's thoughts.

    prompts: the prompt that asks for thoughts, and the one that asks for none. The mark is what
    `before` adds to a prompt, or the prompt with thoughts to `before`. If there is neither, it is
    the shortest suffix that starts at a bracket or a line and does not end the prompt without
    thoughts.
    """
    before, (on, off) = before.rstrip(), (prompt.rstrip() for prompt in prompts)
    for longer, shorter in ((before, on), (before, off), (on, before)):
        if shorter and longer != shorter and longer.startswith(shorter):
            return longer[len(shorter) :].strip()
    starts = [found.start() for found in re.finditer(r"(?<=\n)|[<\[]", before)]
    suffixes = [before[start:] for start in reversed(starts)]
    if before == off:  # every prompt opens thoughts
        return suffixes[0] if suffixes else before
    return next((suffix for suffix in suffixes if not off.endswith(suffix)), before)


def empty_thought(marks: ThoughtMarks | None) -> re.Pattern[str]:
    """Matches an empty thought at the beginning of an answer. The prompt may have opened it."""
    forms = [
        rf"({re.escape(opening)}\s*)?{re.escape(closing)}"
        for opening, closing in ([marks] if marks else []) + list(COMMON_MARKS)
    ]
    return re.compile(rf"\s*({'|'.join(forms)})\s*")
