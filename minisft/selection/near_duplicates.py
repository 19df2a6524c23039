"""Find near-duplicate texts, which select.py --dedup drops.

    near_duplicates(["Say hello!", "say  hello", "Say goodbye."], similarity=0.9)
    # array([False,  True, False])

The similarity of two texts is the Jaccard index of their sets of shingles, runs of five characters.
Comparing all pairs would take too long. MinHash signatures (Broder 1997) find the pairs worth
comparing: two signatures agree in a hash with a probability equal to the similarity. A text takes
about 400 bytes, whatever its length.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from minisft.selection.rows import Instructions

SHINGLE_LENGTH = 5
# A signature has NUM_BANDS bands of BAND_SIZE hashes. Texts with an equal band are candidates.
NUM_BANDS, BAND_SIZE = 32, 4
# A text is compared with at most MAX_COMPARED others, and in each band with the latest MAX_DEPTH.
# This bounds the work for thousands of texts that are similar but not duplicates.
MAX_COMPARED, MAX_DEPTH = 32, 32


def near_duplicates(texts: Sequence[str] | Instructions, similarity: float) -> np.ndarray:
    """bool (N,): True for texts with at least this similarity to an earlier text that is kept.

    Case, punctuation and white space do not count; symbols and -*/%#& do. From a similarity of 0.7
    practically all pairs are found, and equal sets always. A duplicate can be missed only if more
    than MAX_COMPARED kept texts are about as similar. Texts that are compared are read again.
    """
    groups = band_groups(texts)  # (N, NUM_BANDS + 1)
    bands = np.arange(groups.shape[1])
    latest = np.full(groups.T.shape, -1, np.int32)  # (band, group): the latest kept text
    before = np.full(groups.shape, -1, np.int32)  # (text, band): the kept text before it
    is_duplicate = np.zeros(len(texts), bool)
    min_bands = min_equal_bands(similarity)
    for number, own_groups in enumerate(groups):
        others = latest_kept(latest[bands, own_groups], before)
        num_equal = (groups[others] == own_groups).sum(1)
        order = np.argsort(-num_equal, kind="stable")[:MAX_COMPARED]
        if candidates := others[order][num_equal[order] >= min_bands].tolist():
            own = shingles(texts[number])
            is_duplicate[number] = any(
                jaccard(own, shingles(texts[other])) >= similarity for other in candidates
            )
        if not is_duplicate[number]:
            before[number] = latest[bands, own_groups]
            latest[bands, own_groups] = number
    return is_duplicate


def min_equal_bands(similarity: float) -> float:
    """The number of equal bands of texts with this similarity, less five standard deviations."""
    probability = similarity**BAND_SIZE
    return NUM_BANDS * probability - 5 * (NUM_BANDS * probability * (1 - probability)) ** 0.5


def latest_kept(latest: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The latest MAX_DEPTH kept texts of each of a text's groups, (n,) without repetition.

    latest: (NUM_BANDS + 1,), the latest text of each group, or -1. before: see near_duplicates.
    """
    bands, kept = np.arange(len(latest)), []
    while len(bands) > 0 and len(kept) < MAX_DEPTH:
        bands, latest = bands[latest >= 0], latest[latest >= 0]
        kept.append(latest)
        latest = before[latest, bands]
    return np.unique(np.concatenate(kept))


def band_groups(texts: Sequence[str] | Instructions) -> np.ndarray:
    """(N, NUM_BANDS + 1) uint32: texts with the same number in a column agree in that band.

    In the last column, texts with equal sets of shingles have the same number.
    """
    generator = np.random.default_rng(0)
    numbers = generator.integers(1, 2**63, (3, NUM_BANDS * BAND_SIZE), dtype=np.uint64)
    factors, offsets, mixers = numbers | np.uint64(1)
    keys = np.empty((NUM_BANDS + 1, len(texts)), np.uint32)
    for number in range(len(texts)):
        own = shingles(texts[number])
        signature = minhash(own, factors, offsets)
        # One number per band: the upper half, since the lower bits of a product mix less.
        keys[:-1, number] = (signature * mixers).reshape(-1, BAND_SIZE).sum(1) >> np.uint64(32)
        keys[-1, number] = own.sum() >> np.uint64(32)
    for band in keys:
        band[:] = np.unique(band, return_inverse=True)[1]
    return keys.T


def minhash(hashes: np.ndarray, factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The signature (n,): the minimum of `hash * factor + offset` mod 2^64 for each factor (n,).

    Computed in blocks, because all hashes of a long text would fill the memory.
    """
    blocks = [
        (hashes[start : start + 4096, None] * factors + offsets).min(0)
        for start in range(0, len(hashes), 4096)
    ]
    return np.min(blocks, axis=0)


def shingles(text: str) -> np.ndarray:
    """The distinct shingles of a text as hashes, uint64 (n,), n at least 1."""
    text = unicodedata.normalize("NFKC", text).casefold()
    spaces = {ord(character): " " for character in set(text) if not counts(character)}
    text = " ".join(text.translate(spaces).split()).ljust(SHINGLE_LENGTH)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, SHINGLE_LENGTH)
    hashes = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        hashes = (hashes + column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def counts(character: str) -> bool:
    """True for letters, digits, symbols, and marks such as the vowels of Hindi.

    Operators that Unicode counts as punctuation are symbols here: 3 * 4 is not 3 - 4, nor C# C.
    """
    return unicodedata.category(character)[0] in "LNMS" or character in "-*/%#&"


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """The size of the intersection of two sets over that of their union."""
    num_common = len(np.intersect1d(left, right, assume_unique=True))
    return num_common / (len(left) + len(right) - num_common)
