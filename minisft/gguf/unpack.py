"""Use a GGUF file as a checkpoint folder.

    folder = unpack("ggml-model-q4_0.gguf")     # config.json, tokenizer files, a link to the file
    tensors = stored_tensors(folder / GGUF)     # named as in a checkpoint
    tensors["model.norm.weight"].read()

So all scripts read a GGUF file like any checkpoint. The small files are in a temporary folder,
which is removed when the program ends. Tensors are read from the GGUF file itself, dequantised,
with their rows in the checkpoint's order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from minisft.common.errors import UserError
from minisft.common.json_files import write_json
from minisft.common.outputs import temporary_folder
from minisft.common.tensor_files import StoredTensor
from minisft.gguf.mapping import (
    FUSED,
    PARTS,
    ROTARY_DIVISORS,
    checkpoint_name,
    deinterleave,
    is_interleaved,
)
from minisft.gguf.reader import GGUFFile, read_gguf
from minisft.gguf.tensor_types import TORCH_TYPES
from minisft.gguf.unpack_config import config_fields
from minisft.gguf.unpack_tokenizer import tokenizer_files
from minisft.model.packed_weights import Blocks

GGUF = "model.gguf"  # the link to the file
# The types that can be multiplied without dequantising, and the bytes of their blocks.
BLOCK_BYTES = {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q8_0: 34}


def unpack(path: str | Path) -> Path:
    """The checkpoint folder of a GGUF file.

    UserError if the file is damaged, or if minisft does not know its model or tokenizer.
    """
    path = Path(path).resolve()
    file = read_gguf(path)
    try:
        if file.metadata.get("general.type") == "adapter":
            raise UserError(
                "this is a LoRA adapter for llama.cpp, not a model. Give the folder that it was "
                "exported from as --adapter."
            )
        num_parts = file.metadata.get("split.count")
        if type(num_parts) is int and num_parts > 1:
            raise UserError(
                f"this is one of the {num_parts} parts of a model. Join them with llama.cpp's "
                "llama-gguf-split --merge."
            )
        config = config_fields(file.metadata, file.tensors, _rotary_divisors(file))
        contents = tokenizer_files(file.metadata, config["vocab_size"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    folder = temporary_folder() / path.name  # so that messages name the file
    folder.mkdir()
    write_json(config, folder / "config.json")
    for name, content in contents.items():
        if not isinstance(content, bytes):
            content = json.dumps(content, ensure_ascii=False).encode()
        (folder / name).write_bytes(content)
    (folder / GGUF).symlink_to(path)
    return folder


def _rotary_divisors(file: GGUFFile) -> torch.Tensor | None:
    placed = file.tensors.get(ROTARY_DIVISORS)
    if placed is None:
        return None
    if placed.type != Type.F32 or len(placed.shape) != 1:
        raise UserError(f"{ROTARY_DIVISORS} is not a vector of float32")
    return StoredTensor(
        file.path, ROTARY_DIVISORS, torch.float32, placed.shape, placed.start, placed.nbytes
    ).read()


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """{name in a checkpoint: StoredTensor} of a GGUF file."""
    file = read_gguf(path)
    _check_types(file)
    architecture = file.metadata["general.architecture"]
    head_dim = config_fields(file.metadata, file.tensors)["head_dim"]
    tensors = {}
    for gguf_name, placed in file.tensors.items():
        if gguf_name == ROTARY_DIVISORS:  # part of config.json
            continue
        name, type = checkpoint_name(gguf_name), Type(placed.type)
        group = head_dim if is_interleaved(name, architecture) else None
        tensors[name] = StoredTensor(
            file.path,
            name,
            TORCH_TYPES.get(type, torch.float32),
            placed.shape,
            placed.start,
            placed.nbytes,
            BlockRows(type, placed.shape[1:], group),
            row_group=group or 1,
        )
    return _fused(tensors) if architecture == "baichuan" else tensors


def _fused(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with q_proj, k_proj and v_proj of a layer as one, W_pack."""
    result = dict(tensors)
    for name, query in tensors.items():
        names = [name.replace(PARTS[0], part) for part in PARTS]
        parts = tuple(tensors[part] for part in names if part in tensors)
        if f".{PARTS[0]}." not in name or len(parts) < 3 or not query.shape:
            continue
        if all(part.shape == query.shape for part in parts):
            whole, shape = name.replace(PARTS[0], FUSED), (3 * query.shape[0], *query.shape[1:])
            result[whole] = replace(query, name=whole, shape=shape, parts=parts)
            for part in names:
                del result[part]
    return result


