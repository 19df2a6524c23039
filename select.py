"""Choose the rows to train on, by the scores and embeddings that score.py has computed.

    python select.py --dataset examples/data/train.json --scores runs/scores.jsonl \
        --strategy ifd --sample_rate 0.05 --output runs/cherry.json

    python select.py --dataset examples/data/train.json --embeddings runs/scores.embeddings.npy \
        --strategy cluster --clusters 100 --per_cluster 10 --output runs/pre.json
"""

from __future__ import annotations

if __name__ == "select":
    # Python's own modules import `select` and find this file, because its folder comes first on
    # the path. Replace it by the extension module of that name before anything else is imported.
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
    from argparse import Namespace
    from functools import partial
    from pathlib import Path
    from typing import Any

    from minisft.common.script import run_script
    from minisft.data.early_checks import check_places
    from minisft.selection.select_options import parse_options

    # Before the heavy modules, so that --help and a mistyped flag or path answer at once.
    command_line = run_script(lambda: check_places(parse_options()))

    import numpy as np

    from minisft.common.model_flags import CUTOFF_LEN
    from minisft.common.outputs import check_output_file
    from minisft.common.single_writer import single_writer
    from minisft.common.torchrun import announced_rank
    from minisft.data.dataset import CHECKED_BYTES, Rows
    from minisft.selection.choose import Candidates, Choice, RowData, choose, read_row_data
    from minisft.selection.limits import length_limits
    from minisft.selection.near_duplicates import near_duplicates
    from minisft.selection.next_command import train_command
    from minisft.selection.plot import draw
    from minisft.selection.provenance import dataset_record
    from minisft.selection.rows import (
        LEFT_OUT,
        Instructions,
        answer_lengths,
        draw_readable,
        left_out_by,
        open_every_row,
        placeholder_note,
        row_sources,
    )
    from minisft.selection.score_files import ScorePaths
    from minisft.selection.write_selection import write_selection


def main(options: Namespace) -> None:
    """Choose rows with these options."""
    if announced_rank() != 0:
        return  # under torchrun, rank 0 does all the work
    with single_writer(options.output):
        select_rows(options)


def select_rows(options: Namespace) -> None:
    """The job in order, from the rows of the data set to the file of the chosen ones."""
    # Rows with several answers have rewards as their only scores.
    with_rankings = options.strategy in ("reward", "margin")
    rows, is_drawn = open_every_row(
        options.dataset,
        options.dataset_dir,
        options.skip_bad_rows,
        with_rankings,
        options.max_samples,
        replace_flag=None,  # only the chosen rows matter
    )
    output = check_output(options, rows)
    dataset = dataset_record(rows, is_drawn, options.max_samples)
    draws_unread = is_plain_draw(options) and rows.sizes().sum() > CHECKED_BYTES
    if draws_unread:
        lengths, is_broken = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    else:
        lengths, is_broken = answer_lengths(rows, is_drawn)
    data = read_row_data(options, len(rows), dataset, lengths)
    if options.balance == "source":
        data.sources = row_sources(rows)

    candidates = usable_rows(options, data.lengths, is_broken, is_drawn)
    usable = candidates.rows
    if options.dedup:
        is_duplicate = np.zeros(len(rows), bool)
        is_duplicate[usable] = near_duplicates(Instructions(rows, usable), options.dedup)
        candidates.drop(is_duplicate, "near-identical instruction")
    number = options.sample_number
    if options.sample_rate:
        number = max(1, round(len(candidates.rows) * options.sample_rate))
    if draws_unread:
        candidates.check_enough(number)
        generator = np.random.default_rng(options.seed)
        chosen, broken, data.lengths = draw_readable(rows, usable, number, generator)
        is_broken[broken] = True
        candidates.drop(is_broken, "broken")
        choice = Choice(chosen)
    else:
        choice = choose(options, data, candidates, number)
    notes = choice.notes
    if options.scores:
        num_tokens = np.fmax(data.scores["num_tokens"], data.lengths)
        notes = notes + length_limits(num_tokens, choice.rows, data.cutoff_len, CUTOFF_LEN)

    if note := placeholder_note(rows, choice.rows):
        notes = [*notes, note]

    mean_all = None if draws_unread else float(data.lengths[usable].mean())
    manifest = manifest_of(options, dataset, data, candidates, choice, notes, mean_all)
    write_selection(rows, choice.rows, manifest, output)
    print_summary(manifest)
    if any(file.description for file in rows.files):
        print("The columns keep their names. Give the file an entry in dataset_info.json.")
    else:
        print(f"Train on them: {train_command(options)}")
    if options.plot:
        print(f"drew {draw(data, usable, choice, options.strategy, output)}")


