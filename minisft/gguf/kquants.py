"""K-quants: blocks of 256 numbers whose scales are quantised too (Q4_K and Q6_K of llama.cpp).

    data = quantize_q4_k(np.random.randn(8, 512).astype(np.float32))     # (8, 288), uint8
    gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K)          # (8, 512), float32

    Q4_K    x = d * scale * q - d_min * minimum     8 groups of 32 numbers, 4.5 bits per number
            q in 0..15, scale and minimum in 0..63, d and d_min in float16
    Q6_K    x = d * scale * q                       16 groups of 16 numbers, 6.5625 bits per number
            q in -32..31, scale in -128..127, d in float16

Rounding to the grid from the smallest to the largest number of a group is not the best choice. So
several slightly finer and coarser grids are tried. For each, least squares gives the best scale,
and the grid with the smallest error wins. Large numbers weigh more than small ones.

Shapes: N blocks, M groups, n numbers in a group. Groups are columns, so that numpy computes along
long rows.

The tour explains it: docs/tour/12_ship.md.
"""

from collections.abc import Callable

import numpy as np

BLOCK = 256
BLOCKS_AT_ONCE = 1024  # enough to amortise the calls; the arrays still fit the caches
TINY = 1e-15  # a group whose numbers are all below this counts as zero

Array = np.ndarray
Sums = tuple[Array, Array, Array]


def quantize_q4_k(rows: Array) -> Array:
    """float32 (R, C), C a multiple of 256 -> uint8 (R, C / 256 * 144)."""
    return _by_blocks(rows, _q4_k_blocks, 144)


def quantize_q6_k(rows: Array) -> Array:
    """float32 (R, C), C a multiple of 256 -> uint8 (R, C / 256 * 210)."""
    return _by_blocks(rows, _q6_k_blocks, 210)


def _by_blocks(rows: Array, quantize: Callable[[Array], Array], block_bytes: int) -> Array:
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, BLOCK)
    data = np.empty((len(blocks), block_bytes), dtype=np.uint8)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            part = slice(start, start + BLOCKS_AT_ONCE)
            data[part] = quantize(blocks[part])
    return data.reshape(len(rows), -1)


def _q4_k_blocks(blocks: Array) -> Array:
    """float32 (N, 256) -> uint8 (N, 144)."""
    groups = blocks.reshape(-1, 8, 32)
    x = np.ascontiguousarray(groups.reshape(-1, 32).T)
    root_mean_square = np.sqrt(np.square(x).mean(0))
    scales, minimums = affine_fit(x, root_mean_square + np.abs(x), 15)
    d, scale = _six_bits(scales.reshape(-1, 8))
    d_min, minimum = _six_bits(minimums.reshape(-1, 8))
    step = (_as_stored(d) * scale)[..., None]
    offset = (_as_stored(d_min) * minimum)[..., None]
    levels = np.where(step == 0, 0, np.rint((groups + offset) / step)).clip(0, 15).astype(np.uint8)
    low, high = levels[:, 0::2], levels[:, 1::2]  # two groups share 32 bytes
    nibbles = (low | high << 4).reshape(-1, 128)
    return np.concatenate(
        [_float16_bytes(d), _float16_bytes(d_min), _packed(scale, minimum), nibbles], axis=1
    )


def _six_bits(values: Array) -> tuple[Array, Array]:
    """Non-negative (N, 8) -> a unit (N, 1) in float32, and multiples of it in 0..63 (N, 8)."""
    largest = values.max(-1, keepdims=True)
    multiples = np.where(largest > 0, np.rint(values * (63 / largest)), 0)
    return largest / 63, multiples.astype(np.uint8).clip(0, 63)


def _packed(scale: Array, minimum: Array) -> Array:
    """Two (N, 8) of 6-bit numbers in (N, 12) bytes.

    The first four of each take the low bits of a byte. The others are cut into 4 and 2 bits.
    """
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    third = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _q6_k_blocks(blocks: Array) -> Array:
    """float32 (N, 256) -> uint8 (N, 210)."""
    groups = blocks.reshape(-1, 16, 16)
    x = np.ascontiguousarray(groups.reshape(-1, 16).T)
    scale = symmetric_fit(x, np.square(x), 32).reshape(-1, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], axis=-1)
    is_zero = np.abs(largest) < TINY
    d = np.where(is_zero, 0, largest / -128)
    scale = np.where(is_zero, 0, np.rint(scale / np.where(is_zero, 1, d))).clip(-128, 127)
    step = (_as_stored(d) * scale)[..., None]
    levels = np.where(step == 0, 0, np.rint(groups / step)).clip(-32, 31) + 32
    # Each half of a block is four runs of 32 numbers. A byte holds the low four bits of two runs,
    # or the high two bits of all four.
    runs = levels.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = runs[:, :, :2] & 15 | (runs[:, :, 2:] & 15) << 4
    high = runs >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.concatenate(
        [
            low.reshape(-1, 128),
            high.reshape(-1, 64),
            scale.astype(np.int8).view(np.uint8),
            _float16_bytes(d),
        ],
        axis=1,
    )


