"""Choose the number type of each tensor in a GGUF file, as llama.cpp does.

    tensor_type("blk.0.attn_q.weight", (2048, 2048), "q4_k_m", config)     # Q4_K
    tensor_type("output.weight", (32000, 2048), "q4_k_m", config)          # Q6_K

Most matrices get the type that --quantization names. Three rules differ from it:

    vectors (norms, biases)           F32: they are small and sensitive
    the output matrix                 Q6_K instead of 4 and 5 bits: it chooses between tokens
    attn_v and ffn_down in q4_k_m     Q6_K in about half of the layers: they lose most by rounding

The tour explains it: docs/tour/12_ship.md.
"""

import torch
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from minisft.model.config import ModelConfig

# --quantization -> the type of the file, and of most of its matrices.
QUANTIZATIONS = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, Type.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "q4_1": (LlamaFileType.MOSTLY_Q4_1, Type.Q4_1),
    "q5_0": (LlamaFileType.MOSTLY_Q5_0, Type.Q5_0),
    "q5_1": (LlamaFileType.MOSTLY_Q5_1, Type.Q5_1),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
}
# Types whose bytes are the numbers. All others are quantised in blocks.
TORCH_TYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
# For rows that cannot be cut into blocks of a type. F16 for all other types.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def tensor_type(name: str, shape: tuple[int, ...], quantization: str, config: ModelConfig) -> Type:
    """The type of a tensor, named as in the GGUF file."""
    type = QUANTIZATIONS[quantization][1]
    if len(shape) == 1:
        return Type.F32
    if type in TORCH_TYPES:
        return type
    # A tied embedding is the output matrix as well.
    output = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    is_output = name == output and type != Type.Q8_0
    if is_output or (quantization == "q4_k_m" and _is_sensitive(name, config.num_hidden_layers)):
        type = Type.Q6_K
    return type_for_rows(type, shape[-1])


def _is_sensitive(name: str, num_layers: int) -> bool:
    """True for tensors that q4_k_m stores in Q6_K.

    Among attn_v and ffn_down these are the first and the last eighth of the layers, and every third
    layer between them.
    """
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return False
    if num_layers == 80 and name.endswith("attn_v.weight"):
        # Llama 70B shares each value head among eight query heads. llama.cpp uses Q5_K here, which
        # we do not write.
        return True
    layer, eighth = int(name.split(".")[1]), num_layers // 8
    is_outer = layer < eighth or layer >= 7 * num_layers // 8
    return is_outer or (layer - eighth) % 3 == 2


def type_for_rows(type: Type, row_length: int) -> Type:
    """The type, or one with smaller blocks if a row cannot be cut into its blocks."""
    for candidate in (type, FALLBACKS.get(type, Type.F16)):
        if row_length % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Type.F16
