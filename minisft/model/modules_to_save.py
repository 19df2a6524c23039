"""Modules that are trained in full next to an adapter: embedding, output matrix, reward head."""

from collections.abc import Sequence

from torch import nn

from minisft.common.errors import UserError
from minisft.model.decoder import CausalLM, Linear
from minisft.model.reward import Model

# Name in --modules_to_save and in adapter_config.json -> name in the model.
SAVEABLE_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "score": "score"}


def train_fully(model: Model, names: Sequence[str]) -> None:
    """Make modules of SAVEABLE_MODULES trainable; a tied output matrix is untied first. In place.

    A CausalLM has embed_tokens and lm_head, a RewardModel embed_tokens and score.
    """
    available = ("embed_tokens", "lm_head" if isinstance(model, CausalLM) else "score")
    for name in names:
        if name not in available:
            raise UserError(f"--modules_to_save {name}: choose from {', '.join(available)}")
    if names and isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        untie(model)
    for name in names:
        model.get_submodule(SAVEABLE_MODULES[name]).requires_grad_(True)


def untie(model: CausalLM) -> None:
    """Give the model an output matrix of its own, a frozen copy of the embedding. In place."""
    embedding = model.model.embed_tokens.weight
    vocab_size, width = embedding.shape
    model.lm_head = Linear(width, vocab_size, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
