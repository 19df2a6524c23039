"""Baichuan2's turn tokens and chat template, which no file of its checkpoints states.

Its code puts token 195 before a question and 196 before an answer. Both are user-defined pieces of
the vocabulary, so SentencePiece produces them from text that spells them. Here they are special.
"""

import re
from collections.abc import Callable
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
BAICHUAN2 = "baichuan2"  # the template's name
TURN_TOKENS = {"<reserved_106>": 195, "<reserved_107>": 196}
BEHIND_FIRST_CHARACTER = re.compile("(?<=<)(?=reserved_10[67]>)")


def turn_token_ids(token_id: Callable[[str], int | None]) -> set[int]:
    """The ids of Baichuan2's turn tokens; empty for other tokenizers.

    token_id: looks up a token by its text.
    """
    is_baichuan2 = all(token_id(text) == id for text, id in TURN_TOKENS.items())
    return set(TURN_TOKENS.values()) if is_baichuan2 else set()


def split_turn_tokens(text: str) -> list[str]:
    """The text, cut inside every turn token that it spells. No part of it becomes one."""
    return BEHIND_FIRST_CHARACTER.split(text)


def turn_template() -> str:
    """Baichuan2's chat template, as Jinja text."""
    return (TEMPLATES / f"{BAICHUAN2}.jinja").read_text(encoding="utf-8")
