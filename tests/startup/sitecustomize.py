"""`--dtype auto` means float32 in every process of the tests, whatever the processor.

Python imports a module of this name when it starts, and conftest.py puts this folder on PYTHONPATH:
scripts that tests start, the processes that torchrun starts and the fork server all get it. When
minisft.options is loaded, it says that no processor multiplies bfloat16. A test that is about
precision gives --dtype, or replaces the function once more.
"""

import sys
from importlib.machinery import PathFinder


class Float32:
    """Finds minisft.options and, once it is loaded, replaces multiplies_bfloat16."""

    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name == "minisft.options" else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: replace(load, module)
        return spec


def replace(load, module):
    load(module)
    real = module.multiplies_bfloat16
    module.multiplies_bfloat16 = lambda device: False
    module.multiplies_bfloat16.real = real


sys.meta_path.insert(0, Float32)
