"""`--dtype auto` means float32 in every process of the tests, whatever the processor.

Python imports a module of this name when it starts, and conftest.py puts this folder on PYTHONPATH:
scripts that tests start, the processes that torchrun starts and the fork server all get it. When
minisft.common.devices is loaded, it says that no processor is fast at bfloat16. A test about
precision gives --dtype, or replaces the functions once more.

Nothing waits for the disk: the system keeps what a killed process has written, and no test cuts the
power.
"""

import os
import sys
from importlib.machinery import PathFinder

MODULE = "minisft.common.devices"


class Float32:
    """Finds the module and, once it is loaded, replaces its functions."""

    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name == MODULE else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: replace(load, module)
        return spec


def replace(load, module):
    load(module)
    answers = {"has_fast_bfloat16": False, "type_for_answers": None}  # None: as without a choice
    for name, answer in answers.items():
        real = getattr(module, name)
        setattr(module, name, lambda device, answer=answer: answer)
        getattr(module, name).real = real


sys.meta_path.insert(0, Float32)
os.fsync = lambda descriptor: None
