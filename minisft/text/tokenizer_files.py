"""The files beside a tokenizer: added tokens, the ids of BOS and EOS, the chat template.

    special_token_id(Path("Qwen2.5"), "eos_token", engine.token_id, default=None)
    read_chat_template(Path("Qwen2.5"), config)

Checkpoints state these things in different files, depending on when and by which library they were
written. Each function here reads the files in the order in which transformers does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, read_json, token_ids, write_json
from minisft.common.lfs_pointers import refuse_pointer
from minisft.common.outputs import atomic_write

# All files that a tokenizer can consist of.
FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json "
    "additional_chat_templates/tool_use.jinja"
).split()
TOOL_TEMPLATE = FILES[-1]


def has_tokenizer(folder: str | Path) -> bool:
    """True if a folder holds a tokenizer that we read."""
    return any((Path(folder) / name).is_file() for name in FILES[:2])


def read_added_tokens(model_dir: Path, config: dict[str, Any]) -> dict[int, str]:
    """{id: text} of the tokens in added_tokens.json and in tokenizer_config.json (`config`)."""
    added: dict[int, str] = {}
    content = read_json(model_dir / "added_tokens.json", missing={})
    try:
        added |= {id: text for text, id in content.items()}
        listed = config.get("added_tokens_decoder") or {}
        added |= {int(id): entry["content"] for id, entry in listed.items()}
        for id, text in added.items():
            if not is_integer(id, most=2**31 - 1):
                raise ValueError(f"the id {id!r} is not a whole number below 2**31")
            text.encode()  # fails for anything but valid text
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{model_dir}: added_tokens.json, or added_tokens_decoder in tokenizer_config.json, "
            f"is not a list of tokens ({error!r})"
        ) from error
    return added


def special_token_id(
    model_dir: Path, name: str, token_id: Callable[[str], int | None], default: int | None
) -> int | None:
    """The id of `bos_token`, `eos_token`, ...; None if a file says that there is none.

    token_id: looks up a token by its text. default: the id if no file says anything.
    """
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(model_dir / file_name, missing={})
        if name in content:
            token = content[name]
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise UserError(f"{model_dir / file_name}: {name} must be text, not {token!r}")
            return None if token is None else token_id(token)
    for file_name in ("config.json", "generation_config.json"):
        path = model_dir / file_name
        stated = read_json(path, missing={}).get(f"{name}_id")
        if ids := token_ids(stated, path, f"{name}_id"):
            return ids[0]
    return default


def read_chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """The checkpoint's chat template, as Jinja text. config: tokenizer_config.json."""
    path, tool_path = model_dir / "chat_template.jinja", model_dir / TOOL_TEMPLATE
    if path.is_file():
        template: Any = read_template_file(path)
        if tool_path.is_file():
            return with_tool_template(template, read_template_file(tool_path))
        return template
    template = config.get("chat_template")
    if not template:
        template = read_json(model_dir / "chat_template.json", missing={}).get("chat_template")
    if isinstance(template, list):  # several templates: [{"name": ..., "template": ...}]
        by_name = {
            entry["name"]: entry.get("template")
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
        template, for_tools = by_name.get("default"), by_name.get("tool_use")
        if isinstance(template, str) and isinstance(for_tools, str):
            return with_tool_template(template, for_tools)
    return template if isinstance(template, str) else None


def read_template_file(path: Path) -> str:
    """The text of a .jinja file, without a byte order mark."""
    refuse_pointer(path)
    return path.read_text(encoding="utf-8-sig", errors="replace")


def with_tool_template(template: str, for_tools: str) -> str:
    """One template of two: transformers renders conversations with tools by the second.

    Jinja removes the line break after a block, and the last one of a template.
    """
    template, for_tools = template.removesuffix("\n"), for_tools.removesuffix("\n")
    return f"{{% if tools %}}\n{for_tools}{{% else %}}\n{template}{{% endif %}}"


def state_special_tokens(
    output_dir: Path, config: dict[str, Any], texts: dict[str, str | None]
) -> dict[str, Any]:
    """tokenizer_config.json with BOS and EOS, written to a folder if no file there states them.

    A chat template writes `bos_token`, so other programs must know it as we do. config: the content
    of tokenizer_config.json. texts: {"bos_token": text, ...}.
    """
    stated = config.keys() | read_json(output_dir / "special_tokens_map.json", missing={}).keys()
    missing = {name: texts.get(name) for name in ("bos_token", "eos_token") if name not in stated}
    if missing:
        config = {**config, **missing}
        write_json(config, output_dir / "tokenizer_config.json")
    return config


def write_chat_template(output_dir: Path, config: dict[str, Any], chat_template: str) -> None:
    """Replace the chat template in a folder. config: its tokenizer_config.json."""
    with atomic_write(output_dir / "chat_template.jinja") as file:
        file.write(chat_template)
    (output_dir / TOOL_TEMPLATE).unlink(missing_ok=True)  # it would win for rows with tools
    if "chat_template" in config:  # old programs read only this one
        write_json({**config, "chat_template": chat_template}, output_dir / "tokenizer_config.json")
