"""Files of tensors: safetensors, alone or in shards, checked before anything is read from them.

    stored = tensor_files("examples/base")["model.norm.weight"]
    print(stored.dtype, stored.shape)          # from the header
    tensor = stored.read()
    write_safetensors({"model.norm.weight": tensor}, "copy.safetensors")

A safetensors file is eight bytes with the length of its header, the header, a JSON object that
gives each tensor's type, shape and place, and the bytes of the tensors one after the other. Whoever
made a file may have meant harm: sizes are checked against the file's own before memory is taken,
and an index can name nothing but files beside it.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, read_json
from minisft.common.outputs import atomic_path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # torch's
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


@dataclass
class StoredTensor:
    """A tensor in a file: its type and shape, and the bytes where it lies."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple
    start: int  # in the file
    nbytes: int
    unpack: object = None  # bytes of some rows (uint8) -> these rows; None where they are the rows

    def read(self, begin=0, end=None):
        """The tensor, or its rows begin..end-1, pages brought in from the file as they are used.

        They are shared with other processes that read the file; writing to them changes a copy.
        Whoever changes the file in place, instead of replacing it, changes the tensor.
        """
        shape = self.shape if end is None else (end - begin, *self.shape[1:])
        row_bytes = self.nbytes // (self.shape or (1,))[0] if self.nbytes else 0
        start, nbytes = self.start + begin * row_bytes, (shape or (1,))[0] * row_bytes
        if not nbytes:
            return torch.empty(shape, dtype=self.dtype)
        try:
            if self.path.stat().st_size < start + nbytes:
                raise UserError(f"{self.path}: became shorter while it was being read")
            # Not Python's mmap, which keeps a file open for as long as it maps it.
            pages = torch.from_file(
                str(self.path), shared=False, size=start + nbytes, dtype=torch.uint8
            )
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error
        except RuntimeError as error:
            raise UserError(f"{self.path}: cannot be mapped: {error}") from error
        data = pages[start:]
        if data.data_ptr() % self.dtype.itemsize:  # numbers stand at multiples of their size
            data = data.clone()
        return self.unpack(data) if self.unpack else data.view(self.dtype).view(shape)

    def check(self, shape, wanted_by):
        """UserError unless the tensor is of floating-point type and has this shape."""
        if self.shape != tuple(shape):
            raise UserError(
                f"{self.path}: {self.name} has shape {list(self.shape)}, {wanted_by} {list(shape)}"
            )
        if not self.dtype.is_floating_point:
            raise UserError(
                f"{self.path}: {self.name} is "
                f"{str(self.dtype).removeprefix('torch.')}, not a floating-point type"
            )


def read_header(path):
    """{tensor name: StoredTensor} of a safetensors file; UserError says what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path}: not a safetensors file, or cut off: a header of "
                    f"{length:,} bytes in a file of {size:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than text")
        tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
        _check_places(tensors, 8 + length, size)
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or not a safetensors file: {error}; download it again"
        ) from error
    return {tensor.name: tensor for tensor in tensors}


def _without_repetition(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is in the header twice")
    return content


def _stored(path, name, entry, data_start):
    """One entry of a header, checked by itself."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype!r}; known are {', '.join(DTYPES)}")
    if not (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(is_integer(number) for number in shape)
    ):
        raise ValueError(f"{name} has the shape {shape!r}")
    if not (is_integer(start) and is_integer(end) and start <= end):
        raise ValueError(f"{name} has the data_offsets {start!r}, {end!r}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != end - start:
        raise ValueError(
            f"{name} takes {end - start:,} bytes, but {dtype} of shape {shape} takes {needed:,}"
        )
    return StoredTensor(path, name, DTYPES[dtype], tuple(shape), data_start + start, end - start)


def _check_places(tensors, start, size):
    """Tensors lie one after the other, from the header to the file's end."""
    for tensor in sorted(tensors, key=lambda one: (one.start, one.nbytes)):
        if tensor.start != start:
            fault = "overlaps with" if tensor.start < start else "leaves a gap after"
            raise ValueError(f"{tensor.name} {fault} what comes before it")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,}, the file at {size:,}")


def tensor_files(model_dir):
    """{tensor name: StoredTensor} of a checkpoint, from its single file or its index."""
    model_dir = Path(model_dir)
    index_path, path = model_dir / INDEX, model_dir / WEIGHTS
    if path.is_file():
        return read_header(path)
    if index_path.is_file():
        return _tensors_in_shards(model_dir, index_path)
    pickled = any(model_dir.glob("*.bin"))
    hint = "; pickled .bin files are never opened: convert them to safetensors" if pickled else ""
    raise UserError(f"{model_dir}: neither {WEIGHTS} nor {INDEX} is there{hint}")


def _tensors_in_shards(model_dir, index_path):
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: has no weight_map")
    tensors = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        # A name with a path could lead anywhere. That the file itself may be a link is how the
        # cache of the hub is made; an index cannot make one.
        if os.path.basename(shard) != shard or not os.path.isfile(model_dir / shard):
            raise UserError(f"{index_path}: '{shard}' is not a file in {model_dir}")
        for name, tensor in read_header(model_dir / shard).items():
            if name in tensors:
                raise UserError(
                    f"{model_dir}: tensor {name} is in {tensors[name].path.name} and {shard}"
                )
            tensors[name] = tensor
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise UserError(f"{index_path}: tensors not in any shard: {shorten_list(lost)}")
    moved = sorted(name for name, shard in weight_map.items() if tensors[name].path.name != shard)
    if moved:
        raise UserError(f"{index_path}: tensors not in the shard it names: {shorten_list(moved)}")
    return tensors


def shorten_list(names, limit=5):
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def write_safetensors(tensors, path):
    """Write a safetensors file with `atomic_path`; UserError if the disk is full."""
    try:
        with atomic_path(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(dict(tensors), partial, metadata={"format": "pt"})
            partial.chmod(mode)  # save_file makes the file private to its owner
    except SafetensorError as error:
        raise UserError(f"{path}: could not be written: {error}") from error


def parse_size(text):
    """`5GB`, `500MB`, `100KB` (powers of ten) or a number of bytes -> bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    try:
        if text[-2:].upper() in units:
            size = int(float(text[:-2]) * units[text[-2:].upper()])
        else:
            size = int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"'{text}' is not a size; write 5GB, 500MB or a number of bytes")
    return size
