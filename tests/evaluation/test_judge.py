"""judge.py and remote_judge.py: verdicts, retries, and verdicts that survive a failure."""

import itertools
import json
import re
import urllib.request
from argparse import Namespace

import pytest
from full_disk import file_size_limit
from judge_stub import serving
from standing import HANG_SECONDS, wait_until

from minisft.common.errors import UserError
from minisft.evaluation.compare import Item, answer_items
from minisft.evaluation.judge import (
    Comparison,
    LocalJudge,
    collect_verdicts,
    cost_line,
    outcome,
    parse_verdict,
    tally,
)
from minisft.evaluation.remote_judge import RemoteJudge
from minisft.evaluation.resume import saying_how_to_go_on
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Because.\nVerdict: 1", 1),
        ("**Verdict:** 2", 2),
        ("verdict - TIE", "tie"),
        ("Verdict: 1? No.\nVerdict: 2", 2),
        ("The first.", None),
        ("Verdict: 12", None),
        ("", None),
        ("Verdict: Answer 2.", 2),
        ("Verdict: [[1]]", 1),
        ("Verdict：1。因为它短", 1),
        ("Verdict:2更好", 2),
        ("Verdict: 1/2", None),
        ("Verdict: 2 / 10", None),
        ("Verdict: **1** or **2**", None),
        ("Verdict: Answer 1 and Answer 2", None),
        ("Verdict: tie|2", None),
        ("Verdict: 1或2", None),
        ("Verdict: 1.5", None),
        ("Verdict: 2:1", None),
        ("Verdict: 1\nVerdict: 1/2", None),
        ("Verdict: 1/2/tie\nVerdict: 2", 2),
        ("Verdict: 1, not 2", 1),
        ("Verdict: 1. Answer 2 is wrong, or 2 lines too long.", 1),
        ("Verdict: 2\n1 and 2 are long.", 2),
        ("Verdict: 1 - and the reason", 1),
    ],
)
def test_parse_verdict(text, verdict):
    assert parse_verdict(text) == verdict


def test_outcome_and_tally():
    # The verdict with the baseline's answer first, then with the other's first.
    expected = {
        (2, 1): "win",
        (2, "tie"): "win",
        ("tie", 1): "win",
        (1, 2): "loss",
        (1, "tie"): "loss",
        ("tie", 2): "loss",
        ("tie", "tie"): "tie",
        (1, 1): "tie",
        (2, 2): "tie",
        (None, 1): None,
        (2, None): None,
    }
    assert {pair: outcome(*pair) for pair in expected} == expected
    always_first = tally([(1, 1)] * 9 + [(2, 1)])
    assert always_first["contradicting"] == 9 and always_first["tie"]["count"] == 9
    assert always_first["first_place"] == 19 / 20
    fair = tally([(2, 1), (1, 2), ("tie", "tie"), (None, 1), (None, 2)])
    assert fair["first_place"] == 0.5 and (fair["contradicting"], fair["unreadable"]) == (0, 2)
    assert tally([(None, None)])["first_place"] is None


@pytest.fixture
def stub():
    with serving() as server:
        yield server


def remote(stub, **settings):
    return RemoteJudge(stub.url, "stub", "secret\n", **{"pause": 0.01, **settings})


@pytest.fixture
def impatient(monkeypatch):
    """The first two requests about "slow" time out soon; all others get enough time."""
    number, urlopen = itertools.count(), urllib.request.urlopen

    def open_for_a_moment(request, timeout):
        assert timeout == 120
        if b"]\\nslow\\n" in request.data and next(number) < 2:
            request.add_header("Unanswered", "yes")
            return urlopen(request, timeout=0.05)
        return urlopen(request, timeout=HANG_SECONDS)

    monkeypatch.setattr("minisft.evaluation.remote_judge.urllib.request.urlopen", open_for_a_moment)


def test_both_orders_are_judged_and_failed_requests_repeated(stub, impatient, tmp_path):
    comparisons = [
        Comparison("plain", "a", "longer"),
        Comparison("busy", "longer", "b"),
        Comparison("broken", "same", "size"),
        Comparison("slow", "a", "longer"),
        Comparison("html", "a", "longer"),
        Comparison("nonsense", "a", "longer"),
        Comparison("first", "a", "longer"),
    ]
    path, seen, written = tmp_path / "verdicts.jsonl", [], []

    def advance(count):
        seen.append(count)
        written.append(path.read_text().count("\n") if path.exists() else 0)

    verdicts = collect_verdicts(remote(stub), comparisons, path, advance)
    assert written == list(range(15))  # on disk as soon as it is known
    outcomes = [outcome(*pair) for pair in verdicts]
    # A judge that always chooses the first answer contradicts itself: a tie.
    assert outcomes == ["win", "loss", "tie", "win", "win", None, "tie"]
    assert sum(seen) == 14
    assert {one[:3] for one in stub.requests} == {("/v1/chat/completions", "Bearer secret", "stub")}
    # Requests that timed out may arrive late.
    wait_until(lambda: [one[3] for one in stub.requests].count("slow") == 4)
    asked = [one[3] for one in stub.requests]
    assert asked.count("plain") == 2 and asked.count("busy") == asked.count("slow") == 4
    before = len(asked)
    assert (
        collect_verdicts(remote(stub), comparisons, path) == verdicts
        and len(stub.requests) == before
    )
    another = remote(stub)
    another.name = "another"
    assert collect_verdicts(another, comparisons[:1], path) == verdicts[:1]
    assert len(stub.requests) == before + 2  # another judge does not reuse these verdicts
    report = tally(verdicts)
    assert (report["win"]["count"], report["tie"]["count"], report["loss"]["count"]) == (3, 2, 1)
    assert report["unreadable"] == 1 and report["win"]["share"] == 0.5
    low, high = report["win"]["interval"]
    assert low < 0.5 < high


