"""The metadata of a GGUF file as tokenizer files: the inverse of vocabulary.py.

tokenizer_files(file.metadata, vocab_size=32000).keys()
# tokenizer.model (or tokenizer.json), tokenizer_config.json, generation_config.json
"""

import struct
from typing import Any, TypeGuard, TypeVar

from minisft.common.errors import UserError
from minisft.gguf.prompts import checkpoint_text
from minisft.gguf.protobuf import field
from minisft.gguf.vocabulary import (
    ADDS_BOS,
    BYTE,
    CONTROL,
    KNOWN_STOPS,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE_AT_START,
    STOPS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from minisft.text.tokenizer_files import with_tool_template

# An older name of SPACE_AT_START. Files with it say that llama.cpp adds no space.
OLD_SPACE_AT_START = "minisft.chat_template_writes_space"
TOKEN_TYPES = {0, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}  # 0: not stated
# Other names that llama.cpp has for the same pre-tokenizers.
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
Item = TypeVar("Item")


def tokenizer_files(metadata: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """{file name: bytes, or content of a JSON file} of the tokenizer and generation_config.json."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, types = fields.get("tokens"), fields.get("token_type", [NORMAL] * vocab_size)
    if not _is_list_of(tokens, str) or not _is_list_of(types, int) or len(types) != len(tokens):
        raise UserError(
            "tokenizer.ggml.tokens and tokenizer.ggml.token_type must be lists of equal length"
        )
    if unknown := set(types) - TOKEN_TYPES:
        raise UserError(f"tokenizer.ggml.token_type: {min(unknown)} is not a type of token")
    model = fields.get("model")
    if model not in ("llama", "gpt2"):
        raise UserError(
            f"the tokenizer model '{model}' is not supported; supported are llama and gpt2"
        )
    config = _tokenizer_config(metadata, fields, tokens)
    # In a file of another program, the control tokens at which llama.cpp stops. `</s>` is an
    # ordinary token of Qwen.
    stated = [fields.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    controls = [id for id, type in enumerate(types) if type == CONTROL and id not in stated]
    known = [id for id in controls if tokens[id] in KNOWN_STOPS]
    stop_ids = fields.get(STOPS) or [id for id in stated + known if id is not None]
    files = {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": stop_ids}}
    if model == "llama":
        return {**files, "tokenizer.model": _sentencepiece_model(fields, tokens, types)}
    return {**files, "tokenizer.json": _tokenizer_json(fields, tokens, types, config)}


def _is_list_of(value: object, kind: type[Item]) -> TypeGuard[list[Item]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _tokenizer_config(
    metadata: dict[str, Any], fields: dict[str, Any], tokens: list[str]
) -> dict[str, Any]:
    is_sentencepiece = fields["model"] == "llama"
    # If the file does not say whether BOS begins a text, llama.cpp decides by the pre-tokenizer.
    name = str(fields.get("pre"))
    by_default = is_sentencepiece or ALIASES.get(name, name) == "llama-bpe"
    add_bos = bool(fields.get(ADDS_BOS, fields.get("add_bos_token", by_default)))
    ids = {name: fields.get(f"{theirs}_token_id") for name, theirs in SPECIAL_TOKENS.items()}
    if not add_bos and not fields.get("add_bos_token") and ids["bos"] in (ids["pad"], ids["eos"]):
        ids["bos"] = None  # a placeholder: this tokenizer has no BOS
    for name, id in ids.items():
        if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
            raise UserError(f"tokenizer.ggml: the {name} token {id!r} is not in the vocabulary")
    config = {f"{name}_token": None if id is None else tokens[id] for name, id in ids.items()}
    config |= {
        "add_bos_token": add_bos,
        # llama.cpp adds a space after special tokens too, which transformers calls legacy.
        "legacy": not _space_at_start(fields),
        "add_prefix_space": _adds_space(fields),
        # Tells transformers how to read the files.
        "tokenizer_class": "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast",
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        template = checkpoint_text(template, _space_at_start(fields))
        for_tools = metadata.get("tokenizer.chat_template.tool_use")
        if isinstance(for_tools, str):
            template = with_tool_template(template, for_tools)
        config["chat_template"] = template
    return config


def _adds_space(fields: dict[str, Any]) -> bool:
    return _space_at_start(fields) or bool(fields.get("add_space_prefix", True))


def _space_at_start(fields: dict[str, Any]) -> bool:
    return bool(fields.get(SPACE_AT_START, fields.get(OLD_SPACE_AT_START)))


def _tokenizer_json(
    fields: dict[str, Any], tokens: list[str], types: list[int], config: dict[str, Any]
) -> dict[str, Any]:
    """The tokenizer.json of byte-level BPE."""
    name, merges = str(fields.get("pre")), fields.get("merges")
    steps_by_name = {name: steps for steps, name in PRE_TOKENIZERS.items()}
    steps = steps_by_name.get(ALIASES.get(name, name))
    if steps is None:
        raise UserError(
            f"the pre-tokenizer '{name}' is not supported; supported are "
            f"{', '.join(PRE_TOKENIZERS.values())}"
        )
    if not _is_list_of(merges, str) or any(merge.count(" ") != 1 for merge in merges):
        raise UserError("tokenizer.ggml.merges must be a list of pairs, separated by a space")
    *patterns, ignore_merges = steps
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": id,
                "content": tokens[id],
                "special": types[id] == CONTROL,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            for id in range(len(tokens))
            if types[id] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_pre_tokenizer_step(pattern, byte_level) for pattern in patterns],
        },
        "post_processor": _post_processor(fields, config),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {tokens[id]: id for id in range(len(tokens)) if types[id] != UNUSED},
            "ignore_merges": ignore_merges,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _pre_tokenizer_step(pattern: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    """A step of PRE_TOKENIZERS as tokenizer.json writes it."""
    if pattern == "bytes":
        return {**byte_level, "use_regex": False}
    if pattern == "gpt2 words and bytes":
        return byte_level
    if pattern == "single digits":
        return {"type": "Digits", "individual_digits": True}
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def _post_processor(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """The step that puts BOS before a text. transformers reads it from tokenizer.json only."""
    token = config["bos_token"]
    if not config["add_bos_token"] or not token:
        return None
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {
            token: {"id": token, "ids": [fields["bos_token_id"]], "tokens": [token]}
        },
    }


def _sentencepiece_model(fields: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """A tokenizer.model: SentencePiece's ModelProto, a protocol buffer.

    ModelProto: 1 pieces, 2 trainer, 3 normalizer. Piece: 1 text, 2 score, 3 type (as in GGUF).
    Trainer: 3 model type (2 is BPE), 35 byte fallback. Normalizer: 3 add a leading space, 4 remove
    repeated spaces.
    """
    scores, unknown_id = fields.get("scores"), fields.get("unknown_token_id", 0)
    if not _is_list_of(scores, float) or len(scores) != len(tokens):
        raise UserError("tokenizer.ggml.scores must be a list with a number for every token")
    pieces = []
    for id, (token, score, type) in enumerate(zip(tokens, scores, types, strict=True)):
        if id == unknown_id:
            type = UNKNOWN
        elif type == UNKNOWN:  # the library accepts only one unknown piece
            type = CONTROL
        score_field = b"\x15" + struct.pack("<f", score)
        pieces.append(field(1, field(1, token.encode()) + score_field + field(3, type)))
    trainer = field(3, 2) + field(35, int(BYTE in types))
    normalizer = field(3, int(_adds_space(fields))) + field(4, 0)
    return b"".join(pieces) + field(2, trainer) + field(3, normalizer)
