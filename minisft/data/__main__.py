"""Convert instruction data of any supported format to ShareGPT.

    python -m minisft.data convert firefly.jsonl sharegpt.json
"""

import json
import os
from pathlib import Path

from minisft.common.command_line import OptionParser, run_script
from minisft.common.errors import UserError
from minisft.data.dataset import open_rows, read
from minisft.data.dataset_info import FILE_NAME
from minisft.data.formats import BadRow, sharegpt


def convert(dataset, output_path, overwrite=False, skipped=None, **options):
    """Write rows of any format as sharegpt JSON, or JSON lines to a .jsonl -> number of rows.

    The file appears only when it is complete. Raises UserError for a broken row or a full disk.
    """
    output_path = Path(output_path)
    if output_path.exists() and not output_path.is_file():
        raise UserError(f"{output_path}: is a folder or a device; give the name of a file")
    if output_path.exists() and not overwrite:
        raise UserError(f"{output_path}: is there already; give --overwrite or another name")
    rows = open_rows(dataset, skipped=skipped, **options)
    if any(file.records.path.resolve() == output_path.resolve() for file in rows.files):
        raise UserError(f"{output_path}: is also read from; choose another")
    begin, between, end = ("", "\n", "\n") if output_path.suffix == ".jsonl" else (
        "[\n", ",\n", "\n]\n")
    partial_path, count = output_path.with_name(output_path.name + ".partial"), 0
    try:
        with open(partial_path, "w", encoding="utf-8") as file:
            for line in _sharegpt_lines(rows, skipped):
                file.write((between if count else begin) + line)
                count += 1
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, output_path)
    except OSError as error:
        raise UserError(f"{output_path}: {error.strerror}") from error
    finally:
        partial_path.unlink(missing_ok=True)
    return count


def _sharegpt_lines(rows, skipped):
    """Yield the JSON of each row; one that sharegpt cannot say is a broken one."""
    for number in range(len(rows)):
        for row in read(rows, skipped, [number]):
            try:
                yield json.dumps(sharegpt(row.messages, row.tools), ensure_ascii=False)
            except BadRow as error:
                message = f"{row.source}, row {row.index + 1}: {error}"
                if skipped is None:
                    raise UserError(f"{message} (--skip_bad_rows leaves such rows out)") from error
                skipped.append(message)


def main():
    """The command `convert`."""
    parser = OptionParser(prog="python -m minisft.data",
                          description="convert instruction data to the sharegpt format")
    parser.add_argument("command", choices=["convert"], help="what to do")
    parser.add_argument("input", help="what --dataset of train.py names: file, folder, data set")
    parser.add_argument("output", help="file to write: .json for an array, .jsonl for lines")
    add, switch = parser.section("data")
    add("--dataset_dir", default="data", help=f"folder of {FILE_NAME}")
    switch("--skip_bad_rows", "leave broken rows out and count them, instead of stopping")
    switch("--overwrite", "replace the output file if there is one")
    options = parser.parse_options()
    skipped = [] if options.skip_bad_rows else None
    count = convert(options.input, options.output, options.overwrite, skipped,
                    dataset_dir=options.dataset_dir)
    left_out = f"; {len(skipped)} broken rows left out, the first: {skipped[0]}" if skipped else ""
    print(f"{options.output}: {count} rows{left_out}")


if __name__ == "__main__":
    run_script(main)
