"""Figures of a benchmark as lines of a file, which bench/cpu.py collects for the tables in docs/.

    add_results_option(parser)                                          # --results FILE
    add_figure(options.results, "decoding", 101.5, "tokens/s", peer_name="llama.cpp", peer=130.0,
        ratio=0.78)

A line is a JSON object with a name, a figure and its unit. peer, peer_name and ratio (above 1:
minisft is better) are present if a peer ran, share and limit if the limit is known.
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# torch, and the peers whose versions stand above a table.
PACKAGES = "torch", "transformers", "peft", "scikit-learn", "lm_eval", "xllamacpp"


def add_results_option(parser: ArgumentParser) -> None:
    """Add the flag that names the file."""
    parser.add_argument("--results", type=Path, help="append the figures as lines of JSON")


def add_figure(path: Path | None, name: str, figure: float, unit: str, **more: Any) -> None:
    """Append a figure. Without a path, do nothing."""
    if path is not None:
        line: Line = {"name": name, "figure": figure, "unit": unit, **more}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