def test_an_interrupted_run_continues_where_it_stopped(stub, tmp_path):
    comparisons = [Comparison("plain", "a", "longer"), Comparison("down", "a", "longer")]
    path = tmp_path / "verdicts.jsonl"
    with pytest.raises(UserError, match="500 .*3 times.*--resume"):
        collect_verdicts(remote(stub, retries=2), comparisons, path)
    assert len(path.read_text().splitlines()) == 2
    with open(path, "ab") as file:
        file.write('{"key": "cut 你'.encode()[:-1])  # killed while writing
    stub.is_down, stub.requests[:] = False, []
    assert collect_verdicts(remote(stub), comparisons, path) == [(2, 1), (2, 1)]
    assert {one[3] for one in stub.requests} == {"down"}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_keeps_the_verdicts_before(stub, tmp_path):
    comparisons = [Comparison("plain", "a", "longer")]
    path = tmp_path / "verdicts.jsonl"
    verdicts = collect_verdicts(remote(stub), comparisons, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    message = "verdicts.jsonl: could not be written: File too large. Make room; .* with --resume"
    full = file_size_limit(len(lines[0]) + 9)
    with full, pytest.raises(UserError, match=message), saying_how_to_go_on(Namespace(), ()):
        collect_verdicts(remote(stub), comparisons, path)
    assert collect_verdicts(remote(stub), comparisons, path) == verdicts
    assert path.read_bytes() == b"".join(lines)


def test_retry_after_is_respected_up_to_a_minute(stub, monkeypatch):
    pauses = []
    monkeypatch.setattr("minisft.evaluation.remote_judge.time.sleep", pauses.append)
    prompt, _ = Comparison("patient", "a", "longer").prompts()
    assert parse_verdict(remote(stub).ask(prompt)) == 2 and pauses == [60, 60]
    pauses.clear()
    prompt, _ = Comparison("broken", "a", "longer").prompts()  # without Retry-After
    assert parse_verdict(remote(stub, pause=3).ask(prompt)) == 2 and pauses == [3, 6]


def test_a_request_that_is_refused_is_not_repeated(stub, tmp_path):
    with pytest.raises(UserError, match='401.*"no such key".*OPENAI_API_KEY'):
        collect_verdicts(remote(stub), [Comparison("refused", "a", "b")], tmp_path / "v.jsonl")
    with pytest.raises(UserError, match="not a chat completion"):
        collect_verdicts(
            remote(stub, retries=0), [Comparison("elsewhere", "a", "b")], tmp_path / "u.jsonl"
        )
    assert {one[1] for one in stub.requests if one[0] == "/other"} == {None}
    with pytest.raises(UserError, match="http"):
        RemoteJudge("ftp://somewhere", "x", None)
    with pytest.raises(UserError, match="--judge_url: has a space"):
        RemoteJudge("http://some where", "x", None)
    with pytest.raises(UserError, match="OPENAI_API_KEY: has a space, or") as error:
        RemoteJudge(stub.url, "x", "geheim–1")
    assert "geheim" not in str(error.value)
    with pytest.raises(UserError, match="--judge_url http://127.0.0.1:9"):
        collect_verdicts(
            RemoteJudge("http://127.0.0.1:9", "x", None, retries=1, pause=0.01),
            [Comparison("plain", "a", "b")],
            tmp_path / "w.jsonl",
        )


def test_local_judge(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")
    judge = LocalJudge(assistant, "ours", 2)
    texts = dict(judge.replies(["Which?", "the cat", "you?"]))
    expected = answer_items(
        assistant,
        [Item([{"role": "user", "content": "the cat"}], "")],
        Sampling(max_new_tokens=512, greedy=True),
        1,
    )
    assert sorted(texts) == [0, 1, 2] and texts[1] == expected[0]["answer"]
    short = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=40)
    texts = dict(LocalJudge(short, "ours", 2).replies(["the cat " * 30]))
    assert texts == {0: "(no room in the context)"}


def test_cost_line():
    comparisons = [Comparison("问题" * 100, "a" * 400, "b" * 400)] * 3
    line = cost_line(comparisons, 2.0, 8.0)
    assert line.startswith("judging: 6 requests, about ") and "at most 3,072 to write" in line
    told = int(re.search(r"about ([\d,]+) tokens", line)[1].replace(",", ""))
    assert 6 * (200 + 200) < told < 6 * (200 + 200 + 250)
    assert f"{(told * 2 + 3072 * 8) / 1e6:.2f}" in line
