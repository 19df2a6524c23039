"""A reward model: the decoder, and a head that gives one number for a whole conversation.

    model = load_reward_model("examples/base")        # with a new head, or its own if it has one
    rewards = model.rewards(model(tokens)[rows, last])

Its files are those of transformers' LlamaForSequenceClassification with one label: `score.weight`
beside the decoder, no output matrix. An adapter has the head among its `modules_to_save`.
"""

from dataclasses import replace

import torch
from torch import nn

from minisft.model.decoder import Decoder


class RewardModel(nn.Module):
    """`forward` gives hidden states, as CausalLM's does; `rewards` what they are worth."""

    def __init__(self, config):
        super().__init__()
        # There is no output matrix that the embedding could be tied to.
        self.config = replace(config, tie_word_embeddings=False)
        self.config.original = _described(config)
        self.model = Decoder(self.config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, tokens, cache=None):
        """Hidden states (B, T, D) of tokens (B, T), padded on the right; `cache` as CausalLM's."""
        return self.model(tokens, None, None, cache, None)

    def rewards(self, hidden):
        """Rewards (...) in float32 of the hidden states (..., D) of the last tokens."""
        # Not a matrix product, which autocast would round to half precision.
        return (hidden.float() * self.score.weight.float()).sum(-1)


def _described(config):
    """What config.json says of a reward model."""
    family = config.to_dict()["model_type"].capitalize()
    return {
        **config.to_dict(),
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def new_head(config):
    """A weight (1, D) for `score`, drawn on the CPU as the model's weights once were."""
    return torch.randn(1, config.hidden_size) * config.initializer_range
