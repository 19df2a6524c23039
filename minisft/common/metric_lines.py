"""The metrics of a run: the lines of metrics.jsonl, and as words for a message.

rows = read_metrics("runs/demo/metrics.jsonl")      # [{"step": 10, "loss": 0.5, ...}, ...]
in_words({"loss": 0.5, "accuracy": 0.75})           # "loss 0.5000, accuracy 75.0 %"
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that is still being written."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_words(metrics: Mapping[str, float]) -> str:
    """{"loss": 0.5, "accuracy": 0.75} -> "loss 0.5000, accuracy 75.0 %"."""
    parts = []
    for name, value in metrics.items():
        if name in ("accuracy", "exact_match"):
            text = f"{100 * value:.1f} %"
        elif name == "perplexity":
            text = f"{value:.2f}"
        else:
            text = f"{value:.4f}"
        parts.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)
