"""A tokenizer as the metadata of a GGUF file: what llama.cpp needs to make the same ids.

    fields = vocabulary_fields(Tokenizer.load("examples/base"), rows=1536)
    fields["tokenizer.ggml.tokens"][:3]

Two kinds. SentencePiece becomes the model `llama`: pieces with scores, merged by score. Byte-level
BPE becomes `gpt2`: tokens and merges, and the name by which llama.cpp knows the pattern that cuts a
text into words (`pre`). A pattern that has no such name is an error: a wrong one would tokenize
nearly right, and nobody would notice.
"""

from itertools import groupby

from minisft.common.errors import UserError
from minisft.common.json_files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED_SCORE = -1000.0  # of tokens that the merges never make
# Tells our own code that the tokenizer puts a space before a text, though llama.cpp must not; see
# ConversationForm.
WRITES_SPACE = "minisft.chat_template_writes_space"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of tokenizer.json's pre_tokenizer, and whether a word that is a token is taken whole
# (ignore_merges) -> llama.cpp's name for that.
PRE_TOKENIZERS = {
    (WORDS % r"\p{N}{1,3}", "bytes", True): "llama-bpe",
    (WORDS % r"\p{N}{1,3}", "bytes", False): "smaug-bpe",
    (WORDS % r"\p{N}", "bytes", False): "qwen2",
    ("gpt2 words and bytes", False): "gpt-2",
    ("single digits", "gpt2 words and bytes", False): "smollm",
}
# Tokens that llama.cpp stops at by their text.
KNOWN_STOPS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<EOT>",
}


def vocabulary_fields(tokenizer, rows, stop_ids=None, writes_space=False):
    """The metadata {key: value} of a Tokenizer for an embedding of `rows` rows.

    stop_ids: what ends an answer, an id or a list of them, as generation_config has it.
    writes_space: see ConversationForm. Raises UserError where llama.cpp could not make the same
    ids, or has no place for an id.
    """
    _check_size(tokenizer, rows)
    byte_level = getattr(tokenizer.engine, "byte_level", False)
    fields = _byte_level(tokenizer, rows) if byte_level else _sentencepiece(tokenizer, rows)
    bos = tokenizer.bos_token_id
    ids = {
        # llama.cpp needs one, and takes 11 where none is stated: the place-holder is Qwen's.
        "bos_token_id": tokenizer.pad_token_id if bos is None else bos,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": next(
            (id for id, kind in enumerate(fields["token_type"]) if kind == UNKNOWN), None
        ),
        "padding_token_id": tokenizer.pad_token_id,
        **_further_stops(tokenizer, stop_ids),
    }
    fields |= {name: id for name, id in ids.items() if id is not None and 0 <= id < rows}
    fields["add_bos_token"] = tokenizer.add_bos_token
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if writes_space:
        fields |= {"tokenizer.ggml.add_space_prefix": False, WRITES_SPACE: True}
    return fields


def tokenizer_differences(form):
    """Sentences on where llama.cpp will make other ids than we do, by the ConversationForm."""
    if form.writes_space:
        return [
            "llama.cpp puts no space before a text, lest it puts one behind every control "
            "token too; begin texts for use without the chat template with a space"
        ]
    if not form.is_exact:
        return [
            "llama.cpp puts a space before text directly behind a control token: where the "
            "chat template has such text, prompts get a token that training did not have"
        ]
    return []


def _check_size(tokenizer, rows):
    # Ids need not be consecutive: look for tokens beyond the embedding, not at their number.
    ids = range(rows, max(rows, tokenizer.vocab_size) + 1000)
    beyond = [id for id in ids if tokenizer.token_text(id) is not None]
    if beyond:
        raise UserError(
            f"{tokenizer.model_dir}: the token '{tokenizer.token_text(beyond[0])}' has "
            f"the id {beyond[0]}, but the embedding has {rows} rows; is this the "
            "model's own tokenizer?"
        )


def _further_stops(tokenizer, stop_ids):
    """`eot` and `eom`: the places for two more stops that llama.cpp does not know by their text."""
    stop_ids = stop_ids if isinstance(stop_ids, (list, tuple)) else [stop_ids]
    further = [
        id
        for id in sorted(set(stop_ids) - {tokenizer.eos_token_id, None})
        if tokenizer.token_text(id) not in KNOWN_STOPS
    ]
    if len(further) > 2:
        listed = ", ".join(f"'{tokenizer.token_text(id)}'" for id in further)
        raise UserError(
            f"GGUF has room for two stop tokens besides EOS; this model has {listed}; "
            "name fewer in generation_config.json"
        )
    return dict(zip(("eot_token_id", "eom_token_id"), further, strict=False))


def _looks_special(text):
    """llama.cpp takes such tokens for control tokens whatever their flag says."""
    return text.startswith("<|") and text.endswith("|>")


def _added_type(tokenizer, id, text):
    special = id in tokenizer.special_ids or _looks_special(text)
    return CONTROL if special else USER_DEFINED


