"""Make untrusted text safe to show as Markdown: HTML tags become visible, images become links.

    escape("<b> ![x](y)")       # a JOINER follows both marks, so a browser shows them as text

The page's sanitizer and content security policy are a second and third barrier.
"""

import re

# A character without width. After "<", "&" or "!" it breaks the tag, entity or image.
JOINER = "\u2060"
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)")
# Code is shown unchanged: blocks between fences, in lists too (an unclosed block reaches to the
# end), and spans between backticks.
CODE = re.compile(
    r"(^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})"
    r"[\s\S]*?(?:^[ \t>]*(?P=fence)[`~]*[ \t]*$|\Z)"
    r"|(?P<ticks>(?<!`)`+(?!`))[^\n]+?(?<!`)(?P=ticks)(?!`))",
    re.MULTILINE,
)


def escape(text: str) -> str:
    """The text with a JOINER after every mark outside code."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [_add_joiners(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + _add_joiners(text[end:])


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return text.replace(JOINER, "")


def _add_joiners(text: str) -> str:
    return MARKUP.sub(lambda mark: mark[0] + JOINER, text)
