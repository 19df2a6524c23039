"""One program at a time writes an output.

    with single_writer("runs/demo", is_folder=True):    # runs/demo/.lock
        train()
    with single_writer("scores.jsonl"):                 # scores.jsonl.lock
        score()

The lock file names the host and the process that hold it. The operating system releases the lock
when that process ends, however it ends, so a killed program blocks nobody on its host. Another host
cannot tell whether it is alive, and refuses.
"""

import fcntl
import os
import re
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from minisft.common.errors import UserError

FOLDER_LOCK = ".lock"
OWNER = re.compile(r"process (\d+) on (\S*)")


@contextmanager
def single_writer(output: str | Path, is_folder: bool = False) -> Generator[None, None, None]:
    """Hold the lock of an output; UserError if another process holds it.

    A folder that is created for the lock is removed again if it stays empty.
    """
    output = Path(output)
    target = Path(os.path.realpath(output))  # a file that links lead to has one lock
    path = output / FOLDER_LOCK if is_folder else target.parent / f"{target.name}.lock"
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        handle = _open_lock(path, output)
        try:
            yield
        finally:
            with suppress(OSError):  # a folder that is gone, or whose rights have changed
                path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        for folder in created:
            with suppress(OSError):  # a folder with content stays
                folder.rmdir()


def _open_lock(path: Path, output: Path) -> int:
    """Create the lock file `path`, with its folder, and lock it. UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _acquire(path, output)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{output}: a part of this path is a file. Choose another.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder. Move it, or choose another output.") from error
    except OSError as error:
        raise UserError(
            f"{output}: could not be written: {error.strerror}. Make room, or choose another."
        ) from error


def _acquire(path: Path, output: Path) -> int:
    """The open lock file `path`, locked by this process."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            _lock(handle, path, output)
            # The last owner may have removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    _sign(handle, path)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _sign(handle: int, path: Path) -> None:
    """Write the owner into a lock file. On a full disk, nothing stays of it."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {_host()}\n".encode(), 0)
    except OSError:
        path.unlink()
        raise


def _lock(handle: int, path: Path, output: Path) -> None:
    """Lock an open file. UserError if it has an owner who may be alive, or is no lock file."""
    is_file = stat.S_ISREG(os.fstat(handle).st_mode)
    text = os.pread(handle, 1000, 0).decode(errors="replace").strip() if is_file else ""
    owner = OWNER.fullmatch(text)
    if not is_file or text and not owner:
        raise UserError(f"{path} is not a lock file of minisft. Move it, or choose another output.")
    is_locked = _try_lock(handle)
    advice = "Wait until it has finished, or choose another output."
    if owner and owner[2] != _host():
        is_held, advice = True, f"If that process has ended, remove {path}."
    elif is_locked is None:
        is_held = owner is not None and _is_alive(int(owner[1]))
    else:
        is_held = not is_locked
    if is_held:
        raise UserError(f"{output}: {text or 'another process'} is writing to it. {advice}")


def _try_lock(handle: int) -> bool | None:
    """True if this process has the lock now; None on a file system without locks."""
    try:
        # Not flock: child processes would inherit it and keep it after a kill of this process.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _host() -> str:
    return socket.gethostname()


def _is_alive(process_id: int) -> bool:
    """True if this host has another process of this number."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process_id != os.getpid()
