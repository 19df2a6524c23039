"""Counts of truncated, dropped and changed rows, for the log."""

import math
from collections import Counter
from dataclasses import dataclass, field, fields

from minisft.common.words import counted
from minisft.text.tool_texts import TOOLS_AS_TEXT

# A share that leaves out the few rows that are far longer than the others.
KEPT_WHOLE = 0.95
# Counts that follow from the template, and say the same in every epoch.
FROM_TEMPLATE = ("num_split", "num_from_split", "num_tools_as_text")


@dataclass
class EncodeReport:
    """Counts of rows. `broken` holds a message for each row that could not be read."""

    num_rows: int = 0
    num_truncated: int = 0
    num_dropped: int = 0  # truncation left no answer
    num_unlearned: int = 0  # all answers are marked as not supervised
    num_split: int = 0  # each answer is a separate example ...
    num_from_split: int = 0  # ... and how many examples these rows make
    num_tools_as_text: int = 0  # the template does not support their tools or calls
    num_too_long: int = 0  # left out, because they may not be truncated
    num_equal: int = 0  # preference rows whose answers are all the same
    long_rows: list[int] = field(default_factory=list)  # lengths before truncation, in tokens
    broken: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # remark on prompts: number of rows

    def add(self, other: "EncodeReport") -> None:
        """Add the counts of another report to this one."""
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))

    @property
    def num_left_out(self) -> int:
        """Rows that nothing is learned from."""
        return (
            self.num_dropped
            + self.num_unlearned
            + self.num_too_long
            + self.num_equal
            + len(self.broken)
        )

    def remedy(self) -> str:
        """The --cutoff_len that keeps 95 % of the rows whole; all of them, if 95 % fit already."""
        num_fitting = self.num_rows - len(self.long_rows)
        num_kept = math.ceil(KEPT_WHOLE * self.num_rows)
        share = f"{KEPT_WHOLE:.0%} of the rows"
        if num_fitting >= num_kept:
            num_kept, share = self.num_rows, "every row"
        cutoff_len = sorted(self.long_rows)[num_kept - num_fitting - 1]
        return f"--cutoff_len {cutoff_len} keeps {share} whole"

    def same_counts(self, other: "EncodeReport") -> bool:
        """True if the other report counts the same: no need to print both."""
        return all(
            getattr(self, count.name) == getattr(other, count.name)
            for count in fields(self)
            if count.name not in (*FROM_TEMPLATE, "long_rows", "notes")
        )

    def drop_repeated_notes(self, earlier: "EncodeReport") -> None:
        """Reset the counts that follow from the template, if an earlier report has printed them."""
        for name in FROM_TEMPLATE:
            if getattr(earlier, name):
                setattr(self, name, 0)
        for note in earlier.notes:
            del self.notes[note]

    def __bool__(self) -> bool:
        """True if there is anything to say."""
        return bool(str(self))

    def __str__(self) -> str:
        """One line for the log."""
        parts = [
            f"{count} of {self.num_rows} rows have {note}" for note, count in self.notes.items()
        ]
        if self.num_truncated:
            text = (
                f"{self.num_truncated} of {self.num_rows} rows "
                f"({self.num_truncated / self.num_rows:.0%}) truncated"
            )
            if self.num_dropped:
                text += f", {self.num_dropped} of them dropped because no answer was left"
            # Where they are not truncated to --cutoff_len, there are no lengths.
            parts.append(f"{text}; {self.remedy()}" if self.long_rows else text)
        if self.num_unlearned:
            parts.append(
                f"{self.num_unlearned} of {self.num_rows} rows left out: none of their answers is "
                "supervised"
            )
        if self.num_split:
            parts.append(
                f"{self.num_split} of {self.num_rows} rows became {self.num_from_split} examples, "
                "one per answer, because the template changes earlier turns; they cost that much "
                "more time"
            )
        if self.num_tools_as_text:
            parts.append(f"{self.num_tools_as_text} of {self.num_rows} rows have {TOOLS_AS_TEXT}")
        if self.num_too_long:
            parts.append(
                f"{self.num_too_long} of {self.num_rows} rows left out: longer than the limit; "
                + self.remedy()
            )
        if self.num_equal:
            parts.append(
                f"{self.num_equal} of {self.num_rows} rows left out: their answers are the same"
            )
        if self.broken:
            parts.append(
                f"{counted(len(self.broken), 'broken row')} left out, the first: {self.broken[0]}"
            )
        return "; ".join(parts)
