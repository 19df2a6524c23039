"""Safetensors files, single or in shards, checked before anything is read from them.

    stored = tensor_files("examples/base")["model.norm.weight"]
    print(stored.dtype, stored.shape)          # from the header
    tensor = stored.read()
    write_safetensors({"model.norm.weight": tensor}, "copy.safetensors")

A safetensors file consists of the length of its header (8 bytes), the header (a JSON object with
the type, shape and place of each tensor), and the bytes of all tensors without gaps. The author of
a file may be hostile: all sizes are checked against the size of the file before memory is
allocated, and an index can only name files in its own folder.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minisft.common.devices import dtype_name
from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, read_json
from minisft.common.lfs_pointers import refuse_pointer
from minisft.common.outputs import atomic_path
from minisft.common.words import list_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # the limit of torch
MAX_TENSORS = 100_000  # in one file; a hostile header could list millions
QUOTES_PER_TENSOR = 12  # quotation marks of an entry: 10, and 2 for entries of the metadata
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Types of quantised weights. Files with them are intact, but minisft cannot use them.
QUANTIZED_DTYPES = {
    "U32": "packed weights, as MLX writes them",
    **dict.fromkeys(
        ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), "8-bit floating point"
    ),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2", "F4"), "floating point of fewer than 8 bits"),
}
USE_ORIGINAL = (
    "Use the original weights: the checkpoint in bfloat16, float16 or float32 that this one was "
    "made from. --quantization_bit quantises it while it is loaded."
)
AGAIN = "; download the checkpoint again"


@dataclass
class StoredTensor:
    """A tensor in a file: type, shape, and which bytes of the file hold it.

    unpack: converts the bytes of some rows (uint8) to these rows, if the file holds them in another
    form. row_group: it needs whole groups of this many rows. parts: the tensors whose rows this one
    has, one after the other, if it has no bytes of its own.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset in the file
    nbytes: int
    unpack: Callable[[Tensor], Tensor] | None = None
    row_group: int = 1
    parts: tuple["StoredTensor", ...] = ()

    def read(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The tensor, or its rows from begin to end - 1, memory-mapped.

        Processes that read the same file share the pages. Writing to the tensor changes a private
        copy. Changing the file in place, instead of replacing it, changes the tensor.
        """
        if self.parts:
            return self._read_parts(begin, self.shape[0] if end is None else end)
        if end is not None and (begin % self.row_group or end % self.row_group):
            first = begin // self.row_group * self.row_group
            last = -(-end // self.row_group) * self.row_group
            return self.read(first, last)[begin - first : end - first]
        shape = self.shape if end is None else (end - begin, *self.shape[1:])
        row_bytes = self.nbytes // (self.shape or (1,))[0] if self.nbytes else 0
        start, nbytes = self.start + begin * row_bytes, (shape or (1,))[0] * row_bytes
        if not nbytes:
            return torch.empty(shape, dtype=self.dtype)
        try:
            if self.path.stat().st_size < start + nbytes:
                raise UserError(f"{self.path}: was truncated while it was being read; start again")
            # Python's mmap would keep a file descriptor open for every mapping.
            pages = torch.from_file(
                str(self.path), shared=False, size=start + nbytes, dtype=torch.uint8
            )
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error
        except RuntimeError as error:
            raise UserError(f"{self.path}: cannot be mapped: {error}") from error
        data = pages[start:]
        if data.data_ptr() % self.dtype.itemsize:  # torch needs aligned numbers
            data = data.clone()
        return self.unpack(data) if self.unpack else data.view(self.dtype).view(shape)

    def _read_parts(self, begin: int, end: int) -> Tensor:
        rows, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if begin < last and first < end:
                rows.append(part.read(max(begin - first, 0), min(end, last) - first))
            first = last
        return torch.cat(rows) if rows else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def check(self, shape: Sequence[int], source: str) -> None:
        """UserError unless the tensor has this shape and a floating-point type.

        source: where the shape comes from, for the message: "config.json says".
        """
        if self.shape != tuple(shape):
            raise UserError(
                f"{self.path}: {self.name} has shape {list(self.shape)}, {source} {list(shape)}"
            )
        if not self.dtype.is_floating_point:
            raise UserError(
                f"{self.path}: {self.name} is {dtype_name(self.dtype)}, not a floating-point type"
            )


def read_header(path: str | Path) -> dict[str, StoredTensor]:
    """{tensor name: StoredTensor} of a safetensors file; UserError if the file is damaged."""
    path = Path(path)
    refuse_pointer(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path}: not a safetensors file, or truncated: a header of "
                    f"{length:,} bytes in a file of {size:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        if not text.startswith(b"{"):
            raise ValueError("the header does not begin with {")
        if text.count(b'"') > QUOTES_PER_TENSOR * MAX_TENSORS:
            raise ValueError(f"the header lists more than {MAX_TENSORS:,} tensors")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_dict_without_duplicates)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds values that are not text")
        tensors = [_checked_entry(path, name, entry, 8 + length) for name, entry in header.items()]
        _check_layout(tensors, 8 + length, size)
    except UserError:  # the file is intact, but unusable
        raise
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or not a safetensors file: {error}; download it again"
        ) from error
    return {tensor.name: tensor for tensor in tensors}


def _dict_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name} is in the header twice")
        content[name] = value
    return content


def _checked_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """The StoredTensor of an entry of the header. ValueError if type, shape and size disagree."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from error
    if isinstance(dtype, str) and dtype in QUANTIZED_DTYPES:
        raise UserError(
            f"{path}: the weights are quantised ({name} is of type {dtype}: "
            f"{QUANTIZED_DTYPES[dtype]}). {USE_ORIGINAL}"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype!r}; supported are {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(is_integer(number) for number in shape)
    ):
        raise ValueError(f"{name} has the shape {shape!r}")
    if not (is_integer(start) and is_integer(end) and start <= end):
        raise ValueError(f"{name} has the data_offsets {start!r}, {end!r}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != end - start:
        raise ValueError(
            f"{name} takes {end - start:,} bytes, but {dtype} of shape {shape} takes {nbytes:,}"
        )
    return StoredTensor(path, name, DTYPES[dtype], tuple(shape), data_start + start, nbytes)


def _check_layout(tensors: list[StoredTensor], start: int, size: int) -> None:
    """ValueError if the tensors overlap, or leave gaps between header and end of the file."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != start:
            fault = "overlaps with" if tensor.start < start else "leaves a gap after"
            raise ValueError(f"{tensor.name} {fault} the tensor before it")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,}, the file at {size:,}")


def tensor_files(model_dir: str | Path) -> dict[str, StoredTensor]:
    """{tensor name: StoredTensor} of a checkpoint, from its single file or its index."""
    model_dir = Path(model_dir)
    index_path, path = model_dir / INDEX, model_dir / WEIGHTS
    if path.is_file():
        return read_header(path)
    if index_path.is_file():
        return _read_shards(model_dir, index_path)
    hint = ""
    for pickled in model_dir.glob("*.bin"):
        refuse_pointer(pickled)
        hint = "; pickled .bin files are never opened: convert them to safetensors (docs/export.md)"
    raise UserError(f"{model_dir}: there is neither {WEIGHTS} nor {INDEX}{hint}")


def _read_shards(model_dir: Path, index_path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: has no weight_map; download it again")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        # A name with a path could lead anywhere. The file itself may be a link, as in the hub's
        # cache, because an index cannot create links.
        if os.path.basename(shard) != shard or not os.path.isfile(model_dir / shard):
            raise UserError(f"{index_path}: '{shard}' is not a file in {model_dir}")
        for name, tensor in read_header(model_dir / shard).items():
            if name in tensors:
                raise UserError(
                    f"{model_dir}: tensor {name} is in {tensors[name].path.name} and {shard}{AGAIN}"
                )
            tensors[name] = tensor
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise UserError(f"{index_path}: tensors not in any shard: {list_names(missing)}{AGAIN}")
    moved = sorted(name for name, shard in weight_map.items() if tensors[name].path.name != shard)
    if moved:
        raise UserError(
            f"{index_path}: tensors not in the shard it names: {list_names(moved)}{AGAIN}"
        )
    return tensors


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file with `atomic_path`; UserError if the disk is full."""
    try:
        with atomic_path(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(dict(tensors), partial, metadata={"format": "pt"})
            partial.chmod(mode)  # save_file makes the file private to its owner
    except SafetensorError as error:
        raise UserError(f"{path}: could not be written: {error}") from error


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `100KB` (powers of ten) or a number of bytes -> bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    try:
        if text[-2:].upper() in units:
            size = int(float(text[:-2]) * units[text[-2:].upper()])
        else:
            size = int(text)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"'{text}' is not a size; write 5GB, 500MB or a number of bytes")
    return size
