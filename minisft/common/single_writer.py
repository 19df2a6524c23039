"""One program at a time writes an output.

    with single_writer("runs/demo"):       # a folder: runs/demo/.lock
        train()
    with single_writer("scores.jsonl"):    # a file: scores.jsonl.lock
        score()

The lock file names the host and the process that hold it. The operating system releases the lock
when that process ends, however it ends, so a killed program blocks nobody.
"""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from minisft.common.errors import UserError

FOLDER_LOCK = ".lock"


@contextmanager
def single_writer(output: str | Path, is_folder: bool = False) -> Generator[None, None, None]:
    """Hold the lock of an output; UserError if another process holds it.

    A folder that is created for the lock is removed again if it stays empty.
    """
    output = Path(output)
    path = output / FOLDER_LOCK if is_folder else output.with_name(output.name + ".lock")
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, output)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # a folder with content stays
            for folder in created:
                folder.rmdir()


def _acquire(path: Path, output: Path) -> int:
    """The open lock file `path`, locked by this process."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock: child processes would inherit it and keep it after a kill of this process.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(handle, 1000).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UserError(
                f"{output}: {owner} is writing to it. Wait until it has finished, or choose "
                "another output."
            ) from error
        except OSError:  # a file system without locks
            pass
        # The last owner may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle
        os.close(handle)
