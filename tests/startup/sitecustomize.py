"""`--dtype auto` means float32 in every process of the tests, whatever the processor.

Python imports a module of this name when it starts, and conftest.py puts this folder on PYTHONPATH:
scripts that tests start, the processes that torchrun starts and the fork server all get it. When
minisft.common.devices is loaded, it says that no processor is fast at bfloat16. A test about
precision gives --dtype, or replaces the function once more.

Nothing waits for the disk: the system keeps what a killed process has written, and no test cuts the
power.
"""

import os
import sys
from importlib.machinery import PathFinder

MODULE, FUNCTION = "minisft.common.devices", "has_fast_bfloat16"


class Float32:
    """Finds the module and, once it is loaded, replaces the function."""

    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name == MODULE else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: replace(load, module)
        return spec


def replace(load, module):
    load(module)
    real = getattr(module, FUNCTION)
    setattr(module, FUNCTION, lambda device: False)
    getattr(module, FUNCTION).real = real


sys.meta_path.insert(0, Float32)
os.fsync = lambda descriptor: None
