"""A reward model: the decoder, and a head that gives one number for a whole conversation.

    model = load_reward_model("examples/base")        # with a new head, or its own if it has one
    rewards = model.rewards(model(tokens)[rows, last])

Its files are those of transformers' LlamaForSequenceClassification with one label: `score.weight`
beside the decoder, no output matrix. An adapter has the head among its `modules_to_save`.
"""

from dataclasses import replace

import torch
from torch import nn

from minisft.model import Decoder
from minisft.options import UserError
from minisft.weights import adapter_tensors, load_model, stored_tensors


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
    return {**config.to_dict(), "architectures": [f"{family}ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def choose_padding(model, tokenizer, stop_ids):
    """Make config.json name a token to pad with, with which no conversation ends.

    In a batch transformers takes for the last token the last one that is not this.
    """
    content = model.config.original
    candidates = (content.get("pad_token_id"), tokenizer.bos_token_id, model.config.bos_token_id)
    content["pad_token_id"] = next((id for id in candidates if id not in {None, *stop_ids}), None)


def load_reward_model(model_dir, dtype=torch.float32, device="cpu", quantization_bit=None):
    """The RewardModel of a checkpoint folder, frozen; arguments as `load_model` has them.

    A language model's gets a new head, drawn as its weights once were, and in float32.
    """
    model = load_model(model_dir, dtype, device, quantization_bit, RewardModel)
    if model.score.weight.is_meta and torch.device(device).type != "meta":
        model.score.weight = nn.Parameter(new_head(model.config).to(device), requires_grad=False)
    return model


def new_head(config):
    """A weight (1, D) for `score`, drawn on the CPU as the model's weights once were."""
    return torch.randn(1, config.hidden_size) * config.initializer_range


def has_head(model_dir, adapter_dir=None):
    """Whether the checkpoint or the adapter is a reward model's, with a trained head."""
    stored = [stored_tensors(model_dir), adapter_tensors(adapter_dir) if adapter_dir else {}]
    return any("score.weight" in tensors for tensors in stored)


def check_head(model_dir, adapter_dir=None):
    """UserError unless there is such a head."""
    if not has_head(model_dir, adapter_dir):
        raise UserError(f"{adapter_dir or model_dir}: is no reward model (there is no score.weight "
                        "in it); train.py --stage rm makes one")
