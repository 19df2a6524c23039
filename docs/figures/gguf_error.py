"""Chapter 12: the rounding error of each GGUF type in each tensor of a layer, and in an embedding.

The layer is the last one of the embedded model, the embedding that of SmolLM2. The package of
SmolLM2 has its other tensors in Q4_1, so they are rounded already; its embedding is in Q8_0.
"""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from matplotlib.figure import Figure

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.tour.lab import BASE
from minisft import load_model
from minisft.gguf.mapping import LAYER_MODULES
from minisft.gguf.writer import Tensor

LAYER = 3
NUM_ROWS = 4096  # of SmolLM2's embedding
TYPES = (Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q5_0, Type.Q5_1, Type.Q6_K, Type.Q8_0)


def relative_error(weight: torch.Tensor, type: Type) -> float:
    """|stored - weight| / |weight|. Blocks of 256 are cut without regard to rows."""
    rows = weight.reshape(-1, 256)
    data = Tensor("", tuple(rows.shape), type, lambda begin, end: rows[begin:end])
    stored = gguf.quants.dequantize(data.convert(0, len(rows)), type)
    return float(np.linalg.norm(stored - rows.numpy()) / rows.norm())


def data() -> tuple[list[str], np.ndarray]:
    """The tensors, and the error of each type in each (types, tensors)."""
    model = load_model(BASE, torch.float32)
    weights = {
        name: parameter.detach()
        for module, name in LAYER_MODULES.items()
        for path, parameter in model.model.layers[LAYER].named_parameters()
        if path == f"{module}.weight" and parameter.ndim == 2
    }
    weights["SmolLM2 token_embd"] = smollm2.load()[0].model.embed_tokens.weight.detach()[:NUM_ROWS]
    errors = [[relative_error(weight, type) for weight in weights.values()] for type in TYPES]
    result = np.array(errors)
    result[TYPES.index(Type.Q8_0), -1] = np.nan  # stored in this type, and so exact
    return list(weights), result


def draw(colors: Colors, data: tuple[list[str], np.ndarray]) -> Figure:
    """A line of marks for each tensor; the types are ordered by bits."""
    tensors, errors = data
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = []
    for type in TYPES:
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        labels.append(f"{type.name}\n{8 * block_bytes / block:.4g} bits")
    marks = "osD^v<>*"
    families = {"attn": colors.quantity}
    for number, tensor in enumerate(tensors):
        color = families.get(tensor.partition("_")[0], colors.text)
        axes.plot(labels, errors[:, number], marks[number], color=color, alpha=0.8, label=tensor)
    axes.set(yscale="log", ylabel="relative error")
    axes.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1], ["0.5 %", "1 %", "2 %", "5 %", "10 %"])
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.5)
    axes.legend(ncols=2)
    return figure


if __name__ == "__main__":
    save("gguf_error", draw, data())
