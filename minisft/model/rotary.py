"""Rotary positions (arXiv 2104.09864) and the ways to stretch them over longer contexts.

    frequencies, factor = rotary_frequencies(config, length=1024)      # (d/2,), a number
    angles = positions[:, None] * frequencies                          # (T, d/2)

d is the width of an attention head.
"""

import math

import torch


def rotary_frequencies(config, length, device=None):
    """Inverse frequencies (d/2,) in float32 and the factor on cos and sin (arXiv 2104.09864).

    `length` is the number of positions in use; only the `dynamic` type depends on it.
    """
    scaling = config.rope_scaling or {"rope_type": "default"}
    theta, width, factor = config.rope_theta, config.head_dim, scaling.get("factor")
    if scaling["rope_type"] == "dynamic" and length > config.max_position_embeddings:
        stretch = factor * length / config.max_position_embeddings - (factor - 1)
        theta = theta * stretch ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    frequencies = 1.0 / theta**exponents
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3_frequencies(frequencies, scaling), 1.0
    if scaling["rope_type"] == "yarn":
        return _yarn_frequencies(frequencies, scaling, theta, width)
    return frequencies, 1.0


def _llama3_frequencies(frequencies, scaling):
    """Divide the slow frequencies by `factor`, keep the fast, blend between (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def _yarn_frequencies(frequencies, scaling, theta, width):
    """YaRN, "NTK by parts" and the attention temperature (arXiv 2309.00071)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(rotations):
        """Which pair turns so many times within the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=frequencies.device)
    interpolate = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = interpolate * frequencies / factor + (1 - interpolate) * frequencies

    def temperature(weight):
        """What cos and sin are multiplied by."""
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = (
            temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1.0)
        )
    return frequencies, attention_factor


def rotate(x, cos, sin):
    """Rotate pairs (i, i + d/2) of x (B, heads, T, d); cos, sin (B or 1, 1, T, d).

    (left, right) becomes (left cos - right sin, right cos + left sin); the minus is in `sin`.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
