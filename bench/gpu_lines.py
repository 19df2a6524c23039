"""The device of a GPU run, its sizes and limits, and the lines that its stages yield.

    share = Bench(dry_run=True, limits={MATMUL: 790e12}).share(300e12, MATMUL)
    yield line_with_peer("scoring", 300.0, "rows/s", "reference way", 20.0, None, **share)

A line is a dict that goes to the results unchanged. It has a name, and either a figure with its
unit, or "failed" or "skipped" with the reason. "peer", "peer_name" and "ratio" (above 1: minisft is
faster) are present if the peer ran, "share" and "limit" if the limit is known.
"""

import gc
import traceback
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import reason_of
from bench.results import Line

MATMUL, COPY, PEAK = "matrix product", "memory copy", "peak of the data sheet"
# A step has `rows` of `length` tokens. An epoch has `steps`; the second one is measured. A compiled
# cache has `capacity`. Both sides compile only `few_layers`, to save time. minisft scores `scored`
# rows, the reference scores `reference` of them.
SIZES = {
    "tinyllama": "tinyllama",
    "llama3-8b": "llama3-8b",
    "rows": 16,
    "length": 256,
    "steps": 6,
    "new_tokens": 64,
    "capacity": 1024,
    "few_layers": 8,
    "scored": {"tinyllama": 8192, "llama3-8b": 2048},
    "reference": 32,
    "batch_tokens": 8192,
    "workers": 4,
    "repeats": 3,
    "matrix": 8192,
}
DRY_SIZES = {
    "tinyllama": "tiny",
    "llama3-8b": "tiny",
    "rows": 2,
    "length": 32,
    "steps": 1,
    "new_tokens": 4,
    "capacity": 32,
    "few_layers": 1,
    "scored": {"tinyllama": 12, "llama3-8b": 12},
    "reference": 2,
    "batch_tokens": 2048,
    "workers": 1,
    "repeats": 1,
    "matrix": 256,
}


class Bench:
    """The device and the sizes of a run, and the limits that earlier stages measured."""

    def __init__(self, dry_run: bool, limits: dict[str, float]):
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype, self.limits = torch.bfloat16, limits
        self.sizes: dict[str, Any] = DRY_SIZES if dry_run else SIZES

    def share(self, per_second: float, limit: str) -> Line:
        """{"share", "limit"} for a line; empty if the limit was not measured."""
        if not self.limits.get(limit):
            return {}
        return {"share": per_second / self.limits[limit], "limit": limit}


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """(function(), None), or (None, the reason of its failure), which costs only its own line."""
    try:
        return function(), None
    except Exception as error:
        traceback.print_exc()  # goes to the log
        return None, reason_of(error)
    finally:
        gc.collect()


def line_with_peer(
    name: str,
    figure: float,
    unit: str,
    peer_name: str,
    peer: float | None,
    reason: str | None,
    **more: Any,
) -> Line:
    """A line with the peer's figure, or with the reason why there is none."""
    line = {"name": name, "figure": figure, "unit": unit}
    if peer is None:
        return {**line, "note": f"{peer_name}: {reason}", **more}
    return {**line, "peer_name": peer_name, "peer": peer, "ratio": figure / peer, **more}
