"""GGUF files written a piece at a time, converted on all processors, whole or not at all.

    tensor = Tensor("output_norm.weight", (64,), GGMLQuantizationType.F32, lambda a, b: norm[a:b])
    write_gguf("model.gguf", "llama", {"general.name": "tiny"}, [tensor])

A tensor is cut into pieces of whole rows. Pieces are read and converted by a few threads and
written in their order, while only a handful of them are in memory.
"""

import math
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from tqdm import tqdm

from minisft.common.errors import UserError
from minisft.gguf.kquants import quantize_q4_k, quantize_q6_k

TORCH_TYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
K_QUANTS = {Type.Q4_K: quantize_q4_k, Type.Q6_K: quantize_q6_k}
# The largest number that fits; the scales of quantised blocks are float16.
LARGEST = {type: torch.finfo(dtype).max for type, dtype in TORCH_TYPES.items()}
PIECE_SIZE = 2**22  # numbers converted at a time: enough to amortise the call, little memory


@dataclass
class Tensor:
    """A tensor of the file to be: its type, and where its rows come from."""

    name: str
    shape: tuple
    type: Type
    read: object  # (begin, end) -> these rows, float32
    rows_together: int = 1  # reading may cut only at multiples of this

    @property
    def nbytes(self):
        """What it takes in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes

    def pieces(self):
        """(begin, end) of pieces of about PIECE_SIZE numbers, in order."""
        row = math.prod(self.shape[1:])
        step = max(1, PIECE_SIZE // (row * self.rows_together)) * self.rows_together
        return [
            (begin, min(begin + step, self.shape[0])) for begin in range(0, self.shape[0], step)
        ]

    def converted(self, begin, end):
        """Rows begin..end-1 as the bytes of the file; UserError for what the type cannot hold."""
        rows = self.read(begin, end)
        low, high = torch.aminmax(rows)
        largest = torch.maximum(-low, high).item()
        limit = LARGEST.get(self.type, LARGEST[Type.F16])
        if not largest <= limit:  # so that NaN fails too
            fault = (
                "holds NaN"
                if math.isnan(largest)
                else f"holds {largest:.4g}; {self.type.name.lower()} reaches to {limit:.4g}: "
                "try --quantization bf16 or f32"
            )
            raise UserError(f"{self.name}: {fault}")
        if self.type in TORCH_TYPES:
            return rows.to(TORCH_TYPES[self.type]).view(torch.uint8).numpy()
        with np.errstate(all="ignore"):  # a block of zeros has no scale to divide by
            if self.type in K_QUANTS:
                return K_QUANTS[self.type](rows.numpy())
            return gguf.quants.quantize(rows.numpy(), self.type)


def write_gguf(output, architecture, metadata, tensors):
    """Write the file beside its place and rename it when it is whole. UserError leaves nothing."""
    output, total = Path(output), sum(tensor.nbytes for tensor in tensors)
    _make_room(output, total)
    unfinished = Path(f"{output}.partial")
    writer = gguf.GGUFWriter(None, architecture)
    _add_metadata(writer, metadata)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, tensors, total)
        writer.close()
        os.replace(unfinished, output)
    except OSError as error:
        reason = error.strerror or "the disk is full"  # numpy's say how many bytes
        raise UserError(f"{output}: could not be written: {reason}") from error
    finally:  # where the disk is full, closing fails again; where it is read-only, removing
        with suppress(OSError):
            writer.close()
        with suppress(OSError):
            unfinished.unlink()


def _make_room(output, total):
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: its folder cannot be made: {error.strerror}") from error
    free = shutil.disk_usage(output.parent).free
    if total > free:
        raise UserError(f"{output}: needs {total / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f}")


def _add_metadata(writer, metadata):
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        np.int32: GGUFValueType.INT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    for key, value in metadata.items():
        if type(value) is int and not 0 <= value < 2**32:
            raise UserError(f"{key}: {value} does not fit a GGUF file")
        writer.add_key_value(key, value, kinds[type(value)])


def _write_tensors(writer, tensors, total):
    """Convert pieces on all processors, write them in their order; a few wait in memory."""
    (file,), workers, waiting = writer.fout, torch.get_num_threads(), deque()
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def write_oldest():
        """The piece that has waited longest, once it is converted."""
        begin, future = waiting.popleft()
        if begin == 0:  # tensors begin at multiples of the alignment
            writer.write_padding(file, file.tell())
        data = future.result()
        data.tofile(file)
        bar.update(data.nbytes)

    with ThreadPoolExecutor(workers) as pool, bar:
        for tensor in tensors:
            for begin, end in tensor.pieces():
                waiting.append((begin, pool.submit(tensor.converted, begin, end)))
                if len(waiting) > 2 * workers:
                    write_oldest()
        while waiting:
            write_oldest()
    writer.write_padding(file, file.tell())
