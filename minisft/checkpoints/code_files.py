"""The Python files of a checkpoint, for programs that run them. minisft only copies them.

Models that transformers does not know, such as Baichuan2, bring their code. `auto_map` in
config.json and tokenizer_config.json names the classes in it.
"""

import shutil
from pathlib import Path

from minisft.common.json_files import read_json
from minisft.common.outputs import atomic_path

STATES_CODE = ("config.json", "tokenizer_config.json")


def copy_code_files(model_dir: Path, output_dir: Path) -> None:
    """Copy the Python files of a checkpoint to the folder of a model made from it."""
    contents = [read_json(output_dir / name, missing={}) for name in STATES_CODE]
    if any(content.get("auto_map") for content in contents):
        for path in sorted(model_dir.glob("*.py")):
            with atomic_path(output_dir / path.name) as partial:
                shutil.copyfile(path, partial)
