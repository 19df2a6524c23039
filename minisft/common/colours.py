"""Colours for a terminal.

print(f"\033[32m{text}\033[0m" if has_colours(sys.stdout) else text)
"""

import os
from typing import TextIO


def has_colours(stream: TextIO) -> bool:
    """True for a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
