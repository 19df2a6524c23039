"""Run scripts as a user does, and measure the memory of processes.

    start("train.py", *flags(model_name_or_path="examples/base", max_steps=20, packing=True))
    before = forget_peak_memory()
    ...
    print(peak_memory() - before)

Memory is what the kernel reports (Linux only).
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_GROWTH = 1.1  # the factor by which the memory of a long run may grow


def flags(**options: Any) -> list[str]:
    """The words of the command line: `--name value` for each option, `--name` for True.

    Options that are None or False are left out.
    """
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def start(*words: object) -> subprocess.Popen[bytes]:
    """Start Python with these arguments in the root of the repository. Its output is dropped."""
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def output_of(*words: object, **settings: Any) -> str:
    """Run Python with these arguments in the root of the repository; returns its standard output.

    settings: more arguments of subprocess.run. CalledProcessError if the program fails.
    """
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, **settings
    )
    return done.stdout


def reason_of(error: Exception) -> str:
    """The class and the message of an error, on one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def early_and_late(used: Sequence[int]) -> tuple[float, float]:
    """The median memory in the second and in the last quarter of a long run."""
    quarter = max(1, len(used) // 4)
    return statistics.median(used[quarter : 2 * quarter]), statistics.median(used[-quarter:])


def resident_memory(process_id: int | str = "self") -> int:
    """Bytes of a process that are in memory now."""
    return _status("VmRSS", process_id)


def peak_memory(process_id: int | str = "self") -> int:
    """The most bytes of a process that were in memory since it began, or forgot its peak."""
    return _status("VmHWM", process_id)


def forget_peak_memory() -> int:
    """Reset the peak of this process; returns the bytes that are in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_memory()


def _status(name: str, process_id: int | str) -> int:
    text = Path(f"/proc/{process_id}/status").read_text()
    rest = text.partition(f"{name}:")[2]
    return 1024 * int(rest.split()[0]) if rest else 0  # a process that has ended has no memory
