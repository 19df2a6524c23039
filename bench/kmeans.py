"""k-means beside scikit-learn: time, memory and inertia on the same points.

    python bench/kmeans.py                       # 20,000 x 2,048 float32, 100 clusters, 3 data sets
    python bench/kmeans.py --rows 4000 --width 256 --rounds 2         # a quick look

Both seed by greedy k-means++ and take Lloyd steps with scikit-learn's tolerance. They run in turns,
each in a process of its own, so that memory is that process's own peak and a busy moment hits both.
Memory is the peak above what the process had once the points were loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "blobs": "100 blobs that touch",
    "spectrum": "one cloud, variances that fall by a power law, far from the origin",
    "noise": "one cloud, all variances equal",
}


def make(kind, rows, width):
    """Points (rows, width) float32."""
    generator = np.random.default_rng(0)
    points = generator.standard_normal((rows, width), dtype=np.float32)
    if kind == "blobs":
        points += generator.standard_normal((100, width), dtype=np.float32)[
            generator.integers(100, size=rows)
        ]
    if kind == "spectrum":
        points *= np.arange(1, width + 1, dtype=np.float32) ** -0.7
        points += 10 * generator.standard_normal(width, dtype=np.float32)
    return points


def peak_memory():
    """The process's peak resident memory so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024


def work(side, path, clusters, starts, seed):
    """Cluster once and print the figures: what each process does."""
    points = np.load(path)
    if side == "ours":
        sys.path.insert(0, str(ROOT))
        from minisft.selection.kmeans import kmeans

        def run():
            found = kmeans(points, clusters, seed, starts)
            return found.inertia, found.num_steps
    else:
        from sklearn.cluster import KMeans

        def run():
            found = KMeans(clusters, n_init=starts, random_state=seed).fit(points)
            return found.inertia_, found.n_iter_

    before, began, used = peak_memory(), time.perf_counter(), time.process_time()
    inertia, steps = run()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "cpu": time.process_time() - used,
                "memory": peak_memory() - before,
                "data": points.nbytes,
                "inertia": float(inertia),
                "steps": int(steps),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, path, *numbers = options.work
        return work(side, path, *map(int, numbers))

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{options.rows:,} x {options.width:,}, {options.clusters} clusters, best of "
        f"{options.starts} starts, {options.rounds} rounds in turns, {threads} thread(s)"
    )
    print(f"{'':10} {'seconds':>18} {'CPU seconds':>20} {'MiB with the data':>20} {'inertia':>9}")
    for kind in options.kinds:
        results = {"ours": [], "theirs": []}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "points.npy"
            np.save(path, make(kind, options.rows, options.width))
            for seed in range(options.rounds):
                for side in results:
                    words = [side, path, options.clusters, options.starts, seed]
                    done = subprocess.run(
                        [sys.executable, __file__, "--work", *map(str, words)],
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    results[side].append(json.loads(done.stdout))
        show(kind, results)


def show(kind, results):
    """A line of medians: ours, theirs and their ratio."""

    def median(side, name):
        return statistics.median(one[name] for one in results[side])

    for one in (*results["ours"], *results["theirs"]):
        one["memory"] += one["data"]
    columns = []
    for name, unit, digits in (("seconds", 1, 2), ("cpu", 1, 2), ("memory", 2**20, 0)):
        ours, theirs = (median(side, name) / unit for side in ("ours", "theirs"))
        columns.append(f"{ours:.{digits}f} / {theirs:.{digits}f} = {ours / theirs:.2f}")
    worst = max(
        ours["inertia"] / theirs["inertia"]
        for ours, theirs in zip(results["ours"], results["theirs"], strict=True)
    )
    columns.append(f"{median('ours', 'inertia') / median('theirs', 'inertia'):.4f}")
    print(
        f"{kind:10} {columns[0]:>18} {columns[1]:>20} {columns[2]:>20} {columns[3]:>9}"
        f"  (worst round {worst:.4f}; {KINDS[kind]})",
        flush=True,
    )


if __name__ == "__main__":
    main()
