"""The report on an export to GGUF."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minisft.gguf.writer import Tensor


@dataclass
class Report:
    """A line about the file, and notes on differences in llama.cpp."""

    summary: str
    notes: list[str] = field(default_factory=list)


def summarize(path: str | Path, tensors: Sequence[Tensor]) -> str:
    """`1,170.8 MB, 8.50 bits per weight, 201 tensors (155 Q8_0, 46 F32)`."""
    num_bits = 8 * sum(tensor.nbytes for tensor in tensors)
    counts = Counter(tensor.type.name for tensor in tensors)
    return (
        f"{Path(path).stat().st_size / 1e6:,.1f} MB, "
        f"{num_bits / num_parameters(tensors):.2f} bits per weight, {len(tensors)} tensors "
        f"({', '.join(f'{count} {name}' for name, count in counts.items())})"
    )


def num_parameters(tensors: Sequence[Tensor]) -> int:
    """The number of elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors)
