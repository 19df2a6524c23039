"""The flags of `select.py`, and checks of their combinations.

options = parse_options(["--dataset", "examples/data/train.json", "--scores", "runs/scores.jsonl",
                         "--strategy", "ifd", "--sample_rate", "0.05", "--output", "few.json"])
options.seed                                 # 42, the default
"""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from importlib.util import find_spec

from minisft.common.command_line import OptionParser, non_negative_int, positive_float, positive_int
from minisft.common.errors import UserError

# The inputs that each strategy needs.
STRATEGIES = {
    "ifd": ("scores",),
    "ifd_ppl": ("scores",),
    "ppl": ("scores",),
    "reward": ("scores",),
    "margin": ("scores",),
    "longest": (),
    "random": (),
    "random_matched": ("match",),
    "cluster": ("embeddings",),
    "kcenter": ("embeddings",),
    "ifd+kcenter": ("scores", "embeddings"),
}
EPILOGUE = """\
Strategies:
  ifd             the highest ratio of losses below 1 (above 1, the instruction does not help)
  ifd_ppl         the highest ratio of perplexities below 1
  ppl             rows around the median perplexity of the answer given its prompt
  reward          the highest reward of a reward model (score.py --mode reward)
  margin          the preferences that the reward model is surest of: the highest reward of the
                  chosen answer minus reward of the rejected
  cluster         k-means of the embeddings, then --per_cluster rows of each cluster, spread over
                  --band percentiles of the prompt's perplexity: the pre-experience set
  kcenter         each row as far as possible from the rows before it: diversity, with outliers
  ifd+kcenter     N rows by kcenter, of the --pool x N rows with the highest ifd below 1
  longest         the longest answers: in tokens with --scores, else in characters
  random          the baseline
  random_matched  random rows with answers as long as those of the selection --match: a control,
                  to see whether a strategy does more than find long answers
The output has the columns and the order of --dataset. OUTPUT.manifest records the strategy, the
seed, the hashes of the inputs, the numbers of the chosen rows, and how many were dropped and why.
"""


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of select.py, checked; by default from the command line."""
    description = "Choose the rows to train on, by the scores and embeddings of score.py."
    parser = OptionParser(description=description)
    add, switch = parser.section("data")
    add("--dataset", required=True, help="files, folders, names in dataset_info.json; by commas")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    first = "choose among the first N rows of each data set, as in score.py"
    add("--max_samples", type=positive_int, help=first)
    switch("--skip_bad_rows", "never choose broken rows, instead of stopping")
    add("--scores", metavar="F.jsonl", help="written by score.py --mode ifd, all or reward")
    add("--embeddings", metavar="F.embeddings.npy", help="written by score.py --mode embed or all")

    add, switch = parser.section("selection")
    add("--strategy", choices=list(STRATEGIES), required=True, help="see below")
    add("--sample_rate", type=positive_float, help="choose this fraction of the rows, such as 0.05")
    add("--sample_number", type=positive_int, help="choose this many rows")
    add("--clusters", type=positive_int, default=100, help="clusters of k-means")
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
    switch("--plot", "draw OUTPUT.png: the scores, the clusters, the chosen rows (matplotlib)")
    parser.epilog = EPILOGUE
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


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
    needs_cluster = given & {"clusters", "per_cluster", "starts", "band"}
    if needs_cluster and strategy != "cluster":
        raise UserError(f"--{min(needs_cluster)} needs --strategy cluster")
    if "pool" in given and strategy != "ifd+kcenter":
        raise UserError("--pool needs --strategy ifd+kcenter")
    if "match" in given and strategy != "random_matched":
        raise UserError("--match needs --strategy random_matched")
    missing = set(STRATEGIES[strategy]) - given
    if missing:
        raise UserError(f"--strategy {strategy} needs --{min(missing)} (see --help)")

    sizes = given & {"sample_rate", "sample_number"}
    if len(sizes) == 2:
        raise UserError("--sample_rate contradicts --sample_number. Give one of them.")
    size_flags = {"cluster": "--clusters and --per_cluster", "random_matched": "--match"}
    if strategy in size_flags:
        if sizes:
            raise UserError(
                f"--{min(sizes)} contradicts --strategy {strategy}: {size_flags[strategy]} "
                "already says how many rows to choose"
            )
    elif not sizes:
        raise UserError("give --sample_rate or --sample_number: how many rows to choose")

    if options.embeddings and not options.embeddings.endswith(".embeddings.npy"):
        raise UserError(
            f"--embeddings {options.embeddings}: give the file that ends in .embeddings.npy"
        )
    for flag, low, high in (("sample_rate", 0, 1), ("pool", 1, float("inf")), ("dedup", 0.7, 1)):
        value = getattr(options, flag)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{flag} {value}: must be from {low} to {high}")
    if options.plot:
        if not options.scores and not options.embeddings:
            raise UserError("--plot draws --scores and --embeddings. Give one of them.")
        if not find_spec("matplotlib"):
            raise UserError("--plot needs matplotlib (requirements/plot.txt)")
        if options.output.endswith(".png"):
            raise UserError(
                f"--output {options.output}: --plot draws there. Give the rows another name."
            )
