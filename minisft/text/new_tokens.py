"""Add tokens to a checkpoint's tokenizer.

    tokenizer = with_new_tokens(Tokenizer.load("Qwen2.5"), special=["<|step|>"], ordinary=["<svg>"])
    tokenizer.token_id("<|step|>")              # 151665, the first free id

A special token is written by a chat template, and never by the text of a message. An ordinary
token matches wherever a text spells it. Each file that lists tokens gets the new ones, so
transformers and llama.cpp give them the same ids. tokenizer.model alone cannot be extended: the
files beside it list the new tokens, which must be special ones.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import read_json, write_json
from minisft.common.outputs import temporary_folder
from minisft.text.tokenizer import Tokenizer

# Files that other modules look for beside a tokenizer: ids of BOS and EOS, the recorded template.
NEIGHBOURS = ("config.json", "generation_config.json", "options.toml")


def with_new_tokens(
    tokenizer: Tokenizer, special: Sequence[str] = (), ordinary: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer with new tokens, in this order, after its last token.

    Its files are in a temporary folder, which is removed when the program ends. UserError if a
    token exists, or if the format cannot store it.
    """
    if ordinary and not (tokenizer.model_dir / "tokenizer.json").is_file():
        raise UserError(
            f"{tokenizer.model_dir}: tokenizer.model alone cannot match {ordinary[0]} in a text. "
            "Add a tokenizer.json, or make it a special token."
        )
    for token in (*special, *ordinary):
        if (id := tokenizer.token_id(token)) is not None:
            raise UserError(
                f"{tokenizer.model_dir}: the token {token} exists already, with the id {id}. Leave "
                "it out of the new tokens."
            )
    first = first_free_id(tokenizer)
    entries = [
        _entry(first + index, text, is_special=index < len(special))
        for index, text in enumerate((*special, *ordinary))
    ]
    folder = temporary_folder()
    tokenizer.save(folder)
    for name in NEIGHBOURS:
        if (tokenizer.model_dir / name).is_file():
            shutil.copyfile(tokenizer.model_dir / name, folder / name)
    _add_to_files(folder, entries)
    extended = Tokenizer.load(folder)
    extended.source = tokenizer.source
    for entry in entries:
        is_taken = tokenizer.token_text(entry["id"]) is not None
        if is_taken or extended.token_id(entry["content"]) != entry["id"]:
            raise UserError(
                f"{tokenizer.model_dir}: the ids of its tokens have gaps, so {entry['content']} "
                "cannot be added behind them. Add it with transformers (add_special_tokens, "
                "save_pretrained) and use that folder with --resize_vocab."
            )
    return extended


def first_free_id(tokenizer: Tokenizer) -> int:
    """The id after the last token. It is the number of tokens, unless the ids have gaps."""
    added = (*tokenizer.engine.added_text, *tokenizer.special_ids)
    return max([tokenizer.vocab_size, *(id + 1 for id in added)])


def _entry(id: int, text: str, is_special: bool) -> dict[str, Any]:
    """A token as tokenizer.json lists it. It swallows no white space around it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": is_special}


def _add_to_files(folder: Path, entries: list[dict[str, Any]]) -> None:
    """List the tokens in every file of a folder that lists tokens."""
    json_path, listed_path = folder / "tokenizer.json", folder / "added_tokens.json"
    has_json = json_path.is_file()
    if has_json:
        content = read_json(json_path)
        content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]
        write_json(content, json_path)
    if listed_path.is_file():
        new = {entry["content"]: entry["id"] for entry in entries}
        write_json({**read_json(listed_path), **new}, listed_path)

    path = folder / "tokenizer_config.json"
    config = read_json(path, missing={})
    if "added_tokens_decoder" in config or not has_json:
        listed = dict(config.get("added_tokens_decoder") or {})
        for entry in entries:
            listed[str(entry["id"])] = {name: entry[name] for name in entry if name != "id"}
        config["added_tokens_decoder"] = listed
    special = [entry["content"] for entry in entries if entry["special"]]
    key = "extra_special_tokens"  # the new name of additional_special_tokens
    if not isinstance(config.get(key), list):
        key = "additional_special_tokens"
    config[key] = _extended(config.get(key), special)
    write_json(config, path)
    path = folder / "special_tokens_map.json"
    content = read_json(path, missing={})
    if "additional_special_tokens" in content:
        listed = _extended(content["additional_special_tokens"], special)
        write_json({**content, "additional_special_tokens": listed}, path)


def _extended(listed: Any, new: Iterable[str]) -> list[Any]:
    return [*(listed if isinstance(listed, list) else []), *new]
