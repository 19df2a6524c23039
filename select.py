"""Choose the rows worth training on, by the scores and embeddings that score.py has computed.

    python select.py --dataset examples/data/train.json --scores runs/scores.jsonl \
        --strategy ifd --sample_rate 0.05 --output runs/cherry.json

    python select.py --dataset examples/data/train.json --embeddings runs/scores.embeddings.npy \
        --strategy cluster --clusters 100 --per_cluster 10 --output runs/pre.json

This file has the name of a module of the standard library, which `selectors`, `subprocess` and so
torch import. Imported as that, it hands over to the real one; nothing may be imported before.
"""

if __name__ == "select":
    import sys
    from importlib.machinery import ExtensionFileLoader, PathFinder
    from importlib.util import module_from_spec

    for folder in sys.path:
        found = PathFinder.find_spec("select", [folder])
        if found and isinstance(found.loader, ExtensionFileLoader):
            break
    else:
        raise ImportError("the standard library's module 'select' is not to be found")
    # What stands in sys.modules is what the import gives, now and from now on.
    sys.modules["select"] = module_from_spec(found)
    found.loader.exec_module(sys.modules["select"])

STRATEGIES = {  # and what each needs
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
# Which of the scores a strategy goes by.
SCORE_OF = {
    "ifd": "ifd",
    "ifd_ppl": "ifd_ppl",
    "ppl": "loss_conditioned",
    "reward": "reward",
    "margin": "margin",
    "ifd+kcenter": "ifd",
}
EPILOGUE = """\
Strategies:
  ifd             the highest ratio of losses below 1 (above, the instruction does not help)
  ifd_ppl         the highest ratio of perplexities below 1
  ppl             the middle band: around the median perplexity of the answer behind its prompt
  reward          the highest reward of a reward model (score.py --mode reward)
  margin          of preferences those that the reward model is surest of: the highest reward of the
                  chosen answer less that of the rejected
  cluster         k-means of the embeddings, then --per_cluster rows of each cluster, spread over
                  --band percentiles of the instruction's perplexity: the pre-experience set
  kcenter         each row as far as can be from those before it: diversity, outliers included
  ifd+kcenter     of the --pool x N rows with the highest ifd below 1, N by kcenter
  longest         the longest answers: in tokens with --scores, else in characters
  random          the baseline
  random_matched  random rows with the lengths of the selection --match: the control for the
                  question whether a strategy only finds long answers
The output has the columns and the order of --dataset. Beside it stands OUTPUT.manifest: strategy,
seed, hashes of the inputs, the numbers of the chosen rows, what was dropped and why.
"""


def parse_options(arguments=None):
    """The options of select.py, checked; from the command line if no words are given."""
    from minisft.common.command_line import (
        OptionParser,
        non_negative_int,
        positive_float,
        positive_int,
    )

    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = parser.section("data")
    add("--dataset", required=True, help="files, folders and names in dataset_info.json")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    switch("--skip_bad_rows", "never choose broken rows, instead of stopping")
    add("--scores", metavar="F.jsonl", help="written by score.py, but for --mode embed")
    add("--embeddings", metavar="F.embeddings.npy", help="by score.py --mode embed or all")

    add, switch = parser.section("what is chosen")
    add("--strategy", choices=list(STRATEGIES), required=True, help="see below")
    add("--sample_rate", type=positive_float, help="this share of all rows, such as 0.05")
    add("--sample_number", type=positive_int, help="this many rows")
    add("--clusters", type=positive_int, default=100, help="of k-means")
    add("--per_cluster", type=positive_int, default=10, help="rows of each cluster")
    add(
        "--starts",
        type=positive_int,
        default=1,
        help="k-means is begun so often; the best is taken",
    )
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
        help="ifd+kcenter chooses among so many times N rows",
    )
    add("--match", metavar="F", help="a selection, written by select.py, whose lengths to match")
    add(
        "--dedup",
        type=positive_float,
        nargs="?",
        const=0.9,
        help="first drop instructions that share this much (0.9, if no number is given) of their "
        "runs of five characters with an earlier one",
    )
    add("--seed", type=non_negative_int, default=42, help="of k-means and of random choice")

    add, switch = parser.section("output")
    add("--output", required=True, help="file to write: .jsonl for lines, .json for an array")
    switch("--overwrite", "replace what is there of the file, its manifest and its picture")
    switch("--plot", "draw OUTPUT.png: the scores, the clusters and what was chosen (matplotlib)")
    parser.epilog = EPILOGUE
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def band(text):
    """`25,75` -> [25.0, 75.0]."""
    low, high = map(float, text.split(","))
    if not 0 <= low < high <= 100:
        raise ValueError(text)
    return [low, high]


