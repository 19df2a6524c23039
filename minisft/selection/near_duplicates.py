"""Texts that are nearly one before them: what select.py --dedup leaves out.

    near_duplicates(["Say hello!", "say  hello", "Say goodbye."], similarity=0.9)
    # array([False,  True, False])

Texts are compared as sets of runs of five characters. Which pairs are worth comparing is found by
MinHash signatures (Broder 1997), of which a text leaves about 400 bytes in memory, whatever its
length.
"""

import re
import unicodedata

import numpy as np

# Bands of a signature and hashes in each: pairs with an equal band are compared.
NUM_BANDS, BAND = 32, 4
SHINGLE = 5  # characters
# A text is compared with this many at most, of this many in each band: the work stays bounded where
# thousands are alike and none is dropped.
COMPARED, DEPTH = 32, 32


def near_duplicates(texts, similarity):
    """bool (N,): texts that are nearly one before them.

    That is, of the runs of five characters that either of the two has, they share at least
    `similarity`; case, punctuation and white space do not count. texts: a sequence, of which
    those that are compared are read again. Candidates come from MinHash signatures (Broder 1997),
    which find practically all pairs from 0.7 on; equal sets are always found. Others can be missed
    where more than COMPARED texts that were kept are about as like it.
    """
    groups = alike_in_a_band(texts)  # (N, NUM_BANDS + 1)
    bands = np.arange(groups.shape[1])
    latest = np.full(groups.T.shape, -1, np.int32)  # of each group, the text kept last
    before = np.full(groups.shape, -1, np.int32)  # of each text and band, the one kept before it
    duplicate, least = np.zeros(len(texts), bool), fewest_bands(similarity)
    for number, own in enumerate(groups):
        others = kept_last(latest[bands, own], before)
        alike = (groups[others] == own).sum(1)
        order = np.argsort(-alike, kind="stable")[:COMPARED]
        if others := others[order][alike[order] >= least].tolist():
            shingles = shingles_of(texts[number])
            duplicate[number] = any(
                overlap(shingles, shingles_of(texts[other])) >= similarity for other in others
            )
        if not duplicate[number]:
            before[number] = latest[bands, own]
            latest[bands, own] = number
    return duplicate


def fewest_bands(similarity):
    """How many equal bands texts of this similarity have, less five standard deviations."""
    probability = similarity**BAND
    return NUM_BANDS * probability - 5 * (NUM_BANDS * probability * (1 - probability)) ** 0.5


def kept_last(latest, before):
    """The texts (n,) that were kept last, up to DEPTH in each group of a text.

    latest (NUM_BANDS + 1,): the very last in each, or -1; before (N, NUM_BANDS + 1): see above.
    """
    bands, found = np.arange(len(latest)), []
    while len(bands) and len(found) < DEPTH:
        bands, latest = bands[latest >= 0], latest[latest >= 0]
        found.append(latest)
        latest = before[latest, bands]
    return np.unique(np.concatenate(found))


def alike_in_a_band(texts):
    """(N, NUM_BANDS + 1) uint32: numbers of groups of texts of which that band of MinHash is equal.

    Those in the last column are of texts with equal sets, practically.
    """
    generator = np.random.default_rng(0)
    numbers = generator.integers(1, 2**63, (3, NUM_BANDS * BAND), dtype=np.uint64)
    factors, offsets, mixers = numbers | np.uint64(1)
    keys = np.empty((NUM_BANDS + 1, len(texts)), np.uint32)
    for number in range(len(texts)):
        shingles = shingles_of(texts[number])
        signature = signature_of(shingles, factors, offsets)
        # One number for a band; the upper half, since the lower bits of a product mix less.
        keys[:-1, number] = (signature * mixers).reshape(-1, BAND).sum(1) >> np.uint64(32)
        keys[-1, number] = shingles.sum() >> np.uint64(32)
    for band in keys:
        band[:] = np.unique(band, return_inverse=True)[1]
    return keys.T


def signature_of(shingles, factors, offsets):
    """MinHash: the least of all `shingles * factor + offset` mod 2^64, for each factor (n,).

    In blocks: of a text of a million characters all hashes at once would fill the memory.
    """
    return np.min(
        [
            (shingles[start : start + 4096, None] * factors + offsets).min(0)
            for start in range(0, len(shingles), 4096)
        ],
        axis=0,
    )


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
