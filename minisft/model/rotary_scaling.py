"""Rotary positions beyond the context of the original training: `rope_scaling` in config.json.

linear     divide all frequencies by a factor
dynamic    raise theta with the length in use; short texts keep their frequencies
llama3     divide the low frequencies only (Llama 3.1)
yarn       divide the low frequencies, and scale cos and sin (arXiv 2309.00071)
"""

import math
from typing import Any

import torch
from torch import Tensor

from minisft.model.config import ModelConfig


def theta_for_length(config: ModelConfig, length: int) -> float:
    """theta for `length` positions: only the type `dynamic` changes it."""
    scaling, theta = config.rope_scaling or {}, config.rope_theta
    if not config.has_dynamic_rope or length <= config.max_position_embeddings:
        return theta
    factor, width = scaling["factor"], config.head_dim
    stretch = factor * length / config.max_position_embeddings - (factor - 1)
    return theta * stretch ** (width / (width - 2))


def scale_frequencies(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """The scaled frequencies (d/2,), and the factor for cos and sin."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling["rope_type"] == "yarn":
        return _yarn(frequencies, scaling, config), _yarn_factor(scaling)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Divide frequencies with few turns in the original context; keep frequencies with many turns.

    Between low_freq_factor and high_freq_factor turns, the two are blended.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def _yarn(frequencies: Tensor, scaling: dict[str, Any], config: ModelConfig) -> Tensor:
    """ "NTK by parts": like llama3, but blended over the index of the pair."""
    width, theta = config.head_dim, config.rope_theta
    original = scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        """The index of the pair that makes this many turns in the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_with(scaling.get("beta_fast") or 32)
    last = pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pair = torch.arange(width // 2, dtype=torch.float32, device=frequencies.device)
    divide = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return divide * frequencies / scaling["factor"] + (1 - divide) * frequencies


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """The factor for cos and sin, which makes attention sharper over longer contexts."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def growth(mscale: float) -> float:
        """1 + 0.1 mscale log(factor), as in the paper."""
        factor = scaling["factor"]
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return growth(mscale) / growth(mscale_all_dim)
    return growth(1.0)
