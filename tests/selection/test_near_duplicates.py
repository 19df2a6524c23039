"""Near-duplicates: similarity equals that of sets, all pairs are found, memory is bounded."""

import json
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT

from minisft.selection import near_duplicates as module
from minisft.selection.near_duplicates import near_duplicates


def similarity_of(left, right):
    """The Jaccard index of the sets of runs of five characters."""
    left, right = (
        {text[start : start + 5] for start in range(max(1, len(text) - 4))}
        for text in (left, right)
    )
    return len(left & right) / len(left | right)


def test_similarity_is_of_runs_of_five_characters():
    for left, right in (
        ("the cat sat on the mat", "the cat sat on the hat"),
        ("abc", "abc"),
        ("abc", "abd"),
        ("今天天气很好啊", "今天天气很好吗"),
        ("a" * 20, "a" * 9),
    ):
        found = module.jaccard(*map(module.shingles, (left, right)))
        assert found == pytest.approx(similarity_of(left, right))


def test_near_duplicates():
    texts = [
        "Name three countries in Europe and describe the food that people eat there.",
        "Write a poem about a tree.",
        "name  THREE countries in Europe, and describe the food that people eat there!",
        "Name three countries in Europe and describe the food that people eat here.",
        "Name three animals in Africa and say what they eat.",
        "Write a poem about a tree",
        "写一首关于树的诗。",
        "写一首关于树的诗",
        "写一首关于海的长诗。",
        "?",
        "!",
    ]
    found = near_duplicates(texts, 0.85).tolist()
    assert [number for number, one in enumerate(found) if one] == [2, 3, 5, 7, 10]
    assert near_duplicates(texts, 1.0).tolist() == [
        number in (2, 5, 7, 10) for number in range(len(texts))
    ]


def test_operators_and_marks_count():
    """Python's \\w has neither: texts that differ only in them were one."""
    texts = [f"What is 12 {operator} 7?" for operator in "+-*/%^<>=&"]
    texts += ["What is 12 7?", "Sort a list in C", "Sort a list in C#", "Sort a list in C++"]
    texts += ["पानी क्या है", "पाना क्या है", "3 €", "3 $", "😀", "🚀", "3 €."]
    assert np.flatnonzero(near_duplicates(texts, 1.0)).tolist() == [len(texts) - 1]


def test_a_dropped_text_drops_no_other():
    """A text that is similar to a dropped text, but to no kept text, stays."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmno"), 200)
    first = "".join(letters)
    chain = [first, first[12:] + "qrstuvwxyz12", first[24:] + "qrstuvwxyz12" + "3456789zyxwv"]
    shared = [similarity_of(chain[one], chain[other]) for one, other in ((0, 1), (1, 2), (0, 2))]
    assert min(shared[:2]) > 0.85 > 0.8 > shared[2]
    assert near_duplicates(chain, 0.85).tolist() == [False, True, False]


def test_near_duplicates_are_all_found():
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghij klmno"))
    originals = ["".join(generator.choice(letters, 120)) for _ in range(300)]
    changed = [text[:60] + "z" + text[61:] for text in originals]
    found = near_duplicates(originals + changed, 0.85)
    assert not found[:300].any() and found[300:].all()


def test_copies_among_many_similar_texts_are_found():
    """The copies share most bands with more texts than they are compared with."""
    text = "".join(np.random.default_rng(0).choice(list("abcdefghij klmno"), 2000))
    texts = [text[:place] + "z" + text[place + 1 :] for place in range(0, 2000, 20)]
    for number in (2, 100):
        found = near_duplicates(texts[:number] * 2, 1.0)
        assert not found[:number].any() and found[number:].all()


def test_near_duplicates_equal_those_of_comparing_all_pairs():
    rows = json.loads((ROOT / "examples" / "data" / "train.json").read_text("utf-8"))[:800]
    texts = [row["instruction"] + " " + row["input"] for row in rows]
    sets, kept, expected = [set(module.shingles(text).tolist()) for text in texts], [], []
    for one in sets:
        expected.append(any(len(one & other) >= 0.7 * len(one | other) for other in kept))
        kept += [] if expected[-1] else [one]
    assert near_duplicates(texts, 0.7).tolist() == expected and sum(expected) > 100


def test_the_work_is_bounded_for_many_similar_texts(monkeypatch):
    compared = []
    jaccard = module.jaccard
    monkeypatch.setattr(module, "jaccard", lambda *sets: compared.append(1) or jaccard(*sets))
    frame = "Is the following review, which was written by a guest, positive or not? It is number "
    texts = [frame + f"{number * 7919 % 1000:03}" * 3 for number in range(200)]
    assert not near_duplicates(texts, 0.95).any()
    assert 100 * module.MAX_COMPARED < len(compared) <= 200 * module.MAX_COMPARED


def test_a_long_text_takes_little_memory():
    text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 200_000)))
    tracemalloc.start()
    try:
        found = near_duplicates([text, "short", text[1:]], 0.9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == [False, False, True]
    assert peak < 64 * 2**20  # a tenth of all its hashes


def test_many_texts_take_little_memory():
    class Numbers:
        """Three thousand different texts, none of them in memory."""

        def __len__(self):
            return 3000

        def __getitem__(self, number):
            return str(np.random.default_rng(number).integers(10**18, size=2))

    tracemalloc.start()
    try:
        assert not near_duplicates(Numbers(), 0.9).any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500 * 3000


def test_a_signature_is_of_all_shingles():
    generator = np.random.default_rng(0)
    shingles = np.unique(generator.integers(2**63, size=10_000, dtype=np.uint64))
    factors, offsets = generator.integers(2**63, size=(2, 6), dtype=np.uint64)
    expected = [
        min((value * factor + offset) % 2**64 for value in shingles.tolist())
        for factor, offset in zip(factors.tolist(), offsets.tolist(), strict=True)
    ]
    assert module.minhash(shingles, factors, offsets).tolist() == expected
