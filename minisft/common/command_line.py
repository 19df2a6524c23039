"""The command line: flags, recipes, and which flags were given.

    parser = OptionParser(description="add two numbers")
    add, switch = parser.section("numbers")
    add("--left", type=int, default=1, help="first summand")
    options = parser.parse_options(["--left", "1"])
    parser.given(options)                               # {"left"}

Hyphens work for underscores. `--config recipe.toml` sets flags by the same names, and the command
line wins over the recipe.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from minisft.common.errors import UserError
from minisft.common.flag_names import own_name
from minisft.common.flag_words import (
    flag_and_value,
    grouped,
    is_flag,
    normalized,
    with_home,
)
from minisft.common.llama_factory import STRATEGIES, set_steps, translate
from minisft.common.option_types import (
    boolean,
    fraction,
    non_negative_float,
    non_negative_int,
    optional_int,
    positive_float,
    positive_int,
    sample_number,
    sample_rate,
    share_of_warmup,
    steps_of_warmup,
)
from minisft.common.recipes import read_recipe, record_to_resume
from minisft.common.toml_files import is_record
from minisft.common.torchrun import announced_rank
from minisft.common.unknown_words import (
    checked,
    example_with,
    explain_stray,
    with_hint,
)

# Choices of a flag. --help shows them without loading the modules that implement them.
QUANTIZATIONS = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]

# How --help shows the value of a flag of this type; TEXT for all other types.
METAVARS: dict[object, str] = {
    int: "N",
    optional_int: "N",
    positive_int: "N",
    non_negative_int: "N",
    float: "X",
    positive_float: "X",
    non_negative_float: "X",
    fraction: "X",
    sample_rate: "X",
    sample_number: "N",
    share_of_warmup: "X",
    steps_of_warmup: "N",
}
_UNSET = object()
# Values of another program's flag that change nothing in a script, and what to do instead.
Neighbour = tuple[tuple[Any, ...], str]


def check_rules(rules: Iterable[tuple[set[str], Any, str]], given: set[str]) -> None:
    """UserError for a flag that was given, but is wrong here.

    rules: (names of flags, true if they are wrong here, why). given: from OptionParser.given.
    """
    for flags, is_wrong, reason in rules:
        if is_wrong and flags & given:
            raise UserError(f"--{min(flags & given)} {reason}")


class OptionParser(argparse.ArgumentParser):
    """argparse with hyphens, recipes, and errors that suggest the right flag."""

    def __init__(
        self,
        examples: str = "",
        common: str = "",
        neighbours: Mapping[str, Neighbour] | None = None,
        **settings: Any,
    ):
        """examples: commands that --help shows first. common: names of flags to mark in --help.

        neighbours: flags of other programs that mean something special for this script.
        """
        formatter = argparse.RawDescriptionHelpFormatter
        settings.setdefault("usage", "%(prog)s --flag value ...")
        if examples:
            settings["description"] += f"\n\nexamples:\n{examples.rstrip()}"
        if common:
            settings["description"] += "\n\nMost runs need only the flags marked with *."
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self._common, self._neighbours = set(common.split()), neighbours or {}
        self._examples = examples
        self._flags: dict[str, argparse.Action] = {}
        # name -> the flag that makes it unnecessary, and a remark on that; both may be ""
        self._required: dict[str, tuple[str, str]] = {}
        self._given: set[str] = set()
        add, _ = self.section("general")
        recipe = "set flags from a file: TOML, or YAML, also with the keys of LLaMA-Factory"
        add("--config", metavar="RECIPE", help=recipe)
        add("--debug", action="store_true", help="show the traceback of an error")

    def section(self, title: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Start a section of the help; returns (add, switch).

        add(flag, ...) takes the arguments of argparse's add_argument. switch(flag, help) adds a
        flag that is on or off. It is off by default, and `--flag false` turns it off if a recipe
        has turned it on.
        """
        group = self.add_argument_group(title)

        def add(
            flag: str, required: bool = False, unless: str = "", remark: str = "", **settings: Any
        ) -> None:
            """Add a flag to the section.

            unless: the flag with which it is not required. remark: when to use that, for the error.
            """
            if required:
                self._required[flag.removeprefix("--")] = unless, remark
                exception = f", except with --{unless}" if unless else ""
                settings["help"] += f" (required{exception})"
            default = settings.get("default")
            if isinstance(default, list):  # as a user writes it
                words = [f"{word:g}" if isinstance(word, float) else str(word) for word in default]
                default = (" " if "nargs" in settings else ",").join(words)
            if default is not None and default is not False and default != "":  # 0 is shown
                settings["help"] += f" (default: {default})".replace("%", "%%")
            if not settings.keys() & {"choices", "metavar", "action"}:
                settings["metavar"] = METAVARS.get(settings.get("type"), "TEXT")
            if "choices" in settings:
                type = settings.get("type", str.lower)  # names such as Q4_K_M have no case
                settings["type"] = partial(checked, flag=flag.removeprefix("--"), type=type)
            if flag.removeprefix("--") in self._common:
                settings["help"] = "* " + settings["help"]
            action = group.add_argument(flag, **settings)
            self._flags[action.dest] = action

        def switch(flag: str, help: str) -> None:
            """Add a flag that is on or off."""
            add(flag, type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help=help)

        return add, switch

    def parse_options(self, arguments: Iterable[str] | None = None) -> Namespace:
        """The options from the command line, the recipe and the defaults, in this order.

        arguments: the words of the command line, by default those of this process. UserError
        names every unknown flag and key of the recipe, or every required flag that is missing.
        """
        assert self._common <= self._flags.keys(), "common names a flag that does not exist"
        arguments = sys.argv[1:] if arguments is None else arguments
        words = [normalized(word) for word in arguments]
        options, rest = self._parse(words)
        path = "" if options.config is _UNSET else options.config
        recipe, faults = (
            self._read_recipe(path) if path else (dict.fromkeys(self._flags, _UNSET), [])
        )
        groups = self._without_strategies(grouped(rest, words), options, recipe)
        rest, refused = self._without_neighbours(groups)
        self._refuse_unknown([word for word in rest if word.startswith("-")], refused, path, faults)
        if rest:
            raise UserError(explain_stray(rest[0], words, self._flags))
        self._given = self._names_given(vars(options), recipe)
        missing = [
            name for name, (unless, _) in self._required.items() if not {name, unless} & self._given
        ]
        if missing:
            names = ", ".join(f"--{name}" for name in missing)
            remark = self._required[missing[0]][1] if len(missing) == 1 else ""
            example = example_with(missing, self._examples) if len(missing) > 1 else ""
            if record := record_to_resume(options):
                remark, example = f"--config {record} has the options of that run", ""
            remark = f"; {remark}" if remark else ""
            raise UserError(f"{names} must be given{remark}{example} (see --help)")
        for name, action in self._flags.items():
            values = (getattr(options, name), recipe[name], action.default)
            setattr(options, name, next(value for value in values if value is not _UNSET))
        return options

    def given(self, options: Namespace) -> set[str]:
        """The names of the options that the command line or the recipe has set.

        A flag that was set to its default is given too. A switch that was set to false is not,
        because it changes nothing.
        """
        values = vars(options)
        return {
            name
            for name in self._given
            if values[name] is not None and values[name] is not False  # 0 was given
        }

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a wrong command line: raise UserError."""
        raise UserError(f"{message} (see --help)")

    def _parse(self, words: list[str]) -> tuple[Namespace, list[str]]:
        """(options, unknown words); an option that the words do not set is _UNSET."""
        return self.parse_known_args(words, Namespace(**dict.fromkeys(self._flags, _UNSET)))

    def _read_recipe(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """(options, unknown keys and why) of a recipe; an option that it does not set is _UNSET."""
        recipe, refused = read_recipe(path, self._flags)
        words, faults = [], []
        for reason in dict.fromkeys(refused.values()):  # keys with the same reason side by side
            keys = [key for key in refused if refused[key] == reason]
            faults.append(f"{', '.join(keys)} ({reason})")
        for key, value in recipe.items():
            name = key.replace("-", "_")
            if name in ("config", "debug"):
                faults.append(f"{key} (only on the command line)")
            elif name not in self._flags:
                reason = self._reason_against(name, value)
                if isinstance(value, dict) and value.keys() & self._flags.keys():  # [key] in TOML
                    faults.append(f"{key} (a recipe has no sections)")
                elif reason != "":
                    faults.append(f"{key} ({reason})" if reason else with_hint(key, self._flags))
            elif value is not None:  # YAML's null leaves an option unset
                words += self._words(name, value)
        try:
            return vars(self._parse(words)[0]), faults
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def _words(self, name: str, value: Any) -> list[str]:
        """A line of a recipe as words of a command line."""
        if isinstance(value, list) and self._flags[name].nargs in ("+", "*"):
            return [f"--{name}", *(with_home(str(item)) for item in value)]
        if isinstance(value, list):
            text = ",".join(map(str, value))
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
        return [f"--{name}={with_home(text)}"]

    def _names_given(self, options: dict[str, Any], recipe: dict[str, Any]) -> set[str]:
        given = {name for name, value in recipe.items() if value is not _UNSET}
        if given and is_record(options["config"]):
            # A record lists every option. A value at its default may not have been chosen by the
            # user.
            given = {name for name in given if recipe[name] != self._flags[name].default}
        return given | {name for name in self._flags if options[name] is not _UNSET}

    def _without_strategies(
        self, groups: list[list[str]], options: Namespace, recipe: dict[str, Any]
    ) -> list[list[str]]:
        """The other groups. --eval_strategy and --save_strategy set options.eval_steps and so on.

        groups: from `grouped`. recipe: the options that the recipe sets.
        """
        if "eval_steps" not in self._flags:
            return groups
        asked = {name: value for name, value in map(flag_and_value, groups) if name in STRATEGIES}
        steps = {}
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(options, name)
            value = recipe[name] if value is _UNSET else value
            if value is not _UNSET:
                steps[name] = value
        translated = {**steps, **asked}
        set_steps(translated)
        for name in ("eval_steps", "save_steps"):
            if translated.get(name) != steps.get(name):
                setattr(options, name, translated.get(name))
        # One that minisft does not have is still there.
        left = {name for name in asked if name.replace("evaluation", "eval") in translated}
        done = asked.keys() - left
        return [group for group in groups if flag_and_value(group)[0] not in done]

    def _without_neighbours(self, groups: list[list[str]]) -> tuple[list[str], list[str]]:
        """(unknown words, flags of other programs with the reason why minisft has none).

        Leaves out flags of transformers, trl and LLaMA-Factory whose value asks for what minisft
        does anyway, and says so. groups: from `grouped`.
        """
        unknown, refused, accepted = [], [], []
        for group in groups:
            flag, (name, value) = group[0].partition("=")[0], flag_and_value(group)
            reason = self._reason_against(name, value) if is_flag(flag) else None
            if reason is None:
                unknown += group
            elif reason:
                refused.append(f"{flag} ({reason})")
            else:
                accepted.append(flag)
        if accepted and announced_rank() == 0:
            print(f"no effect in minisft: {', '.join(accepted)}", file=sys.stderr)
        return unknown, refused

    def _refuse_unknown(
        self, words: list[str], refused: list[str], recipe_path: str, keys: list[str]
    ) -> None:
        """UserError that names unknown words of the command line and unknown keys of the recipe.

        refused: flags with a reason. keys: with a hint or a reason.
        """
        flags = [with_hint(word.partition("=")[0], self._flags) for word in words] + refused
        faults = []
        if flags:
            faults.append(f"no such flag: {', '.join(flags)}")
        if keys:
            faults.append(f"{recipe_path}: no such option: {', '.join(keys)}")
        if faults:
            raise UserError(f"{'; '.join(faults)} (see --help)")

    def _reason_against(self, name: str, value: Any) -> str | None:
        """Why minisft does not have another program's flag with this value.

        "" if the value asks for what minisft does anyway; None for a flag without an entry.
        """
        usual, reason = self._neighbours.get(own_name(name, self._neighbours) or "", ((), ""))
        if reason:
            return "" if value in usual else reason
        options, reasons = translate({name: value}, self._flags)
        if options and name in STRATEGIES:
            return "belongs to train.py"
        return None if options else next(iter(reasons.values()), "")


def report_without_effect(given: set[str], rules: Sequence[tuple[set[str], Any, str]]) -> None:
    """Print a line for each given flag without effect, on rank 0.

    These are flags that people pass together out of habit; others are errors. rules: (flags, when
    they have no effect, why).
    """
    for flags, is_unused, reason in rules:
        if is_unused and announced_rank() == 0:
            for name in sorted(flags & given):
                print(f"--{name} has no effect: {reason}", file=sys.stderr)
