"""The threads of a process on the CPU: its share of the cores.

    share_cores()               # before torch is imported; it reads OMP_NUM_THREADS then

torch takes a thread for each physical core, and torchrun gives each of its processes a single one.
Both are wrong at times: a container may use only some of the cores, and two processes on sixteen
cores can have eight threads each. More threads than cores make a step several times slower, because
all of them wait for the slowest. OMP_NUM_THREADS wins if the user has set it.
"""

import os
from pathlib import Path

from minisft.common.words import counted

SYSTEM = Path("/sys")
# Load per core from which other programs compute. An earlier script alone makes it 1.
BUSY = 1.5


def share_cores(system: Path = SYSTEM) -> None:
    """Set OMP_NUM_THREADS if torch or torchrun would choose another number than this share."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores, quota = physical_cores(system), cpu_quota(system)
    if not is_chosen() and (num_processes > 1 or quota < cores):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(min(cores, quota)) // num_processes))


def is_chosen() -> bool:
    """True if the user has set OMP_NUM_THREADS. torchrun sets it to 1 where the user has not."""
    try:
        launched_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # not Linux
        launched_with = []
    if "TORCHELASTIC_RUN_ID" in os.environ and launched_with:
        return any(setting.startswith(b"OMP_NUM_THREADS=") for setting in launched_with)
    return "OMP_NUM_THREADS" in os.environ


def physical_cores(system: Path = SYSTEM) -> int:
    """The cores that this process may run on. The hyperthreads of a core count once."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    places = [
        system / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        for number in os.sched_getaffinity(0)
    ]
    cores = {place.read_text() if place.is_file() else str(place) for place in places}
    return len(cores)


def busy_note(num_threads: int, system: Path = SYSTEM) -> str:
    """A note if other programs keep the cores busy and this one has several threads; else "".

    To be called before this program computes. num_threads: of torch.
    """
    load, cores = os.getloadavg()[0], physical_cores(system)
    if num_threads == 1 or load <= BUSY * cores:
        return ""
    return (
        f"note: the load average is {load:.1f} on {counted(cores, 'core')}: other programs are "
        "computing. OMP_NUM_THREADS=1 may be several times faster."
    )


def cpu_quota(system: Path = SYSTEM) -> float:
    """The number of cores whose time the container may use; infinite without a limit."""
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota == "max" else int(quota) / int(period)
