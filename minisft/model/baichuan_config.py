"""Fields that the config.json of Baichuan2 implies, and checks of it."""

from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer
from minisft.model.config_checks import rotary_values

# Baichuan 1 has the same model_type, and another output matrix. Users add tokens to both.
BAICHUAN1_CLASS, BAICHUAN1_TOKENS, BAICHUAN2_TOKENS = "BaiChuanForCausalLM", 64_000, 125_696


def baichuan_values(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The fields of Baichuan2 that its config.json implies.

    UserError for Baichuan 1, whose output matrix is plain, and for fields that Baichuan's own code
    does not have.
    """
    num_tokens = content.get("vocab_size")
    is_small = is_integer(num_tokens, BAICHUAN1_TOKENS, BAICHUAN2_TOKENS - 1)
    if is_small or BAICHUAN1_CLASS in str(content.get("architectures")):
        reason = f"vocab_size is {num_tokens}" if is_small else f"its class is {BAICHUAN1_CLASS}"
        raise UserError(
            f"{source}: Baichuan 1 is not supported ({reason}). Use Baichuan2, which has "
            f"{BAICHUAN2_TOKENS:,} tokens."
        )
    num_heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    plain: dict[str, Any] = {"num_key_value_heads": num_heads, "z_loss_weight": 0}
    if is_integer(num_heads, 1) and is_integer(width):
        plain["head_dim"] = width // num_heads
    plain |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), False)
    for name, value in plain.items():
        if content.get(name, value) not in (value, None):
            raise UserError(f"{source}: {name} must be {value} in Baichuan2, not {content[name]!r}")
    # The 7B model has rotary positions and states how many, the 13B model has ALiBi. If this field
    # was added or removed, the number of layers decides, as in llama.cpp.
    stated, num_layers = content.get("max_position_embeddings"), content.get("num_hidden_layers")
    alibi = num_layers == 40 or (num_layers != 32 and stated is None)
    if isinstance(content.get("alibi"), bool):  # in configs that minisft wrote
        alibi = content["alibi"]
    if alibi and rotary_values(content, source)["rope_scaling"]:
        raise UserError(f"{source}: rope_scaling has no meaning with ALiBi (Baichuan2-13B)")
    length = stated or content.get("model_max_length") or 4096
    return {"alibi": alibi, "max_position_embeddings": length}
