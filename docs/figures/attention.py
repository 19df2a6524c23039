"""Chapter 5: attention maps of SmolLM2."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.figures.token_boxes import spelled
from minisft.model.attention import causal_mask
from minisft.model.decoder import CausalLM
from minisft.model.families import position_factors
from minisft.model.rotary import rotate

TEXT = "Anna met Tom in Paris. A week later Anna met Tom in Rome."


@torch.no_grad()
def attention_weights(model: CausalLM, tokens: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of all layers and heads (L, H, T, T)."""
    T, config, weights = tokens.shape[1], model.config, []
    cos, sin = position_factors(config, torch.arange(T), torch.float32)

    def keep(layer, inputs):
        q, k, _ = layer.project(inputs[0])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
        scores = q @ k.mT / config.head_dim**0.5
        hidden = ~causal_mask(T, T, tokens.device)
        weights.append(scores.masked_fill(hidden, -torch.inf).softmax(-1)[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(keep)
    model(tokens)
    return torch.stack(weights)


def data() -> tuple[list[str], list[tuple[str, Tensor]]]:
    """The tokens, and three maps: the previous token, the word after an earlier copy, the start."""
    model, tokenizer = smollm2.load()
    ids = tokenizer.encode(TEXT)
    maps = attention_weights(model, torch.tensor([ids]))
    L, H, T, _ = maps.shape
    before = maps.diagonal(-1, 2, 3).mean(-1)  # (L, H)
    copies = [
        (query, key + 1)
        for query in range(T)
        for key in range(query - 1)
        if ids[key] == ids[query] and len(tokenizer.token_text(ids[key]) or "") > 3
    ]
    induction = torch.stack([maps[:, :, query, key] for query, key in copies]).mean(0)
    chosen = []
    for title, score in (
        ("the token before", before),
        ("what followed the same word", induction),
        ("the first token", maps[..., 0].mean(-1)),
    ):
        layer, head = divmod(int(score.argmax()), H)
        chosen.append((f"{title}\n(layer {layer}, head {head}, counted from 0)", maps[layer, head]))
    return [spelled(tokenizer.token_text(id) or "") for id in ids], chosen


def draw(colors: Colors, data: tuple[list[str], list[tuple[str, Tensor]]]) -> Figure:
    """Rows are queries, columns are keys."""
    tokens, maps = data
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    for axes, (title, weights) in zip(figure.subplots(1, len(maps)), maps, strict=True):
        image = axes.imshow(weights, cmap=colors.map, vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, family="monospace")
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7, family="monospace")
        axes.set(xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


if __name__ == "__main__":
    save("attention", draw, data())
