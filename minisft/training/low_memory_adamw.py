"""AdamW in less memory: moments in 8 bits, and weights in bfloat16.

    optimizer = LowMemoryAdamW(groups, 1e-4, (0.9, 0.999), eps=1e-8, eight_bit=True, seed=42)

AdamW keeps a mean m and a mean square v of the gradients g of every weight w (step t, rate r,
decay d):

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - r d w - r m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

In float32, weights, gradients and moments take 16 bytes a parameter.

`--optim adamw_8bit` (arXiv 2110.02861) keeps m and v of a matrix in 8 bits: a block of 256 numbers
of a row is divided by its largest, and each number becomes the nearest of 256 levels. The step
itself is computed in float32, a few million weights at a time. Blocks end with their row, so a
model that is sharded by rows (FSDP) has the same blocks. Norms and biases keep float32.

`--pure_bf16` keeps weights and gradients in bfloat16. A weight has 8 significant bits there, and
most updates are smaller than half of the last one: rounding to the nearest would drop them all.
Stochastic rounding goes up or down at random, so that the expected value is exact. The random
numbers follow from the seed, the step and, with FSDP, the rank, so a resumed run draws them again.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.common import processes
from minisft.model.level_table import LevelTable
from minisft.model.quantized import dequantize_blocks, dynamic_levels, scale_blocks

BLOCK = 256
# Numbers that are updated at a time. On a CPU their float32 copies fit into its cache, which takes
# two thirds of the time that 2**22 take.
PIECE_ON_CPU, PIECE_ON_GPU = 2**18, 2**22
MOMENTS = "exp_avg", "exp_avg_sq"  # m and v, by torch's names
GOLDEN_RATIO = round(2**16 * (math.sqrt(5) - 1) / 2)  # its fraction, 0.618, in 16 bits


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW for weights in float32 or bfloat16, with moments in float32 or in 8 bits."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight_bit: bool,
        seed: int,
    ):
        """params: groups with "params" and "weight_decay". seed: for stochastic rounding."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.eight_bit, self.seed = eight_bit, seed
        device = self.param_groups[0]["params"][0].device
        # A mean has a sign, a mean square has none.
        self.tables = [LevelTable(dynamic_levels(signed).to(device)) for signed in (True, False)]

    def prepare(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter: zeros before its first step. Sharded like the parameter."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                if self.eight_bit and parameter.ndim == 2:
                    scales = parameter.detach()[:, ::BLOCK]  # one for each block of a row
                    state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                    state[f"{name}_scale"] = torch.zeros_like(scales, dtype=torch.float32)
                else:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        pairs = [(group, matrix) for group in self.param_groups for matrix in group["params"]]
        for number, (group, parameter) in enumerate(pairs):
            if parameter.grad is not None:
                step = int(self.prepare(parameter)["step"]) + 1
                self._update(parameter, step, group, self._generator(parameter, number))

    def _generator(self, parameter: Tensor, number: int) -> torch.Generator:
        """Draws the same numbers in every step. Ranks with the same weights draw the same ones."""
        rank = processes.rank() if processes.is_sharded(parameter) else 0
        seed = (self.seed + 1_000_003 * number + rank) % 2**63
        return torch.Generator(parameter.device).manual_seed(seed)

    def _update(
        self, parameter: Tensor, step: int, group: dict[str, Any], generator: torch.Generator
    ) -> None:
        """Update a parameter and its state, some rows at a time."""
        state = self.state[parameter]
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        moments = [tensor for name, tensor in state.items() if name != "step"]
        rows = max(1, piece_size(parameter.is_cpu) // math.prod(parameter.shape[1:]))
        pieces = [
            processes.local_rows(tensor).split(rows)
            for tensor in (parameter.detach(), parameter.grad, *moments)
        ]
        for weight, gradient, *stored in zip(*pieces, strict=True):
            if not len(weight):  # a rank may have no rows
                continue
            gradient, new = gradient.float(), weight.float()  # float32 weights change in place
            mean, square = self._read(stored)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            divisor = square.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
            new.mul_(1 - rate * group["weight_decay"])
            new.addcdiv_(mean, divisor, value=-rate / correction1)
            if weight.dtype == torch.bfloat16:
                weight.copy_(self.to_bfloat16(new, generator, step))
            del gradient, new, divisor  # free their memory before the moments need more
            self._write(stored, mean, square)

    def _read(self, stored: list[Tensor]) -> list[Tensor]:
        """m and v in float32, of some rows."""
        if len(stored) == len(MOMENTS):
            return stored
        pairs = zip(stored[::2], stored[1::2], self.tables, strict=True)
        return [dequantize_rows(indices, scales, table.levels) for indices, scales, table in pairs]

    def _write(self, stored: list[Tensor], mean: Tensor, square: Tensor) -> None:
        """Store m and v of some rows; in float32 they have changed in place."""
        if len(stored) == len(MOMENTS):
            return
        pairs = zip(stored[::2], stored[1::2], (mean, square), self.tables, strict=True)
        for indices, scales, values, table in pairs:
            new_indices, new_scales = quantize_rows(values, table)
            # A small v must not become 0: without it, an m that is left would be divided by eps.
            indices.copy_(new_indices.clamp_(min=1) if values is square else new_indices)
            scales.copy_(new_scales)

    @staticmethod
    def to_bfloat16(values: Tensor, generator: torch.Generator, step: int) -> Tensor:
        """The weights (float32) as they are stored: rounded up or down at random."""
        return round_stochastically(values, generator, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the moments; rate, decay and betas stay.

        torch's own method would convert the moments to the type of the weights.
        """
        parameters = [matrix for group in self.param_groups for matrix in group["params"]]
        for index, values in state_dict["state"].items():
            state = self.prepare(parameters[index])
            for name, value in values.items():
                state[name].copy_(value)


def quantize_rows(values: Tensor, table: LevelTable) -> tuple[Tensor, Tensor]:
    """(R, C) float32 -> indices of levels (R, C) uint8, and the largest of each block (R, blocks).

    A row begins a new block; its last block is filled up with zeros.
    """
    num_rows, num_columns = values.shape
    block = min(BLOCK, num_columns)
    padded = F.pad(values, (0, -num_columns % block))
    scaled, largest = scale_blocks(padded.flatten(), block)
    indices = table.nearest(scaled)
    return indices.view(num_rows, -1)[:, :num_columns], largest.view(num_rows, -1)


def dequantize_rows(indices: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The values (R, C) in float32 from the result of quantize_rows."""
    num_rows, num_columns = indices.shape
    block = min(BLOCK, num_columns)
    padded = F.pad(indices, (0, -num_columns % block))
    values = dequantize_blocks(padded.flatten(), scales.flatten(), levels, block)
    return values.view(num_rows, -1)[:, :num_columns]


def round_stochastically(values: Tensor, generator: torch.Generator, step: int) -> Tensor:
    """float32 -> bfloat16, up or down at random; over all seeds, the mean is the exact value.

    bfloat16 is the upper half of float32. A random lower half is added, and carries into the upper
    half with the probability that the lower half stands for.

    generator: must draw the same numbers in every step. The golden ratio times the step is added to
    them, modulo 1, so that the numbers of a weight are spread evenly over its steps. A weight that
    should move by a tenth of the distance to its neighbour in each step then moves in about every
    tenth step. With independent numbers it might not move for thirty steps; their errors add up to
    1.6 to 2.1 times as much in 200 steps of AdamW. (Only updates that repeat after 21, 34, 55, ...
    steps, where the golden ratio comes back to its start, would be worse off.)
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    noise.add_(step * GOLDEN_RATIO % 2**16).bitwise_and_(2**16 - 1)
    rounded = noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
    # A GPU's NaN is 0x7fffffff: the sum overflows to -0.
    return rounded.masked_fill_(values.isnan(), torch.nan).bfloat16()


def moment_bytes(parameter: Tensor, eight_bit: bool) -> int:
    """Bytes of a parameter's mean and mean square."""
    if eight_bit and parameter.ndim == 2:
        num_rows, num_columns = parameter.shape
        return 2 * num_rows * (num_columns + 4 * -(-num_columns // BLOCK))
    return 2 * 4 * parameter.numel()


def piece_size(is_cpu: bool) -> int:
    """The numbers that are updated at a time."""
    return PIECE_ON_CPU if is_cpu else PIECE_ON_GPU


def update_bytes(parameter: Tensor, eight_bit: bool, is_cpu: bool) -> int:
    """Bytes that are needed to update a parameter, besides weight, gradient and moments.

    For each number of a piece, some float32 copies; measured with torch's profiler.
    """
    return (30 if eight_bit else 18) * min(piece_size(is_cpu), parameter.numel())
