"""Run the scripts of this repository as a user does.

run("train.py", "--config", "examples/demo.toml")
"""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *words: object) -> None:
    """Print a command and run it in the root of the repository. If it fails, end with its status.

    Ctrl-C reaches the script, too. It may need some time to save its work, so this waits for it.
    """
    command = [script, *map(str, words)]
    print("\n$ python", shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            pass
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
