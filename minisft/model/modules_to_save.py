"""Modules trained in full next to an adapter: embedding, output matrix, norms, reward head."""

from collections.abc import Sequence

from torch import nn

from minisft.common.errors import UserError
from minisft.model.basic_layers import Linear, RMSNorm
from minisft.model.decoder import CausalLM
from minisft.model.reward import Model

# Name in --modules_to_save and in adapter_config.json -> name in the model.
SAVEABLE_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "score": "score"}


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as in SAVEABLE_MODULES; names of norms, short or full, as they are."""
    short = {full: name for name, full in SAVEABLE_MODULES.items()}
    return tuple(short.get(name, name) for name in names)


def saved_modules(model: Model, names: Sequence[str]) -> list[str]:
    """The full names of the modules whose names end with one of `names`, as in PEFT.

    So `norm` selects all norms of the model, and `model.norm` the last one.
    """
    return [
        name
        for name, module in model.named_modules()
        if name.endswith(tuple(names))
        and (isinstance(module, RMSNorm) or name in SAVEABLE_MODULES.values())
    ]


def train_fully(model: Model, names: Sequence[str]) -> None:
    """Make modules trainable; to train embedding or output matrix unties them first. In place.

    A CausalLM has embed_tokens and lm_head, a RewardModel embed_tokens and score; both have norms.
    """
    unties = "embed_tokens" in names or "lm_head" in names
    if unties and isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        untie(model)
    available = ("embed_tokens", "lm_head" if isinstance(model, CausalLM) else "score", "norm")
    for name in names:
        modules = saved_modules(model, [name])
        if not modules:
            raise UserError(f"--modules_to_save {name}: choose from {', '.join(available)}")
        for module in modules:
            model.get_submodule(module).requires_grad_(True)


def untie(model: CausalLM) -> None:
    """Replace a tied output matrix by a frozen copy of the embedding. In place."""
    embedding = model.model.embed_tokens.weight
    vocab_size, width = embedding.shape
    model.lm_head = Linear(width, vocab_size, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
