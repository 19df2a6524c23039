"""Which tests `make fast` leaves out and which `make test-avx2` runs again.

takes_long(item, {})        # the marker slow
compares_numbers(item)      # the marker numerical
"""

import functools
import inspect
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# A test takes long when it, a fixture or a helper of tests/ that it uses has one of these names: it
# starts a process, serves a page, compiles, trains with transformers, tries many random inputs, or
# measures memory.
LONG = re.compile(
    r"subprocess|Popen|Process|Server|run_script|fork|sync_playwright|launch|\w*compile\w*|"
    r"CompiledDecoder|Trainer|hypothesis|given|tracemalloc|measure|allocated"
)
# Such results depend on kernels. A numerical test's file contains one of these names.
NUMBERS = re.compile(r"\b(assert_close|assert_allclose|approx)\(")


def compares_numbers(item):
    """True if the file of a test compares numbers with a tolerance."""
    return file_compares_numbers(item.module)


@functools.cache
def file_compares_numbers(module):
    return NUMBERS.search(inspect.getsource(module)) is not None


def takes_long(item, known):
    """True if a test, or anything in tests/ that it uses, contains a name in LONG.

    known: a cache of the results for functions and classes.
    """
    fixtures = [
        definition.func
        for definitions in item._fixtureinfo.name2fixturedefs.values()
        for definition in definitions
    ]
    return any(is_long(function, known) for function in [item.function, *fixtures])


def is_long(thing, known):
    names = {*vars(thing)}  # hypothesis marks tests there
    thing = inspect.unwrap(thing)
    if thing in known:
        return known[thing]
    known[thing] = False  # until the result is known: functions may use each other
    if inspect.isclass(thing):
        names = {base.__name__ for base in thing.__mro__}
        used = vars(thing).values()
    else:
        names |= names_in(thing.__code__)
        used = [thing.__globals__[name] for name in names & thing.__globals__.keys()]
    known[thing] = any(map(LONG.fullmatch, names)) or any(
        is_long(value, known) for value in used if is_in_tests(value)
    )
    return known[thing]


def is_in_tests(value):
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return False
    module = sys.modules.get(value.__module__)
    return TESTS in Path(getattr(module, "__file__", None) or "").parents


def names_in(code):
    """The names in a function's code and in that of its inner functions."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return set(code.co_names).union(*map(names_in, inner))
