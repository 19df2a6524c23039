"""k-means against scikit-learn: time, memory and inertia on the same points.

    python bench/kmeans.py                       # 20,000 x 2,048 float32, 100 clusters, 3 data sets
    python bench/kmeans.py --rows 4000 --width 256 --rounds 2         # quick

Both sides use greedy k-means++ seeding and Lloyd steps with scikit-learn's tolerance. They take
turns, each in a separate process, so that a busy moment of the machine affects both. Memory is
the peak of the process, without what it held when the points were loaded.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from bench.measure import output_of, peak_memory  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402

KINDS = {
    "blobs": "100 blobs that touch",
    "spectrum": "one cloud, variances that fall by a power law, far from the origin",
    "noise": "one cloud, all variances equal",
}


def random_points(kind: str, rows: int, width: int) -> np.ndarray:
    """Points (rows, width) float32."""
    generator = np.random.default_rng(0)
    points = generator.standard_normal((rows, width), dtype=np.float32)
    if kind == "blobs":
        centers = generator.standard_normal((100, width), dtype=np.float32)
        points += centers[generator.integers(100, size=rows)]
    if kind == "spectrum":
        points *= np.arange(1, width + 1, dtype=np.float32) ** -0.7
        points += 10 * generator.standard_normal(width, dtype=np.float32)
    return points


def measure(side: str, path: str, clusters: int, starts: int, seed: int) -> dict[str, Any]:
    """Cluster the points in a file once; the figures of this process."""
    points = np.load(path)
    # Only the side that is measured is imported.
    if side == "ours":
        from minisft.selection.kmeans import kmeans

        def run() -> tuple[float, int]:
            """(inertia, number of steps) of minisft."""
            result = kmeans(points, clusters, seed, starts)
            return result.inertia, result.num_steps
    else:
        from sklearn.cluster import KMeans

        def run() -> tuple[float, int]:
            """(inertia, number of steps) of scikit-learn."""
            model = KMeans(clusters, n_init=starts, random_state=seed).fit(points)
            return float(model.inertia_), int(model.n_iter_)

    before, began, cpu_began = peak_memory(), time.perf_counter(), time.process_time()
    inertia, num_steps = run()
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu_began,
        "memory": peak_memory() - before + points.nbytes,
        "inertia": inertia,
        "steps": num_steps,
    }


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add_results_option(parser)
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Take turns on each kind of points and print a table."""
    options = parse_options()
    if options.side:
        side, path, *numbers = options.side
        print(json.dumps(measure(side, path, *map(int, numbers))))
        return

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{options.rows:,} x {options.width:,}, {options.clusters} clusters, best of "
        f"{options.starts} starts, {options.rounds} rounds in turns, {threads} threads"
    )
    print(f"{'':10} {'seconds':>18} {'CPU seconds':>20} {'MiB with the data':>20} {'inertia':>9}")
    for kind in options.kinds:
        results: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "points.npy"
            np.save(path, random_points(kind, options.rows, options.width))
            for seed in range(options.rounds):
                for side, runs in results.items():
                    words = [side, path, options.clusters, options.starts, seed]
                    runs.append(json.loads(output_of(__file__, "--side", *words)))
        print_row(options.results, kind, results)


def print_row(path: Path | None, kind: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of both sides and their ratios; append them to the file of results."""
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for side, runs in results.items()
    }
    columns = []
    for name, unit, digits in (("seconds", 1, 2), ("cpu", 1, 2), ("memory", 2**20, 0)):
        ours, theirs = (medians[side][name] / unit for side in ("ours", "theirs"))
        columns.append(f"{ours:.{digits}f} / {theirs:.{digits}f} = {ours / theirs:.2f}")
    worst = max(
        ours["inertia"] / theirs["inertia"]
        for ours, theirs in zip(results["ours"], results["theirs"], strict=True)
    )
    columns.append(f"{medians['ours']['inertia'] / medians['theirs']['inertia']:.4f}")
    print(
        f"{kind:10} {columns[0]:>18} {columns[1]:>20} {columns[2]:>20} {columns[3]:>9}"
        f"  (worst round {worst:.4f}; {KINDS[kind]})",
        flush=True,
    )
    (ours, our_memory), (theirs, their_memory) = (
        (medians[side]["seconds"], medians[side]["memory"]) for side in ("ours", "theirs")
    )
    more = {"peer_name": "scikit-learn", "peer": theirs, "ratio": theirs / ours}
    add_figure(path, f"k-means, {kind}", ours, "s", memory_ratio=our_memory / their_memory, **more)


if __name__ == "__main__":
    main()
