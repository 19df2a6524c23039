"""The rank and the number of processes that torchrun announces in the environment.

They are known before torch is imported. processes.py gives them once the processes have joined.
"""

import os


def announced_rank() -> int:
    """The rank of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def announced_processes() -> int:
    """The number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))
