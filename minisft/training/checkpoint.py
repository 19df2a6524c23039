"""Save and resume a run, atomically and exactly.

    path = save(output_dir, step=40, write_weights=lambda folder: ..., state={...}, keep=2)
    path = find(output_dir, "auto", print)         # the newest complete one, or None
    state = load_state(path)

A checkpoint is a folder `checkpoint-STEP` with the trained weights (an adapter, or the model in
float32), `trainer_state.pt` (optimizer, random states, counters) and `complete.json`, which lists
the size and SHA-256 of every file. Of a sharded model the state of the optimizer is in a folder of
its own, written by all processes. It is written under another name, the list last, and renamed
when all of it is on disk: whatever happens in between, a folder of that name is whole.
"""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import torch

from minisft.checkpoints.adapters import PEFT_PREFIX
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.tensor_files import ADAPTER_WEIGHTS, read_header, tensor_files

STATE, MARKER = "trainer_state.pt", "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


def save(output_dir, step, write_weights, state, keep=None, best=None):
    """Write `checkpoint-STEP`, then remove all but the newest `keep` and the one of step `best`.

    Every process calls it, and every one's write_weights(folder), which writes the trained weights
    and what else is sharded; the rest is done by the first. Returns the folder. Where the disk is
    full or fails, the unfinished folder is removed and UserError raised; older checkpoints stay.
    """
    output_dir, is_first = Path(output_dir), processes.rank() == 0
    final, partial = (output_dir / f"checkpoint-{step}{end}" for end in ("", ".partial"))
    try:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.barrier()
        write_weights(partial)
        processes.barrier()
        if is_first:
            torch.save(state, partial / STATE)
            _complete(partial, final, step)
            _rotate(output_dir, keep, {step, best})
        processes.barrier()
    except (OSError, RuntimeError, UserError) as error:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final} could not be written: {error}; what was saved before is intact, "
            "go on from it with --resume_from_checkpoint auto"
        ) from error
    return final


def _complete(partial, final, step):
    """Add the list of all files, wait until they are on disk, and give the folder its name."""
    paths = sorted(partial.rglob("*"))
    files = {
        path.relative_to(partial).as_posix(): _fingerprint(path) for path in paths if path.is_file()
    }
    (partial / MARKER).write_text(json.dumps({"step": step, "files": files}, indent=1))
    for path in [*paths, partial / MARKER, partial]:
        _flush(path)
    if final.exists():  # one of the same step must not be lost before this one is in place
        old = final.rename(f"{final}.old")
        os.rename(partial, final)
        _remove(old)
    else:
        os.rename(partial, final)
    _flush(final.parent)


def _rotate(output_dir, keep, wanted):
    old = [path for _, path in _checkpoints(output_dir)][keep:] if keep else []
    for path in old:
        if int(NAME.fullmatch(path.name)[1]) not in wanted:
            _remove(path)


def remove_others(output_dir, resumed, step):
    """Remove the checkpoints that a run from here on would take for its own, and are not.

    resumed: the folder that it goes on from, at `step`; None for a new run. Of the same output
    folder the earlier ones stay, since they are this run's past; of unfinished ones none does.
    """
    own = resumed and Path(resumed).parent.resolve() == Path(output_dir).resolve()
    for path in Path(output_dir).glob("checkpoint-*"):
        number = NAME.match(path.name)
        is_past = own and number and number[0] == path.name and int(number[1]) <= step
        if number and path.is_dir() and not is_past:
            _remove(path)


def _remove(path):
    # Without its marker a folder is no checkpoint, so a half-removed one is never taken for one.
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path):
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _flush(path):
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(output_dir):
    """(step, folder) of what is called a checkpoint, the newest first."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)


def find(output_dir, which, say):
    """The checkpoint to resume from: the folder `which`, or with "auto" the newest complete one.

    say(text) is told of every damaged one that is passed over. Returns None if "auto" finds none;
    a damaged `which` raises UserError.
    """
    if which != "auto":
        fault = damage(Path(which))
        if fault:
            raise UserError(
                f"--resume_from_checkpoint {which}: {fault}; give the folder of a "
                "checkpoint, or auto for the newest in --output_dir"
            )
        return Path(which)
    for _, path in _checkpoints(output_dir):
        fault = damage(path)
        if fault is None:
            return path
        say(f"skipped {path}: {fault}")
    if _checkpoints(output_dir):
        raise UserError(
            f"{output_dir}: none of its checkpoints is whole; "
            "--overwrite_output_dir, without resuming, starts anew and removes them"
        )
    return None


def damage(path):
    """What is wrong with a checkpoint folder, in words; None if it is whole."""
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
        return f"not complete: {MARKER} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read: {error}"
    return None


def load_state(path):
    """The `state` that was saved, on the CPU. Only plain data is unpickled, never code.

    Tensors are mapped from the file, so that the processes of a machine share what they read.
    """
    path = Path(path) / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, and of many lines
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); go on from another checkpoint") from (
            error
        )


@torch.no_grad()
def restore_weights(model, path):
    """Give the trainable parameters of `model` their values from a checkpoint."""
    path = Path(path)
    adapter = path / ADAPTER_WEIGHTS
    prefix = PEFT_PREFIX if adapter.is_file() else ""
    files = read_header(adapter) if prefix else tensor_files(path)
    # Unlike named_parameters, state_dict puts nothing together that is sharded.
    for name, parameter in model.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            continue
        stored = files.get(prefix + name)
        if stored is None or stored.shape != parameter.shape:
            raise UserError(f"{path}: {name} does not fit; was the run started with other options?")
        processes.copy_shard(parameter, stored.read)


def random_state(device):
    """The state of every random generator that training draws from in this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Interruption:
    """Inside `with`: the first SIGTERM or Ctrl-C is noted in `signal`; a second Ctrl-C acts.

    A second SIGTERM does not: a cluster sends it to the whole group, and torchrun passes it on.
    """

    def __enter__(self):
        self.signal = None
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _note(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            self.__exit__()
            signal.raise_signal(number)
        self.signal = self.signal or number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
