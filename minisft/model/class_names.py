"""The names of transformers' model classes, which config.json states as `architectures`."""

PREFIXES = {"smollm3": "SmolLM3"}


def class_name(model_type: str, task: str = "CausalLM") -> str:
    """`llama` -> `LlamaForCausalLM`. task: `CausalLM` or `SequenceClassification`."""
    return f"{PREFIXES.get(model_type, model_type.capitalize())}For{task}"
