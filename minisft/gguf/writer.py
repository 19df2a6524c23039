"""Write a GGUF file piece by piece, converted on all processors.

    tensor = Tensor("output_norm.weight", (64,), GGMLQuantizationType.F32, lambda a, b: norm[a:b])
    write_gguf("model.gguf", "llama", {"general.name": "tiny"}, [tensor])

The gguf package writes the header. A tensor is cut into pieces of a few million numbers. Threads
read and convert the pieces, and the main thread writes them in order. Only a few pieces are in
memory at once, so memory does not grow with the model.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from minisft.common.errors import UserError
from minisft.common.outputs import atomic_path, check_free_space
from minisft.common.progress import ProgressBar
from minisft.gguf.kquants import quantize_q4_k, quantize_q6_k
from minisft.gguf.tensor_types import TORCH_TYPES

K_QUANTS = {Type.Q4_K: quantize_q4_k, Type.Q6_K: quantize_q6_k}
# The largest number of a type. Quantised blocks have float16 scales.
LARGEST = {type: torch.finfo(dtype).max for type, dtype in TORCH_TYPES.items()}
PIECE_SIZE = 2**22  # numbers converted at once: enough to amortise the call, little memory
METADATA_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    np.int32: GGUFValueType.INT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


@dataclass
class Tensor:
    """A tensor to write.

    read: (begin, end) -> rows begin..end-1 in float32. row_group: pieces begin at multiples of this
    number of rows.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    read: Callable[[int, int], torch.Tensor]
    row_group: int = 1

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes

    def pieces(self) -> list[tuple[int, int]]:
        """(begin, end) of pieces of about PIECE_SIZE numbers, in order."""
        num_rows, group_size = self.shape[0], self.row_group * math.prod(self.shape[1:])
        step = max(1, PIECE_SIZE // group_size) * self.row_group
        return [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]

    def convert(self, begin: int, end: int) -> np.ndarray:
        """Rows begin..end-1 in the file's type, as uint8; UserError if a number does not fit."""
        rows = self.read(begin, end)
        low, high = torch.aminmax(rows)
        largest = torch.maximum(-low, high).item()
        limit = LARGEST.get(self.type, LARGEST[Type.F16])
        if math.isnan(largest):
            raise UserError(
                f"{self.name}: holds NaN. The checkpoint is damaged; use an intact one."
            )
        if largest > limit:
            raise UserError(
                f"{self.name}: holds {largest:.4g}, but the largest {self.type.name.lower()} is "
                f"{limit:.4g}. Try --quantization bf16 or f32."
            )
        if self.type in TORCH_TYPES:
            return rows.to(TORCH_TYPES[self.type]).view(torch.uint8).numpy()
        if self.type in K_QUANTS:
            return K_QUANTS[self.type](rows.numpy())
        with np.errstate(all="ignore"):  # a block of zeros divides by a scale of zero
            return gguf.quants.quantize(rows.numpy(), self.type)


def write_gguf(
    output: str | Path, architecture: str, metadata: dict[str, Any], tensors: list[Tensor]
) -> None:
    """Write a file; UserError, and no file, if the disk is full or a number does not fit its type.

    metadata: {key: bool, int, np.int32, float, str or list}.
    """
    output = Path(output)
    check_free_space(output.parent, sum(tensor.nbytes for tensor in tensors))
    with atomic_path(output) as partial:
        _write_header(partial, architecture, metadata, tensors)
        with open(partial, "ab") as file:
            _write_data(file, tensors)


def _write_header(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: list[Tensor]
) -> None:
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        if type(value) is int and not 0 <= value < 2**32:
            raise UserError(f"{key}: {value} does not fit a GGUF file, which has 32 bits for it")
        writer.add_key_value(key, value, METADATA_TYPES[type(value)])
    for tensor in tensors:
        float32 = np.dtype(np.float32)  # with this type the package takes the shape unchanged
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_data(file: BinaryIO, tensors: list[Tensor]) -> None:
    """Write the tensors in order, each from a multiple of the alignment."""
    with ProgressBar(len(tensors), "tensor") as bar:
        for is_first_piece, data in _converted_pieces(tensors):
            if is_first_piece:
                _pad(file)
            file.write(data.data)
            bar.update(is_first_piece)
    _pad(file)


def _converted_pieces(tensors: list[Tensor]) -> Iterator[tuple[bool, np.ndarray]]:
    """Yield (first piece of its tensor, bytes) in order, converted ahead by a pool of threads."""
    num_threads = torch.get_num_threads()
    waiting: deque[tuple[bool, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for tensor in tensors:
            for begin, end in tensor.pieces():
                waiting.append((begin == 0, pool.submit(tensor.convert, begin, end)))
                if len(waiting) > 2 * num_threads:
                    is_first_piece, future = waiting.popleft()
                    yield is_first_piece, future.result()
        while waiting:
            is_first_piece, future = waiting.popleft()
            yield is_first_piece, future.result()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
