"""ModelConfig: the architecture of a model, with the names and values of config.json.

config = ModelConfig.load("examples/base")
print(config.hidden_size, config.num_hidden_layers)

The tour explains it: docs/tour/05_model.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minisft.common.json_files import read_json
from minisft.model.baichuan_config import baichuan_values
from minisft.model.config_checks import (
    check_values,
    refuse_unsupported,
    rotary_values,
    smollm3_values,
)

# The defaults of each family where config.json has no value (from transformers' config classes).
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "qkv_bias": True,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "qk_norm": True,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    "baichuan": {"fused_qkv": True, "norm_head": True},
}
# Fields in which null is a value: no window, or the number that __post_init__ derives. In other
# fields null means the family's default.
NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim")
# Fields that config.json does not set, or not in every family.
NOT_IN_FILE = (
    *("original", "qkv_bias", "qk_norm", "no_rope_layers"),
    *("fused_qkv", "norm_head", "alibi"),
)


@dataclass
class ModelConfig:
    """The fields of config.json, then those that follow from the family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: num_attention_heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    qkv_bias: bool = False
    qk_norm: bool = False
    no_rope_layers: list[int] = field(default_factory=list)  # per layer: 1 rotary, 0 no positions
    fused_qkv: bool = False  # one matrix for queries, keys and values
    norm_head: bool = False  # the rows of the output matrix count with length 1
    alibi: bool = False  # in place of rotary positions
    sliding_window: int | None = None
    max_window_layers: int = 0  # this many layers, from the first, have full attention
    layer_types: list[str] = field(default_factory=list)  # empty: from max_window_layers
    original: dict[str, Any] = field(default_factory=dict, repr=False)  # the content of config.json

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if not self.no_rope_layers:
            self.no_rope_layers = [1] * self.num_hidden_layers
        if not self.layer_types:
            num_full = self.num_hidden_layers
            if self.sliding_window is not None:
                num_full = min(self.max_window_layers, num_full)
            num_sliding = self.num_hidden_layers - num_full
            self.layer_types = ["full_attention"] * num_full + ["sliding_attention"] * num_sliding

    @classmethod
    def load(cls, model_dir: str | Path) -> Self:
        """Read `model_dir/config.json`; UserError if it is missing, wrong or not supported."""
        path = Path(model_dir) / "config.json"
        return cls.from_dict(read_json(path), source=path)

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str | Path = "config.json") -> Self:
        """The config from the content of a config.json; source: its path, for errors."""
        refuse_unsupported(content, list(FAMILY_DEFAULTS), source)
        family = content["model_type"]
        values = dict(FAMILY_DEFAULTS[family])
        for name in cls.__dataclass_fields__:
            is_set = name in content and (content[name] is not None or name in NULLABLE)
            if is_set and name not in NOT_IN_FILE:
                values[name] = content[name]
        values.update(rotary_values({**content, **values}, source))
        if family in ("qwen2", "qwen3") and not content.get("use_sliding_window"):
            values["sliding_window"] = None
            values.pop("layer_types", None)
        if family in ("llama", "mistral", "smollm3", "baichuan"):
            values["max_window_layers"] = 0
            values.pop("layer_types", None)
        if family in ("llama", "smollm3", "baichuan"):
            values["sliding_window"] = None
        if family == "smollm3":
            values.update(smollm3_values(content, source))
        if family == "baichuan":
            values.update(baichuan_values(content, source))
        if family == "qwen2":
            values["attention_bias"] = False
        check_values(values, source)
        for name in ("num_key_value_heads", "head_dim"):
            values[name] = values.get(name) or 0
        return cls(**values, original=content)

    def to_dict(self) -> dict[str, Any]:
        """The config.json to write: the original with the fields that may have changed."""
        if not self.original:
            return {name: value for name, value in vars(self).items() if name != "original"}
        return {
            **self.original,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    @property
    def context_length(self) -> int:
        """The number of positions that the model supports, with rotary scaling."""
        scaling = self.rope_scaling or {}
        stretched = 0
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            stretched = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        return max(self.max_position_embeddings, stretched)

    @property
    def has_dynamic_rope(self) -> bool:
        """True if the rotary angles of all positions depend on the length of the text."""
        return self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic"

    @property
    def dtype(self) -> str:
        """The name of the torch dtype that config.json states; float32 if it states none."""
        name = self.original.get("dtype") or self.original.get("torch_dtype")
        return name if name in ("float32", "bfloat16", "float16") else "float32"

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list; empty if there is none."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
