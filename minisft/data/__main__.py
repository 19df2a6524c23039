"""Convert instruction data from any supported format to ShareGPT, or look at rows.

python -m minisft.data convert firefly.jsonl sharegpt.json
python -m minisft.data show rows.json --model_name_or_path M --template alpaca
"""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.common.command_line import OptionParser, positive_int
from minisft.common.errors import UserError
from minisft.common.json_files import write_rows
from minisft.common.model_flags import add_replace_flag
from minisft.common.outputs import check_json_name, check_not_an_input, check_output_file
from minisft.common.script import run_script
from minisft.common.single_writer import single_writer
from minisft.common.words import counted
from minisft.data.dataset import Rows, open_rows, read, unused_values
from minisft.data.dataset_info import FILE_NAME
from minisft.data.formats import to_sharegpt
from minisft.data.row_values import BadRow


def convert(
    dataset: str,
    output_path: str | Path,
    overwrite: bool = False,
    skipped: list[str] | None = None,
    **options: Any,
) -> int:
    """Write rows of any format as ShareGPT; returns their number.

    The output is a JSON array if its name ends in .json, and JSON lines with .jsonl. skipped: a
    list that collects messages about broken rows; without it the first one raises UserError.
    """
    check_json_name("output", output_path)
    output_path = check_output_file("output", output_path, overwrite=overwrite)
    rows = open_rows(dataset, skipped=skipped, **options)
    check_not_an_input("output", output_path, [file.records.path for file in rows.files])
    if note := unused_values(rows.files):
        print(note)
    is_array = output_path.suffix != ".jsonl"
    with single_writer(output_path):
        return write_rows(_sharegpt_lines(rows, skipped), output_path, is_array)


def _sharegpt_lines(rows: Rows, skipped: list[str] | None) -> Iterator[str]:
    """Yield the JSON of each row. A row that ShareGPT cannot express counts as broken."""
    for number in range(len(rows)):
        for row in read(rows, skipped, [number]):
            try:
                yield json.dumps(to_sharegpt(row.messages, row.tools), ensure_ascii=False)
            except BadRow as error:
                message = f"{row.source}, row {row.index + 1}: {error}"
                if skipped is None:
                    raise UserError(f"{message} (--skip_bad_rows leaves such rows out)") from error
                skipped.append(message)


def show(words: list[str]) -> None:
    """Print rows as a model reads them, which depends on the options of the training.

    So train.py does it: `show rows.json --model_name_or_path M` is short for
    `train.py --dry_run --show_samples 3 --dataset rows.json --model_name_or_path M`.
    """
    script = Path(__file__).resolve().parents[2] / "train.py"
    if not script.exists():
        raise UserError(
            f"show runs train.py, which is not in {script.parent}. Start it in a clone."
        )
    data = ["--dataset"] if words and not words[0].startswith("-") else []
    sys.argv = [str(script), "--dry_run", "--show_samples", "3", *data, *words]
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    """Run the command `convert` or `show`."""
    if sys.argv[1:2] == ["show"] and not {"-h", "--help"} & set(sys.argv):
        return show(sys.argv[2:])
    parser = OptionParser(
        prog="python -m minisft.data",
        usage="%(prog)s convert INPUT OUTPUT [--flag value ...]\n"
        "       %(prog)s show INPUT --model_name_or_path M [--flag of train.py ...]",
        description="convert: write instruction data in the ShareGPT format\n"
        "show: print rows as a model reads them, their lengths and the plan of a run; the same as\n"
        "      python train.py --model_name_or_path M --dataset INPUT --dry_run --show_samples 3",
    )
    parser.add_argument("command", choices=["convert", "show"], help="what to do")
    parser.add_argument("input", help="what --dataset of train.py names: file, folder, data set")
    parser.add_argument("output", help="file to write: .json for an array, .jsonl for lines")
    add, switch = parser.section("data")
    add("--dataset_dir", default="data", help=f"folder of {FILE_NAME}")
    add("--max_samples", type=positive_int, help="only the first N rows of each data set")
    switch("--skip_bad_rows", "leave broken rows out and count them, instead of stopping")
    add_replace_flag(add)
    switch("--overwrite", "replace the output file if there is one")
    options = parser.parse_options()
    skipped = [] if options.skip_bad_rows else None
    count = convert(
        options.input,
        options.output,
        options.overwrite,
        skipped,
        dataset_dir=options.dataset_dir,
        max_samples=options.max_samples,
        replace=options.replace,
    )
    left_out = (
        f"; {counted(len(skipped), 'broken row')} left out, the first: {skipped[0]}"
        if skipped
        else ""
    )
    print(f"{options.output}: {counted(count, 'row')}{left_out}")


if __name__ == "__main__":
    run_script(main)
