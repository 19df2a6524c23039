"""Loading reward models."""

import torch
from torch import nn

from minisft.checkpoints.adapters import adapter_tensors
from minisft.checkpoints.folders import load_model, stored_tensors
from minisft.common.errors import UserError
from minisft.model.reward import RewardModel, new_head


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


def has_head(model_dir, adapter_dir=None):
    """Whether the checkpoint or the adapter is a reward model's, with a trained head."""
    stored = [stored_tensors(model_dir), adapter_tensors(adapter_dir) if adapter_dir else {}]
    return any("score.weight" in tensors for tensors in stored)


def check_head(model_dir, adapter_dir=None):
    """UserError unless there is such a head."""
    if not has_head(model_dir, adapter_dir):
        raise UserError(
            f"{adapter_dir or model_dir}: is no reward model (there is no score.weight "
            "in it); train.py --stage rm makes one"
        )
