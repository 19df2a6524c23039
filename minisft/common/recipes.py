"""Recipes for `--config`: TOML with our flags, YAML with ours or those of LLaMA-Factory.

options, refused = read_recipe("qwen3_lora_sft.yaml", flags)
"""

import re
from argparse import Namespace
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
    is_yaml = path.lower().endswith((".yaml", ".yml"))
    recipe: dict[str, Any] = {}
    for key, value in (read_yaml if is_yaml else read_toml)(path).items():
        name = key.replace("-", "_")
        if name in recipe:
            raise UserError(f"{path}: {name} appears twice. Keep one of them.")
        recipe[name] = value
    return translate(recipe, flags) if is_yaml else (recipe, {})


def record_to_resume(options: Namespace) -> Path | None:
    """The options.toml of the run that the options want to continue; None if there is none.

    options: of which those that are not given have other types than str and bool.
    """
    which = getattr(options, "resume_from_checkpoint", None)
    resumes = getattr(options, "resume", None) is True
    output_dir = getattr(options, "output_dir", None)
    folders = []
    if isinstance(output_dir, str) and (isinstance(which, str) or resumes):
        folders.append(Path(output_dir))
    if isinstance(which, str):
        folders.append(Path(which).parent)
    paths = [folder / "options.toml" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def read_yaml(path: str) -> dict[str, Any]:
    """The content of a YAML file; UserError if it cannot be read or is not a mapping."""
    try:
        import yaml  # optional
    except ImportError as error:
        raise UserError(f"--config {path} needs PyYAML (requirements/yaml.txt)") from error

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, which YAML 1.1 takes for text. Refuses keys that appear twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """As in the base class, after a look at the keys."""
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            for number, key in enumerate(keys):
                if key.value in names[:number]:
                    line = key.start_mark.line + 1
                    raise UserError(f"{path}, line {line}: {key.value} appears twice. Keep one.")
            return super().construct_mapping(node, deep)

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
