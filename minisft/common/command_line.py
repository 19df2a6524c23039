"""The command line: flags, TOML recipes, the record of what was run, and errors for people.

    parser = OptionParser(description="add two numbers")
    add, switch = parser.section("numbers")
    add("--left", type=int, default=1, help="first summand")
    options = parser.parse_options(["--left", "2"])

Flags may be written with hyphens or underscores. `--config recipe.toml` sets the same names, and
what stands on the command line wins.
"""

import argparse
import math
import os
import sys
import tomllib
import traceback

from minisft.common import failure
from minisft.common.errors import UserError
from minisft.common.flag_names import suggest_flag

# Choices that stand in the help, which is to appear without loading what implements them.
SCHEDULES = ["cosine", "linear", "constant", "polynomial"]
QUANTIZATIONS = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]


def boolean(text):
    """`true`, `yes`, `1`, `false`, `no`, `0` in any case -> bool."""
    lowered = str(text).lower()
    if lowered in ("true", "yes", "1"):
        return True
    if lowered in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def optional_int(text):
    """A whole number, or `none` for 'not set' (how a recipe or a record spells it out)."""
    return None if str(text).lower() == "none" else int(text)


def _number(kind, fits, words):
    """An argparse type: a number of this kind for which fits(number) holds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}")
        return value

    parse.__name__ = "N" if kind is int else "X"
    return parse


MOST = 2**53  # more than anything that is counted here, and no more than libraries can take
positive_int = _number(
    int, lambda value: 1 <= value < MOST, "a whole number of at least 1, below 2**53"
)
non_negative_int = _number(
    int, lambda value: 0 <= value < MOST, "a whole number of at least 0, below 2**53"
)
positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
non_negative_float = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one, the kind of value a flag takes, and text as it stands."""

    def _get_help_string(self, action):
        silent = action.default in (None, False, "", argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        name = getattr(action.type, "__name__", "TEXT")
        return {"int": "N", "float": "X"}.get(name, name if len(name) == 1 else "TEXT")


class OptionParser(argparse.ArgumentParser):
    """argparse with hyphens, recipes, and one-line errors that suggest the flag that was meant."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.add_argument("--config", metavar="RECIPE.toml", help="set flags from a file")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def section(self, title):
        """A headed part of the help -> (add, switch): add_argument, and flags that are on or off.

        A switch is off unless given; `--name false` switches off what a recipe has set.
        """
        group = self.add_argument_group(title)

        def switch(name, help):
            group.add_argument(
                name, type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help=help
            )

        return group.add_argument, switch

    def error(self, message):
        """A mistake in the command line is a UserError."""
        raise UserError(f"{message} (see --help)")

    def parse_options(self, arguments=None):
        """Read the recipe, then the command line over it; unknown names raise UserError."""
        self.built_in = {action.dest: action.default for action in self._actions}
        arguments = sys.argv[1:] if arguments is None else arguments
        arguments = [_underscores(word) for word in arguments]
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config")
        recipe_path = early.parse_known_args(arguments)[0].config
        if recipe_path and not {"-h", "--help"} & set(arguments):
            self._apply_recipe(recipe_path)
        for word in arguments:
            # Before argparse looks for required flags, which a misspelt one would be.
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                name = word.split("=")[0]
                raise UserError(f"unknown flag {name}{suggest_flag(name[2:], self.built_in)}")
        return self.parse_args(arguments)

    def given(self, options):
        """The names of the options that differ from what the parser was built with."""
        return {name for name, value in vars(options).items() if value != self.built_in[name]}

    def _apply_recipe(self, path):
        actions = {action.dest: action for action in self._actions}
        for name, value in read_toml(path).items():
            action = actions.get(name.replace("-", "_"))
            if action is None or action.dest in ("help", "config", "debug"):
                raise UserError(
                    f"{path}: unknown option '{name}'{suggest_flag(name, self.built_in)}"
                )
            self.set_defaults(**{action.dest: _converted(action, value, path)})
            action.required = False


def _underscores(word):
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + _at_home(value)


def _at_home(text):
    """The home folder for `~/`, which no shell puts in a recipe or behind `=`."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def read_toml(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def _converted(action, value, path):
    """A recipe's value, through the type and choices of its flag."""
    many = action.nargs in ("+", "*")
    values = value if many and isinstance(value, list) else [value]
    try:
        values = [_convert_one(action, one) for one in values]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{path}: {action.dest} = {value!r}: {error}") from error
    if action.choices and any(one not in action.choices for one in values):
        choices = ", ".join(action.choices)
        raise UserError(f"{path}: {action.dest} = {value!r}: choose from {choices}")
    return values if many else values[0]


def _convert_one(action, value):
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(action, argparse._StoreTrueAction):
        return boolean(value)
    return action.type(str(value)) if action.type else _at_home(str(value))


def run_script(main):
    """Call `main()` and return its result.

    A UserError becomes one line on standard error and exit status 2. Of several processes under
    torchrun, the first to fail says why.
    """
    try:
        return main()
    except SystemExit:
        raise
    except BaseException as error:
        if not failure.claim():
            failure.give_way()
        status = _tell(error)
        failure.told()
        failure.leave(status)


def _tell(error):
    """Say on standard error why the script ends, in one line or a traceback -> exit status."""
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe (`| head`) has left: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    message = _in_one_line(error)
    if message is None or "--debug" in sys.argv:
        traceback.print_exception(error)
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    return 1 if message is None else 2


def _in_one_line(error):
    """What a person is told of an error that is no fault of the program; else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # Those of torch, which is not loaded here, are known by name.
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if of_torch or isinstance(error, MemoryError):
        reason = str(error).partition("\n")[0]
        return f"out of memory: use smaller batches, or a smaller model {reason}".rstrip()
    return None
