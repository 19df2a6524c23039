"""A small checkpoint for every real chat template of the shared folder.

The tokenizer is that of stories260K, with the template's control tokens added to it.
"""

import json
import re
import shutil
from pathlib import Path

CONTROL = re.compile(
    r"<\|[\w/ .:-]+\|>|<[\w-]+\|>|<\|[\w-]+>|<｜[^｜]{1,40}｜>|</?s>|\[/?INST\]|<bos>|<eos>"
    r"|\[/?(?:SYSTEM_PROMPT|THINK|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS)\]"
    r"|</?(?:assistant|user|system)>|<(?:start|end)_of_(?:turn|sentence)>|<end_of_\w+>"
    r"|<seed:\w+>|<SPECIAL_\d+>|<sep>|<reserved_\d+>|\[e~\[|\]~!?b\[|\]~b\]|\]<\]|\[>\["
)


def build_checkpoint(base: Path, template: str, folder: Path) -> Path:
    """Copy the tokenizer in `base` to `folder`, with a template and its control tokens."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.model"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in spec["added_tokens"]} | set(spec["model"]["vocab"])
    ids = [token["id"] for token in spec["added_tokens"]]
    next_id = max([len(spec["model"]["vocab"]) - 1, *ids]) + 1
    for number, text in enumerate(sorted(set(CONTROL.findall(template)) - known)):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": next_id + number, "content": text, "special": True, **flags}
        spec["added_tokens"].append(token)
    config.pop("added_tokens_decoder", None)
    config.pop("chat_template", None)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
