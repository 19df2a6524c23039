"""Time and memory to load a checkpoint, against transformers' from_pretrained.

    python bench/load.py --shape tinyllama --dtype bfloat16

Writes random weights of the shape, then loads them in fresh processes, one side after the other.
The time is that of the load, imports aside, until every page of the weights has been touched (a
file can be mapped at no cost and read later); the memory is how much the process's peak grew.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ONE_LOAD = """
import json, re, sys, time, torch
side, folder, dtype = sys.argv[1:4]
dtype = getattr(torch, dtype)
if side == "minisft":
    from minisft.checkpoints.folders import load_model
    load = lambda: load_model(folder, dtype)
else:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

def status(name):
    text = open("/proc/self/status").read()
    return 1024 * int(re.search(name + r":\\s*(\\d+)", text)[1])

open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before, began = status("VmRSS"), time.monotonic()
model = load()
for parameter in model.parameters():
    parameter.view(-1).view(torch.uint8)[::4096].sum()
seconds, size = time.monotonic() - began, sum(one.nbytes for one in model.parameters())
print(json.dumps([seconds, status("VmHWM") - before, size]))
"""


def measure(side, folder, dtype):
    """(seconds, growth of the peak in bytes, size of the parameters in bytes) of one load."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_LOAD, side, str(folder), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    from bench.shapes import SHAPES, write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="to load as; the files are in bfloat16",
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    figures = {"minisft": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, options.shape, options.num_layers)
        for repeat in range(options.repeats + 1):
            for side in figures:
                if result := measure(side, folder, options.dtype):
                    figures[side] += [result] if repeat else []  # the first warms the file cache
    medians = {
        side: [statistics.median(column) for column in zip(*runs, strict=True)]
        for side, runs in figures.items()
    }
    for side, (seconds, grown, size) in medians.items():
        print(
            f"{side:>14} {seconds:8.2f} s {grown / 2**20:10,.0f} MiB "
            f"({grown / size:.2f} x the parameters)"
        )
    (ours, our_peak, _), (theirs, their_peak, _) = medians.values()
    print(f"{'ratio':>14} {ours / theirs:8.2f}   {our_peak / their_peak:10.2f}")


if __name__ == "__main__":
    main()
