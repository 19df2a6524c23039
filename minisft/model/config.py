"""ModelConfig: the architecture of a model, with the names and values of config.json.

config = ModelConfig.load("examples/base")
print(config.hidden_size, config.num_hidden_layers)

The tour explains it: docs/tour/05_model.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minisft.common.json_files import read_json
from minisft.model.config_values import config_values


@dataclass
class ModelConfig:
    """The fields of config.json, then those that follow from the family (config_values.py)."""

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
        return cls(**config_values(content, source), original=content)

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
