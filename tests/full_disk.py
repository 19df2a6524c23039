"""Run a script, or a part of a test, that can write at most so many bytes to a file.

    python tests/full_disk.py [BYTES] train.py FLAGS        # 20,000 bytes unless BYTES are given

    with file_size_limit(500):
        write()                                             # OSError: File too large

The script, or the body, fails as on a full disk.
"""

import resource
import runpy
import signal
import sys
from contextlib import contextmanager


@contextmanager
def file_size_limit(num_bytes):
    """In the body, this process can write at most `num_bytes` bytes to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    limit = int(sys.argv.pop(0)) if sys.argv[0].isdigit() else 20_000
    with file_size_limit(limit):
        runpy.run_path(sys.argv[0], run_name="__main__")
