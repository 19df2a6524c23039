"""Load reward models, and prepare them for transformers.

model = load_reward_model("runs/reward-model")     # or a language model, for a new head
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from minisft.checkpoints.adapter_forms import adapter_tensors
from minisft.checkpoints.folders import load_weights, open_model, stored_tensors
from minisft.common.errors import UserError
from minisft.model.reward import Model, RewardModel, new_head
from minisft.text.tokenizer import Tokenizer


def load_reward_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization_bit: int | None = None,
) -> RewardModel:
    """The RewardModel in a checkpoint folder, frozen. Arguments as in load_model.

    A language model gets a new random head, in float32.
    """
    model, stored = open_model(path, RewardModel)
    load_weights(model, stored, dtype, device, quantization_bit)
    if "score.weight" not in stored and torch.device(device).type != "meta":
        model.score.weight = nn.Parameter(new_head(model.config).to(device), requires_grad=False)
    return model.eval()


def has_head(path: str | Path, adapter_dir: str | Path | None = None) -> bool:
    """True if the checkpoint, or the adapter, has the trained head of a reward model."""
    if "score.weight" in stored_tensors(path):
        return True
    return adapter_dir is not None and "score.weight" in adapter_tensors(adapter_dir)


def check_head(path: str | Path, adapter_dir: str | Path | None = None) -> None:
    """UserError unless the checkpoint, or the adapter, is a reward model."""
    if not has_head(path, adapter_dir):
        raise UserError(
            f"{adapter_dir or path} is not a reward model: it has no tensor score.weight. "
            "train.py --stage rm trains a reward model."
        )


def choose_padding(model: Model, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
    """Give config.json a padding token that does not end a conversation.

    transformers scores a conversation at the last token that is not padding.
    """
    content = model.config.original
    candidates = (content.get("pad_token_id"), tokenizer.bos_token_id, model.config.bos_token_id)
    content["pad_token_id"] = next((id for id in candidates if id not in {None, *stop_ids}), None)
