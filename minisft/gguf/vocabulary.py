"""A tokenizer as the metadata of a GGUF file, so that llama.cpp produces the same ids.

    fields = vocabulary_fields(Tokenizer.load("examples/base"), num_rows=1536)
    fields["tokenizer.ggml.tokens"][:3]

There are two kinds. SentencePiece becomes the model `llama`: pieces with scores, where the pair
with the best score merges first. Byte-level BPE becomes `gpt2`: tokens, merges, and llama.cpp's
name for the pattern that cuts a text into words (`pre`). An unknown pattern is an error: with a
similar pattern llama.cpp would tokenize almost right, without any error.

unpack_tokenizer.py reads the tokenizer back.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.gguf.prompts import Prompts
from minisft.gguf.protobuf import read_fields
from minisft.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0  # no merge produces these tokens
# Our own fields, for unpack_tokenizer.py: the leading space is at the beginning of a text only, not
# after special tokens; the tokenizer puts BOS before a text, though its prompts have none; all stop
# tokens, of which llama.cpp knows some by their text.
SPACE_AT_START = "minisft.leading_space_at_start_only"
ADDS_BOS = "minisft.tokenizer_adds_bos"
STOPS = "minisft.stop_token_ids"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (the steps of tokenizer.json's pre_tokenizer, ignore_merges) -> llama.cpp's name.
PRE_TOKENIZERS = {
    (WORDS % r"\p{N}{1,3}", "bytes", True): "llama-bpe",
    (WORDS % r"\p{N}{1,3}", "bytes", False): "smaug-bpe",
    (WORDS % r"\p{N}", "bytes", False): "qwen2",
    ("gpt2 words and bytes", False): "gpt-2",
    ("single digits", "gpt2 words and bytes", False): "smollm",
}
# Tokens at which llama.cpp stops because of their text.
KNOWN_STOPS = (
    "<|eot_id|> <|eom_id|> <|end_of_text|> <|im_end|> <|endoftext|> <|end|> <end_of_turn> </s> "
    "<EOT>"
).split()


def vocabulary_fields(
    tokenizer: Tokenizer,
    num_rows: int,
    stop_ids: list[int] | None = None,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """The metadata of a tokenizer, for an embedding with num_rows rows.

    stop_ids: the tokens that end an answer. prompts: by default those of a model without a chat
    template. UserError if llama.cpp would cut texts in another way, or cannot store a stop token.
    """
    _check_size(tokenizer, num_rows)
    if tokenizer.engine.byte_level:
        fields = _byte_level_fields(tokenizer, num_rows)
    else:
        fields = _sentencepiece_fields(tokenizer, num_rows)
    types = fields["token_type"]
    bos = tokenizer.bos_token_id
    ids = {
        # llama.cpp needs a BOS and would take token 11. Qwen has none; its placeholder is PAD.
        "bos_token_id": tokenizer.pad_token_id if bos is None else bos,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": types.index(UNKNOWN) if UNKNOWN in types else None,
        "padding_token_id": tokenizer.pad_token_id,
        **_more_stops(tokenizer, stop_ids or []),
    }
    fields |= {name: id for name, id in ids.items() if id is not None and 0 <= id < num_rows}
    prompts = prompts or Prompts(None, tokenizer.add_bos_token, tokenizer.leading_space)
    fields["add_bos_token"] = prompts.add_bos
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if not tokenizer.engine.byte_level:
        fields["tokenizer.ggml.add_space_prefix"] = prompts.add_space
    if tokenizer.leading_space and not tokenizer.prefix_after_special:
        fields[SPACE_AT_START] = True
    if tokenizer.add_bos_token != prompts.add_bos:
        fields[ADDS_BOS] = tokenizer.add_bos_token
    if stop_ids:
        fields[STOPS] = stop_ids
    if prompts.chat_template is not None:
        fields["tokenizer.chat_template"] = prompts.chat_template
    return fields


def _check_size(tokenizer: Tokenizer, num_rows: int) -> None:
    """UserError if a token has no row in the embedding. Ids may have gaps, so look beyond them."""
    for id in range(num_rows, max(num_rows, tokenizer.vocab_size) + 1000):
        if (text := tokenizer.token_text(id)) is not None:
            raise UserError(
                f"{tokenizer.source}: the token '{text}' has the id {id}, but the embedding has "
                f"{num_rows} rows. Use the model's own tokenizer."
            )


def _more_stops(tokenizer: Tokenizer, stop_ids: list[int]) -> dict[str, int]:
    """The fields of stop tokens that llama.cpp does not know by their text."""
    unknown = [
        id
        for id in sorted(set(stop_ids) - {tokenizer.eos_token_id})
        if tokenizer.token_text(id) not in KNOWN_STOPS
    ]
    if len(unknown) > 2:
        names = ", ".join(f"'{tokenizer.token_text(id)}'" for id in unknown)
        raise UserError(
            f"GGUF has room for two stop tokens besides EOS, but this model has {names}. Remove "
            "some from generation_config.json."
        )
    return dict(zip(("eot_token_id", "eom_token_id"), unknown, strict=False))


def _added_type(tokenizer: Tokenizer, id: int, text: str) -> int:
    # llama.cpp treats tokens of this form as special, whatever their type.
    looks_special = text.startswith("<|") and text.endswith("|>")
    return CONTROL if id in tokenizer.special_ids or looks_special else USER_DEFINED


# Byte-level BPE


def _byte_level_fields(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    path = tokenizer.model_dir / "tokenizer.json"
    spec = read_json(path)
    model = spec["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{path}: GGUF needs a BPE tokenizer, not {model.get('type')}")
    if not model["merges"]:
        raise UserError(f"{path}: has no merges, which GGUF needs. Download it again.")
    ordinary = set(model["vocab"].values()) - set(tokenizer.engine.added_text)
    tokens, types = [], []
    for id in range(num_rows):
        text = tokenizer.token_text(id)
        if text is None:
            text, type = f"[PAD{id}]", UNUSED
        else:
            type = NORMAL if id in ordinary else _added_type(tokenizer, id, text)
        tokens.append(text)
        types.append(type)
    return {
        "model": "gpt2",
        "pre": pre_tokenizer_name(spec, path),
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in _merges(model)],
    }


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a tokenizer.json, which writes them as lists or with a space between."""
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((left, right))
    return merges


