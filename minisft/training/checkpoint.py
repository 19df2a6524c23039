"""Checkpoint folders: written atomically, verified before they are used.

    with new_checkpoint(output_dir, step=40, keep=2) as folder:      # every rank
        save_model(model, folder)
        if processes.rank() == 0:
            save_state({"step": 40}, folder)
    path = find_checkpoint(output_dir, "auto", say=print)            # the newest complete one
    state = load_state(path)

`checkpoint-STEP` holds the trained weights (an adapter, or the model, in the type of the training),
`trainer_state.pt` (optimizer, random states, counters) and `complete.json`, which lists the size
and SHA-256 of every file. It is written as `checkpoint-STEP.partial` and renamed when everything is
on disk. Whenever the process is killed, a folder without `.partial` is complete.

The tour explains it: docs/tour/09_resume.md.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisft.checkpoints.adapter_forms import PEFT_PREFIX
from minisft.checkpoints.new_folder import written_aside
from minisft.common import processes
from minisft.common.errors import UserError, first_line
from minisft.common.hashes import sha256
from minisft.common.outputs import flush
from minisft.common.tensor_files import ADAPTER_WEIGHTS, read_header, tensor_files
from minisft.common.words import file_size

STATE, MARKER = "trainer_state.pt", "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


# Write


@contextmanager
def new_checkpoint(
    output_dir: str | Path, step: int, keep: int | None = None, best: int | None = None
) -> Generator[Path, None, None]:
    """Yield a folder to be filled, which becomes `checkpoint-STEP`. Every rank enters it.

    Afterwards all checkpoints but the newest `keep` (0: the newest) and that of step `best` are
    removed. UserError if it cannot be written; older checkpoints stay.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"checkpoint-{step}.partial"

    def publish() -> None:
        _complete(partial, final, step)
        _remove_old(output_dir, keep, {step, best})

    problem = f"{final} is not saved"
    with written_aside(partial, publish, problem, lambda: how_to_go_on(output_dir)):
        yield partial


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write trainer_state.pt. UserError if the disk is full."""
    try:
        torch.save(state, folder / STATE)
    except RuntimeError as error:  # torch hides the reason: "unexpected pos 64 vs 0"
        free = file_size(shutil.disk_usage(folder).free)
        raise UserError(f"{folder / STATE}: the disk is full or failing; {free} free") from error


def how_to_go_on(output_dir: str | Path) -> str:
    """What to do after a failed save, which depends on the checkpoints that exist."""
    for step, path in find_checkpoints(Path(output_dir)):
        if damage(path) is None:
            advice = "Make room, or restore what is missing"
            return f"{advice}; --resume_from_checkpoint auto continues from step {step}."
    return (
        "There is no checkpoint to continue from: make room and start again with "
        "--overwrite_output_dir."
    )


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Add complete.json, `record` and the list of files, and flush everything to disk."""
    paths = sorted(folder.rglob("*"))
    files = {
        path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths if path.is_file()
    }
    (folder / MARKER).write_text(json.dumps({**record, "files": files}, indent=1))
    for path in [*paths, folder / MARKER, folder]:
        flush(path)


def _complete(partial: Path, final: Path, step: int) -> None:
    """Seal the folder and rename it."""
    seal(partial, {"step": step})
    # An earlier one of this step stays until the new one is complete.
    old = final.rename(f"{final}.old") if final.exists() else None
    os.rename(partial, final)
    if old:
        _remove(old)
    flush(final.parent)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


# Remove


def _remove_old(output_dir: Path, keep: int | None, wanted: set[int | None]) -> None:
    for step, path in [] if keep is None else find_checkpoints(output_dir)[max(keep, 1) :]:
        if step not in wanted:
            _remove(path)


def remove_others(output_dir: Path, resumed: Path | None, step: int) -> None:
    """Remove the checkpoints that do not belong to a run that is at `step`.

    resumed: the checkpoint that it resumed from; None for a new run. Checkpoints in the same folder
    up to that step belong to the run; later ones belong to an abandoned run.
    """
    same_run = resumed is not None and resumed.parent.resolve() == output_dir.resolve()
    for path in output_dir.glob("checkpoint-*"):
        name = NAME.match(path.name)  # also matches checkpoint-40.partial
        if name is None or not path.is_dir():
            continue
        is_complete = name[0] == path.name
        if not (same_run and is_complete and int(name[1]) <= step):
            _remove(path)


def _remove(path: Path) -> None:
    # Remove the marker first, so that a partly removed folder is not a checkpoint.
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


# Find and read


def find_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, the newest first."""
    checkpoints = []
    for path in output_dir.glob("checkpoint-*"):
        name = NAME.fullmatch(path.name)
        if name and path.is_dir():
            checkpoints.append((int(name[1]), path))
    return sorted(checkpoints, reverse=True)


def find_checkpoint(output_dir: str | Path, which: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the folder `which`, or with "auto" the newest complete one.

    "auto" reports damaged checkpoints with say(text) and skips them; None if there is none at all.
    UserError if `which` is damaged, or all are.
    """
    if which != "auto":
        if fault := damage(Path(which)):
            raise UserError(
                f"--resume_from_checkpoint {which}: {fault}. Give the folder of a complete "
                "checkpoint, or auto for the newest one in --output_dir."
            )
        return Path(which)
    checkpoints = find_checkpoints(Path(output_dir))
    for _, path in checkpoints:
        fault = damage(path)
        if fault is None:
            return path
        say(f"skipped {path}: {fault}")
    if checkpoints:
        raise UserError(
            f"{output_dir}: all checkpoints are damaged. To start again and remove them, give "
            "--overwrite_output_dir without --resume_from_checkpoint."
        )
    return None


def damage(path: Path) -> str | None:
    """The fault of a checkpoint folder, as text; None if it is complete and unchanged."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        if STATE not in files:
            return f"{MARKER} does not list {STATE}"
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _fingerprint(path / name) != expected:
                return f"{name} has changed since it was saved"
    except FileNotFoundError:
        return f"{MARKER} is missing, so it is not complete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MARKER} cannot be read: {error}"
    return None


def load_state(path: str | Path) -> dict[str, Any]:
    """The state that `save_state` wrote, on the CPU. Only plain data is unpickled, never code.

    The tensors are memory-mapped, so the ranks of a machine share them.
    """
    path = Path(path) / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types, with long messages
        raise UserError(
            f"{path} cannot be read ({first_line(error)}). Resume from another checkpoint."
        ) from error


@torch.no_grad()
def restore_weights(model: nn.Module, path: str | Path) -> None:
    """Give the trainable parameters of `model` their values from a checkpoint."""
    path = Path(path)
    is_adapter = (path / ADAPTER_WEIGHTS).is_file()
    stored = read_header(path / ADAPTER_WEIGHTS) if is_adapter else tensor_files(path)
    # state_dict, not named_parameters: it leaves the parameters of a sharded model sharded.
    for name, parameter in model.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            continue
        tensor = stored.get(PEFT_PREFIX + name if is_adapter else name)
        if tensor is None or tensor.shape != parameter.shape:
            raise UserError(
                f"{path}: {name} is missing or has another shape. Was the run started with other "
                "options?"
            )
        processes.copy_shard(parameter, tensor.read)
