"""Fill a folder aside, then move its files to their place, the file that completes it last.

    with new_folder("merged", marker="config.json", advice="Make room.") as folder:
        save_model(model, folder)
        tokenizer.save(folder)

A reader finds the old files, or the new ones. Without `marker`, the folder is not complete: a kill
between two renames can leave files of an older result beside new ones.
"""

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from minisft.checkpoints.folders import remove_other_weights
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.outputs import RESULT_PARTIAL, flush
from minisft.text.tokenizer_files import FILES

# A model or an adapter replaces these files of the one before it.
REPLACED = ("config.json", "generation_config.json", *FILES)


class NotSaved(UserError):
    """A folder could not be written. The reason is its __cause__."""


@contextmanager
def new_folder(output_dir: Path, marker: str, advice: str) -> Generator[Path, None, None]:
    """A folder to fill, whose files then move to `output_dir`. Every rank enters it.

    If the disk is full or fails, older files stay, and UserError ends with `advice`.
    """
    partial = output_dir / RESULT_PARTIAL
    problem = f"{output_dir}: the result is not saved"
    with written_aside(
        partial, lambda: move_files(partial, output_dir, marker), problem, lambda: advice
    ):
        yield partial


@contextmanager
def written_aside(
    partial: Path, publish: Callable[[], None], problem: str, advice: Callable[[], str]
) -> Generator[None, None, None]:
    """Create the folder `partial`, which the body fills; then rank 0 calls `publish`.

    Every rank enters it. If the disk is full or fails, NotSaved says the problem, its reason and
    the advice. The folder is removed in any case.
    """
    is_rank0 = processes.rank() == 0
    try:
        if is_rank0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.barrier()
        yield
        processes.barrier()
        if is_rank0:
            publish()
        processes.barrier()
    except (OSError, RuntimeError, UserError) as error:
        raise NotSaved(f"{problem}: {str(error).removesuffix('.')}. {advice()}") from error
    finally:
        if is_rank0:
            shutil.rmtree(partial, ignore_errors=True)


def move_files(folder: Path, output_dir: Path, marker: str) -> None:
    """Move the files of `folder` to `output_dir`, and remove those of another result there.

    The file `marker` is removed first and comes last.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    (output_dir / marker).unlink(missing_ok=True)
    flush(output_dir)
    for name in sorted(set(names) - {marker}):
        (output_dir / name).parent.mkdir(exist_ok=True)
        os.replace(folder / name, output_dir / name)
    remove_other_weights(output_dir, names)
    for name in set(REPLACED) - set(names):
        (output_dir / name).unlink(missing_ok=True)
    flush(output_dir)
    os.replace(folder / marker, output_dir / marker)
    flush(output_dir)
