"""Recipes for `--config`: TOML with our flags, YAML with ours or those of LLaMA-Factory.

options, refused = read_recipe("qwen3_lora_sft.yaml", flags)
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.llama_factory import translate
from minisft.common.toml_files import read_toml


def read_recipe(path: str, flags: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """({key: value} of a recipe, {key: why minisft does not have it}).

    flags: the names of the script's flags; a key that is none of them is left for the caller.
    """
    if not path.lower().endswith((".yaml", ".yml")):
        return read_toml(path), {}
    recipe = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
    return translate(recipe, flags)


def read_yaml(path: str) -> dict[str, Any]:
    """The content of a YAML file; UserError if it cannot be read or is not a mapping."""
    try:
        import yaml  # optional
    except ImportError as error:
        raise UserError(f"--config {path} needs PyYAML (requirements/yaml.txt)") from error

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number. YAML 1.1 takes it for text, since it has no dot."""

    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f'{path}: not a recipe. It needs lines such as "lora_rank: 8".')
    return content
