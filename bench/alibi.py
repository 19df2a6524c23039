"""The time of a decoder layer with ALiBi against the same layer with rotary positions.

    python bench/alibi.py                     # a layer of Baichuan2-13B, 2,048 tokens, bfloat16

Both layers have the same random weights, frozen as under LoRA, and take turns: forward, and
backward to the input. The ratio is the median over the pairs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.shapes import SHAPES  # noqa: E402
from minisft.model.attention import attend  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.model.decoder import DecoderLayer  # noqa: E402
from minisft.model.families import position_factors  # noqa: E402


def seconds(layer: DecoderLayer, config: ModelConfig, x: Tensor) -> float:
    """The time of forward and backward for x (1, T, D)."""
    x, T = x.clone().requires_grad_(), x.shape[1]
    began = time.perf_counter()
    factors = position_factors(config, torch.arange(T), x.dtype)
    layer(x, factors, attend, None, 0).sum().backward()
    return time.perf_counter() - began


def main() -> None:
    """Print the seconds of both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shape = SHAPES["baichuan2-13b"]
    rotary_shape = {**shape, "num_hidden_layers": 32}  # the 7B: 32 layers have rotary positions
    del rotary_shape["alibi"]
    configs = [ModelConfig.from_dict(fields) for fields in (shape, rotary_shape)]
    layers = [DecoderLayer(config, 0).to(dtype).requires_grad_(False) for config in configs]
    layers[1].load_state_dict(layers[0].state_dict())
    assert [config.alibi for config in configs] == [True, False]
    x = torch.randn(1, options.num_tokens, shape["hidden_size"], dtype=dtype)
    pairs = [
        [seconds(layer, config, x) for layer, config in zip(layers, configs, strict=True)]
        for _ in range(options.repeats + 1)
    ][1:]  # the first pair warms up
    alibi, rotary = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(one / other for one, other in pairs)
    print(f"ALiBi {alibi:.2f} s, rotary {rotary:.2f} s, ratio {statistics.median(ratios):.3f}")
    print(f"from {ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} pairs")


if __name__ == "__main__":
    main()