def _byte_level(tokenizer, rows):
    spec = read_json(tokenizer.model_dir / "tokenizer.json")
    model = spec["model"]
    source = f"{tokenizer.model_dir}/tokenizer.json"
    if model.get("type") != "BPE":
        raise UserError(f"{source}: a {model.get('type')} tokenizer; GGUF export knows BPE")
    if not model["merges"]:
        raise UserError(f"{source}: has no merges, without which GGUF has no BPE")
    ordinary = set(model["vocab"].values()) - set(tokenizer.engine.added_text)
    tokens, types = [], []
    for id in range(rows):
        text = tokenizer.token_text(id)
        if text is None:
            tokens.append(f"[PAD{id}]")
            types.append(UNUSED)
        else:
            tokens.append(text)
            types.append(NORMAL if id in ordinary else _added_type(tokenizer, id, text))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "model": "gpt2",
        "pre": pre_tokenizer_name(spec, source),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
    }


def pre_tokenizer_name(spec, source="tokenizer.json"):
    """llama.cpp's name for the way a tokenizer.json cuts text into words; UserError if none."""
    normalizer = spec.get("normalizer") or {}
    steps = {step.get("type") for step in normalizer.get("normalizers", [normalizer])}
    if unknown := steps - {None, "NFC"}:  # llama.cpp leaves NFC to whoever writes the text
        raise UserError(f"{source}: llama.cpp has no normalizer {min(unknown)} for byte-level BPE")
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = [_step(step) for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    key = (*steps, bool(spec["model"].get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        names = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(
            f"{source}: its pre_tokenizer is none of those that this export knows by "
            f"llama.cpp's names ({names}); it would tokenize wrongly there"
        )
    return PRE_TOKENIZERS[key]


def _step(step):
    """One step of a pre_tokenizer as PRE_TOKENIZERS writes it; None for others."""
    kind = step.get("type")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt2 words and bytes" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "single digits"
    return None


def _sentencepiece(tokenizer, rows):
    model_path = tokenizer.model_dir / "tokenizer.model"
    has_model = model_path.is_file()
    pieces = _model_pieces(tokenizer, model_path) if has_model else _json_pieces(tokenizer)
    tokens, scores, types = [], [], []
    for id in range(rows):
        text = tokenizer.token_text(id)
        if id in pieces:
            score, kind = pieces[id]
            if kind in (NORMAL, USER_DEFINED) and id in tokenizer.special_ids:
                kind = CONTROL
        elif text is None:
            text, score, kind = f"[PAD{id}]", -10000.0, UNUSED
        else:
            score, kind = ADDED_SCORE, _added_type(tokenizer, id, text)
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": tokenizer.leading_space,
    }


def _model_pieces(tokenizer, path):
    """{id: (score, type)} of a tokenizer.model."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model; download it again") from error
    pieces = {}
    for id in range(model.vocab_size()):
        if tokenizer.token_text(id) != model.id_to_piece(id):
            raise UserError(
                f"{path}: its piece {id} is '{model.id_to_piece(id)}', tokenizer.json "
                f"says '{tokenizer.token_text(id)}'; remove the file that is not the "
                "model's own"
            )
        kind = NORMAL
        for test, name in (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        ):
            kind = name if test(id) else kind
        pieces[id] = model.get_score(id), kind
    if any(score % 1 for score, kind in pieces.values() if kind == NORMAL):
        # BPE's scores are ranks; a unigram model's are log-probabilities.
        raise UserError(f"{path}: not a BPE model; llama.cpp merges by rank and would differ")
    return pieces


def _json_pieces(tokenizer):
    """{id: (score, type)} of a tokenizer.json of SentencePiece's kind: the score is minus the rank.

    llama.cpp merges any two pieces that make a piece. That is what the file says only if its merges
    are all such pairs, those of a better piece before those of a worse.
    """
    path = tokenizer.model_dir / "tokenizer.json"
    model = read_json(path)["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(f"{path}: GGUF needs BPE with byte_fallback, or a tokenizer.model")
    pairs = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    ranks, pieces = {}, {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    for piece, id in model["vocab"].items():
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        kind = UNKNOWN if piece == model.get("unk_token") else BYTE if is_byte else NORMAL
        if id not in tokenizer.engine.added_text or kind == UNKNOWN:
            pieces[id] = float(-ranks.get(piece, len(pairs))), kind
    _check_merges(
        path,
        pairs,
        model["vocab"],
        [
            piece
            for piece, id in model["vocab"].items()
            if pieces.get(id, (0, UNKNOWN))[1] == NORMAL
        ],
    )
    return pieces


def _check_merges(path, pairs, vocabulary, pieces):
    listed, way_out = set(pairs), "put the model's tokenizer.model beside it"
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed:
                raise UserError(
                    f"{path}: '{pair[0]}' and '{pair[1]}' are not merged there, but "
                    f"would be by llama.cpp; {way_out}"
                )
    made = [left + right for left, right in pairs]
    if len(list(groupby(made))) > len(set(made)):
        raise UserError(
            f"{path}: its merges are not in the order of the pieces that they make, in "
            f"which llama.cpp merges; {way_out}"
        )
