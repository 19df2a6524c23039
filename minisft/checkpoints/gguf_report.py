"""The report on an export to GGUF."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES

from minisft.common.words import counted
from minisft.gguf.tensor_types import tensor_type
from minisft.gguf.writer import Tensor
from minisft.model.config import ModelConfig

# The numbers in a block of a K-quant. The blocks of other types are smaller and divide it.
MAX_BLOCK = 256


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


def larger_types(tensors: Sequence[Tensor], quantization: str, config: ModelConfig) -> list[str]:
    """A note if rows do not fit in the blocks of their type, which makes the file larger."""
    others, sizes, blocks = Counter[tuple[str, str]](), set[int](), set[int]()
    for tensor in tensors:
        # The type of a tensor of the same name with rows that every block size divides.
        shape = (*tensor.shape[:-1], MAX_BLOCK)
        wanted = tensor_type(tensor.name, shape, quantization, config)
        if tensor.type != wanted:
            others[wanted.name, tensor.type.name] += 1
            sizes.add(tensor.shape[-1])
            blocks.add(GGML_QUANT_SIZES[wanted][0])
    if not others:
        return []
    changes = ", ".join(
        f"{actual} instead of {wanted} in {counted(count, 'tensor')}"
        for (wanted, actual), count in others.items()
    )
    rows, of = (" or ".join(map(str, sorted(numbers))) for numbers in (sizes, blocks))
    return [
        f"more bits than {quantization} has in most models: rows of {rows} numbers cannot be cut "
        f"into blocks of {of}, hence {changes}"
    ]


def num_parameters(tensors: Sequence[Tensor]) -> int:
    """The number of elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors)
