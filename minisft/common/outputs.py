"""Output files and folders: written completely or not at all, and never over an input.

check_output_dir(options.output_dir, options.overwrite_output_dir, options.model_name_or_path)
with atomic_write("runs/a/metrics.json") as file:
    file.write("{}")
save_options(options, "runs/a/options.toml")
"""

import atexit
import errno
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minisft.common.errors import UserError
from minisft.common.single_writer import FOLDER_LOCK
from minisft.common.toml_files import RECORD_HEADER, read_toml
from minisft.common.words import file_size

# Options of a single invocation, which --config does not repeat.
UNRECORDED = ("config", "debug", "overwrite_output_dir", "resume_from_checkpoint")

# The folder in an output folder that a result is written to before its files are renamed.
RESULT_PARTIAL = "result.partial"
# The errors of a disk, a quota or a size limit that has no room for more.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | Path, suffix: str = ".partial") -> Generator[Path, None, None]:
    """Yield the path `path`.partial to write to. On success the file is renamed to `path`.

    suffix: for a caller that has a file of its own named `path`.partial.

    If the body fails, `path` keeps its old content and the partial file is removed. A full or
    failing disk raises UserError, and so does text that UTF-8 cannot express.
    """
    path = Path(path)
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
    except UnicodeEncodeError as error:  # a file name from the command line, for instance
        name = error.object[max(0, error.start - 60) : error.end]
        raise UserError(
            f"{path}: could not be written: {name!a} is not UTF-8 text. Rename the file."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: str | Path, mode: str = "w", suffix: str = ".partial"
) -> Generator[IO[Any], None, None]:
    """Open `path` for writing: see atomic_path. The content is on the disk before the rename.

    mode: "w" for UTF-8 text, "wb" for bytes.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    with atomic_path(path, suffix) as partial:
        with open(partial, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


def save_figure(figure: Any, path: str | Path) -> None:
    """Draw a figure of matplotlib to a PNG file: see atomic_path."""
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def despite_full_disk() -> Generator[None, None, None]:
    """Print in the body. A line that a full disk refuses is lost; it does not end a long run."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise


def temporary_folder() -> Path:
    """A new folder, which is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="minisft-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_not_an_input(flag: str, output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise UserError if the file or folder `output` is, or contains, one of the inputs.

    Weights may be memory-mapped from an input; writing over it would destroy both.
    """
    # Not Path.resolve(), which fails for links that lead to each other.
    target = Path(os.path.realpath(output))
    for source in inputs:
        if source and Path(source).exists():
            if Path(source).resolve().is_relative_to(target):
                raise UserError(f"{flag} {output}: {source} is an input; choose another place")


def check_output_file(
    flag: str,
    path: str | Path,
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool = True,
) -> Path:
    """The file to write. UserError if it is a folder, a device or an input, or exists.

    overwrite: accept a file that exists.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path} is a folder or a device. Give the name of a file.")
    check_not_an_input(flag, path, inputs)
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path} exists. Choose another name, or add --overwrite.")
    return path


def check_json_name(flag: str, path: str | Path) -> None:
    """UserError unless the name of a file for rows ends in .json or .jsonl.

    A folder or a device is left to check_output_file, which says so.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl") and (path.is_file() or not path.exists()):
        raise UserError(
            f"{flag} {path}: rows are written as JSON. Give a name that ends in .json, for an "
            "array, or in .jsonl, for lines."
        )


def check_output_dir(
    output_dir: str | Path, overwrite: bool, *inputs: str | Path | None, hint: str = ""
) -> Path:
    """The folder to write to. UserError if it is a file, an input, or not empty.

    overwrite: accept a folder that is not empty. hint: what else to do if it is not empty.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file. Give a folder.")
    check_not_an_input("--output_dir", path, inputs)
    # A program that was killed leaves its lock, and perhaps a part of its result.
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if names - {FOLDER_LOCK, RESULT_PARTIAL} and not overwrite:
        ways = ["choose another folder", "add --overwrite_output_dir"]
        ways = f"{hint}, {', or '.join(ways)}" if hint else ", or ".join(ways)
        raise UserError(f"--output_dir {path} is not empty. {ways[0].upper()}{ways[1:]}.")
    return path


def save_options(options: Namespace, path: str | Path) -> None:
    """Write the resolved options as TOML, so that `--config` can repeat the run."""
    with atomic_write(path) as file:
        file.write(RECORD_HEADER)
        for name, value in sorted(vars(options).items()):
            if name not in UNRECORDED and value is not None:
                # JSON strings, numbers, lists and booleans are also TOML.
                file.write(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")


def recorded_options(folder: str | Path) -> dict[str, Any]:
    """The options that `save_options` wrote to a folder; empty if there are none.

    For a checkpoint, the options of the run that contains it.
    """
    folder = Path(os.path.realpath(folder))
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "options.toml"
    return read_toml(path) if path.is_file() else {}


def check_free_space(folder: str | Path, num_bytes: int) -> None:
    """Create the folder; raise UserError unless its disk has room for `num_bytes` bytes."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be created: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: the files need {file_size(num_bytes)}, and the disk has {file_size(free)} "
            "free"
        )
