"""Write the results of bench/gpu.sh or bench/cpu.py into docs/benchmarks.md: a table a machine.

    python bench/machines.py results.json

Lines that failed or were skipped are left out, and so is a dry run. A later run of the same machine
replaces the lines that it has measured; that of another machine of its kind replaces the table.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import tables  # noqa: E402
from bench.results import PACKAGES  # noqa: E402

MACHINES = "AMX", "AVX-512", "AVX2", "H100", "H200"
HEAD = ["what", "minisft", "compared with", "ratio", "share of the limit"]


def write_table(results: dict[str, Any]) -> None:
    """Write the table of the machine. SystemExit if the results are of none that has a table."""
    measured = [line for line in results["lines"] if "figure" in line and "unit" in line]
    name = next((line["device"] for line in measured if "device" in line), "no device")
    kind = next((kind for kind in MACHINES if kind in name), None)
    if results["dry_run"] or kind is None:
        raise SystemExit(f"no table for {name}: measure on one of {', '.join(MACHINES)}")
    versions = ", ".join(
        f"{package} {results[package]}" for package in PACKAGES if results.get(package)
    )
    rows = [row_of(line) for line in measured if line["unit"] != "passed"]
    # Lines of another machine must not stay under the name of this one.
    first_date = date_of_table(kind, name)
    order = None if first_date else [row[0] for row in rows]
    dates = results["date"]
    if first_date and first_date != dates:
        dates = f"{first_date} to {dates}"
    title = f"**{name}** ({dates}): {versions}."
    tables.update("benchmarks.md", kind, HEAD, rows, order, title=title)


def date_of_table(kind: str, name: str) -> str | None:
    """The first date of the table of this kind; None if it is of another machine, or empty."""
    page = (tables.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    table = page.partition(f"<!-- {kind} -->")[2].partition(f"<!-- /{kind} -->")[0]
    match = re.search(rf"\*\*{re.escape(name)}\*\* \((\d+-\d+-\d+)", table)
    return match[1] if match else None


def row_of(line: dict[str, Any]) -> list[str]:
    """A line of the results as cells of the table."""
    peer = f"{line['peer_name']}: {number(line['peer'])}" if "peer" in line else ""
    ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
    memory_ratio = line.get("memory_ratio")
    if line.get("peer_peak_gib"):
        memory_ratio = line["peak_gib"] / line["peer_peak_gib"]
    if memory_ratio is not None:
        ratio += f", {memory_ratio:.2f} of the memory"
    share = f"{line['share']:.0%} of the {line['limit']}" if "share" in line else ""
    if "share_of_peak" in line:
        share += f", {line['share_of_peak']:.0%} of the peak by {line['counted']}"
    figure = f"{number(line['figure'])} {line['unit']}"
    if "peak_gib" in line:
        figure += f", {number(line['peak_gib'])} GiB"
    if line.get("waits") is not None:
        figure += f", {line['waits']} waits in a step"
    if "minutes_of_alpaca" in line:
        figure += f", 52,000 rows in {line['minutes_of_alpaca']:.1f} min"
    return [line["name"], figure, peer, ratio, share]


def number(value: float) -> str:
    """A figure with one decimal, or with two where it is small."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    """Write the table of a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", type=Path, help="JSON file that bench/gpu.sh or bench/cpu.py wrote"
    )
    write_table(json.loads(parser.parse_args().results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
