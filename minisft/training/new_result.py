"""The result of a run in --output_dir: written aside, then renamed, the marker last.

    with new_result(output_dir, record={"step": 40}) as folder:      # every rank
        save_adapter(model, folder, ...)
    finished = read_record(output_dir)                               # {"step": 40, "files": ...}

complete.json lists the files, as in a checkpoint. Without it the run has not finished: a kill
between two renames can leave files of an older result beside new ones.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisft.checkpoints.folders import remove_other_weights
from minisft.common.json_files import read_json
from minisft.text.tokenizer_files import FILES
from minisft.training.checkpoint import MARKER, flush, seal, written_aside


@contextmanager
def new_result(output_dir: Path, record: dict[str, Any]) -> Generator[Path, None, None]:
    """A folder to fill, whose files then move to `output_dir`. Every rank enters it.

    If the disk is full or fails, older files stay, and UserError says how to go on.
    """
    partial = output_dir / "result.partial"

    def publish() -> None:
        seal(partial, record)
        _publish(partial, output_dir)

    with written_aside(partial, publish, f"{output_dir}: the result could not be written"):
        yield partial


def read_record(output_dir: Path) -> dict[str, Any]:
    """complete.json of a finished run; empty if the run has not finished, or files are missing."""
    record = read_json(output_dir / MARKER, missing={})
    return record if all((output_dir / name).is_file() for name in record.get("files", {})) else {}


def remove_record(output_dir: Path) -> None:
    """The result, if there is one, no longer belongs to a finished run."""
    (output_dir / MARKER).unlink(missing_ok=True)
    flush(output_dir)


def _publish(folder: Path, output_dir: Path) -> None:
    """Move the files of `folder` to `output_dir`, and remove those of another result there."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (name == MARKER, name))
    remove_record(output_dir)
    for name in names:
        if name == MARKER:  # all other files are in place
            remove_other_weights(output_dir, names)
            for other in set(FILES) - set(names):
                (output_dir / other).unlink(missing_ok=True)
            flush(output_dir)
        (output_dir / name).parent.mkdir(exist_ok=True)
        os.replace(folder / name, output_dir / name)
    flush(output_dir)
