"""Time and memory to load a checkpoint, against transformers' from_pretrained.

    python bench/load.py --shape tinyllama --dtype bfloat16

Writes random weights of the shape, then loads them in fresh processes, both sides in turn. The time
excludes imports and ends when every page of the weights has been read: a file can be mapped at no
cost and read later. The memory is the growth of the process's peak.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.limits import bandwidth  # noqa: E402
from bench.measure import flags, forget_peak_memory, output_of, peak_memory  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from bench.shapes import SHAPES, write_checkpoint  # noqa: E402


def load_once(side: str, folder: str, dtype: torch.dtype) -> tuple[float, int, int]:
    """(seconds, growth of the peak in bytes, size of the parameters in bytes) of a load."""
    # Only the side that is measured is imported.
    if side == "minisft":
        from minisft.checkpoints.folders import load_model

        load = load_model
    else:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        assert LlamaForCausalLM  # loaded on first use otherwise, which would count

        def load(folder: str, dtype: torch.dtype) -> torch.nn.Module:
            """The model, as transformers loads it."""
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    before, began = forget_peak_memory(), time.monotonic()
    model = load(folder, dtype)
    for parameter in model.parameters():
        parameter.view(-1).view(torch.uint8)[::4096].sum()
    seconds, size = time.monotonic() - began, sum(weight.nbytes for weight in model.parameters())
    return seconds, peak_memory() - before, size


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    dtype = "number type in memory; the files are in bfloat16"
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help=dtype)
    parser.add_argument("--repeats", type=int, default=5)
    add_results_option(parser)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Take turns, then print the medians and their ratio."""
    options = parse_options()
    if options.side:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(load_once(options.side, options.folder, dtype)))
        return
    results = {"minisft": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, options.shape, options.num_layers)
        for repeat in range(options.repeats + 1):
            for side, runs in results.items():
                output = output_of(__file__, *flags(side=side, folder=folder, dtype=options.dtype))
                if repeat:  # the first load fills the file cache
                    runs.append(json.loads(output.splitlines()[-1]))
    medians = {
        side: [statistics.median(column) for column in zip(*runs, strict=True)]
        for side, runs in results.items()
    }
    for side, (seconds, growth, size) in medians.items():
        print(
            f"{side:>14} {seconds:8.2f} s {growth / 2**20:10,.0f} MiB "
            f"({growth / size:.2f} x the parameters)"
        )
    (ours, our_peak, size), (theirs, their_peak, _) = medians.values()
    print(f"{'ratio':>14} {ours / theirs:8.2f}   {our_peak / their_peak:10.2f}")
    more = {"peer_name": "transformers", "peer": theirs, "ratio": theirs / ours}
    if options.dtype == "float32":  # each weight is read in 2 bytes and written in 4
        limit = 1.5 * size / bandwidth(torch.device("cpu"))
        more |= {"share": limit / ours, "limit": "memory copy"}
    name, memory = f"loading {options.shape} in {options.dtype}", our_peak / their_peak
    add_figure(options.results, name, ours, "s", memory_ratio=memory, **more)


if __name__ == "__main__":
    main()
