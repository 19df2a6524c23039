"""A reward model: the decoder with a head that computes one number for a conversation.

    model = load_reward_model("examples/base")      # with a new head, if the folder has none
    hidden = model(tokens)                          # (B, T, D)
    rewards = model.rewards(hidden[rows, last])     # (B,), from the last token of each row

Its files are those of transformers' LlamaForSequenceClassification with one label: `score.weight`
beside the decoder, and no output matrix. An adapter has the head among its `modules_to_save`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minisft.model.cache import KeyValueCache
from minisft.model.class_names import reward_model_fields
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM, Decoder


class RewardModel(nn.Module):
    """`forward` returns hidden states, and `rewards` a number for each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # There is no output matrix to tie the embedding to.
        content = reward_model_fields(config.to_dict())
        self.config = replace(config, tie_word_embeddings=False, original=content)
        self.model = Decoder(self.config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) from tokens (B, T), padded on the right.

        positions: as in CausalLM.forward. cache: read and extended.
        """
        return self.model(tokens, positions, cache=cache)

    def rewards(self, hidden: Tensor) -> Tensor:
        """Rewards (...) in float32 from the hidden states (..., D) of last tokens."""
        # Autocast would compute a matrix product in half precision.
        return (hidden.float() * self.score.weight.float()).sum(-1)


# Either kind of model. Both have a `config`, and a Decoder called `model`.
Model = CausalLM | RewardModel


def new_head(config: ModelConfig) -> Tensor:
    """An initial weight (1, D) for `score`, drawn on the CPU."""
    return torch.randn(1, config.hidden_size) * config.initializer_range
