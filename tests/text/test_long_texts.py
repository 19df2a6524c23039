"""long_texts.py: the ids of a text are those of its parts."""

import json

import pytest
from real_tokenizers import BAICHUAN2, LLAMA3, MISTRAL, QWEN, TINYLLAMA, load_tokenizer
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from minisft.common.errors import UserError
from minisft.data.dataset import load_rows
from minisft.data.encode_texts import encode_texts
from minisft.text import long_texts
from minisft.text.tokenizer import Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")


@pytest.mark.parametrize("folder", [TINYLLAMA, MISTRAL, QWEN, LLAMA3, BAICHUAN2])
def test_ids_of_a_text_in_parts_are_those_of_the_text(folder, shared_data, monkeypatch):
    """Rows as JSON text, English and Chinese, and Python code."""
    tokenizer = load_tokenizer(shared_data / folder)
    instruct = shared_data / "instruct"
    texts = [
        *((instruct / f"alpaca_{kind}_demo.json").read_text()[:20_000] for kind in ("en", "zh")),
        json.dumps(json.loads((instruct / "alpaca_zh_demo.json").read_text())[:20]),  # \uXXXX
        open(__file__).read() * 9,
    ]
    whole = [tokenizer.encode(text, more) for text in texts for more in (False, True)]
    monkeypatch.setattr(long_texts, "PART", 37)
    monkeypatch.setattr(long_texts, "MAX_WORD", 8000)
    assert all(len(list(long_texts.parts_of(text))) > 50 for text in texts)
    assert [tokenizer.encode(text, more) for text in texts for more in (False, True)] == whole


def test_words_of_mistral_nemo(monkeypatch):
    """Its pattern takes line ends and slashes after punctuation into one word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    pattern = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words_of = Split(Regex(pattern), "isolated").pre_tokenize_str
    text = "/* a */\n//b;\n/c 12\n'd\n" * 99
    monkeypatch.setattr(long_texts, "PART", 7)
    monkeypatch.setattr(long_texts, "MAX_WORD", 100)
    parts = list(long_texts.parts_of(text))
    assert len(parts) > 50
    words = [word for part in parts for word, _ in words_of(part)]
    assert words == [word for word, _ in words_of(text)]


def test_no_space_and_no_line_end_is_refused_by_row(tiny_tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(long_texts, "PART", 1000)
    monkeypatch.setattr(long_texts, "MAX_WORD", 2000)
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    assert len(tokenizer.encode("x" * 3000)) > 100  # short enough for one part
    with pytest.raises(UserError, match="2,000 characters in a row without"):
        tokenizer.encode("x" * 3001)
    path = tmp_path / "texts.jsonl"
    texts = ["a b", "x " * 1500 + "x" * 4000, "c d " * 1000]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(UserError, match=r"texts.jsonl, row 2 \(line 2\): 2,000 characters in a"):
        load_rows(path, plain_text=True)
    kept = load_rows(path, skipped=[], plain_text=True)
    (example,), _ = encode_texts(kept, tokenizer, 10**6)
    assert kept == [texts[0], texts[2]] and len(example.ids) > 1000