def affine_fit(x: Array, weights: Array, top: int) -> tuple[Array, Array]:
    """The scale and minimum (M,), both >= 0, for x ~ scale * q - minimum with q in 0..top.

    x and weights: (n, M). The first grid spans x. Then come grids from one step coarser to one step
    finer, each from the best minimum so far.
    """
    high, low = x.max(0), np.minimum(x.min(0), 0)
    is_flat, best_scale = high == low, (high - low) / top
    of_x = weights.sum(0), (weights * x).sum(0), (weights * x * x).sum(0)
    q, product = x - low, np.empty_like(x)
    of_q = _sums(q, top / (high - low), (0, top), x, weights, product)
    best_error = _affine_error(best_scale, low, of_q, of_x)
    for grid in np.arange(top - 1, top + 1.05, 0.1, dtype=np.float32):
        np.subtract(x, low, out=q)
        of_q = _sums(q, grid / (high - low), (0, top), x, weights, product)
        scale, offset, is_unique = _affine_least_squares(of_q, of_x)
        error = _affine_error(scale, offset, of_q, of_x)
        is_better = is_unique & (error < best_error)
        best_scale = np.where(is_better, scale, best_scale)
        best_error = np.where(is_better, error, best_error)
        low = np.where(is_better, offset, low)
    return np.where(is_flat, 0, best_scale), -low


def _affine_least_squares(of_q: Sums, of_x: Sums) -> tuple[Array, Array, Array]:
    """The scale and offset <= 0 with the smallest _affine_error, and whether they are unique."""
    (sum_q, sum_qq, sum_qx), (sum_w, sum_x, _) = of_q, of_x
    determinant = sum_w * sum_qq - sum_q * sum_q
    scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
    offset = (sum_qq * sum_x - sum_q * sum_qx) / determinant
    scale = np.where(offset > 0, sum_qx / sum_qq, scale)
    return scale, np.minimum(offset, 0), determinant > 0


def _affine_error(scale: Array, offset: Array, of_q: Sums, of_x: Sums) -> Array:
    """The weighted sum (M,) of (scale * q + offset - x)^2, from weighted sums of its terms.

    of_q: the sums of q, q q and q x. of_x: the sums of 1, x and x x.
    """
    (sum_q, sum_qq, sum_qx), (sum_w, sum_x, sum_xx) = of_q, of_x
    return (
        scale * scale * sum_qq
        + offset * offset * sum_w
        + sum_xx
        + 2 * (scale * offset * sum_q - scale * sum_qx - offset * sum_x)
    )


def symmetric_fit(x: Array, weights: Array, top: int) -> Array:
    """The scale (M,), of either sign, for x ~ scale * q with q in -top..top-1.

    x and weights: (n, M).
    """
    extreme = np.take_along_axis(x, np.abs(x).argmax(0)[None], axis=0)[0]
    best_scale = best_gain = np.zeros_like(extreme)
    q, product = np.empty_like(x), np.empty_like(x)
    for grid in (top, *np.arange(top - 0.9, top + 0.95, 0.1, dtype=np.float32)):
        np.copyto(q, x)
        _, sum_qq, sum_qx = _sums(q, -grid / extreme, (-top, top - 1), x, weights, product)
        scale = sum_qx / sum_qq
        gain = scale * sum_qx  # the reduction of the error from that of a scale of 0
        is_better = (sum_qq > 0) & (gain > best_gain)
        best_gain = np.where(is_better, gain, best_gain)
        best_scale = np.where(is_better, scale, best_scale)
    return np.where(np.abs(extreme) < TINY, 0, best_scale)


def _sums(
    q: Array, factor: Array, limits: tuple[int, int], x: Array, weights: Array, product: Array
) -> Sums:
    """Round q * factor in place; the weighted sums (M,) of q, q q and q x. Overwrites `product`."""
    q *= factor
    np.rint(q, out=q)
    np.clip(q, *limits, out=q)
    np.multiply(weights, q, out=product)
    sum_q = product.sum(0)
    q *= product
    product *= x
    return sum_q, q.sum(0), product.sum(0)


def _as_stored(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def _float16_bytes(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint8)