def _check_types(file: GGUFFile) -> None:
    """UserError if the gguf package cannot dequantise a type."""
    for type, name in {placed.type: name for name, placed in file.tensors.items()}.items():
        type = Type(type)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[type][1]), np.uint8)
        try:
            gguf.quants.dequantize(block, type)
        except NotImplementedError as error:
            raise UserError(
                f"{file.path}: the tensor '{name}' has the type {type.name}, which cannot be read. "
                "Get a file of another type, such as Q8_0."
            ) from error


@dataclass
class BlockRows:
    """Unpacks rows of a tensor.

    type: how the numbers are stored. row_shape: the shape of a row. head_dim: given if the writer
    reordered the rows of each head.
    """

    type: Type
    row_shape: tuple[int, ...]
    head_dim: int | None

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        """The rows (R, *row_shape) in a piece of the file's bytes (uint8)."""
        if self.type in TORCH_TYPES:
            rows = data.view(TORCH_TYPES[self.type])
        else:
            rows = torch.from_numpy(gguf.quants.dequantize(data.numpy(), self.type))
        return self._in_order(rows.reshape(-1, *self.row_shape))

    def blocks(self, data: torch.Tensor) -> list[Blocks]:
        """The rows without dequantising them: one Blocks, or two whose sum they are.

        A block of Q4_0 has a scale (float16) and 16 bytes: their low halves are the first 16 steps,
        their high halves the others. Q4_1 has a minimum (float16) after the scale. Q8_0 has 32
        bytes, from -128 to 127.
        """
        num_factors = 2 if self.type == Type.Q4_1 else 1
        block = data.view(-1, BLOCK_BYTES[self.type])
        factors = block[:, : 2 * num_factors].contiguous().view(torch.float16).float()
        numbers, scales = block[:, 2 * num_factors :], factors[:, 0]
        if self.type == Type.Q8_0:
            numbers = numbers.int() ^ 128  # from 0 to 255, with the minimum -128 * scale
            high = self._in_rows(numbers >> 4, 16 * scales, -120 * scales)
            return [high, self._in_rows(numbers & 15, scales, -8 * scales)]
        steps = torch.cat((numbers & 15, numbers >> 4), dim=1).int()
        minimums = factors[:, 1] if self.type == Type.Q4_1 else -8 * scales
        return [self._in_rows(steps, scales, minimums)]

    def _in_rows(self, *blocks: torch.Tensor) -> Blocks:
        """Blocks from the steps (blocks, 32), scales (blocks,) and minimums of all rows."""
        num_rows = blocks[0].numel() // self.row_shape[0]
        return Blocks(*[self._in_order(part.reshape(num_rows, -1)) for part in blocks])

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        return deinterleave(rows, self.head_dim) if self.head_dim else rows


def read_blocks(stored: StoredTensor) -> list[Blocks]:
    """A matrix of type Q4_0, Q4_1 or Q8_0, see BlockRows.blocks; [] for other tensors."""
    if stored.parts:
        parts = [read_blocks(part) for part in stored.parts]
        same_form = len({len(part) for part in parts}) == 1
        return [join_rows(blocks) for blocks in zip(*parts, strict=True)] if same_form else []
    rows = stored.unpack
    if not isinstance(rows, BlockRows) or rows.type not in BLOCK_BYTES or len(stored.shape) != 2:
        return []
    data = replace(stored, dtype=torch.uint8, shape=(stored.nbytes,), unpack=None).read()
    return rows.blocks(data)


def join_rows(parts: Sequence[Blocks]) -> Blocks:
    """The rows of several matrices, one after the other."""
    return Blocks(*map(torch.cat, zip(*parts, strict=True)))
