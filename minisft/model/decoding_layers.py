"""Embedding, RMSNorm and Linear for inference on a CPU: the same numbers, faster.

    use_decoding_layers(model)      # in place; load_model does it for a CPU

At batch size 1 on a CPU, most of the time of a token goes into reading the weights and calling
torch. Other operations are then faster than for many rows. On some CPUs one of them is faster for
any number of rows, as in scoring. Every other call, such as one with gradients, gets the plain
layer.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.common.devices import is_intel
from minisft.model.basic_layers import Embedding, Linear, RMSNorm

HAS_ONEDNN = torch.backends.mkldnn.is_available()
# With AVX2, oneDNN is faster than MKL for any number of rows: 2 to 18 % for the layers of a batch,
# 1.3 to 1.5 times for its logits (AMD EPYC). With AVX-512, it is for a few rows only.
HAS_AVX2_ONLY = torch.backends.cpu.get_cpu_capability() == "AVX2"
# oneDNN's call takes longer than MKL's, so only large matrices gain, and on Intel only larger ones.
# With 2^18, a Xeon wrote 16 tokens/s of SmolLM2-135M in float32; with 2^20, it writes 24.
MIN_WEIGHTS = 2**20 if is_intel() else 2**18
FEW_ROWS = 64
PRODUCT_TYPES = torch.float32, torch.bfloat16  # of rms_norm_by_product


def use_decoding_layers(model: nn.Module) -> None:
    """Replace the basic layers of a model by those for decoding. In place; weights are shared."""
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if type(module) is Embedding:
            model.set_submodule(name, DecodingEmbedding(module))
        elif type(module) is Linear or type(module) is nn.Linear:  # merging leaves nn.Linear
            model.set_submodule(name, DecodingLinear(module))
        elif type(module) is RMSNorm:
            model.set_submodule(name, DecodingRMSNorm(module))


class DecodingEmbedding(Embedding):
    """An Embedding whose logits take the fast path."""

    def __init__(self, layer: Embedding):
        super().__init__(layer.num_embeddings, layer.embedding_dim, device="meta")
        self.weight = layer.weight

    def logits(self, x: Tensor) -> Tensor:
        """x W^T: scores (..., V) from hidden states x (..., D)."""
        return linear(x, self.weight)


class DecodingLinear(Linear):
    """A Linear that takes the fast path."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        return linear(input, self.weight, self.bias)


class DecodingRMSNorm(RMSNorm):
    """An RMSNorm that takes the fast path for one position."""

    def __init__(self, layer: RMSNorm):
        super().__init__(0, layer.eps)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension of x (..., width), in the type of x."""
        is_known_type = x.dtype == self.weight.dtype and x.dtype in PRODUCT_TYPES
        is_decoding = x.dim() == 3 and x.shape[1] == 1 and _has_few_rows(x)
        if is_known_type and is_decoding and _is_plain_inference(x):
            return rms_norm_by_product(x, self.weight, self.eps)
        return super().forward(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., out) from x (..., in), W (out, in) and b (out,)."""
    is_float32 = x.dtype == weight.dtype == torch.float32
    is_large = weight.numel() >= MIN_WEIGHTS
    is_faster = HAS_ONEDNN and is_large and (HAS_AVX2_ONLY or _has_few_rows(x))
    if is_float32 and is_faster and _is_plain_inference(x):
        return linear_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in float32 by oneDNN instead of MKL.

    For large matrices, AMD takes half the time for one row and two thirds for eight; Intel as long
    for one row, and half to two thirds for eight.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rms_norm_by_product(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm for x (B, 1, D) without gradients: four operations instead of eleven.

    It computes in float32, as F.rms_norm does.
    """
    # eps + x x^T / D: the mean square as a matrix product.
    x32 = x.float()
    mean_square = torch.baddbmm(_constant(eps), x32, x32.mT, alpha=1 / x.shape[-1])  # (B, 1, 1)
    return (x32 * mean_square.rsqrt_()).mul_(weight).to(x.dtype)


def _has_few_rows(x: Tensor) -> bool:
    """True if x (..., in) has at most FEW_ROWS rows."""
    return x.numel() <= FEW_ROWS * x.shape[-1]


def _is_plain_inference(x: Tensor) -> bool:
    """True on a CPU, without gradients, autocast or compiler."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses its own kernels
    )


@lru_cache(maxsize=8)
def _constant(value: float) -> Tensor:
    """A scalar on the CPU; creating one takes as long as a small operation."""
    return torch.tensor(value, device="cpu")
