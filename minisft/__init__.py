"""minisft: select data for, fine-tune, evaluate, export and chat with Llama-family models.

    from minisft import Assistant

    assistant = Assistant("examples/base", adapter="runs/demo")
    print("".join(assistant.stream([{"role": "user", "content": "What is 2 + 2?"}])))

The names in PUBLIC stay; everything else may move. Each is imported at its first use, so that
`import minisft` is fast and does not load torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# The modules that define the public names.
PUBLIC = {
    "Assistant": "minisft.generation.assistant",
    "ModelConfig": "minisft.model.config",
    "Sampling": "minisft.generation.sampling",
    "Tokenizer": "minisft.text.tokenizer",
    "generate": "minisft.generation.generate",
    "get_template": "minisft.text.template_choice",
    "load_adapter": "minisft.checkpoints.adapters",
    "load_model": "minisft.checkpoints.folders",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'minisft' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(PUBLIC)