def check_options(options, given):
    """Refuse what cannot work before anything is read. given: the flags that were set."""
    from minisft.common.errors import UserError

    strategy = options.strategy
    clustered, fixed = strategy == "cluster", strategy in ("cluster", "random_matched")
    by = "--clusters and --per_cluster" if clustered else "--match"
    for names, wrong, why in (
        ({"clusters", "per_cluster", "starts", "band"}, not clustered, "needs --strategy cluster"),
        ({"pool"}, strategy != "ifd+kcenter", "needs --strategy ifd+kcenter"),
        ({"match"}, strategy != "random_matched", "needs --strategy random_matched"),
        (
            {"sample_rate", "sample_number"},
            fixed,
            f"contradicts --strategy {strategy}, for which {by} says how many rows are chosen",
        ),
        ({"sample_rate"}, options.sample_number, "contradicts --sample_number: give one of them"),
    ):
        if wrong and names & given:
            raise UserError(f"--{min(names & given)} {why}")
    if missing := set(STRATEGIES[strategy]) - given:
        raise UserError(f"--strategy {strategy} needs --{min(missing)} (see --help)")
    if options.embeddings and not options.embeddings.endswith(".embeddings.npy"):
        raise UserError(
            f"--embeddings {options.embeddings}: give the file that ends in .embeddings.npy"
        )
    if not fixed and not (options.sample_rate or options.sample_number):
        raise UserError("give --sample_rate or --sample_number: how many rows to choose")
    for flag, low, high in (("sample_rate", 0, 1), ("pool", 1, float("inf")), ("dedup", 0.7, 1)):
        value = getattr(options, flag)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{flag} {value}: must be from {low} to {high}")
    if options.plot:
        if not (options.scores or options.embeddings):
            raise UserError("--plot draws --scores and --embeddings: give one of them")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UserError("--plot needs matplotlib (requirements-extras.txt)") from error


def main():
    import os

    options = parse_options()
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun one process does it all

    from minisft.selection import strategies
    from minisft.selection.plot import draw
    from minisft.selection.score_files import open_every_record, record_of_data

    skipped = [] if options.skip_bad_rows else None
    # Rows with several answers have no other scores than rewards.
    ranking = None if options.strategy in ("reward", "margin") else False
    rows, drawn = open_every_record(options.dataset, options.dataset_dir, skipped, ranking=ranking)
    output = check_output(options, rows)
    dataset = record_of_data(rows, drawn)
    inputs = read_inputs(options, len(rows), dataset)
    candidates = strategies.Candidates(len(rows))
    inputs.lengths = strategies.lengths_of(rows, candidates)
    candidates.drop(~drawn, "left out by num_samples")
    inputs.rows = candidates.rows
    if options.dedup:
        strategies.drop_duplicates(rows, candidates, options.dedup)
    if inputs.scores:  # better than characters
        inputs.lengths, inputs.unit = inputs.scores["num_answer_tokens"], "tokens"

    number = options.sample_number or round(len(inputs.rows) * (options.sample_rate or 0)) or 1
    chosen, clusters = choose(options, inputs, candidates, number)
    manifest = {
        "strategy": options.strategy,
        "seed": options.seed,
        "options": vars(options),
        "dataset": dataset,
        "inputs": inputs.hashes,
        "rows": len(rows),
        "dropped": candidates.dropped,
        "not_chosen": len(candidates.rows) - len(chosen),
        "num_chosen": len(chosen),
        "answer_length": {
            "unit": inputs.unit,
            "mean_chosen": float(inputs.lengths[chosen].mean()),
            "mean_all": float(inputs.lengths[inputs.rows].mean()),
        },
        **clusters,
        "chosen": chosen.tolist(),
    }
    strategies.write(rows.files, chosen, manifest, output)
    tell(manifest, rows.files)
    if options.plot:
        print(f"drew {draw(inputs, chosen, options.strategy, output)}")


def tell(manifest, files):
    """Print what was chosen and what was not."""
    lengths, output = manifest["answer_length"], manifest["options"]["output"]
    print(
        f"{output}: {manifest['num_chosen']:,} of {manifest['rows']:,} rows "
        f"by {manifest['strategy']}; answers of {lengths['mean_chosen']:,.1f} {lengths['unit']} "
        f"on average (all rows: {lengths['mean_all']:,.1f})"
    )
    for why, positive_int in manifest["dropped"].items():
        print(f"dropped {positive_int:,}: {why}")
    if any(file.description for file in files):
        print("its columns are named as before: give it an entry of its own in dataset_info.json")


def check_output(options, rows):
    """The Path to write. UserError where a file to write is read from too, or is there already."""
    from pathlib import Path

    from minisft.common.errors import UserError
    from minisft.common.outputs import check_output_file
    from minisft.selection.score_files import perplexity_path

    path = Path(options.output)
    written = [path, Path(f"{path}.manifest"), *([path.with_suffix(".png")] * options.plot)]
    if options.plot and path.suffix == ".png":
        raise UserError(f"--output {path}: is where --plot draws; give the rows another name")
    read = [
        *(file.records.path for file in rows.files),
        options.scores,
        options.embeddings,
        options.embeddings and perplexity_path(options.embeddings),
        options.match,
        options.match and options.match + ".manifest",
    ]
    for one in written:
        check_output_file("--output", one, read)
        if one.exists() and not options.overwrite:
            raise UserError(
                f"--output {path}: {one} is there already; choose another, or give --overwrite"
            )
    return path


