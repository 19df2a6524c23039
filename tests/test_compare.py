"""eval.py compare and its rooms: measures equal the libraries', a judge that may be ill, a page."""

import json
import math
import re
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sacrebleu
import torch
import transformers
from conftest import command
from rouge_score import rouge_scorer

from minisft.assistant import Assistant
from minisft.compare import (
    Item,
    answer_items,
    differences,
    measure,
    parse_model,
    read_items,
    reference_losses,
)
from minisft.dataset import load_rows
from minisft.generate import Sampling
from minisft.judge import (
    Comparison,
    LocalJudge,
    RemoteJudge,
    cost_line,
    judge,
    parse_verdict,
    tally,
)
from minisft.options import UserError
from minisft.report_page import page
from minisft.text_metrics import Splitter, corpus_bleu2, row_scores

PAIRS = [("the cat sat", "a cat sat down"), ("今天天气很好", "今天天气不错"),
         ("same same", "same same"), ("", "nothing"), ("我用 Python 写 code。", "我写 Python code")]


def test_rouge_equals_the_library_character_by_character():
    oracle = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    found, expected = row_scores(*PAIRS[0]), oracle.score(PAIRS[0][1], PAIRS[0][0])
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert found[ours] == pytest.approx(expected[theirs].fmeasure)
    # It splits at spaces: one letter for each character, with spaces between, is the same text.
    letters = {one: chr(97 + place) for place, one in enumerate("今天气很好不错")}
    answer, reference = (" ".join(letters[one] for one in text) for text in PAIRS[1])
    expected = oracle.score(reference, answer)
    assert row_scores(*PAIRS[1])["rouge_2"] == pytest.approx(expected["rouge2"].fmeasure)
    assert row_scores(*PAIRS[1])["rouge_l"] == pytest.approx(expected["rougeL"].fmeasure)
    assert Splitter().tokenize("我用Python3写 code。") == ["我", "用", "python3", "写", "code"]
    assert row_scores("今天", "今天")["rouge_l"] == 1.0
    assert oracle.score("今天", "今天")["rougeL"].fmeasure == 0.0  # why we bring our own


def test_bleu_is_sacrebleus_of_two_grams():
    answers, references = zip(*PAIRS, strict=True)
    oracle = sacrebleu.BLEU(tokenize="zh", max_ngram_order=2)
    expected = oracle.corpus_score(answers, [references])
    assert corpus_bleu2(answers, references) == pytest.approx(expected.score / 100)
    # By hand: 6 characters, of which 4 + 0 match, and 3 of 5 pairs; equal lengths.
    assert row_scores(*PAIRS[1])["bleu_2"] == pytest.approx(math.sqrt(4 / 6 * 3 / 5), abs=1e-6)
    assert row_scores("same same", "same same ")["exact_match"] == 1.0


ITEMS = [Item([{"role": "user", "content": text}], reference) for text, reference in (
    ("the cat", "the mat"), ("where is the rat and the hat?", "on the mat 垫子"), ("你好", "yes"))]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, top_k=0, top_p=1.0, seed=5)


@pytest.fixture(scope="module")
def assistant(tiny_chat_model_dir):
    return Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")


def test_answers_do_not_depend_on_the_batch(assistant):
    together = answer_items(assistant, ITEMS, SAMPLING, 8)
    assert together == answer_items(assistant, ITEMS, SAMPLING, 1)
    assert len({one["answer"] for one in together}) == 3
    lengths = [len(assistant.template.encode_prompt(item.messages)) for item in ITEMS]
    short = Assistant(assistant.tokenizer.model_dir, device="cpu", dtype="float32",
                      max_length=lengths[1] - 1 + SAMPLING.max_new_tokens)
    skipped = answer_items(short, ITEMS, SAMPLING, 8)
    assert [one["is_skipped"] for one in skipped] == [False, True, False]
    assert skipped[0] == together[0] and skipped[1]["answer"] == ""


def test_reference_losses_equal_transformers(assistant, tiny_chat_model_dir):
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir)
    losses = reference_losses(assistant, ITEMS, 2)
    for item, (loss, count) in zip(ITEMS, losses, strict=True):
        answer = {"role": "assistant", "content": item.reference}
        ids, learned = assistant.template.encode([*item.messages, answer])
        labels = torch.tensor([[id if one else -100 for id, one in zip(ids, learned, strict=True)]])
        expected = oracle(torch.tensor([ids]), labels=labels).loss
        assert count == sum(learned) and loss / count == pytest.approx(float(expected), abs=1e-4)
    report = measure(ITEMS, answer_items(assistant, ITEMS, SAMPLING, 8), [losses[0], None, None])
    assert report["perplexity"] == pytest.approx(math.exp(losses[0][0] / losses[0][1]))
    assert report["bits_per_character"] == pytest.approx(losses[0][0] / math.log(2) / 7)
    assert report["references_without_room"] == 2
    assert report["mean"]["exact_match"]["mean"] == 0
    assert report["mean"]["exact_match"]["interval"] == pytest.approx((0, 0.5615), abs=1e-4)


