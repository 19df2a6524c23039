"""The report: the page is escaped, makes no request and works in a browser; lines and bars."""

import json
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minisft.evaluation.compare import Item
from minisft.evaluation.judge import judge_report
from minisft.evaluation.measures import differences, measure
from minisft.evaluation.report_bars import draw_bars
from minisft.evaluation.report_lines import measure_lines, verdict_lines
from minisft.evaluation.report_page import render_page, write_results

NASTY = "<script>alert(1)</script> </script><b>是 <img src=http://127.0.0.1:9/x>"


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


def made_up_results():
    """The results of a comparison of three models, with long words and all kinds of verdicts."""
    items = [
        Item([{"role": "user", "content": f"问题 {number}: {'很长' * 40}"}], "the mat")
        for number in range(12)
    ]
    texts = {
        "base": ["x" * 300] * 12,
        "tuned": ["the mat", "the cat"] * 6,
        "第三": ["the mat"] * 11 + [NASTY],
    }
    models = {}
    for name, answers in texts.items():
        answers = [
            {"answer": text, "num_tokens": 3, "is_cut": False, "is_skipped": False}
            for text in answers
        ]
        models[name] = measure(items, answers, [(1.0, 3)] * 12) | {"answers": answers}
    verdicts = {"tuned": [(2, 1), (1, 2), (1, 1), (None, 1)] * 3, "第三": [(2, 1)] * 12}
    return {
        "protocol": "12 questions of /a/path/" + "without-spaces" * 10,
        "models": models,
        "questions": [{"question": item.question, "reference": item.reference} for item in items],
        "differences_to_first": {
            name: differences(models["base"], models[name]) for name in verdicts
        },
        "judge": judge_report("made up", verdicts),
    }


def test_texts_are_escaped_and_the_page_makes_no_request():
    results = made_up_results()
    text = render_page(results)
    assert text == render_page(json.loads(json.dumps(results)))
    reader = Reader(text)
    assert reader.tags.count("article") == 12 and reader.tags.count("script") == 1
    assert not {"src", "href", "action"} & {name for name, _ in reader.attributes}
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert NASTY in reader.texts


def test_lines_report_what_went_wrong():
    results = made_up_results()
    results["models"]["tuned"] |= {
        "answers_cut": 3,
        "references_without_room": 1,
        "perplexity": None,
    }
    lines = measure_lines(results)
    assert sum("of 12" in one for one in lines) == 2
    assert any(one.startswith("tuned: 3 of 12 answers were truncated") for one in lines)
    assert any(one.startswith("tuned: 1 of 12 references did not fit") for one in lines)
    assert any(one.startswith("tuned: ") and one.endswith("perplexity unknown") for one in lines)
    (told,) = [one for one in lines if one.startswith("tuned minus base: ")]
    assert "exact match +50.0 points (" in told and "p = 0.0312" in told
    assert verdict_lines(results) == [
        "tuned against base: 3 win, 3 tie, 3 loss, 3 unreadable; 3 of the ties because "
        "the judge contradicted itself; it chose the answer shown first in 67 % of its choices",
        "第三 against base: 12 win, 0 tie, 0 loss, 0 unreadable; 0 of the ties because "
        "the judge contradicted itself; it chose the answer shown first in 50 % of its choices",
        'unreadable: a text of the judge has no line such as "Verdict: 1"; verdicts.jsonl has the '
        "texts. A larger model keeps to this form.",
    ]


def test_the_page_in_a_browser(tmp_path):
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip(f"there is no {chromium} to test in")
    from playwright.sync_api import sync_playwright

    write_results(made_up_results(), tmp_path)
    asked, complaints = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto((tmp_path / "report.html").as_uri())
        # On a phone the page is as wide as the screen. Only the table scrolls sideways.
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        shown = tab.locator("article:visible")
        counts = {}
        for kind in ("", "all-right", "differ", "none-right", "win-1", "loss-1", "tie-1", "win-2"):
            tab.select_option("select", kind)
            counts[kind] = shown.count()
            assert tab.inner_text("#shown") == f"{counts[kind]} of 12"
        assert counts == {
            "": 12,
            "all-right": 0,
            "differ": 11,
            "none-right": 1,
            "win-1": 3,
            "loss-1": 3,
            "tie-1": 3,
            "win-2": 12,
        }
        tab.fill("input", "问题 7")
        assert shown.count() == 1 and "问题 7" in shown.inner_text()
        tab.select_option("select", "loss-1")
        assert shown.count() == 0
        tab.fill("input", "")
        # Text that has scrolled under the bar with the filter does not show through.
        assert tab.evaluate("""() => {
            scrollTo(0, document.body.scrollHeight);
            const bar = document.querySelector("form").getBoundingClientRect();
            const place = [...document.querySelectorAll("article small")].find(one => {
                const {top, bottom} = one.getBoundingClientRect();
                return bottom > 4 && top < bar.height - 4; }).getBoundingClientRect();
            const found = document.elementFromPoint(place.left + 2, Math.max(place.top, 0) + 4);
            return bar.top == 0 && found.closest("form") != null; }""")
        browser.close()
    assert asked == [(tmp_path / "report.html").as_uri()] and not complaints


def test_bars_of_models_with_chinese_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_bars(made_up_results(), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
