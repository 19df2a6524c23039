"""The result of a run in --output_dir: written aside, then renamed, the marker last.

    with new_result(output_dir, record={"step": 40}) as folder:      # every rank
        save_adapter(model, folder, ...)
    finished = read_record(output_dir)                               # {"step": 40, "files": ...}

complete.json lists the files, as in a checkpoint. Without it the run has not finished: a kill
between two renames can leave files of an older result beside new ones.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisft.checkpoints.new_folder import move_files, written_aside
from minisft.common.json_files import read_json
from minisft.common.outputs import RESULT_PARTIAL, flush
from minisft.training.checkpoint import MARKER, how_to_go_on, seal


@contextmanager
def new_result(output_dir: Path, record: dict[str, Any]) -> Generator[Path, None, None]:
    """A folder to fill, whose files then move to `output_dir`. Every rank enters it.

    If the disk is full or fails, older files stay, and UserError says how to go on.
    """
    partial = output_dir / RESULT_PARTIAL

    def publish() -> None:
        seal(partial, record)
        move_files(partial, output_dir, MARKER)

    problem = f"{output_dir}: the result is not saved"
    with written_aside(partial, publish, problem, lambda: how_to_go_on(output_dir)):
        yield partial


def read_record(output_dir: Path) -> dict[str, Any]:
    """complete.json of a finished run; empty if the run has not finished, or files are missing."""
    record = read_json(output_dir / MARKER, missing={})
    files = record.get("files", {})
    is_complete = isinstance(files, dict) and all((output_dir / name).is_file() for name in files)
    return record if is_complete else {}


def remove_record(output_dir: Path) -> None:
    """The result, if there is one, no longer belongs to a finished run."""
    (output_dir / MARKER).unlink(missing_ok=True)
    flush(output_dir)
