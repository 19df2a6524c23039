"""Huge rows: only their beginning is encoded, and the result is that of the complete row."""

import json

import numpy as np
import pytest

from minisft.common.errors import UserError
from minisft.data import long_rows, records
from minisft.data.dataset import Row, load_rows
from minisft.data.encode_preferences import encode_preferences
from minisft.data.encoding import encode_rows
from minisft.data.long_rows import beginning, count_characters
from minisft.selection.ifd import IfdScorer
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(number):
    return {"name": "add", "arguments": {"a": number, "b": "one two"}}


HUGE = {
    "answer": [user("go"), assistant("one two " * 5000)],
    "question": [user("one two " * 5000), assistant("ok")],
    "later question": [user("go"), assistant("ok"), user("one two " * 5000), assistant("ok")],
    "system": [{"role": "system", "content": "be brief " * 5000}, user("go"), assistant("ok")],
    "turns": [user("go"), assistant("ok")] * 3000,
    "thoughts": [user("go"), assistant("ok", reasoning_content="hm " * 9000)],
    "calls": [user("go"), assistant("", tool_calls=[call(n) for n in range(900)])],
    "last not learned": [user("go"), assistant("one two " * 5000, train=False)],
}
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def template(tiny_tokenizer_dir, tmp_path):
    (tmp_path / "thoughts.jinja").write_text(THOUGHTS)
    return get_template(str(tmp_path / "thoughts.jinja"), Tokenizer.load(tiny_tokenizer_dir))


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(long_rows, "KEPT_CHARACTERS", 2000)
    monkeypatch.setattr(long_rows, "KEPT_MESSAGES", 40)


@pytest.mark.parametrize("kind", HUGE)
def test_the_first_tokens_are_those_of_the_complete_row(kind, template, monkeypatch):
    messages = HUGE[kind][:400]
    (whole, report) = encode_rows([Row(messages)], template, 64)
    monkeypatch.setattr(long_rows, "KEPT_CHARACTERS", 2000)
    monkeypatch.setattr(long_rows, "KEPT_MESSAGES", 40)
    monkeypatch.setattr(long_rows, "MAX_CHARACTERS_PER_TOKEN", 20)
    kept, note = beginning(messages, None, 64)
    assert note and kept[-1]["role"] == "assistant" and count_characters(kept) < 4000
    cut, cut_report = encode_rows([Row(messages)], template, 64)
    assert len(cut) == len(whole)
    for first, second in zip(cut, whole, strict=True):
        assert np.array_equal(first.ids, second.ids)
        assert np.array_equal(first.supervised, second.supervised)
    for name in ("num_rows", "num_truncated", "num_dropped", "num_unlearned"):
        assert getattr(cut_report, name) == getattr(report, name), name
    if not report.num_unlearned:
        assert "Only their beginning is read" in str(cut_report)


def test_usual_rows_are_never_cut():
    messages = [user("x " * 400_000), assistant("ok")]
    assert beginning(messages, None, 16) == (messages, "")
    messages = [user("go"), assistant("ok")] * 500
    assert beginning(messages, None, 16) == (messages, "")
    messages = [user("x " * 700_000), assistant("ok")]  # above KEPT_CHARACTERS, but it may fit
    assert beginning(messages, None, 10_000) == (messages, "")


def test_scores_of_a_huge_row(template, small_limits):
    plan = IfdScorer(template, cutoff_len=16).plan(0, Row(HUGE["answer"]))
    assert plan.reason.startswith("longer than cutoff_len") and not plan.passes


def test_preferences_of_huge_answers_are_truncated(template, small_limits):
    rejected = [[user("go"), assistant("three " * 9000)]]
    (example,), report = encode_preferences(
        [Row(HUGE["answer"], None, "", 0, rejected)], template, 32
    )
    assert example.lengths == [32, 32] and report.num_truncated == 1


def test_what_cannot_be_cut_is_refused_by_row(template, small_limits, monkeypatch):
    monkeypatch.setattr(long_rows, "MAX_MESSAGES", 100)
    row = Row(HUGE["turns"], None, "data.json", 6)
    with pytest.raises(UserError, match="data.json, row 7: 1,000 messages may fit into 1,000 tok"):
        encode_rows([row], template, 1000)
    row = Row(HUGE["calls"], [{"name": "add", "description": "x" * 9000}], "data.json", 6)
    with pytest.raises(UserError, match="row 7: its tools have more than 4,096 characters"):
        encode_rows([row], template, 16)


@pytest.mark.parametrize("layout", ["lines", "objects"])
def test_a_row_beyond_the_limit_is_refused_before_it_is_parsed(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "a", "output": "b" * size} for size in (1, 2000, 1)]
    indent = None if layout == "lines" else 1
    path.write_text("\n".join(json.dumps(row, indent=indent) for row in rows) + "\n")
    line = 2 if layout == "lines" else 5
    with pytest.raises(UserError, match=rf"row 2 \(line {line}\): it has 2,0\d\d bytes, and 1,000"):
        load_rows(path)
    assert len(load_rows(path, skipped=[])) == 2