def usable_rows(
    options: Namespace, lengths: np.ndarray, is_broken: np.ndarray, is_drawn: np.ndarray
) -> Candidates:
    """The rows that may be chosen. lengths, is_broken and is_drawn: (rows,)."""
    candidates = Candidates(len(lengths))
    candidates.drop(is_broken, "broken")
    if not is_drawn.all():
        left_out = left_out_by(options.dataset, options.dataset_dir, options.max_samples)
        candidates.drop(~is_drawn, left_out)
    if options.min_tokens:
        candidates.drop(lengths < options.min_tokens, f"under {options.min_tokens} tokens")
    if options.max_tokens:
        candidates.drop(lengths > options.max_tokens, f"over {options.max_tokens} tokens")
    return candidates


def manifest_of(
    options: Namespace,
    dataset: list[dict[str, Any]],
    data: RowData,
    candidates: Candidates,
    choice: Choice,
    notes: list[str],
    mean_all: float | None,
) -> dict[str, Any]:
    """The record of a selection. mean_all: the mean answer length, None if not all were read."""
    return {
        "strategy": options.strategy,
        "seed": options.seed,
        "options": vars(options),
        "dataset": dataset,
        "inputs": data.hashes,
        "rows": len(data.lengths),
        "dropped": candidates.dropped,
        "not_chosen": len(candidates.rows) - len(choice.rows),
        "num_chosen": len(choice.rows),
        "answer_length": {
            "unit": data.length_unit,
            "mean_chosen": float(data.lengths[choice.rows].mean()),
            "mean_all": mean_all,
        },
        **choice.details,
        "notes": notes,
        "chosen": choice.rows.tolist(),
    }


def is_plain_draw(options: Namespace) -> bool:
    """True if no row has to be read before it is drawn."""
    reads = (options.scores, options.embeddings, options.balance, options.min_tokens)
    return options.strategy == "random" and not any(
        (*reads, options.max_tokens, options.dedup, options.plot)
    )


def check_output(options: Namespace, rows: Rows) -> Path:
    """The file to write. UserError if it, its manifest or its picture is an input or exists."""
    inputs = [file.records.path for file in rows.files]
    for path in [options.scores, options.embeddings, *(options.target or [])]:
        inputs += ScorePaths(path).all() if path else []
    if options.match:
        inputs += [Path(options.match), Path(f"{options.match}.manifest")]
    output = Path(options.output)
    written = [output, Path(f"{output}.manifest")]
    if options.plot:
        written.append(output.with_suffix(".png"))
    for path in written:
        check_output_file("--output", path, inputs, options.overwrite)
    return output


def print_summary(manifest: dict[str, Any]) -> None:
    """Print how many rows were chosen, how many were dropped, and what limited the choice."""
    lengths, strategy = manifest["answer_length"], manifest["strategy"]
    strategy = "cluster (k-means)" if strategy == "cluster" else strategy
    mean_all = lengths["mean_all"]  # None if the other rows were not read
    all_rows = "" if mean_all is None else f" (all rows: {mean_all:,.1f})"
    left_out = {
        reason: count
        for reason, count in manifest["dropped"].items()
        if reason.startswith(LEFT_OUT)
    }
    num_rows = manifest["rows"] - sum(left_out.values())
    more = "".join(f" ({count:,} more are {reason})" for reason, count in left_out.items())
    print(
        f"{manifest['options']['output']}: {manifest['num_chosen']:,} of {num_rows:,} rows{more} "
        f"by {strategy}; answers of {lengths['mean_chosen']:,.1f} {lengths['unit']} on "
        f"average{all_rows}"
    )
    for reason, count in manifest["dropped"].items():
        if reason not in left_out:
            print(f"dropped {count:,}: {reason}")
    for note in manifest["notes"]:
        print(note)


def run() -> None:
    """Choose rows with the options of the command line."""
    run_script(partial(main, command_line))


if __name__ == "__main__":
    run()