def test_differences_are_paired():
    first, other = ({"rows": [{"bleu_2": 0, "rouge_1": 0, "rouge_2": 0, "rouge_l": value,
                               "exact_match": float(value == 1)} for value in values]}
                    for values in ([0.5, 0.2, 0.4], [1, 0.7, 0.9]))
    found = differences(first, other)
    assert found["rouge_l"]["mean"] == pytest.approx(0.5)
    assert found["rouge_l"]["interval"] == pytest.approx((0.5, 0.5))  # the same gain in every row
    assert found["exact_match"]["p_value"] == 1.0


def test_names_of_models():
    assert parse_model("base=some/dir") == ("base", "some/dir", None)
    assert parse_model("tuned=dir+runs/a") == ("tuned", "dir", "runs/a")
    for wrong in ("dir", "=dir", "a=", "a/b=dir"):
        with pytest.raises(UserError, match="write NAME=DIR"):
            parse_model(wrong)


@pytest.mark.parametrize("text, verdict", [
    ("Because.\nVerdict: 1", 1), ("**Verdict:** 2", 2), ("verdict - TIE", "tie"),
    ("Verdict: 1? No.\nVerdict: 2", 2), ("The first.", None), ("Verdict: 12", None), ("", None),
])
def test_verdicts_are_read(text, verdict):
    assert parse_verdict(text) == verdict


class Stub(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer; for some questions it is ill first, or for good."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        prompt = request["messages"][0]["content"]
        question = re.search(r"\[Question\]\n(.*)\n", prompt)[1]
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), request["model"],
                                    question))
            first_time = [one[3] for one in server.requests].count(question) <= 2
        if question == "busy" and first_time:
            return self.reply(429, b"", {"Retry-After": "0"})
        if question == "broken" and first_time:
            return self.reply(503, b"")
        if question == "slow" and first_time:
            time.sleep(0.6)
        if question == "html" and first_time:
            return self.reply(200, b"<html>")
        if question == "down" and server.is_down:
            return self.reply(500, b"")
        if question == "refused":
            return self.reply(401, b"")
        first, second = re.search(r"\[Answer 1\]\n(.*)\n\n\[Answer 2\]\n(.*)\n", prompt).groups()
        better = 1 if len(first) > len(second) else 2 if len(first) < len(second) else "tie"
        text = {"nonsense": "I like both", "first": "Verdict: 1"}.get(question,
                                                                      f"So.\nVerdict: {better}")
        content = {"choices": [{"message": {"content": text}}]}
        return self.reply(200, json.dumps(content).encode())

    def reply(self, status, body, headers=()):
        try:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # who asked has given up waiting

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.requests, server.lock, server.is_down = [], threading.Lock(), True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def remote(stub, **settings):
    return RemoteJudge(stub.url, "stub", "secret", **{"pause": 0.01, "timeout": 0.3, **settings})


def test_a_judge_is_asked_in_both_orders_and_again_when_it_fails(stub, tmp_path):
    comparisons = [Comparison("plain", "a", "longer"), Comparison("busy", "longer", "b"),
                   Comparison("broken", "same", "size"), Comparison("slow", "a", "longer"),
                   Comparison("html", "a", "longer"), Comparison("nonsense", "a", "longer"),
                   Comparison("first", "a", "longer")]
    path, seen = tmp_path / "verdicts.jsonl", []
    outcomes = judge(remote(stub), comparisons, path, seen.append)
    # A judge that always takes the first place contradicts itself: that is a tie.
    assert outcomes == ["win", "loss", "tie", "win", "win", None, "tie"]
    assert sum(seen) == 14
    assert {one[:3] for one in stub.requests} == {
        ("/v1/chat/completions", "Bearer secret", "stub")}
    asked = [one[3] for one in stub.requests]
    assert asked.count("plain") == 2 and asked.count("busy") == asked.count("slow") == 4
    before = len(asked)
    assert judge(remote(stub), comparisons, path) == outcomes and len(stub.requests) == before
    report = tally(outcomes)
    assert (report["win"]["count"], report["tie"]["count"], report["loss"]["count"]) == (3, 2, 1)
    assert report["unreadable"] == 1 and report["win"]["share"] == 0.5
    low, high = report["win"]["interval"]
    assert low < 0.5 < high


