"""minisft: select data for, fine-tune, evaluate, export and chat with Llama-family models.

    from minisft import Assistant

    assistant = Assistant("examples/base", adapter="runs/demo")
    print("".join(assistant.stream([{"role": "user", "content": "What is 2 + 2?"}])))

The names in __all__ are public; everything else may move. They are imported at their first use,
so that `import minisft` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisft.checkpoints.adapters import load_adapter
    from minisft.checkpoints.folders import load_model
    from minisft.generation.assistant import Assistant
    from minisft.generation.generate import generate
    from minisft.generation.sampling import Sampling
    from minisft.model.config import ModelConfig
    from minisft.text.template import get_template
    from minisft.text.tokenizer import Tokenizer

__all__ = [
    "Assistant",
    "ModelConfig",
    "Sampling",
    "Tokenizer",
    "generate",
    "get_template",
    "load_adapter",
    "load_model",
]
_MODULES = {
    "Assistant": "minisft.generation.assistant",
    "ModelConfig": "minisft.model.config",
    "Sampling": "minisft.generation.sampling",
    "Tokenizer": "minisft.text.tokenizer",
    "generate": "minisft.generation.generate",
    "get_template": "minisft.text.template",
    "load_adapter": "minisft.checkpoints.adapters",
    "load_model": "minisft.checkpoints.folders",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'minisft' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
