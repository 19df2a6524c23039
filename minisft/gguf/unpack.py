"""A GGUF file as a checkpoint: its config, tokenizer and tensors, as if it were a folder.

    folder = unpack("ggml-model-q4_0.gguf")     # config.json, tokenizer files, a link to the file
    tensors = stored_tensors(folder / GGUF)["model.norm.weight"].read()

So a file that was exported can be talked to, evaluated and trained on by the same code as the
checkpoint it came from. Small files are written to a temporary folder, which goes when the program
ends; tensors are read from the GGUF file itself, dequantised and in the checkpoint's order.
"""

import atexit
import json
import shutil
import struct
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError
from minisft.common.json_files import write_json
from minisft.common.tensor_files import StoredTensor
from minisft.gguf.mapping import (
    ROTARY_DIVISORS,
    checkpoint_name,
    config_fields,
    deinterleaved,
    is_interleaved,
)
from minisft.gguf.reader import read_gguf
from minisft.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WRITES_SPACE,
)

GGUF = "model.gguf"  # what the file is called in its folder
KINDS = {0, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}  # 0: not said
# Other names that llama.cpp has for the same ways to cut text into words.
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def unpack(path):
    """The folder of a GGUF file: everything but the tensors unpacked, a link to the file itself.

    Raises UserError for damaged files and for models and tokenizers that minisft does not know.
    """
    path = Path(path).resolve()
    file = read_gguf(path)
    try:
        _refuse_parts(file.metadata.get("split.count"))
        config = config_fields(file.metadata, file.tensors, _divisors(path, file))
        tokenizer_files = _tokenizer_files(file.metadata, config["vocab_size"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    parent = tempfile.mkdtemp(prefix="minisft-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent) / path.name  # so that messages name the file
    folder.mkdir()
    write_json(config, folder / "config.json")
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(
            content
            if isinstance(content, bytes)
            else json.dumps(content, ensure_ascii=False).encode()
        )
    (folder / GGUF).symlink_to(path)
    return folder


def _refuse_parts(number):
    if type(number) is int and number > 1:
        raise UserError(
            f"one of the {number} parts of a model; make one file of them with "
            "llama.cpp's llama-gguf-split --merge"
        )


def stored_tensors(path):
    """{name in a checkpoint: StoredTensor} of a GGUF file."""
    import gguf
    import torch

    path = Path(path)
    file = read_gguf(path)
    for type, name in {placed.type: name for name, placed in file.tensors.items()}.items():
        type = gguf.GGMLQuantizationType(type)
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[type][1]), np.uint8), type)
        except NotImplementedError as error:
            raise UserError(
                f"{path}: '{name}' is of the type {type.name}, which cannot be read "
                "here; get a file of another type, such as Q8_0"
            ) from error
    architecture = file.metadata["general.architecture"]
    head_dim = config_fields(file.metadata, file.tensors)["head_dim"]
    types = {
        gguf.GGMLQuantizationType.F16: torch.float16,
        gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    }
    tensors = {}
    for name, placed in file.tensors.items():
        if name == ROTARY_DIVISORS:
            continue
        name = checkpoint_name(name)
        swapped = head_dim if is_interleaved(name, architecture) else None
        tensors[name] = StoredTensor(
            path,
            name,
            types.get(placed.type, torch.float32),
            placed.shape,
            placed.start,
            placed.nbytes,
            partial(_rows, placed.type, placed.shape[1:], swapped),
        )
    return tensors


def _rows(type, row_shape, head_dim, data):
    """The bytes of some rows -> the rows, dequantised, in the checkpoint's order."""
    import gguf
    import torch

    type = gguf.GGMLQuantizationType(type)
    if type == gguf.GGMLQuantizationType.BF16:
        rows = data.view(torch.bfloat16)
    elif type == gguf.GGMLQuantizationType.F16:
        rows = data.view(torch.float16)
    elif type == gguf.GGMLQuantizationType.F32:
        rows = data.view(torch.float32)
    else:
        rows = torch.from_numpy(gguf.quants.dequantize(data.numpy(), type))
    rows = rows.reshape(-1, *row_shape)
    return deinterleaved(rows, head_dim) if head_dim else rows


def _divisors(path, file):
    placed = file.tensors.get(ROTARY_DIVISORS)
    if placed is None:
        return None
    import torch

    if placed.type != 0 or len(placed.shape) != 1:
        raise UserError(f"{ROTARY_DIVISORS} is not a vector of float32")
    return StoredTensor(
        path, ROTARY_DIVISORS, torch.float32, placed.shape, placed.start, placed.nbytes
    ).read()


