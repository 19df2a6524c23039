"""Modules that are trained in full next to an adapter: embedding, output matrix, reward head."""

from collections.abc import Iterable

from torch import nn

from minisft.common.errors import UserError

# Name in --modules_to_save and in adapter_config.json -> name in the model.
SAVEABLE_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "score": "score"}


def train_fully(model: nn.Module, names: Iterable[str]) -> None:
    """Make modules of SAVEABLE_MODULES trainable. A tied output matrix gets its own weight first.

    A CausalLM has the embedding and lm_head, a RewardModel the embedding and score.
    """
    names = tuple(names)
    has_score = hasattr(model, "score")
    available = ("embed_tokens", "score" if has_score else "lm_head")
    for name in names:
        if name not in available:
            raise UserError(f"--modules_to_save {name}: choose from {', '.join(available)}")
    if names and model.config.tie_word_embeddings:
        untie(model)
    for name in names:
        model.get_submodule(SAVEABLE_MODULES[name]).weight.requires_grad_(True)


def untie(model: nn.Module) -> None:
    """Give the model its own output matrix, a copy of the embedding. In place."""
    embedding = model.model.embed_tokens.weight
    vocab_size, width = embedding.shape
    model.lm_head = nn.Linear(width, vocab_size, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
