"""Run a script that can write at most 20,000 bytes, or BYTES, to a file, as on a full disk.

python tests/full_disk.py [BYTES] train.py FLAGS
"""

import resource
import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = sys.argv[1:]
    limit = int(sys.argv.pop(0)) if sys.argv[0].isdigit() else 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runpy.run_path(sys.argv[0], run_name="__main__")
