"""The names of transformers' model classes, which config.json states as `architectures`."""

from typing import Any

PREFIXES = {"smollm3": "SmolLM3"}


def class_name(model_type: str, task: str = "CausalLM") -> str:
    """`llama` -> `LlamaForCausalLM`. task: `CausalLM` or `SequenceClassification`."""
    return f"{PREFIXES.get(model_type, model_type.capitalize())}For{task}"


def reward_model_fields(content: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a reward model from that of its language model.

    Neither transformers nor Baichuan2's own code has a class for a reward model on Baichuan2, so
    its config.json names none, and other programs refuse it. minisft reads it.
    """
    has_class = content["model_type"] != "baichuan"
    names = [class_name(content["model_type"], "SequenceClassification")] if has_class else []
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    kept = content if has_class else {k: v for k, v in content.items() if k != "auto_map"}
    return {**kept, "architectures": names, **labels}