def read_inputs(options, num_rows, dataset):
    """What the flags name, checked to belong to the data set, as selection.Inputs."""
    from pathlib import Path

    from minisft.common.errors import UserError
    from minisft.selection import score_files
    from minisft.selection.strategies import Inputs

    inputs = Inputs()
    if options.scores:
        score_files.check_belongs(options.scores, dataset)
        inputs.scores = score_files.read_scores(
            options.scores, num_rows, SCORE_OF.get(options.strategy)
        )
    if options.embeddings:
        score_files.check_belongs(options.embeddings, dataset)
        inputs.embeddings, inputs.perplexity = score_files.read_embeddings(
            options.embeddings, num_rows
        )
    if options.match:
        manifest = score_files.read_record(Path(options.match + ".manifest"))
        if manifest.get("dataset") != dataset:
            raise UserError(f"--match {options.match}: was chosen from another file than --dataset")
        inputs.reference = checked_numbers(manifest.get("chosen"), num_rows, options.match)
    inputs.hashes = {
        flag: score_files.sha256(path)
        for flag in ("scores", "embeddings", "match")
        if (path := getattr(options, flag))
    }
    if options.embeddings:
        inputs.hashes["perplexity"] = score_files.sha256(
            score_files.perplexity_path(options.embeddings)
        )
    return inputs


def checked_numbers(numbers, num_rows, path):
    """The row numbers in a manifest; UserError where they are none."""
    from minisft.common.errors import UserError
    from minisft.common.json_files import is_integer

    if not (
        isinstance(numbers, list)
        and numbers
        and all(is_integer(number, most=num_rows - 1) for number in numbers)
    ):
        raise UserError(
            f"--match {path}: {path}.manifest does not say which rows were chosen; is "
            "it one that select.py wrote?"
        )
    return numbers


def choose(options, inputs, candidates, number):
    """(numbers of the chosen rows in the order of the file, what the manifest says of clusters)."""
    import numpy as np

    from minisft.common.errors import UserError
    from minisft.selection import strategies

    generator, about = np.random.default_rng(options.seed), {}
    strategy, score_files = options.strategy, inputs.scores
    drop_unfit(strategy, inputs, candidates)
    rows = candidates.rows
    if strategy in ("ifd", "ifd_ppl", "reward", "margin"):
        chosen = strategies.highest(score_files[strategy], rows, number)
    elif strategy == "ppl":
        chosen = strategies.middle(score_files["loss_conditioned"], rows, number)
    elif strategy == "cluster":
        chosen, about = choose_by_cluster(options, inputs, rows)
    elif strategy == "kcenter":
        chosen = strategies.k_center(inputs.embeddings, rows, number)
    elif strategy == "ifd+kcenter":
        strategies.enough(rows, number)
        pool = strategies.highest(
            score_files["ifd"], rows, min(len(rows), round(options.pool * number))
        )
        chosen = strategies.k_center(inputs.embeddings, np.sort(pool), number)
    elif strategy == "longest":
        chosen = strategies.highest(inputs.lengths, rows, number)
    elif strategy == "random":
        chosen = strategies.at_random(rows, number, generator)
    else:
        reference = np.array(inputs.reference)
        chosen = strategies.matched(inputs.lengths, rows, reference, generator)
        about = {"also_in_match": len(np.intersect1d(chosen, reference))}
    if not len(chosen):
        raise UserError("no row is chosen: there is none in the --band of any cluster; widen it")
    return np.sort(chosen), about


def drop_unfit(strategy, inputs, candidates):
    """Drop the rows that lack what the strategy goes by."""
    import numpy as np

    if "scores" in STRATEGIES[strategy]:
        candidates.drop_unscored(inputs.scores["reason"])
    if strategy in ("ifd", "ifd_ppl", "ifd+kcenter"):
        name = SCORE_OF[strategy]
        candidates.drop(~(inputs.scores[name] < 1), f"{name} of 1 or more")
    if strategy == "cluster":
        candidates.drop(np.isinf(inputs.perplexity), "no perplexity")


def choose_by_cluster(options, inputs, rows):
    """(numbers of the chosen rows, what the manifest says of the clusters)."""
    import numpy as np

    from minisft.selection import strategies
    from minisft.selection.kmeans import kmeans

    points = strategies.Chosen(inputs.embeddings, rows)
    found = kmeans(points, options.clusters, options.seed, options.starts)
    inputs.clustered = rows, found.assignment
    sizes = np.bincount(found.assignment, minlength=options.clusters)
    chosen = strategies.from_clusters(
        found.assignment, inputs.perplexity, rows, options.per_cluster, options.band
    )
    return chosen, {
        "clusters": {"inertia": found.inertia, "steps": found.num_steps, "sizes": sizes.tolist()}
    }


if __name__ == "__main__":
    from minisft.common.script import run_script

    run_script(main)
