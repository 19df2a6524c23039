"""Words for messages and files: durations, sizes, counts, lists of names, text for UTF-8."""

from collections.abc import Sequence

MAX_NAMES = 5


def duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 120:
        return counted(round(seconds), "second")
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 96 * 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 86400:,.1f} days"


def file_size(num_bytes: int) -> str:
    """A number of bytes in a unit that fits: 2.5 GB, 40.0 MB, 0.5 KB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1000:.1f} KB"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 step`, `2 steps`. plural: of a noun that does not just take an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def list_names(names: Sequence[str], limit: int = MAX_NAMES) -> str:
    """The first few names, up to `limit`, and the number of further names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def valid_text(text: str) -> str:
    """The text with "?" in place of each lone surrogate, which UTF-8 cannot express."""
    return text.encode("utf-8", "replace").decode()
