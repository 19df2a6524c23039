"""Write the results of bench/gpu.sh into docs/benchmarks.md: one table for each kind of card.

    python bench/machines.py results.json

Lines that failed or were skipped are left out, and so is a dry run. A later run of the same card
replaces the lines that it has measured.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables import update  # noqa: E402

CARDS = "H100", "H200"
HEAD = ["what", "minisft", "compared with", "ratio", "share of the limit"]


def write_table(results: dict[str, Any]) -> None:
    """Write the table of the card. SystemExit if the results are of no card that has a table."""
    measured = [line for line in results["lines"] if "figure" in line and "unit" in line]
    name = next((line["device"] for line in measured if "device" in line), "no device")
    card = next((card for card in CARDS if card in name), None)
    if results["dry_run"] or card is None:
        raise SystemExit(f"no table for {name}: measure on one of {', '.join(CARDS)}")
    versions = ", ".join(
        f"{package} {results[package]}"
        for package in ("torch", "transformers", "peft")
        if results.get(package)
    )
    rows = [row_of(line) for line in measured if line["unit"] != "passed"]
    title = f"**{name}** ({results['date']}): {versions}."
    update("benchmarks.md", card, HEAD, rows, [row[0] for row in rows], title=title)


def row_of(line: dict[str, Any]) -> list[str]:
    """A line of the results as cells of the table."""
    peer = f"{line['peer_name']}: {line['peer']:,.1f}" if "peer" in line else ""
    ratio = f"{line['ratio']:.2f}" if "peer" in line else ""
    share = f"{line['share']:.0%} of the {line['limit']}" if "share" in line else ""
    figure = f"{line['figure']:,.1f} {line['unit']}"
    if line.get("waits") is not None:
        figure += f", {line['waits']} waits in a step"
    if "minutes_of_alpaca" in line:
        figure += f", 52,000 rows in {line['minutes_of_alpaca']:.1f} min"
    return [line["name"], figure, peer, ratio, share]


def main() -> None:
    """Write the table of a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="JSON file that bench/gpu.sh wrote")
    write_table(json.loads(parser.parse_args().results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
