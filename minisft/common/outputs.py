"""Output folders and the record of options in them."""

import json
import os
from pathlib import Path

from minisft.common.command_line import read_toml
from minisft.common.errors import UserError

# What a record leaves out: how to write and where to go on from belongs to one invocation.
UNRECORDED = ("config", "debug", "overwrite_output_dir", "resume_from_checkpoint")


def save_options(options, path):
    """Write the resolved options as TOML, so that `--config` can repeat the run."""
    lines = []
    for name, value in sorted(vars(options).items()):
        if name in UNRECORDED or value is None:
            continue
        # JSON strings, numbers, lists and booleans are also TOML.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    partial = Path(f"{path}.partial")  # a full disk leaves the record of before
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)


def recorded_options(folder):
    """The options that `save_options` left in a folder, as a dict; empty where it did not.

    A checkpoint's are those of the run whose folder it is in.
    """
    folder = Path(folder).resolve()
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "options.toml"
    return read_toml(path) if path.is_file() else {}


def check_output_dir(output_dir, overwrite, *inputs):
    """The Path to write to. UserError where that would overwrite anything not meant to be."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: is a file")
    for source in inputs:
        # Weights may be mapped from the files of the input; writing there would destroy both.
        if source and Path(source).exists() and (
                Path(source).resolve().is_relative_to(path.resolve())):
            raise UserError(f"--output_dir {path}: is also read from ({source}); choose another")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {path}: has something in it; choose another, or give "
                        "--overwrite_output_dir")
    return path
