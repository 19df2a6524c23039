"""ModelConfig: what a checkpoint's config.json says about the architecture, by the same names.

config = ModelConfig.load("examples/base")
print(config.hidden_size, config.num_hidden_layers)
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, is_number, read_json, token_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
LAYER_TYPES = ("full_attention", "sliding_attention")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Where null says something: no window, as many as other heads; elsewhere it is as if left out.
MEANT_NULL = ("sliding_window", "num_key_value_heads", "head_dim")
# More than any model has, and little enough that its shape can be computed with.
LARGEST = {"num_hidden_layers": 2**10, "vocab_size": 2**24, "max_position_embeddings": 2**40}

# What a family assumes where its config.json is silent (from the configuration classes of
# transformers; checkpoints older than a field rely on it).
FAMILY_DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"qkv_bias": True, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"qk_norm": True, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
}


@dataclass
class ModelConfig:
    """The architecture. Fields are those of config.json; the last group is derived from it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None
    head_dim: int = None
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list = None
    original: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            full = self.num_hidden_layers
            if self.sliding_window is not None:
                full = min(self.max_window_layers, full)
            windowed = self.num_hidden_layers - full
            self.layer_types = ["full_attention"] * full + ["sliding_attention"] * windowed

    @classmethod
    def load(cls, model_dir):
        """Read `model_dir/config.json`; UserError says what is missing or not supported."""
        path = Path(model_dir) / "config.json"
        return cls.from_dict(read_json(path), source=path)

    @classmethod
    def from_dict(cls, content, source="config.json"):
        """Build from the parsed config.json; unsupported features raise UserError, named."""
        _refuse_unsupported(content, source)
        family = content["model_type"]
        values = dict(FAMILY_DEFAULTS[family])
        names = {one.name for one in dataclasses.fields(cls)} - {"original", "qkv_bias", "qk_norm"}
        values.update(
            {
                name: content[name]
                for name in names
                if name in content and (content[name] is not None or name in MEANT_NULL)
            }
        )
        values.update(_rotary(content, source))
        if family in ("qwen2", "qwen3") and not content.get("use_sliding_window"):
            values["sliding_window"] = None
            values.pop("layer_types", None)
        if family in ("llama", "mistral"):
            values["max_window_layers"] = 0
            values.pop("layer_types", None)
            if family == "llama":
                values["sliding_window"] = None
        if family == "qwen2":
            values["attention_bias"] = False
        _check_sizes(values, source)
        _check_others(values, source)
        return cls(**values, original=content)

    def to_dict(self):
        """The config.json to write: what was read, with the fields that can have changed since."""
        content = {name: value for name, value in vars(self).items() if name != "original"}
        if self.original:
            changeable = ("vocab_size", "tie_word_embeddings")
            content = {**self.original, **{name: content[name] for name in changeable}}
        return content

    @property
    def context_length(self):
        """How many positions the model is made for, rotary scaling included."""
        scaling = self.rope_scaling or {}
        stretched = 0
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            stretched = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        return max(self.max_position_embeddings, stretched)

    @property
    def dtype(self):
        """The torch dtype name the checkpoint is stored in, as far as config.json says so."""
        name = self.original.get("dtype") or self.original.get("torch_dtype") or "float32"
        return name if name in ("float32", "bfloat16", "float16") else "float32"

    @property
    def eos_token_ids(self):
        """`eos_token_id` as a list, empty if there is none."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


def _refuse_unsupported(content, source):
    family = content.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{source}: model_type '{family}' is not supported; minisft knows {', '.join(FAMILIES)}"
        )
    if content.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act '{content['hidden_act']}': only silu is supported")
    if content.get("quantization_config"):
        raise UserError(
            f"{source}: this checkpoint is stored quantised (quantization_config); "
            "use the original, unquantised one"
        )
    if content.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(f"{source}: partial_rotary_factor is not supported")


def _rotary(content, source):
    """rope_theta and rope_scaling from any of the three ways a config.json spells them."""
    scaling = content.get("rope_parameters") or content.get("rope_scaling")
    theta = content.get("rope_theta", 10000.0)
    if not scaling:
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(scaling, dict):
        raise UserError(f"{source}: rope_scaling must be an object, not {scaling!r}")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", theta)
    rope_type = scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"{source}: rope type '{rope_type}' is not supported; minisft computes "
            f"{', '.join(ROPE_TYPES)}"
        )
    if scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = content.get(
            "original_max_position_embeddings", content.get("max_position_embeddings", 2048)
        )
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    needed = needed.get(rope_type, ("factor",))
    for name in ROPE_NUMBERS:
        value = scaling.get(name)
        if not is_number(value) and (value is not None or name in needed):
            raise UserError(
                f"{source}: rope type '{rope_type}' needs the number '{name}', not {value!r}"
            )
    return {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}


def _check_sizes(values, source):
    """Sizes are whole numbers that a model can have, and fit one another."""
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"{source}: '{name}' is missing")
    for name in (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        most = LARGEST.get(name, 2**20)
        if values.get(name) is not None and not is_integer(values[name], 1, most):
            raise UserError(
                f"{source}: {name} must be a whole number from 1 to {most:,}, not {values[name]!r}"
            )
    heads = values["num_attention_heads"]
    key_value_heads = values.get("num_key_value_heads") or heads
    if heads % key_value_heads:
        raise UserError(
            f"{source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {key_value_heads}"
        )
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim, rest = divmod(values["hidden_size"], heads)
        if rest:
            raise UserError(f"{source}: hidden_size is not a multiple of num_attention_heads")
    if head_dim % 2 or head_dim < 4:
        raise UserError(f"{source}: the width of a head is {head_dim}; it must be even, at least 4")


def _check_others(values, source):
    """The fields that are not sizes, each of its kind."""
    for name, above in (("rms_norm_eps", 0), ("rope_theta", 1), ("initializer_range", 0)):
        if name in values and not is_number(values[name], above):
            raise UserError(
                f"{source}: {name} must be a number above {above}, not {values[name]!r}"
            )
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if type(values.get(name, False)) is not bool:
            raise UserError(f"{source}: {name} must be true or false, not {values[name]!r}")
    for name in ("bos_token_id", "eos_token_id"):
        token_ids(values.get(name), source, name)
    window = values.get("sliding_window")
    if window is not None and not is_integer(window, 1):
        raise UserError(
            f"{source}: sliding_window must be a whole number of at least 1, or null, "
            f"not {window!r}"
        )
    if not is_integer(values.get("max_window_layers", 0)):
        raise UserError(
            f"{source}: max_window_layers must be a whole number, not "
            f"{values['max_window_layers']!r}"
        )
    num_layers, layer_types = values["num_hidden_layers"], values.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list)
        and len(layer_types) == num_layers
        and all(one in LAYER_TYPES for one in layer_types)
    ):
        raise UserError(
            f"{source}: layer_types must name one of {', '.join(LAYER_TYPES)} for each "
            f"of the {num_layers} layers of num_hidden_layers"
        )
