"""The flags of `select.py`, and checks of their combinations.

options = parse_options(["--dataset", "examples/data/train.json", "--scores", "runs/scores.jsonl",
                         "--strategy", "ifd", "--sample_rate", "0.05", "--output", "few.json"])
options.seed                                 # 42, the default
"""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from importlib.util import find_spec

from minisft.common.command_line import (
    OptionParser,
    non_negative_int,
    positive_float,
    positive_int,
    report_without_effect,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import add_dataset_flags
from minisft.common.option_types import sample_number, sample_rate, split_names
from minisft.common.outputs import check_json_name

# The inputs that each strategy needs.
STRATEGIES = {
    "ifd": ("scores",),
    "ifd_ppl": ("scores",),
    "mid_ppl": ("scores",),
    "reward": ("scores",),
    "margin": ("scores",),
    "longest": (),
    "random": (),
    "random_matched": ("match",),
    "cluster": ("embeddings",),
    "kcenter": ("embeddings",),
    "ifd+kcenter": ("scores", "embeddings"),
    "facility": ("embeddings",),
    "ifd_ppl+facility": ("scores", "embeddings"),
    "rds": ("embeddings", "target"),
}
RANDOM = ("random", "random_matched", "cluster")  # their choice depends on --seed
# Other names of strategies.
ALIASES = {
    **dict.fromkeys(("kmeans", "k-means", "k_means"), "cluster"),
    **dict.fromkeys(("k-center", "k_center"), "kcenter"),
    **dict.fromkeys(("ppl", "perplexity"), "mid_ppl"),
    **dict.fromkeys(("facility_location", "facility-location"), "facility"),
    "rds+": "rds",
}
# Flags of a single strategy.
ONLY_FOR = {
    "clusters": "cluster",
    "per_cluster": "cluster",
    "starts": "cluster",
    "band": "cluster",
    "pool": "ifd+kcenter",
    "top_rate": "ifd_ppl+facility",
    "balance": "random",
    "match": "random_matched",
    "target": "rds",
}
# How to make the inputs.
MADE_BY = {
    "scores": "score.py writes it",
    "embeddings": "score.py --mode embed writes it",
    "target": "score.py --mode embed --pooling weighted writes it, from a few rows of the task",
    "match": "a selection that select.py has written",
}
EPILOGUE = """\
Strategies:
  ifd             the highest ratio of losses below 1 (above 1, the instruction does not help)
  ifd_ppl         the highest ratio of perplexities below 1
  mid_ppl         rows around the median perplexity of the answer given its prompt (also: ppl)
  reward          the highest reward of a reward model (score.py --mode reward)
  margin          the preferences that the reward model is surest of: the highest reward of the
                  chosen answer minus reward of the rejected
  cluster         k-means of the embeddings, then --per_cluster rows of each cluster, spread over
                  --band percentiles of the prompt's perplexity: the pre-experience set. With
                  --sample_rate or --sample_number, as many of each as that needs (also: kmeans)
  kcenter         each row as far as possible from the rows before it: diversity, with outliers
  ifd+kcenter     N rows by kcenter, of the --pool x N rows with the highest ifd below 1
  facility        facility location: every row has a chosen row near it, by cosine
  ifd_ppl+facility
                  the same, but only of the --top_rate best rows by ifd_ppl (Superfiltering.D)
  rds             RDS+: the rows of --target take turns, each picks its nearest row, by cosine.
                  Several files, separated by commas, are several tasks, which take turns
  longest         the longest answers: in tokens with --scores, else in characters
  random          the baseline; with --balance, the same number from each source or cluster
  random_matched  random rows with answers as long as those of the selection --match: a control,
                  to see whether a strategy does more than find long answers
The output has the columns and the order of --dataset. OUTPUT.manifest records the strategy, the
seed, the hashes of the inputs, the numbers of the chosen rows, and how many were dropped and why.
"""
EXAMPLES = """\
  python select.py --dataset D --scores S.jsonl --strategy ifd --sample_rate 0.05 --output best.json
  python select.py --dataset D --embeddings S.embeddings.npy --strategy cluster --output few.json
  python select.py --dataset D --strategy random --sample_rate 0.1 --output some.json
"""


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of select.py, checked; by default from the command line."""
    description = "Choose the rows to train on, by the scores and embeddings of score.py."
    common = "dataset scores strategy sample_rate sample_number output"
    parser = OptionParser(EXAMPLES, common, description=description)
    add, switch = parser.section("data")
    add_dataset_flags(add, required=True)
    first = "choose among the first N rows of each data set, as in score.py"
    add("--max_samples", type=positive_int, help=first)
    switch("--skip_bad_rows", "never choose broken rows, instead of stopping")
    add("--scores", metavar="F.jsonl", help="written by score.py --mode ifd, all or reward")
    add("--embeddings", metavar="F.embeddings.npy", help="written by score.py --mode embed or all")
    add(
        "--target",
        type=split_names,
        metavar="F.embeddings.npy",
        help="rds: a few rows of the task, embedded with the same flags as --embeddings; "
        "several tasks are separated by commas",
    )
    add("--min_tokens", type=positive_int, help="drop rows with a shorter answer (needs --scores)")
    add("--max_tokens", type=positive_int, help="drop rows with a longer answer (needs --scores)")

    add, switch = parser.section("selection")
    add("--strategy", type=strategy_name, metavar="NAME", required=True, help="see below")
    rate = "choose this fraction of the rows that the filters leave, such as 0.05"
    add("--sample_rate", type=sample_rate, help=rate)
    add("--sample_number", type=sample_number, help="choose this many rows")
    clusters = "clusters of k-means (default: 100, but no more than the rows to choose)"
    add("--clusters", type=positive_int, help=clusters)
    add("--per_cluster", type=positive_int, default=10, help="rows to choose from each cluster")
    add("--starts", type=positive_int, default=1, help="runs of k-means, of which the best is used")
    add(
        "--band",
        type=band,
        default=[25.0, 75.0],
        metavar="LOW,HIGH",
        help="percentiles of perplexity in a cluster",
    )
    add(
        "--pool",
        type=positive_float,
        default=3.0,
        help="ifd+kcenter chooses from this many times N rows",
    )
    add(
        "--top_rate",
        type=positive_float,
        default=0.2,
        help="ifd_ppl+facility chooses from this fraction of the rows, the best",
    )
    add(
        "--balance",
        choices=["source", "cluster"],
        help="random: the same number from each source (a file of --dataset, or in one file "
        "its column `source`) or from each of the --clusters",
    )
    add("--match", metavar="F", help="match the answer lengths of this selection of select.py")
    add(
        "--dedup",
        type=positive_float,
        nargs="?",
        const=0.9,
        help="first drop each instruction that is this similar to an earlier one (0.9 without a "
        "number): the fraction of common runs of five characters",
    )
    add("--seed", type=non_negative_int, default=42, help="seed of k-means and random choice")

    add, switch = parser.section("output")
    add("--output", required=True, help="file to write: .jsonl for lines, .json for an array")
    switch("--overwrite", "replace the file, its manifest and its picture")
    switch("--plot", "draw OUTPUT.png: lengths, scores, clusters, the chosen rows (matplotlib)")
    parser.epilog = EPILOGUE
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def strategy_name(text: str) -> str:
    """An argparse type: the name of a strategy, also one of ALIASES, in any case."""
    name = ALIASES.get(text.lower(), text.lower())
    if name not in STRATEGIES:
        raise ArgumentTypeError(f"'{text}' is not one of {', '.join(STRATEGIES)}")
    return name


def band(text: str) -> list[float]:
    """`25,75` -> [25.0, 75.0]."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = -1.0
    if not 0 <= low < high <= 100:
        raise ArgumentTypeError(f"'{text}' is not two percentiles, such as 25,75")
    return [low, high]


def check_options(options: Namespace, given: set[str]) -> None:
    """UserError for flags that contradict each other. given: names of the flags that were set."""
    strategy = options.strategy
    for flag in sorted(given & ONLY_FOR.keys()):
        for_balance = flag in ("clusters", "starts")
        if strategy != ONLY_FOR[flag] and not (for_balance and options.balance == "cluster"):
            other = " or --balance cluster" if for_balance else ""
            raise UserError(f"--{flag} needs --strategy {ONLY_FOR[flag]}{other}")
    if options.balance == "cluster" and not options.embeddings:
        raise UserError("--balance cluster needs --embeddings (see --help)")
    tokens = given & {"min_tokens", "max_tokens"}
    if tokens and not options.scores:
        raise UserError(f"--{min(tokens)} needs --scores, which say how long the answers are")
    if len(tokens) == 2 and options.min_tokens > options.max_tokens:
        raise UserError(
            f"--min_tokens {options.min_tokens} is above --max_tokens {options.max_tokens}: no row "
            "has such a length"
        )
    missing = {flag for flag in STRATEGIES[strategy] if not getattr(options, flag)}
    if missing:
        flag = min(missing)
        raise UserError(f"--strategy {strategy} needs --{flag}: {MADE_BY[flag]} (see --help)")

    sizes = given & {"sample_rate", "sample_number"}
    if len(sizes) == 2:
        raise UserError("--sample_rate contradicts --sample_number. Give one of them.")
    if sizes and "per_cluster" in given:
        raise UserError(
            f"--{min(sizes)} contradicts --per_cluster: both say how many rows to choose. Give one "
            "of them."
        )
    if not sizes and strategy not in ("cluster", "random_matched"):
        raise UserError("give --sample_rate or --sample_number: how many rows to choose")

    if options.scores and not options.scores.endswith(".jsonl"):
        raise UserError(
            f"--scores {options.scores}: give the file that ends in .jsonl; {MADE_BY['scores']}"
        )
    check_json_name("--output", options.output)
    files = [("embeddings", options.embeddings)] if options.embeddings else []
    files += [("target", path) for path in options.target or []]
    for flag, path in files:
        if not path.endswith(".embeddings.npy"):
            shown = path or "has an empty name"
            raise UserError(
                f"--{flag} {shown}: give the file that ends in .embeddings.npy; {MADE_BY[flag]}"
            )
    reason = f"--strategy {strategy} draws nothing at random"
    report_without_effect(given, [({"seed"}, strategy not in RANDOM, reason)])
    for flag, low, high in (
        ("top_rate", 0, 1),
        ("pool", 1, float("inf")),
        ("dedup", 0.7, 1),
    ):
        value = getattr(options, flag)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{flag} {value:g}: must be from {low} to {high}")
    if options.plot:
        if not find_spec("matplotlib"):
            raise UserError("--plot needs matplotlib (requirements/plot.txt)")
