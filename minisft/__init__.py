"""minisft: score, select, fine-tune, evaluate, export and chat, in PyTorch that can be read.

from minisft import Assistant
"""


def __getattr__(name):
    """`minisft.Assistant`, imported when it is asked for: `import minisft` loads no torch."""
    if name == "Assistant":
        from minisft.generation.assistant import Assistant

        return Assistant
    raise AttributeError(f"module 'minisft' has no attribute '{name}'")
