"""Choose the rows to train on, by the scores and embeddings that score.py has computed.

    python select.py --dataset examples/data/train.json --scores runs/scores.jsonl \
        --strategy ifd --sample_rate 0.05 --output runs/cherry.json

    python select.py --dataset examples/data/train.json --embeddings runs/scores.embeddings.npy \
        --strategy cluster --clusters 100 --per_cluster 10 --output runs/pre.json
"""

from __future__ import annotations

if __name__ == "select":
    # Python's own modules import `select` and find this file: its folder comes first on the path.
    # Put the extension module of that name in its place, before anything else is imported.
    import sys
    from importlib import machinery, util

    for folder in sys.path:
        extension = machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES
        spec = machinery.FileFinder(folder, extension).find_spec("select")
        if spec and spec.loader:
            sys.modules["select"] = util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["select"])
            break
else:
    import os
    from argparse import ArgumentTypeError, Namespace
    from collections.abc import Sequence
    from importlib.util import find_spec
    from pathlib import Path
    from typing import Any

    from minisft.common.command_line import (
        OptionParser,
        non_negative_int,
        positive_float,
        positive_int,
    )
    from minisft.common.errors import UserError
    from minisft.common.outputs import check_output_file

# What each strategy needs.
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
    """The options of select.py, checked. arguments: by default those of the command line."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = parser.section("data")
    add("--dataset", required=True, help="files, folders, names in dataset_info.json; by commas")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
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
    """UserError for options that contradict each other. given: names of the flags that were set."""
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
            raise UserError("--plot needs matplotlib (requirements-extras.txt)")
        if options.output.endswith(".png"):
            raise UserError(
                f"--output {options.output}: --plot draws there. Give the rows another name."
            )


def main() -> None:
    options = parse_options()
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun, rank 0 does all the work

    # Imported after the options, so that --help and a mistyped flag answer at once.
    import numpy as np

    from minisft.selection.choose import Candidates, choose, read_row_data
    from minisft.selection.near_duplicates import near_duplicates
    from minisft.selection.plot import draw
    from minisft.selection.provenance import dataset_record
    from minisft.selection.rows import Instructions, answer_lengths, open_every_row
    from minisft.selection.score_files import ScorePaths
    from minisft.selection.write_selection import write_selection

    # Rows with several answers have rewards as their only scores.
    with_rankings = options.strategy in ("reward", "margin")
    rows, is_drawn = open_every_row(
        options.dataset, options.dataset_dir, options.skip_bad_rows, with_rankings
    )
    inputs = [file.records.path for file in rows.files]
    inputs += map(Path, filter(None, [options.scores, options.embeddings, options.match]))
    if options.embeddings:
        inputs.append(ScorePaths(options.embeddings).perplexity)
    if options.match:
        inputs.append(Path(f"{options.match}.manifest"))
    output = check_output(options, inputs)
    dataset = dataset_record(rows, is_drawn)
    lengths, is_broken = answer_lengths(rows)
    data = read_row_data(options, len(rows), dataset, lengths)

    candidates = Candidates(len(rows))
    candidates.drop(is_broken, "broken")
    candidates.drop(~is_drawn, "left out by num_samples")
    usable = candidates.rows
    if options.dedup:
        is_duplicate = np.zeros(len(rows), bool)
        is_duplicate[usable] = near_duplicates(Instructions(rows, usable), options.dedup)
        candidates.drop(is_duplicate, "near-identical instruction")
    number = options.sample_number or round(len(usable) * (options.sample_rate or 0)) or 1
    choice = choose(options, data, candidates, number)
    manifest = {
        "strategy": options.strategy,
        "seed": options.seed,
        "options": vars(options),
        "dataset": dataset,
        "inputs": data.hashes,
        "rows": len(rows),
        "dropped": candidates.dropped,
        "not_chosen": len(candidates.rows) - len(choice.rows),
        "num_chosen": len(choice.rows),
        "answer_length": {
            "unit": data.length_unit,
            "mean_chosen": float(data.lengths[choice.rows].mean()),
            "mean_all": float(data.lengths[usable].mean()),
        },
        **choice.details,
        "chosen": choice.rows.tolist(),
    }
    write_selection(rows, choice.rows, manifest, output)
    print_summary(manifest)
    if any(file.description for file in rows.files):
        print("The columns keep their names. Give the file an entry in dataset_info.json.")
    if options.plot:
        print(f"drew {draw(data, usable, choice, options.strategy, output)}")


def check_output(options: Namespace, inputs: Sequence[Path]) -> Path:
    """The file to write. UserError if it, its manifest or its picture is an input or exists."""
    output = Path(options.output)
    written = [output, Path(f"{output}.manifest")]
    if options.plot:
        written.append(output.with_suffix(".png"))
    for path in written:
        check_output_file("--output", path, inputs, options.overwrite)
    return output


def print_summary(manifest: dict[str, Any]) -> None:
    """Print how many rows were chosen and how many dropped."""
    lengths = manifest["answer_length"]
    print(
        f"{manifest['options']['output']}: {manifest['num_chosen']:,} of {manifest['rows']:,} rows "
        f"by {manifest['strategy']}; answers of {lengths['mean_chosen']:,.1f} {lengths['unit']} on "
        f"average (all rows: {lengths['mean_all']:,.1f})"
    )
    for reason, count in manifest["dropped"].items():
        print(f"dropped {count:,}: {reason}")


if __name__ == "__main__":
    from minisft.common.script import run_script

    run_script(main)
