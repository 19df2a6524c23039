"""The measures of a comparison as a bar chart (needs matplotlib, see requirements/plot.txt)."""

import math
import warnings
from pathlib import Path
from typing import Any

from minisft.common.outputs import save_figure
from minisft.evaluation.report_lines import MEASURES

# Fonts that come with systems and browsers, for Chinese names of models.
CHINESE_FONTS = {
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
}


def draw_bars(results: dict[str, Any], path: str | Path) -> None:
    """Draw the measures of all models with their intervals. ImportError without matplotlib.

    results: the content of results.json.
    """
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    fonts = ["DejaVu Sans", *CHINESE_FONTS & set(font_manager.get_font_names())]
    with rc_context({"font.family": fonts}), warnings.catch_warnings():
        # Without a Chinese font, the picture has boxes.
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot(ylabel="%", ylim=(0, 100))
        models = results["models"]
        width = 0.8 / len(models)
        for number, (name, report) in enumerate(models.items()):
            shift = (number - (len(models) - 1) / 2) * width
            entries = [report["mean"][key] for key in MEASURES]
            axes.bar(
                [place + shift for place in range(len(MEASURES))],
                [100 * entry["mean"] for entry in entries],
                width,
                yerr=list(zip(*map(_errors, entries), strict=True)),
                capsize=2,
                label=name,
            )
        axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
        axes.legend()
        save_figure(figure, path)


def _errors(entry: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above the mean, in percent. NaN draws nothing."""
    if "interval" not in entry:
        return math.nan, math.nan
    low, high = entry["interval"]
    return 100 * max(0, entry["mean"] - low), 100 * max(0, high - entry["mean"])
