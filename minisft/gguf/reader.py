"""Read the header of a GGUF file, which may be hostile.

    file = read_gguf("model.gguf")
    file.metadata["general.architecture"]         # "llama"
    file.tensors["token_embd.weight"].shape       # (32000, 2048)

The layout of a file:

    "GGUF", version, number of tensors, number of fields
    fields        each a key, a type and a value
    tensors       each a name, a shape, a type and an offset
    data          of all tensors, from the next multiple of the alignment

Every count is compared with the bytes that are left before memory is allocated for it. The reader
of the gguf package trusts the counts, and needs 12 seconds for the vocabulary of Llama 3 (here
0.2).
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
SCALARS = {
    int(GGUFValueType[name]): np.dtype(name.lower()).newbyteorder("<")
    for name in ("BOOL", "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64")
    + ("FLOAT32", "FLOAT64")
}
# {type: (numbers in a block, bytes of a block)}; types without blocks have blocks of 1.
BLOCK_SIZES = {int(type): sizes for type, sizes in GGML_QUANT_SIZES.items()}
# The fewest bytes that an entry takes: key, type, value; name, dimensions, type, offset.
MIN_FIELD_BYTES, MIN_TENSOR_BYTES, MIN_STRING_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8, 8
MAX_HEADER_BYTES = 2**27  # a sparse file can have any size; the largest vocabularies need 20 MB
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


@dataclass
class PlacedTensor:
    """A tensor of the file: its GGML type, its shape as in torch, and which bytes hold it."""

    type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class GGUFFile:
    """The header of a file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, PlacedTensor]


class _Damaged(ValueError):
    """A file that is damaged, or not a GGUF file."""


def is_gguf(path: str | Path) -> bool:
    """True if a file begins with GGUF's magic bytes. Ollama's files have no suffix."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a file; UserError if it is damaged."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read_file(path, _Header(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except _Damaged as error:
        refuse_pointer(path)
        raise UserError(
            f"{path}: damaged, or not a GGUF file: {error}. Download it again."
        ) from error


class _Header:
    """Reads a file from its beginning, never beyond the possible end of the header."""

    def __init__(self, file: BinaryIO):
        self.file, self.position = file, 0
        self.file_size = os.fstat(file.fileno()).st_size
        self.end = min(self.file_size, MAX_HEADER_BYTES)

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        if num_bytes > self.end - self.position:
            raise _Damaged(
                f"byte {self.position:,} announces {num_bytes:,} bytes, but only "
                f"{self.end - self.position:,} follow"
            )
        self.position += num_bytes
        return self.file.read(num_bytes)

    def integer(self, num_bytes: int) -> int:
        """The next unsigned number."""
        return int.from_bytes(self.take(num_bytes), "little")

    def count(self, min_entry_bytes: int) -> int:
        """The next number of entries, of at least `min_entry_bytes` bytes each."""
        count = self.integer(8)
        if count * min_entry_bytes > self.end - self.position:
            raise _Damaged(
                f"byte {self.position:,} announces {count:,} entries, more than the file can hold"
            )
        return count

    def texts(self, count: int) -> list[str]:
        """The next strings. A vocabulary has 100,000 and more, so the loop calls no helpers."""
        read, texts = self.file.read, []
        for _ in range(count):
            num_bytes = int.from_bytes(read(8), "little")
            if self.position + 8 + num_bytes > self.end:
                raise _Damaged(
                    f"byte {self.position:,} announces a string of {num_bytes:,} bytes, more than "
                    "the file can hold"
                )
            self.position += 8 + num_bytes
            # The tokens of some vocabularies are not valid UTF-8.
            texts.append(read(num_bytes).decode("utf-8", "replace"))
        return texts

    def values(self, type: int, count: int) -> list[Any]:
        """The next values of a type other than ARRAY."""
        if type == STRING:
            return self.texts(count)
        if type not in SCALARS:
            raise _Damaged(f"the value at byte {self.position:,} has the unknown type {type}")
        data = self.take(count * SCALARS[type].itemsize)
        return np.frombuffer(data, SCALARS[type]).tolist()

    def field_value(self) -> Any:
        """The next value of a field: a number, bool or str, or a list of these."""
        type = self.integer(4)
        if type != ARRAY:
            return self.values(type, 1)[0]
        type = self.integer(4)
        return self.values(type, self.count(MIN_STRING_BYTES if type == STRING else 1))


def _read_file(path: Path, header: _Header) -> GGUFFile:
    if header.take(len(MAGIC)) != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    version = header.integer(4)
    if version not in VERSIONS:
        raise _Damaged(f"version {version}; supported are {', '.join(map(str, VERSIONS))}")
    num_tensors, num_fields = header.count(MIN_TENSOR_BYTES), header.count(MIN_FIELD_BYTES)

    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        [key] = header.texts(1)
        if key in metadata:
            raise _Damaged(f"the field '{key}' appears twice")
        metadata[key] = header.field_value()
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment!r}, not a power of two")

    tensors: dict[str, PlacedTensor] = {}
    for _ in range(num_tensors):
        [name] = header.texts(1)
        if name in tensors:
            raise _Damaged(f"the tensor '{name}' appears twice")
        tensors[name] = _read_tensor(path, name, header)
    data_start = -(-header.position // alignment) * alignment
    _place_tensors(tensors, data_start, alignment, header.file_size)
    return GGUFFile(path, metadata, tensors)


def _read_tensor(path: Path, name: str, header: _Header) -> PlacedTensor:
    """The next tensor; its start is still the offset from the beginning of the data."""
    num_dimensions = header.integer(4)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _Damaged(f"the tensor '{name}' has {num_dimensions} dimensions")
    dimensions = [
        header.integer(8) for _ in range(num_dimensions)
    ]  # in the reverse of torch's order
    type, offset = header.integer(4), header.integer(8)
    if type not in BLOCK_SIZES:
        raise UserError(
            f"{path}: the tensor '{name}' has the unknown type {type}. Update the gguf package, or "
            "get a file of another type, such as Q8_0."
        )
    block, block_bytes = BLOCK_SIZES[type]
    if not all(dimensions) or dimensions[0] % block:
        raise _Damaged(f"the tensor '{name}' has the shape {dimensions} in blocks of {block}")
    nbytes = math.prod(dimensions) // block * block_bytes
    return PlacedTensor(type, tuple(reversed(dimensions)), offset, nbytes)


def _place_tensors(
    tensors: dict[str, PlacedTensor], data_start: int, alignment: int, file_size: int
) -> None:
    """Check the start of each tensor, and make it an offset in the file.

    Tensors must not overlap: a thousand of them in the same bytes would take a thousand times the
    memory that the size of the file suggests.
    """
    end, previous = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start % alignment or data_start + tensor.start + tensor.nbytes > file_size:
            raise _Damaged(
                f"the tensor '{name}' has {tensor.nbytes:,} bytes at offset {tensor.start:,} of "
                f"the data, which has {file_size - data_start:,}"
            )
        if tensor.start < end:
            raise _Damaged(f"the tensors '{previous}' and '{name}' overlap")
        end, previous = tensor.start + tensor.nbytes, name
        tensor.start += data_start