def test_a_run_that_broke_goes_on_where_it_stopped(stub, tmp_path):
    comparisons = [Comparison("plain", "a", "longer"), Comparison("down", "a", "longer")]
    path = tmp_path / "verdicts.jsonl"
    with pytest.raises(UserError, match="500 .*3 times.*--resume"):
        judge(remote(stub, retries=2), comparisons, path)
    assert len(path.read_text().splitlines()) == 2
    with open(path, "a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    stub.is_down, stub.requests[:] = False, []
    assert judge(remote(stub), comparisons, path) == ["win", "win"]
    assert {one[3] for one in stub.requests} == {"down"}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_judge_that_refuses_is_not_asked_again(stub, tmp_path):
    with pytest.raises(UserError, match="401.*OPENAI_API_KEY"):
        judge(remote(stub), [Comparison("refused", "a", "b")], tmp_path / "v.jsonl")
    with pytest.raises(UserError, match="http"):
        RemoteJudge("ftp://somewhere", "x", None)
    with pytest.raises(UserError, match="--judge_url http://127.0.0.1:9"):
        judge(RemoteJudge("http://127.0.0.1:9", "x", None, retries=1, pause=0.01),
              [Comparison("plain", "a", "b")], tmp_path / "w.jsonl")


def test_a_model_of_ours_as_judge(assistant, tmp_path):
    ask = LocalJudge(assistant, "ours", 2)
    texts = dict(ask(["Which?", "the cat", "you?"]))
    expected = answer_items(assistant, [Item([{"role": "user", "content": "the cat"}], "")],
                            Sampling(max_new_tokens=512, greedy=True), 1)
    assert sorted(texts) == [0, 1, 2] and texts[1] == expected[0]["answer"]


def test_the_cost_is_told_before():
    comparisons = [Comparison("问题" * 100, "a" * 400, "b" * 400)] * 3
    line = cost_line(comparisons, 2.0, 8.0)
    assert line.startswith("judging: 6 requests, about ") and "at most 3,072 to write" in line
    told = int(re.search(r"about ([\d,]+) tokens", line)[1].replace(",", ""))
    assert 6 * (200 + 200) < told < 6 * (200 + 200 + 250)
    assert f"{(told * 2 + 3072 * 8) / 1e6:.2f}" in line


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.texts.append(text)


def test_compare_through_the_command_line(tiny_chat_model_dir, stub, tmp_path):
    rows = [{"instruction": "plain", "output": "the mat"},
            {"instruction": "<script>alert(1)</script> 你好", "output": "</script><b>是"},
            {"instruction": "the rat", "output": "the hat"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["compare", "--models", f"base={tiny_chat_model_dir}", f"same={tiny_chat_model_dir}",
             "--dataset", tmp_path / "rows.json", "--max_new_tokens", 5, "--device", "cpu",
             "--dtype", "float32", "--judge_model", "stub", "--judge_url", stub.url,
             "--output_dir", tmp_path / "out"]
    done = command(*words, script="eval.py")
    assert done.returncode == 0, done.stderr
    assert "judging: 6 requests" in done.stdout and "0 win, 3 tie, 0 loss" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["models"]) == {"base", "same"}
    assert results["models"]["base"] == results["models"]["same"]
    assert results["differences_to_first"]["same"]["rouge_l"]["mean"] == 0
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 3  # same texts

    text = (tmp_path / "out" / "report.html").read_text()
    assert text == page(results)
    reader = Reader(text)
    assert reader.tags.count("article") == 3 and reader.tags.count("script") == 1
    assert not {"src", "href", "action"} & {name for name, _ in reader.attributes}
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert any("<script>alert(1)</script> 你好" in one for one in reader.texts)
    assert any("</script><b>是" in one for one in reader.texts)

    # Kept answers are taken as they are; other settings would not fit to them.
    kept = tmp_path / "out" / "answers" / "same.json"
    content = json.loads(kept.read_text())
    content["answers"][0]["answer"] = "the mat"
    kept.write_text(json.dumps(content))
    done = command(*words, "--resume", script="eval.py")
    assert done.returncode == 0 and "exact match 33.3" in done.stdout
    done = command(*words, "--resume", "--seed", 7, script="eval.py")
    assert done.returncode == 2 and "seed 42, not 7" in done.stderr


def test_real_rows_become_items(shared_data):
    rows = load_rows(str(shared_data / "instruct" / "compare_alpaca.json"))
    items = read_items(rows)
    assert len(items) == 10 and all(item.reference and item.question for item in items)
    report = measure(items, [{"answer": item.reference, "num_tokens": 1, "is_cut": False,
                              "is_skipped": False} for item in items], [None] * 10)
    assert report["mean"]["exact_match"]["mean"] == report["mean"]["rouge_l"]["mean"] == 1
    assert report["mean"]["bleu_2"]["mean"] == pytest.approx(1)
