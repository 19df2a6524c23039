"""Texts that are nearly one before them: what select.py --dedup leaves out.

    near_duplicates(["Say hello!", "say  hello", "Say goodbye."], similarity=0.9)
    # array([False,  True, False])

Texts are compared as sets of runs of five characters. Which pairs are worth comparing is found by
MinHash signatures (Broder 1997), of which a text leaves 256 bytes in memory, whatever its length.
"""

import re
import unicodedata

import numpy as np

# Bands of a signature and hashes in each: pairs with an equal band are compared.
NUM_BANDS, BAND = 32, 4
SHINGLE = 5  # characters


def near_duplicates(texts, similarity):
    """bool (N,): texts that are nearly one before them.

    That is, of the runs of five characters that either of the two has, they share at least
    `similarity`; case, punctuation and white space do not count. texts: a sequence, of which
    those that are compared are read again. Candidates come from MinHash signatures (Broder 1997),
    which find practically all pairs from 0.7 on.
    """
    groups = alike_in_a_band(texts)  # (N, NUM_BANDS)
    first = np.full((NUM_BANDS, len(texts)), -1, np.int32)  # of each group, the text that was kept
    duplicate, bands = np.zeros(len(texts), bool), np.arange(NUM_BANDS)
    for number, own in enumerate(groups):
        others = first[bands, own]
        if (others >= 0).any():
            shingles = shingles_of(texts[number])
            duplicate[number] = any(
                overlap(shingles, shingles_of(texts[other])) >= similarity
                for other in np.unique(others[others >= 0]).tolist())
        if not duplicate[number]:
            first[bands, own] = np.where(others >= 0, others, number)
    return duplicate


def alike_in_a_band(texts):
    """(N, NUM_BANDS) uint32: numbers of groups of texts of which that band of MinHash is equal."""
    generator = np.random.default_rng(0)
    numbers = generator.integers(1, 2**63, (3, NUM_BANDS * BAND), dtype=np.uint64)
    factors, offsets, mixers = numbers | np.uint64(1)
    keys = np.empty((NUM_BANDS, len(texts)), np.uint32)
    for number in range(len(texts)):
        signature = signature_of(shingles_of(texts[number]), factors, offsets)
        # One number for a band; the upper half, since the lower bits of a product mix less.
        keys[:, number] = (signature * mixers).reshape(-1, BAND).sum(1) >> np.uint64(32)
    for band in keys:
        band[:] = np.unique(band, return_inverse=True)[1]
    return keys.T


def signature_of(shingles, factors, offsets):
    """MinHash: the least of all `shingles * factor + offset` mod 2^64, for each factor (n,).

    In blocks: of a text of a million characters all hashes at once would fill the memory.
    """
    return np.min([(shingles[start : start + 4096, None] * factors + offsets).min(0)
                   for start in range(0, len(shingles), 4096)], axis=0)


def shingles_of(text):
    """The distinct runs of five characters of a text as hashes, uint64 (n,), n at least 1."""
    text = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    text = text.ljust(SHINGLE)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, SHINGLE)
    hashes = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        hashes = (hashes + column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def overlap(left, right):
    """The share of their elements that two sets have in common (Jaccard)."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
