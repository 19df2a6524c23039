"""The interface of a model that generation needs; CausalLM and CompiledDecoder have it."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig


class LanguageModel(Protocol):
    """A model that predicts the next token; see CausalLM for the methods."""

    config: ModelConfig

    def __call__(
        self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """Hidden states (B, T, D) from tokens (B, T)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token from hidden states (..., D)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as in nn.Module."""
        ...