def pre_tokenizer_name(spec: dict[str, Any], source: str | Path = "tokenizer.json") -> str:
    """llama.cpp's name for the way a tokenizer.json cuts text into words; UserError if none."""
    normalizer = spec.get("normalizer") or {}
    kinds = {step.get("type") for step in normalizer.get("normalizers", [normalizer])}
    # llama.cpp leaves NFC to the program that passes the text.
    if unknown := kinds - {None, "NFC"}:
        raise UserError(f"{source}: llama.cpp has no normalizer {min(unknown)} for byte-level BPE")
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = [_step_name(step) for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    key = (*steps, bool(spec["model"].get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        raise UserError(
            f"{source}: its pre_tokenizer is not supported. We know llama.cpp's names for "
            f"{', '.join(PRE_TOKENIZERS.values())}; with one of these the ids would be wrong."
        )
    return PRE_TOKENIZERS[key]


def _step_name(step: dict[str, Any]) -> str | None:
    """A step of a pre_tokenizer as PRE_TOKENIZERS writes it; None for unknown steps."""
    kind = step.get("type")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt2 words and bytes" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "single digits"
    return None


# SentencePiece


def _sentencepiece_fields(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    path = tokenizer.model_dir / "tokenizer.model"
    pieces = _model_pieces(tokenizer, path) if path.is_file() else _json_pieces(tokenizer)
    tokens, scores, types = [], [], []
    for id in range(num_rows):
        text = tokenizer.token_text(id)
        if id in pieces:
            score, type = pieces[id]
            if type in (NORMAL, USER_DEFINED) and id in tokenizer.special_ids:
                type = CONTROL
        elif text is None:
            text, score, type = f"[PAD{id}]", UNUSED_SCORE, UNUSED
        else:
            score, type = ADDED_SCORE, _added_type(tokenizer, id, text)
        tokens.append(text)
        scores.append(score)
        types.append(type)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
    }


def _model_pieces(tokenizer: Tokenizer, path: Path) -> dict[int, tuple[float, int]]:
    """{id: (score, type)} of a tokenizer.model."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model. Download it again.") from error
    types = _piece_types(model.serialized_model_proto())
    pieces = {}
    for id, type in enumerate(types):
        if tokenizer.token_text(id) != model.id_to_piece(id):
            raise UserError(
                f"{path}: piece {id} is '{model.id_to_piece(id)}', but tokenizer.json says "
                f"'{tokenizer.token_text(id)}'. Remove the file that is not the model's own."
            )
        pieces[id] = model.get_score(id), type
    # BPE's scores are ranks; those of a unigram model are log-probabilities.
    if any(score % 1 for score, type in pieces.values() if type == NORMAL):
        raise UserError(
            f"{path}: not a BPE model; llama.cpp merges by rank and would differ. Use --format hf."
        )
    return pieces


def _piece_types(model: bytes) -> list[int]:
    """The types of all pieces of a SentencePiece ModelProto; see unpack_tokenizer.py."""
    pieces = [dict(read_fields(value)) for number, value in read_fields(model) if number == 1]
    return [piece.get(3, NORMAL) for piece in pieces]


def _json_pieces(tokenizer: Tokenizer) -> dict[int, tuple[float, int]]:
    """{id: (score, type)} of a SentencePiece tokenizer.json; a score is minus the merge's rank.

    llama.cpp merges any two pieces that form a piece, the best score first. The file must mean the
    same: it must list all such pairs, in the order of the pieces that they form.
    """
    path = tokenizer.model_dir / "tokenizer.json"
    model = read_json(path)["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"{path}: GGUF needs BPE with byte_fallback, or a tokenizer.model. Use --format hf."
        )
    merges, vocabulary = _merges(model), model["vocab"]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    pieces, listed = {}, set(merges)
    for piece, id in vocabulary.items():
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        type = UNKNOWN if piece == model.get("unk_token") else BYTE if is_byte else NORMAL
        if id in tokenizer.engine.added_text and type != UNKNOWN:
            continue
        pieces[id] = float(-ranks.get(piece, len(merges))), type
        if type == NORMAL:
            _check_all_pairs_listed(path, piece, vocabulary, listed)
    formed = [left + right for left, right in merges]
    if len(list(groupby(formed))) > len(set(formed)):
        raise UserError(
            f"{path}: its merges are not in the order of the pieces that they form, in which "
            "llama.cpp merges. Put the model's tokenizer.model beside it."
        )
    return pieces


def _check_all_pairs_listed(
    path: Path, piece: str, vocabulary: dict[str, int], listed: set[tuple[str, str]]
) -> None:
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocabulary and right in vocabulary and (left, right) not in listed:
            raise UserError(
                f"{path}: '{left}' and '{right}' are not merged there, but llama.cpp would merge "
                "them. Put the model's tokenizer.model beside it."
            )
