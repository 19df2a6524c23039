"""Run a script that can write at most 20,000 bytes to a file, as on a full disk.

python tests/full_disk.py train.py FLAGS
"""

import resource
import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
