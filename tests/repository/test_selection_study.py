"""bench/selection.py: its data, checks, choices, intervals; a study that stops and goes on."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from bench import selection, selection_choice, selection_estimates, selection_report, selection_run
from bench.selection_checks import KINDS, make_prompts
from bench.selection_options import SMOKE, STRATEGIES, TARGETS, Budget, parse_options
from bench.selection_pool import BAD_KINDS, SOURCES, TALK, language_of, make_data
from minisft.common.errors import UserError
from minisft.evaluation.confidence import macro_interval
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

pytestmark = pytest.mark.xdist_group("selection_study")  # the study is made once
WORDS = "red blue cat hat sun sea tree road lamp song bread stone river cloud".split()
SIGNS = "红蓝猫帽日海树路灯歌饼石河云"
TOOLS = json.dumps([{"name": "look", "description": "look", "parameters": {"type": "object"}}])


def text(language, generator, count):
    """Words without meaning."""
    places = generator.integers(len(WORDS), size=count)
    if language == "zh":
        return "".join(SIGNS[place] for place in places)
    return " ".join(WORDS[place] for place in places)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Files with the names and the columns of the public data sets."""
    folder, generator = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name, source in SOURCES.items():
        rows = []
        for number in range(24):
            question = f"{name} {number} {text(source.language, generator, 4)}"
            answer = text(source.language, generator, int(generator.integers(6, 24)))
            row = {"instruction": question, "input": "", "output": answer}
            if name in ("lima", "oaast_zh") and number % 3 == 0:
                row["history"] = [[f"one {number}", text(source.language, generator, 5)]]
            if name == "cherry":
                row["input"] = "more"
            if name == "tools":
                said = ["human", question], ["function_call", '{"name": "look", "arguments": {}}']
                said = *said, ["observation", "{}"], ["gpt", answer]
                turns = [{"from": who, "value": value} for who, value in said]
                row = {"conversations": turns, "tools": TOOLS}
            rows.append(row)
        (folder / source.file_name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def template(tiny_chat_model_dir):
    return get_template("auto", Tokenizer.load(tiny_chat_model_dir))


@pytest.fixture(scope="module")
def words(data_dir, tiny_chat_model_dir, tmp_path_factory):
    """The command line of a small study."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    return [
        *("--smoke", "--data_dir", str(data_dir), "--output_dir", str(folder)),
        *("--model_name_or_path", str(tiny_chat_model_dir), "--cutoff_len", "2000"),
        *("--dtype", "float32"),
    ]


@pytest.fixture(scope="module")
def study(words):
    """The folder of a study with all scores and two runs, of the base and of random rows."""
    options = parse_options([*words, "--runs", "2"])
    selection.main(options)
    return selection.Path(options.output_dir)


def test_data_is_the_same_each_time_and_apart(data_dir, template):
    first, second = (make_data(data_dir, template, 2000, 5, seed=3) for _ in range(2))
    assert first == second
    assert first != make_data(data_dir, template, 2000, 5, seed=4)
    assert Counter(row["source"] for row in first.held_out) == dict.fromkeys(SOURCES, 5)
    assert {name: len(rows) for name, rows in first.targets.items()} == {"tools": 4, "alpaca_zh": 4}
    parts = [first.pool, first.held_out, *first.targets.values()]
    # Of the conversations that begin with the same question there is one: 8 of oaast_zh do as
    # those of lima.
    questions = [row["messages"][0]["content"] for part in parts for row in part]
    assert len(questions) == len(set(questions)) == 6 * 24 - 8
    assert {row["quality"] for part in parts[1:] for row in part} == {"good"}


def test_bad_rows_are_what_their_mark_says(data_dir, template):
    rows = make_data(data_dir, template, 2000, 1, seed=0).pool
    originals = {}
    for name, source in SOURCES.items():
        for row in selection_run.load_rows(str(data_dir / source.file_name)):
            originals[row.messages[-2]["content"].split("\n")[0]] = row.messages[-1]["content"]
            if name == "tools":
                originals[row.messages[0]["content"]] = row.messages[-1]["content"]
    kinds = Counter(row["quality"] for row in rows)
    num_bad = round(0.15 * len(rows))
    assert len(rows) - kinds.pop("good") == num_bad
    assert set(kinds) == set(BAD_KINDS) and max(kinds.values()) - min(kinds.values()) <= 1
    answers = {answer: question.split()[0] for question, answer in originals.items()}
    for row in rows:
        question = row["messages"][0 if row["source"] == "tools" else -2]["content"].split("\n")[0]
        good, answer = originals[question], row["messages"][-1]["content"]
        language = SOURCES[row["source"]].language
        assert (answer == good) == (row["quality"] == "good")
        if row["quality"] == "swapped":
            assert answers[answer] == row["source"]
        elif row["quality"] == "cut":
            assert good.startswith(answer) and len(answer) <= 0.6 * len(good)
        elif row["quality"] == "language":
            assert language_of(answer) != language and language_of(good) == language
        elif row["quality"] == "talk":
            assert any(answer.startswith(opening) for opening in TALK[language][0])


def test_missing_sources_are_named(tmp_path, data_dir):
    (tmp_path / "lima.json").write_text("[]")
    with pytest.raises(UserError, match=r"no alpaca_en_demo.json \(github.com/hiyouga"):
        selection.main(parse_options(["--data_dir", str(tmp_path), "--runs", "0"]))
    with pytest.raises(UserError, match="--data_dir is missing"):
        parse_options([])


RIGHT_AND_WRONG = {
    "JSON array": (
        ['["a", "b"]', '```json\n["a", "b"]\n```'],
        ['["a"]', '["a", 1]', '{"a": "b"}', 'Here: ["a", "b"]', '["a", ""]', '["a", "A"]']
        + ["[" * 100_000],
    ),
    "numbered list": (
        ["1. a\n2. b\n3. c", "1) a\n\n2) b\n3) c\n"],
        ["1. a\n2. b", "a\nb\nc", "Sure:\n1. a\n2. b\n3. c", "1. a\n3. b\n2. c"]
        + ["1. a\n2. b\n3. a"],
    ),
    "bullet points": (
        ["- a\n- b", "- a\n\n- b\n"],
        ["- a", "a\nb", "- a\n- b\n- c", "-a\n-b", "* a\n* b", "- a\n- a"],
    ),
    "length": (
        ["Bread is a warm and simple food.", "Bread is food, e.g. for us"],
        ["Bread.", "It is food. It is warm.", "Bread is a food that " + "very " * 20 + "old."]
        + ["Bread is food\nand good"],
    ),
    "Chinese": (
        ["树叶因为天气变冷而落下。"],
        [
            "Leaves fall.",
            "树",
            "",
            "Leaves fall (落下) because",
            "树叶落下来 because it is cold",
        ],
    ),
    "capital letters": (
        ["BREAD IS GOOD FOOD."],
        ["Bread is good.", "", "12345678", "面包是很好的食物。", "A. B. C. D. E. F. G. H."],
    ),
}


@pytest.mark.parametrize("kind", RIGHT_AND_WRONG)
def test_checks_accept_and_refuse(kind):
    class Least:
        """Draws the first of all values."""

        integers = staticmethod(lambda low, high=None: 0 if high is None else low)
        random = staticmethod(lambda: 0.0)

    question, is_right = KINDS[kind](Least)
    right, wrong = RIGHT_AND_WRONG[kind]
    for answer in right:
        assert is_right(answer), (question, answer)
    for answer in wrong:
        assert not is_right(answer), (question, answer)


def test_checks_of_fields_and_facts():
    prompts = make_prompts(per_kind=25)
    assert len(prompts) == 200 and len({prompt.question for prompt in prompts}) == 200
    assert [p.question for p in prompts] == [p.question for p in make_prompts(25)]
    fields = prompts[0]
    name, age = fields.question.split()[0], int(fields.question.split()[2])
    city = fields.question.split("lives in ")[1].split(".")[0]
    right = {"name": name, "age": age, "city": city}
    assert fields.is_right(json.dumps(right))
    for change in ({"age": str(age)}, {"more": 1}, {"name": "X"}):
        assert not fields.is_right(json.dumps(right | change))
    for prompt in prompts:
        if prompt.kind == "yes or no":
            assert prompt.is_right("Yes.") != prompt.is_right("no")
            assert not prompt.is_right("Yes, it is")


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - TARGETS))
def test_strategies_return_the_budget(strategy, study):
    lengths = selection_choice.scored(study / "ifd.jsonl")["num_answer_tokens"]

    def chosen(budget, seed=0):
        return selection_choice.choose_rows(study, strategy, Budget.parse(budget), seed, 2)

    rows = chosen("6")
    if strategy in ("all", "all_same_steps"):
        assert rows.tolist() == list(range(len(lengths)))
        return
    assert len(rows) == len(set(rows)) == 6 and sorted(rows) == rows.tolist()
    assert np.array_equal(rows, chosen("6"))
    if strategy.startswith("random"):
        assert not np.array_equal(rows, chosen("6", seed=1))
    tokens, limit = lengths[chosen("6t")].sum(), 6 * lengths.mean()
    longest = lengths.max()
    assert limit - 2 * longest < tokens <= limit or strategy in ("random_matched", "kmeans")


def test_strategies_choose_what_they_name(study):
    scores = selection_choice.scored(study / "ifd.jsonl")
    lengths, ifd = scores["num_answer_tokens"], scores["ifd"]

    def chosen(strategy):
        return selection_choice.choose_rows(study, strategy, Budget(6), 0, 2)

    below_1 = np.sort(ifd[ifd < 1])
    assert np.array_equal(np.sort(ifd[chosen("ifd")]), below_1[-6:])
    assert np.array_equal(np.sort(ifd[chosen("ifd_lowest")]), below_1[:6])
    assert lengths[chosen("longest")].min() >= np.sort(lengths)[-6]
    matched, reference = (np.sort(lengths[chosen(name)]) for name in ("random_matched", "ifd"))
    assert np.abs(matched - reference).max() <= np.diff(np.sort(lengths)).max() + 6
    pool = selection_run.read_records(study / "pool.json")
    near = [pool[row]["source"] for row in chosen("rds_tools")]
    assert near.count("tools") > 3


def test_intervals_are_those_of_scipy():
    generator = np.random.default_rng(0)
    rows, others = generator.normal(size=(2, 30))
    # One seed: the paired t-test over rows.
    ours = selection_estimates.difference([{"a": rows}], [{"a": others}])
    expected = scipy.stats.ttest_rel(rows, others).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert ours.mean == pytest.approx((rows - others).mean())
    # Rows that do not differ: Welch's test over seeds.
    seeds, more = generator.normal(size=3), generator.normal(1, 3, size=5)
    ours = selection_estimates.difference(
        [{"a": [value] * 4} for value in seeds], [{"a": [value] * 4} for value in more]
    )
    expected = scipy.stats.ttest_ind(seeds, more, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    # A single run among those of the other side: a prediction interval.
    ours = selection_estimates.difference(
        [{"a": [2.0] * 4}], [{"a": [value] * 4} for value in more]
    )
    scale = more.std(ddof=1) * math.sqrt(1 + 1 / 5)
    expected = scipy.stats.t.interval(0.95, 4, 2 - more.mean(), scale)
    assert (ours.low, ours.high) == pytest.approx(expected)
    # The values themselves.
    ours = selection_estimates.level([{"a": rows}])
    expected = scipy.stats.ttest_1samp(rows, 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    ours = selection_estimates.level([{"a": [value] * 4} for value in more])
    expected = scipy.stats.ttest_1samp(more, 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    # Groups count the same, however many rows they have; rows without a value are left out.
    ours = selection_estimates.difference(
        [{"a": [1.0, None], "b": [3.0] * 9}], [{"a": [0.0, 5.0], "b": [0.0] * 9}]
    )
    assert ours.mean == 2.0
    # Both: near the bootstrap over rows.
    first, second = generator.normal(0, 1, (2, 200)), generator.normal(0.2, 1, (2, 200))
    ours = selection_estimates.difference([{"a": first[0]}], [{"a": second[0]}])
    drawn = scipy.stats.bootstrap(
        (first[0] - second[0],), np.mean, method="percentile", rng=generator
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((drawn.low, drawn.high), abs=0.03)


def test_checks_that_are_all_right_are_not_certain():
    runs = [{"a": [1.0] * 400, "b": [0.0, 1.0] * 200}] * 2  # enough rows for the normal interval
    ours = selection_estimates.level(runs, selection_estimates.SHARES)
    assert (ours.low, ours.high) == pytest.approx(
        macro_interval([(1.0, 400), (0.5, 400)]), abs=2e-4
    )
    # Agresti and Min: 30 rows right only in the first, 10 only in the second, of 400.
    theirs = [{"a": [0.0] * 30 + [1.0] * 370}] * 2
    ours = [{"a": [1.0] * 390 + [0.0] * 10}] * 2
    change = selection_estimates.difference(ours, theirs, selection_estimates.CHANGES)
    half = 1.96 * math.sqrt(41 - 20**2 / 402) / 402
    assert change.mean == pytest.approx(0.05)
    assert (change.high - change.low) / 2 == pytest.approx(half, rel=0.01)


def run_of(strategy, budget, seed, loss, checks, **more):
    """A line of results.jsonl."""
    line = {"strategy": strategy, "budget": budget, "seed": seed, "loss": loss, "checks": checks}
    line |= {"num_rows": 0, "answer_tokens": 0, "steps": 0, "trained_tokens": 0}
    return {**line, "seconds": {"choose": 6.0, "train": 54.0, "measure": 1.0}, **more}


def test_tables_of_known_runs(tmp_path, capsys):
    checks = {"form": [1, 1], "length": [0, 0], "fact": [0, 1]}
    wrong = {**checks, "fact": [0, 0]}
    size = {"num_rows": 40, "answer_tokens": 4000, "steps": 10, "trained_tokens": 10_000}
    untrained = {"choose": 0.0, "train": 0.0, "measure": 1.0}
    slow = {"choose": 6.0, "train": 108.0, "measure": 1.0}  # the machine was busy
    results = [
        run_of("base", "none", 0, {"a": [3.0, 5.0], "b": [1.0]}, wrong, seconds=untrained),
        *(
            run_of(
                *("random", "40", seed, {"a": [2.0, 4.0], "b": [1.0 + change]}, checks),
                **{**size, "answer_tokens": 4000 + seed, "quality": {"good": 32, "cut": 8}},
            )
            for seed, change in enumerate((-0.5, 0, 0.5))
        ),
        *(
            run_of(
                *("ifd", "40", seed, {"a": [2.5, 4.5], "b": [1.0]}, wrong),
                **{**size, "quality": {"good": 38, "talk": 2}, "seconds": slow},
            )
            for seed in range(2)
        ),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in results))
    operations = {"ifd": 3e12, "token": 1e8}
    (tmp_path / "operations.json").write_text(json.dumps(operations))
    step = {"step": "ifd", "done": True, "seconds": 120.0}
    (tmp_path / "steps.jsonl").write_text(json.dumps(step) + "\n")
    selection_report.write_report(tmp_path, [("random", "40", 0), ("kcenter", "40", 0)], False)
    said = capsys.readouterr().out
    assert "1 of 2 runs are missing: kcenter 40 (1)." in said
    assert "Held-out rows: a 2, b 1." in said
    assert "always right in every run: form; always wrong in every run: length." in said
    # 24 of 120 rows: the runs differ. 2 of 40 rows: both runs take the same.
    wilson = {
        name: scipy.stats.binomtest(bad, rows).proportion_ci(method="wilson")
        for name, bad, rows in (("random", 24, 120), ("IFD by the base", 2, 40))
    }
    for name, choice, cost in (
        ("random", "20", "0 + 1 | 1.4 | 3 |"),
        ("IFD by the base", "5", "3 + 1 | 3.4 | 2 |"),
    ):
        low, high = (f"{100 * end:.0f}" for end in (wilson[name].low, wilson[name].high))
        assert f"| {name} | 40 | {choice} ({low} to {high}) | 100 | 10 | 10,000 | {cost}" in said
    seeds = scipy.stats.ttest_1samp([0.5, 0, -0.5], 0).confidence_interval()
    assert f"| +0.500 | +0.000 ({seeds.low:+.3f} to {seeds.high:+.3f}) |" in said
    assert "| IFD by the base | 2.250 (" in said and "| random | 2.000 (" in said
    assert "| random: the loss itself | 3.000 (" in said
    # The base has no seed: only those of random vary.
    assert f"| no training | +1.000 | +0.000 ({seeds.low:+.3f} to {seeds.high:+.3f}) |" in said
    (tmp_path / "operations.json").unlink()  # unknown is not nothing
    with pytest.raises(UserError, match="no run with --budgets 7 is done"):
        selection_report.write_report(tmp_path, [("random", "7", 0)], True)
    selection_report.write_report(tmp_path, [("random", "40", 0)], False)
    assert "| 0 + nan | 1.4 | 3 |" in capsys.readouterr().out


def test_a_study_goes_on_where_it_stopped(study, words, capsys):
    path = study / "results.jsonl"
    before = path.read_text()
    assert [json.loads(line)["strategy"] for line in before.splitlines()] == ["base", "random"]
    report = (study / "report.md").read_text()
    assert "27 of 29 runs are missing: random_matched 6 (1), ifd 6 (1)" in report
    assert "held-out rows, 8 prompts; 2 epochs of LoRA of rank 16" in report
    assert "| random | 6 |" in report and (study / "selection.png").exists()
    path.write_text(before + '{"strategy": "random_mat')  # a crash
    made = {name: (study / name).stat().st_mtime_ns for name in ("pool.json", "pre_ifd.jsonl")}
    chosen = ["--strategies", "random", "ifd", "targets_tools", "all_same_steps"]
    chosen += ["--budgets", "6"]
    selection.main(parse_options([*words, *chosen]))
    said = capsys.readouterr().out
    assert "5 runs, 3 to do" in said and "All 5 runs are done." in said
    assert made == {name: (study / name).stat().st_mtime_ns for name in made}
    assert path.read_text().startswith(before)
    results = {row["strategy"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(results) == ["base", "random", "ifd", "targets_tools", "all_same_steps"]
    assert {results[name]["steps"] for name in list(results)[1:]} == {2}
    for result in results.values():
        assert {name: len(rows) for name, rows in result["loss"].items()} == dict.fromkeys(
            SOURCES, SMOKE["held_out"]
        )
        assert {name: len(rows) for name, rows in result["checks"].items()} == dict.fromkeys(
            KINDS, 1
        )
    assert results["ifd"]["loss"] != results["base"]["loss"]
    targets = results["targets_tools"]
    assert targets["sources"] == {"tools": targets["num_rows"]} and targets["answer_tokens"] > 0
    assert results["random"]["trained_tokens"] > results["random"]["answer_tokens"] > 0
    assert [path.name for path in study.glob("ifd-6-0*")] == ["ifd-6-0.answers.json"]
    with pytest.raises(UserError, match="has runs with lora_rank 16, not 4"):
        selection.main(parse_options([*words, "--lora_rank", "4"]))
    selection.main(parse_options([*words, "--runs", "0"]))
    said = capsys.readouterr().out
    assert "29 runs, 24 to do: about " in said and "runs are missing" not in said


def test_a_finished_study_is_reported(monkeypatch, tmp_path):
    """Also without --report: --write_docs has its effect."""
    asked = []
    monkeypatch.setattr(selection, "check_files", lambda folder: None)
    monkeypatch.setattr(selection, "missing_runs", lambda runs, results: [])
    monkeypatch.setattr(selection, "write_report", lambda folder, runs, docs: asked.append(docs))
    words = ["--data_dir", "d", "--output_dir", str(tmp_path)]
    selection.main(parse_options([*words, "--write_docs"]))
    selection.main(parse_options([*words, "--write_docs", "--runs", "0"]))
    assert asked == [True]


def test_costs(study):
    operations = json.loads((study / "operations.json").read_text())
    assert set(operations) == {step for s in STRATEGIES.values() for step in s.needs} | {"token"}
    assert all(value > 0 for value in operations.values())
    assert operations["ifd"] == operations["pre_ifd"] > operations["weighted"] > operations["embed"]
    done = [json.loads(line) for line in (study / "steps.jsonl").read_text().splitlines()]
    assert all(step["done"] and step["seconds"] > 0 for step in done)
    assert math.isfinite(selection.estimate(parse_options(["--data_dir", "d"]), [], []))


def test_all_rows_of_a_small_pool_take_less_time():
    """--max_rows limits what `all` trains on."""
    timed = {"trained_tokens": 10**6, "seconds": {"train": 10.0**4, "measure": 0.0}}
    hours = [
        selection.estimate(
            parse_options(["--data_dir", "d", *limit]), [selection.Run("all", "all", 0)], [timed]
        )
        for limit in ([], ["--max_rows", "55"])
    ]
    assert hours[0] / hours[1] == pytest.approx(selection.NUM_ROWS / (6 * 55))


def test_the_places_of_the_tables_are_in_the_pages():
    for name, marks in (
        ("selection.md", (selection_report.BEGIN, selection_report.END)),
        ("training.md", ("<!-- preference -->\n", "<!-- /preference -->")),
    ):
        text = (selection_report.DOCS / name).read_text(encoding="utf-8")
        assert [text.count(mark) for mark in marks] == [1, 1]