def _tokenizer_files(metadata, vocab_size):
    """{file name: content} for the tokenizer and generation_config.json."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, kinds = fields.get("tokens"), fields.get("token_type")
    kinds = [NORMAL] * vocab_size if kinds is None else kinds
    if not _is_list_of(tokens, str) or not _is_list_of(kinds, int) or len(kinds) != len(tokens):
        raise UserError("tokenizer.ggml.tokens and token_type are no lists of equal length")
    if not set(kinds) <= KINDS:
        raise UserError(f"tokenizer.ggml.token_type: {min(set(kinds) - KINDS)} is no type of token")
    model = fields.get("model")
    if model not in ("llama", "gpt2"):
        raise UserError(f"the tokenizer model '{model}' is not supported; known are llama, gpt2")
    make = _sentencepiece_model if model == "llama" else _tokenizer_json
    files, config = make(fields, tokens, kinds), _tokenizer_config(metadata, fields, tokens)
    if model == "gpt2" and config["add_bos_token"] and config["bos_token"]:
        bos = config["bos_token"], fields["bos_token_id"]
        files["tokenizer.json"]["post_processor"] = _post_processor(*bos)
    files["tokenizer_config.json"] = config
    stops = [fields.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    files["generation_config.json"] = {"eos_token_id": [id for id in stops if id is not None]}
    return files


def _is_list_of(value, kind):
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _tokenizer_config(metadata, fields, tokens):
    add_bos = fields.get("add_bos_token", fields["model"] == "llama")
    ids = {
        name: fields.get(f"{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    if not add_bos and ids["bos"] in (ids["pad"], ids["eos"]):
        ids["bos"] = None  # a place-holder, for tokenizers that have none
    for name, id in ids.items():
        if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
            raise UserError(f"tokenizer.ggml: the {name} token {id!r} is not in the vocabulary")
    config = {f"{name}_token": None if id is None else tokens[id] for name, id in ids.items()}
    # llama.cpp puts a space after control tokens too, what transformers calls legacy.
    config |= {"add_bos_token": bool(add_bos), "legacy": not fields.get(WRITES_SPACE, False)}
    # By which transformers knows how to read the files beside it.
    name = "LlamaTokenizer" if fields["model"] == "llama" else "PreTrainedTokenizerFast"
    config |= {"tokenizer_class": name, "add_prefix_space": _adds_space(fields)}
    template = metadata.get("tokenizer.chat_template")
    return {**config, **({"chat_template": template} if isinstance(template, str) else {})}


def _adds_space(fields):
    return bool(fields.get(WRITES_SPACE) or fields.get("add_space_prefix", True))


def _tokenizer_json(fields, tokens, kinds):
    """Byte-level BPE."""
    pre, merges = str(fields.get("pre")), fields.get("merges")
    steps = {name: steps for steps, name in PRE_TOKENIZERS.items()}.get(ALIASES.get(pre, pre))
    if steps is None:
        raise UserError(
            f"the pre-tokenizer '{pre}' is not known; known are "
            f"{', '.join(PRE_TOKENIZERS.values())}"
        )
    if not _is_list_of(merges, str) or any(merge.count(" ") != 1 for merge in merges):
        raise UserError("tokenizer.ggml.merges is no list of pairs")
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    written = {
        "bytes": {**bytes_step, "use_regex": False},
        "gpt2 words and bytes": bytes_step,
        "single digits": {"type": "Digits", "individual_digits": True},
    }
    added = [
        {
            "id": id,
            "content": token,
            "special": kind == CONTROL,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocabulary = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != UNUSED
    }
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    written.get(step) or {**split, "pattern": {"Regex": step}}
                    for step in steps[:-1]
                ],
            },
            "post_processor": None,
            "decoder": {**bytes_step, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "ignore_merges": steps[-1],
                "merges": [merge.split(" ") for merge in merges],
            },
        }
    }


def _post_processor(token, id):
    """What puts BOS before a text in transformers, which takes it from tokenizer.json alone."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _sentencepiece_model(fields, tokens, kinds):
    """A tokenizer.model: SentencePiece's protocol buffer, of which few fields are needed.

    Piece: 1 text, 2 score, 3 type (numbered as in GGUF). Trainer: 3 model type (2: BPE), 35 whether
    unknown characters fall back to bytes. Normaliser: 3 whether a space is put before a text, 4
    whether runs of spaces are made one.
    """
    scores = fields.get("scores")
    if not _is_list_of(scores, float) or len(scores) != len(tokens):
        raise UserError("tokenizer.ggml.scores is no list of a number for every token")
    unknown = fields.get("unknown_token_id", 0)
    pieces = []
    for id, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        kind = UNKNOWN if id == unknown else kind if kind != UNKNOWN else CONTROL
        pieces.append(
            _field(
                1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
            )
        )
    trainer = _field(3, 2) + _field(35, int(BYTE in kinds))
    normalizer = _field(3, int(_adds_space(fields))) + _field(4, 0)
    return {"tokenizer.model": b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)}


def _field(number, value):
    """One field of a protocol buffer: an int as a varint, bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])
