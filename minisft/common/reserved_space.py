"""Space on the disk that is taken before it is needed, so that no other program can take it.

reserve = ReservedSpace(Path("runs/demo"), num_bytes=10**9)
reserve.take()                  # UserError if the disk has too little room
with reserve.released():        # the space is free for these files
    save()
reserve.release()
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minisft.common.errors import UserError
from minisft.common.outputs import check_free_space
from minisft.common.words import file_size


def allocate(handle: int, num_bytes: int) -> None:
    """Give an open file `num_bytes` bytes of the disk; OSError if the disk has too few.

    Does nothing where the file system cannot reserve. posix_fallocate would write every block
    there, which takes as long as writing the file.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is None or num_bytes == 0:  # macOS
        return
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if function(handle, 0, 0, num_bytes) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(number, os.strerror(number))


class ReservedSpace:
    """`num_bytes` bytes on the disk of a folder, held by a file without a name.

    The operating system removes the file when this process ends, however it ends.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder, self.num_bytes = folder, num_bytes
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Take the space. UserError if the disk has too little."""
        check_free_space(self.folder, self.num_bytes)
        try:
            self._take(self.num_bytes)
        except OSError as error:
            raise UserError(
                f"{self.folder}: the files need {file_size(self.num_bytes)}: {error.strerror}. "
                "Make room."
            ) from error

    def _take(self, num_bytes: int) -> None:
        """Take the space; OSError if the disk has too little."""
        self.release()
        self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
        try:
            allocate(self._file.fileno(), num_bytes)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the space back."""
        if self._file:
            self._file.truncate(0)  # a worker process may hold the file open, too
            self._file.close()
            self._file = None

    @contextmanager
    def released(self) -> Generator[None, None, None]:
        """Give the space back for the body, and take it again afterwards, or what is left of it."""
        was_taken = self._file is not None
        self.release()
        try:
            yield
        finally:
            if was_taken:
                self._take_again()

    def _take_again(self) -> None:
        """Take the space, or as much as there is."""
        try:
            self._take(self.num_bytes)
        except OSError:
            with suppress(OSError):
                self._take(min(self.num_bytes, shutil.disk_usage(self.folder).free))
