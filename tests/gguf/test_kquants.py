"""K-quants: the bytes of llama.cpp's quantiser, and a small error when read back."""

import gguf
import numpy as np
import pytest

from minisft.gguf.kquants import affine_fit, quantize_q4_k, quantize_q6_k, symmetric_fit

# BLOCK quantised by ggml_quantize_chunk (ggml 0.25, of llama-cpp-python 0.3.36).
INDEX = np.arange(768, 1024)
BLOCK = ((INDEX * INDEX * 7919 + INDEX * 104729) % 10007 - 5003) / np.float32(5000)
BLOCK = (BLOCK * (1 + INDEX // 32 % 5)).astype(np.float32)[None]
THEIRS_Q4_K = (
    "3321232dffcd1865ffcc186122edcc98e75459e810c22c018e95457e51bda3426a2b765ad7ee8ec79a06fb8aa2"
    "63be92e192edc03d33d30cde392eacc374cf921f15b4edaf0aff7d94458f62dfd574ada7ac3b64157054d2e999"
    "d2a5010795cd7fdabe3b42e22bfe5a5fee06c712f673085235a2b9588143afa32249fa3418849b2a63258075f3"
    "1acb05e8555bfa23e5"
)
THEIRS_Q6_K = (
    "6dae241041d7b2e37954851af626ac8719e016aa0d5e0e9d0ad6019a02e81da11f7525bd421647f053488f1093"
    "f0bf50bc9b1f4837eb04f387d1bf538c7b1e57ec424e6e351001a7f3c33964a5fbf607b288b7321a4ac1a6d740"
    "2648d3aac9441737bc86a62bf514895373f7b1d0451f3e926c7affb9d73c0503883050c37d9b0d44360ef0cc03"
    "e03be9f17b045f3844c6e375064ddf0b4d7aa14fba0824bb48194b1284a164454cbe8a0c29e001199ba42d4811"
    "435fc12ce514ec526ee30ed7809ae9e6cd2d424a9b5f8183eae7cdce0995"
)
# All numbers are positive, so the minimum can only be zero.
POSITIVE = np.abs(BLOCK) + 1
THEIRS_POSITIVE_Q4_K = (
    "871ed61afcd55f6a15c0070044ff04bfe4aaa5e3efcddaef8d98b77eaebcbbbd96d88696d4ed9dc496f6f886ad"
    "9bbc9ddd7cdbafac9bccdacca7bd8bbb4aae7ddec99adb8ee8fe4c6a895e5ccec94a7b656ab87ad75f79bcd444"
    "ac67fdf5579c4ea68cb8acdcd8ec768eccf694ece65af89eca8d98a86fac8f7cdeb9eabce85b6aca8ddb6f7bed"
    "eaabfbd89b9beadddb"
)
KINDS = {"Q4_K": (quantize_q4_k, 0.09), "Q6_K": (quantize_q6_k, 0.026)}


def read_back(data, kind):
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize(
    "quantize, block, theirs",
    [
        (quantize_q4_k, BLOCK, THEIRS_Q4_K),
        (quantize_q4_k, POSITIVE, THEIRS_POSITIVE_Q4_K),
        (quantize_q6_k, BLOCK, THEIRS_Q6_K),
    ],
    ids=["Q4_K", "Q4_K, positive", "Q6_K"],
)
def test_bytes_equal_llama_cpp(quantize, block, theirs):
    theirs = np.frombuffer(bytes.fromhex(theirs), dtype=np.uint8)
    ours = quantize(block)[0]
    # A tie can go the other way on a processor that sums in another order.
    assert (ours == theirs).mean() > 0.97
    np.testing.assert_array_equal(ours.shape, theirs.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_relative_error(kind):
    """The relative error of normal and of heavy-tailed numbers."""
    quantize, limit = KINDS[kind]
    generator = np.random.default_rng(0)
    for x in (generator.standard_normal((50, 512)), generator.standard_t(4, (50, 512)) * 1e-3):
        x = x.astype(np.float32)
        data = quantize(x)
        assert data.shape == (50, 2 * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
        error = np.square(read_back(data, kind) - x).mean() / np.square(x).mean()
        assert error**0.5 < limit


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_constants_and_extremes(kind):
    quantize, _ = KINDS[kind]
    rows = np.zeros((7, 256), dtype=np.float32)
    rows[1], rows[2], rows[3, :128] = 1, -1, 0.5
    rows[4, 17] = 3  # one number in a block of zeros
    rows[5] = 65504 * np.sign(np.sin(np.arange(256)))
    rows[6] = 1e-20  # below what float16 can scale
    back = read_back(quantize(rows), kind)
    assert np.isfinite(back).all()
    for row, expected in enumerate(rows):
        np.testing.assert_allclose(back[row], expected, atol=0.01 * np.abs(expected).max() + 1e-7)
    many = np.tile(rows, (500, 1))  # more blocks than are done at a time
    np.testing.assert_array_equal(quantize(many), np.tile(quantize(rows), (500, 1)))


def test_fits_beat_the_grid_from_minimum_to_maximum():
    x = np.random.default_rng(1).standard_normal((32, 200)).astype(np.float32)
    weights = np.ones_like(x)
    scale, minimum = affine_fit(x, weights, 15)
    spanning = (x.max(0) - x.min(0)) / 15

    def error(scale, low):
        levels = np.rint((x - low) / scale).clip(0, 15)
        return np.square(levels * scale + low - x).sum(0)

    ours, theirs = error(scale, -minimum), error(spanning, x.min(0))
    assert (ours <= theirs * 1.001).mean() > 0.95 and ours.sum() < 0.93 * theirs.sum()
    scale = symmetric_fit(x, weights, 8)
    levels = np.rint(x / scale).clip(-8, 7)
    plain = np.abs(x).max(0) / 8
    plain_levels = np.rint(x / plain).clip(-8, 7)
    assert np.square(levels * scale - x).sum() < 0.95 * np.square(plain_levels * plain - x).sum()
