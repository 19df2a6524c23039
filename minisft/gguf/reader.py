"""The container of a GGUF file, read with distrust: every count is checked before memory is taken.

    file = read_gguf("model.gguf")
    print(file.metadata["general.architecture"], file.tensors["token_embd.weight"])

A file is: `GGUF`, the version, the number of tensors and of metadata fields; the fields, each a
key, a type and a value; the tensors' names, shapes, types and places; and, from a multiple of the
alignment on, their data.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "u1",
    10: "u8",
    11: "i8",
    12: "f8",
}
BOOL, STRING, ARRAY = 7, 8, 9
# The least that one takes: key, type, value; name, number of dimensions, one of them, type, place.
FIELD_BYTES, TENSOR_BYTES, STRING_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8, 8
MAX_NAME_BYTES = 65535
MAX_HEADER_BYTES = 2**27  # a sparse file can have any size; the largest vocabularies take 20 MB
MAX_DIMENSIONS = 4
ALIGNMENT = 32


@dataclass
class PlacedTensor:
    """A tensor of the file: its GGML type, its shape as in torch, and where its bytes lie."""

    type: int
    shape: tuple
    start: int
    nbytes: int


@dataclass
class GGUFFile:
    """What stands before the data: {key: value} and {name: PlacedTensor}."""

    path: Path
    metadata: dict
    tensors: dict


class Damaged(ValueError):
    """What is wrong with a file."""


def is_gguf(path):
    """Whether a file begins as GGUF files do, whatever its name: Ollama's have no suffix."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path):
    """The GGUFFile of a path; UserError says what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(path, Cursor(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Damaged as error:
        raise UserError(
            f"{path}: damaged, or not a GGUF file: {error}; download it again"
        ) from error


class Cursor:
    """Reads on through a file, and never more than there is."""

    def __init__(self, file):
        self.file, self.position = file, 0
        self.size = os.fstat(file.fileno()).st_size
        self.end = min(self.size, MAX_HEADER_BYTES)

    def take(self, count):
        """The next `count` bytes of what stands before the data."""
        if count > self.end - self.position:
            raise Damaged(
                f"at byte {self.position:,} it says that {count:,} bytes follow, for "
                f"which {self.end - self.position:,} are left"
            )
        self.position += count
        return self.file.read(count)

    def number(self, kind):
        """The next little-endian number, by its struct letter."""
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def count(self, least_bytes):
        """The next 64-bit count of things that take at least so many bytes each."""
        count = self.number("Q")
        if count * least_bytes > self.end - self.position:
            raise Damaged(
                f"at byte {self.position:,} it says that {count:,} entries follow, for "
                "which it is too small"
            )
        return count

    def text(self, most=None):
        """The next string."""
        length = self.count(1)
        if most is not None and length > most:
            raise Damaged(f"at byte {self.position:,} there is a name of {length:,} bytes")
        # Tokens of some vocabularies are not valid UTF-8.
        return self.take(length).decode("utf-8", "replace" if most is None else "strict")

    def texts(self, count):
        """The next `count` strings, as `text` reads them: by a short way, for vocabularies."""
        read, texts = self.file.read, []
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            if self.position + 8 + length > self.end:
                raise Damaged(f"at byte {self.position:,} a string of {length:,} bytes begins")
            self.position += 8 + length
            texts.append(read(length).decode("utf-8", "replace"))
        return texts


def _read(path, cursor):
    from gguf import GGML_QUANT_SIZES

    if cursor.take(len(MAGIC)) != MAGIC:
        raise Damaged("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise Damaged(f"version {version}; known are {', '.join(map(str, VERSIONS))}")
    num_tensors, num_fields = cursor.count(TENSOR_BYTES), cursor.count(FIELD_BYTES)
    try:
        metadata = dict(
            _unique(
                (cursor.text(MAX_NAME_BYTES), _value(cursor, cursor.number("I")))
                for _ in range(num_fields)
            )
        )
        entries = dict(_unique(_tensor(cursor) for _ in range(num_tensors)))
    except UnicodeDecodeError as error:
        raise Damaged(f"before byte {cursor.position:,} there is a name that is no text") from error
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise Damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    sizes = {int(type): pair for type, pair in GGML_QUANT_SIZES.items()}
    for name, (_, kind, _) in entries.items():
        if kind not in sizes:
            raise UserError(
                f"{path}: '{name}' is of the type {kind}, which is not known here; "
                "update the gguf package, or get a file of another type, such as Q8_0"
            )
    tensors = {
        name: _placed(name, entry, sizes, start, alignment, cursor.size)
        for name, entry in entries.items()
    }
    _check_apart(tensors)
    return GGUFFile(path, metadata, tensors)


def _unique(pairs):
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise Damaged(f"'{name}' is there twice")
        seen.add(name)
        yield name, value


def _value(cursor, kind):
    """A field's value: a number, a bool, a str, or a list of those."""
    if kind == STRING:
        return cursor.text()
    if kind == ARRAY:
        return _array(cursor)
    if kind not in SCALARS:
        raise Damaged(f"at byte {cursor.position:,} there is a value of the unknown type {kind}")
    dtype = np.dtype("<" + SCALARS[kind])
    value = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    return bool(value) if kind == BOOL else value


def _array(cursor):
    kind = cursor.number("I")
    if kind == STRING:
        return cursor.texts(cursor.count(STRING_BYTES))
    if kind not in SCALARS:
        raise Damaged(f"at byte {cursor.position:,} there is an array of the type {kind}")
    dtype = np.dtype("<" + SCALARS[kind])
    values = np.frombuffer(cursor.take(cursor.count(dtype.itemsize) * dtype.itemsize), dtype)
    return (values.astype(bool) if kind == BOOL else values).tolist()


def _tensor(cursor):
    """(name, (dimensions, type, offset)) of the next tensor, not yet checked."""
    name, num_dimensions = cursor.text(MAX_NAME_BYTES), cursor.number("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise Damaged(f"'{name}' has {num_dimensions} dimensions")
    dimensions = [cursor.number("Q") for _ in range(num_dimensions)]
    return name, (dimensions, cursor.number("I"), cursor.number("Q"))


def _placed(name, entry, sizes, start, alignment, size):
    dimensions, kind, offset = entry
    block, block_bytes = sizes[kind]
    if dimensions[0] % block or not all(dimensions):
        raise Damaged(f"'{name}' has the shape {dimensions}, in blocks of {block}")
    nbytes = math.prod(dimensions) // block * block_bytes
    if offset % alignment or start + offset + nbytes > size:
        raise Damaged(
            f"'{name}' lies at bytes {start + offset:,} to {start + offset + nbytes:,} of {size:,}"
        )
    return PlacedTensor(kind, tuple(reversed(dimensions)), start + offset, nbytes)


def _check_apart(tensors):
    """Tensors that share bytes would take more memory than the file's size lets one think."""
    end, before = 0, None
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise Damaged(f"'{name}' lies on '{before}'")
        end, before = tensor.start + tensor.nbytes, name
