"""select.py: its name, which the standard library also has, formats, strategies, mistakes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command
from standing import HANG_SECONDS

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.data import dataset
from minisft.data.dataset import RowFile
from minisft.selection.kmeans import kmeans
from minisft.selection.score_files import ScorePaths
from minisft.selection.strategies import spread_over_clusters

NOT_BUILT_IN = pytest.mark.skipif(
    "select" in sys.builtin_module_names,
    reason="this Python has `select` built in, where our file cannot come before it",
)


def python(*words, input=None, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@NOT_BUILT_IN
class TestTheName:
    """In the root of the repository, `import select` finds our file, which hands over."""

    USE = (
        "import select, selectors, subprocess; print(select.__file__); "
        "print(select.select([], [], [], 0)); "
        "print(len(selectors.DefaultSelector().get_map())); "
        "print(subprocess.run(['echo', 'hello'], capture_output=True, text=True).stdout)"
    )

    @pytest.mark.parametrize("words", [["-c", USE], ["-i", "-q"], ["-"]], ids=["-c", "REPL", "-"])
    def test_python_started_here(self, words):
        done = python(*words, input=self.USE + "\n")
        assert done.returncode == 0, done.stderr
        path, nothing, number, hello = done.stdout.split("\n")[:4]
        assert path.endswith(".so") and nothing == "([], [], [])" and number == "0"
        assert hello == "hello"

    def test_our_file_is_what_is_found(self):
        code = "import importlib.util; print(importlib.util.find_spec('select').origin)"
        assert python("-c", code).stdout.strip() == str(ROOT / "select.py")

    def test_twice_on_the_path(self, tmp_path):
        (tmp_path / "select.py").write_text((ROOT / "select.py").read_text())
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {self.USE}"
        done = python("-c", code)
        assert done.returncode == 0 and done.stdout.splitlines()[0].endswith(".so")

    def test_nothing_else_is_imported(self):
        code = (
            "import sys; before = set(sys.modules); import select; "
            "print(sorted(set(sys.modules) - before))"
        )
        loaded = python("-S", "-c", code).stdout
        assert "argparse" not in loaded and "minisft" not in loaded and "'select'" in loaded

    @pytest.mark.parametrize(
        "words",
        [
            ["train.py", "--help"],
            ["score.py", "--help"],
            ["select.py", "--help"],
            ["-m", "torch.distributed.run", "--nproc_per_node", "2", "select.py", "--help"],
        ],
        ids=["train", "score", "select", "torchrun"],
    )
    def test_commands(self, words):
        done = python(*words)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr

    def test_pytest(self, tmp_path):
        (tmp_path / "test_it.py").write_text(f"def test_it():\n    exec({self.USE!r})\n")
        done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_it.py")
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout

    def test_torch_in_a_worker(self):
        code = (
            "import torch, torch.distributed.run, multiprocessing as m\n"
            "import concurrent.futures as f\n"
            "if __name__ == '__main__':\n"
            "    with f.ProcessPoolExecutor(1, m.get_context('spawn')) as pool:\n"
            "        print(pool.submit(abs, -3).result())"
        )
        done = python("-c", code)
        assert done.stdout.strip() == "3", done.stderr


NUM_ROWS = 60


def fingerprint(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def data(tmp_path):
    """(file of rows, scores, embeddings), as score.py writes them, with made-up numbers."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "instruction": f"Do {'xyz'[n % 3] * 5} {n * n}",
            "input": "",
            "output": "y" * (n + 1),
            "number": n,
            "extra": 1.50,
        }
        for n in range(NUM_ROWS)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    output = tmp_path / "scores.jsonl"
    ifd = generator.permutation(NUM_ROWS) / 40
    lines = [
        {
            "index": n,
            "loss_conditioned": float(generator.random()) + 1,
            "loss_direct": 2.0,
            "ifd": ifd[n],
            "ifd_ppl": ifd[n] ** 2,
            "num_answer_tokens": n % 20 + 1,
            "reason": None,
        }
        for n in range(NUM_ROWS)
    ]
    lines[5] |= dict.fromkeys(("loss_conditioned", "loss_direct", "ifd", "ifd_ppl"))
    lines[5]["reason"] = "longer than cutoff_len: 600 tokens, of 512"
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = ScorePaths(output)
    np.save(where.embeddings, generator.standard_normal((NUM_ROWS, 8)).astype(np.float32))
    np.save(where.perplexity, generator.random(NUM_ROWS).astype(np.float32) + 1)
    files = [{"sha256": fingerprint(path), "rows": NUM_ROWS, "opened": NUM_ROWS}]
    where.record.write_text(json.dumps({"dataset": files, "names": {}}))
    return path, output, where.embeddings


def select_here(monkeypatch, *words):
    """Run the script in this process. Mistakes raise UserError."""
    source = (ROOT / "select.py").read_text(encoding="utf-8")
    source = source.replace(
        "from minisft.common.script import run_script", "run_script = lambda main: main()"
    )
    monkeypatch.setattr(sys, "argv", ["select.py", *map(str, words)])
    exec(compile(source, "select.py", "exec"), {"__name__": "__main__"})


@pytest.fixture
def choose(data, tmp_path, monkeypatch):
    """A function: flags -> (numbers of the rows chosen, manifest)."""
    path, scores, embeddings = data

    def run(*words, output=tmp_path / "out.json"):
        select_here(monkeypatch, "--dataset", path, "--output", output, "--overwrite", *words)
        chosen = [row["number"] for row in json.loads(output.read_text())]
        manifest = read_json(tmp_path / "out.json.manifest")
        assert manifest["chosen"] == chosen == sorted(chosen)
        return chosen, manifest

    return run


def test_through_the_command_line(data, tmp_path):
    path, scores, _ = data
    done = command(
        dataset=path,
        scores=scores,
        strategy="ifd",
        sample_rate=0.1,
        output=tmp_path / "out.json",
        script="select.py",
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "out.json").read_text())
    ifd = [json.loads(line)["ifd"] for line in scores.read_text().splitlines()]
    below = sorted((value, n) for n, value in enumerate(ifd) if value is not None and value < 1)
    expected = sorted(n for _, n in below[-6:])
    theirs = json.loads(path.read_text())
    assert ours == [theirs[n] for n in expected]  # whole rows, in the order of the file
    assert "6 of 60 rows by ifd" in done.stdout
    manifest = read_json(tmp_path / "out.json.manifest")
    assert manifest["inputs"] == {"scores": fingerprint(scores)}
    assert manifest["dataset"] == [{"sha256": fingerprint(path), "rows": 60, "opened": 60}]
    assert manifest["dropped"] == {
        "longer than cutoff_len": 1,
        "ifd of 1 or more": 60 - 1 - len(below),
    }
    assert (manifest["num_chosen"], manifest["strategy"], manifest["seed"]) == (6, "ifd", 42)
    assert manifest["not_chosen"] + 6 == len(below)
    assert manifest["options"]["sample_rate"] == 0.1
    from minisft.data.dataset import load_rows

    assert len(load_rows(tmp_path / "out.json")) == 6  # train.py reads it


def test_several_processes_write_one_file(data, tmp_path):
    done = command(
        dataset=data[0],
        strategy="random",
        sample_number=7,
        output=tmp_path / "out.json",
        script="select.py",
        torchrun=2,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 of 60 rows") == 1
    assert len(json.loads((tmp_path / "out.json").read_text())) == 7


def test_strategies(choose, data):
    path, scores, embeddings = data
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    few = ["--sample_number", 7]
    by_scores, both = ["--scores", scores, *few], ["--scores", scores, "--embeddings", embeddings]
    ifd, _ = choose("--strategy", "ifd", *by_scores)
    assert choose("--strategy", "ifd_ppl", *by_scores)[0] == ifd  # the square has the same order
    ppl, _ = choose("--strategy", "ppl", *by_scores)
    losses = sorted(line["loss_conditioned"] for line in lines if line["ifd"] is not None)
    assert sorted(lines[n]["loss_conditioned"] for n in ppl) == losses[26:33]
    longest, manifest = choose("--strategy", "longest", *few)
    assert longest == list(range(53, 60)) and manifest["answer_length"]["unit"] == "characters"
    longest, manifest = choose("--strategy", "longest", *by_scores)
    assert manifest["answer_length"] == {
        "unit": "tokens",
        "mean_all": 10.5,
        "mean_chosen": (20 * 3 + 19 * 3 + 18) / 7,
    }
    random, _ = choose("--strategy", "random", *few)
    assert random == choose("--strategy", "random", *few)[0]
    assert random != choose("--strategy", "random", *few, "--seed", 1)[0]
    cluster, manifest = choose(
        "--strategy",
        "cluster",
        "--embeddings",
        embeddings,
        "--clusters",
        6,
        "--per_cluster",
        3,
        "--starts",
        2,
    )
    points, perplexity = np.load(embeddings), np.load(ScorePaths(scores).perplexity)
    assignment = kmeans(points, 6, seed=42, num_starts=2).assignment
    assert set(cluster) == set(
        spread_over_clusters(assignment, perplexity, np.arange(60), 3, [25, 75])
    )
    assert len(cluster) <= 18 and sum(manifest["clusters"]["sizes"]) == 60
    assert manifest["inputs"] == {
        "embeddings": fingerprint(embeddings),
        "perplexity": fingerprint(ScorePaths(scores).perplexity),
    }
    kcenter, _ = choose("--strategy", "kcenter", "--embeddings", embeddings, *few)
    assert len(kcenter) == 7
    mixed, _ = choose("--strategy", "ifd+kcenter", *both, *few)
    pool, _ = choose("--strategy", "ifd", "--scores", scores, "--sample_number", 21)
    assert len(mixed) == 7 and set(mixed) <= set(pool) and mixed != ifd
    only, _ = choose("--strategy", "ifd+kcenter", *both, *few, "--pool", 1)
    assert only == ifd


def test_other_names_of_strategies(choose, data):
    _, scores, embeddings = data
    by_scores = ["--scores", scores, "--sample_number", 7]
    by_cluster = ["--embeddings", embeddings, "--clusters", 5]
    for name, other, words in (
        ("mid_ppl", "ppl", by_scores),
        ("cluster", "kmeans", by_cluster),
        ("cluster", "K-Means", by_cluster),
    ):
        chosen, manifest = choose("--strategy", name, *words)
        again, other_manifest = choose("--strategy", other, *words)
        assert chosen == again and manifest["strategy"] == other_manifest["strategy"] == name
    with pytest.raises(UserError, match="--strategy: 'best' is not one of ifd, ifd_ppl, mid_ppl"):
        choose("--strategy", "best", *by_scores)


@pytest.fixture
def bundles(data):
    """The embeddings form two bundles, of 40 and 20 rows. Returns the bundle of each row."""
    bundle = np.repeat([0, 1], [40, 20])
    noise = np.random.default_rng(1).standard_normal((NUM_ROWS, 8))
    np.save(data[2], (10 * np.eye(8)[bundle] + 0.1 * noise).astype(np.float32))
    np.save(ScorePaths(data[1]).perplexity, np.arange(1, 61, dtype=np.float32))
    return bundle


def test_budgets_of_clusters(choose, data, bundles, capsys):
    """A budget is met exactly and evenly; without one, a line says what limited the choice."""
    words = ["--strategy", "kmeans", "--embeddings", data[2], "--clusters", 2]
    for number, counts in ((12, [6, 6]), (30, [15, 15]), (50, [30, 20]), (60, [40, 20])):
        chosen, manifest = choose(*words, "--sample_number", number)
        assert np.bincount(bundles[chosen]).tolist() == counts
    assert len(choose(*words, "--sample_number", 3)[0]) == 3
    assert np.bincount(bundles[choose(*words, "--sample_rate", 0.2)[0]]).tolist() == [6, 6]
    capsys.readouterr()
    for per_cluster, note in (
        (10, None),
        (15, "25 rows, not 2 clusters x 15: 1 has fewer rows in --band 25,75."),
        (25, "40 rows, not 2 clusters x 25: 1 has fewer rows, 1 has fewer rows in --band 25,75."),
        (40, "Chose all 60 rows: none of the 2 clusters has more than --per_cluster 40 rows. "),
    ):
        _, manifest = choose(*words, "--per_cluster", per_cluster)
        said = capsys.readouterr().out
        assert (note in said and note in manifest["notes"][0]) if note else not manifest["notes"]
    with pytest.raises(UserError, match="61 rows: the data set has only 60. Lower --sample_number"):
        choose(*words, "--sample_number", 61)


def test_rows_outside_the_band_are_counted(choose, data, bundles):
    """The bands have rows 10 to 29 of the one cluster and rows 45 to 54 of the other."""
    words = ["--strategy", "cluster", "--embeddings", data[2], "--clusters", 2]
    inside = {*range(10, 30), *range(45, 55)}
    for number, is_noted in ((12, False), (30, True), (50, True), (60, False)):
        chosen, manifest = choose(*words, "--sample_number", number)
        outside = set(chosen) - inside
        assert bool(outside) == is_noted or number == 60  # all rows: no choice, no note
        note = f"{len(outside)} of {number} chosen rows are outside --band 25,75: "
        assert [text.startswith(note) for text in manifest["notes"]] == [True] * is_noted
    chosen, manifest = choose(*words, "--per_cluster", 25)
    assert f"{len(set(chosen) - inside)} of 40 chosen rows are outside" in manifest["notes"][1]


def test_there_are_no_more_clusters_than_rows_to_choose(choose, data, capsys):
    """Unless --clusters says so."""
    by_cluster = ["--embeddings", data[2], "--strategy", "cluster"]
    at_random = ["--embeddings", data[2], "--strategy", "random", "--balance", "cluster"]
    for words, count in (
        ([*by_cluster, "--sample_number", 7], 7),
        ([*at_random, "--sample_number", 9], 9),
        (by_cluster, NUM_ROWS),
    ):
        _, manifest = choose(*words)
        assert manifest["num_chosen"] == manifest["options"]["clusters"] == count
        note = f"{count} clusters, not 100: there are only {count} rows to choose. --clusters sets"
        assert note in manifest["notes"][0] and note in capsys.readouterr().out
    _, manifest = choose(*by_cluster, "--sample_number", 7, "--clusters", 30)
    assert manifest["options"]["clusters"] == 30 and manifest["num_chosen"] == 7


def test_random_balance(choose, data, bundles, tmp_path, monkeypatch):
    by_cluster = ["--balance", "cluster", "--embeddings", data[2], "--clusters", 2]
    at_random = ["--strategy", "random", "--sample_number"]
    chosen, manifest = choose(*at_random, 50, *by_cluster)
    assert np.bincount(bundles[chosen]).tolist() == [30, 20]
    assert sorted(manifest["balance"]["chosen"]) == [20, 30]
    rows = json.loads(data[0].read_text())
    for name in ("source", "dataset"):  # a column
        named = [{**row, name: "ab"[part]} for row, part in zip(rows, bundles, strict=True)]
        data[0].write_text(json.dumps(named))
        chosen, manifest = choose(*at_random, 30, "--balance", "source")
        assert np.bincount(bundles[chosen]).tolist() == [15, 15]
        assert manifest["notes"] == []
    data[0].write_text(json.dumps([{**row, "source": "only"} for row in rows]))
    _, manifest = choose(*at_random, 30, "--balance", "source")
    assert "all rows have one source" in manifest["notes"][0]
    for column in ({"source": None}, {"source": None, "dataset": ""}):  # no source at all
        data[0].write_text(json.dumps([{**row, **column} for row in rows]))
        with pytest.raises(UserError, match="without a column `source`"):
            choose(*at_random, 30, "--balance", "source")
    files = [tmp_path / "a.json", tmp_path / "b.json"]  # files
    for path, part in zip(files, (rows[:40], rows[40:]), strict=True):
        path.write_text(json.dumps(part))
    words = ["--dataset", ",".join(map(str, files)), *at_random, 50, "--balance", "source"]
    select_here(monkeypatch, *words, "--output", tmp_path / "both.json")
    chosen = read_json(tmp_path / "both.json.manifest")["chosen"]
    assert np.bincount(bundles[chosen]).tolist() == [30, 20]


def test_random_rows_of_a_large_file_are_drawn_before_they_are_read(tmp_path, monkeypatch, capsys):
    """The draw is that of a small file; broken rows among those drawn are drawn again."""
    path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps({"instruction": f"{n}?", "output": "x" * n}) for n in range(1, 201)]
    path.write_text("\n".join(good) + "\n")
    words = ["--dataset", path, "--strategy", "random", "--output", output, "--overwrite"]
    words += ["--sample_number", 20]
    select_here(monkeypatch, *words)
    expected = output.read_text()
    reads = []
    read = RowFile.read
    monkeypatch.setattr(
        RowFile, "read", lambda file, index: (reads.append(index), read(file, index))[1]
    )
    monkeypatch.setattr(dataset, "CHECKED_BYTES", 0)
    monkeypatch.setattr(dataset, "CHECKED_ROWS", 5)
    capsys.readouterr()
    select_here(monkeypatch, *words)
    # The first 5 are checked; the 20 chosen are read, and once more to look for placeholders.
    assert output.read_text() == expected and len(reads) == 45
    manifest = read_json(tmp_path / "out.jsonl.manifest")
    assert (
        manifest["answer_length"]["mean_all"] is None and "all rows" not in capsys.readouterr().out
    )
    lengths = [len(json.loads(line)["output"]) for line in expected.splitlines()]
    assert manifest["answer_length"]["mean_chosen"] == np.mean(lengths)

    path.write_text("\n".join([*good] + ["{"] * 200) + "\n")  # half of them broken
    select_here(monkeypatch, *words, "--skip_bad_rows")
    manifest = read_json(tmp_path / "out.jsonl.manifest")
    chosen = output.read_text().splitlines()
    assert len(chosen) == 20 and not set(chosen) - set(good) and manifest["dropped"]["broken"] > 3
    assert [good.index(line) for line in chosen] == manifest["chosen"]
    with pytest.raises(UserError, match=r"at least \d+ rows are broken, and at most 2"):
        select_here(monkeypatch, *words, "--skip_bad_rows", "--sample_number", 250)
    with pytest.raises(UserError, match="the data set has only 400"):
        select_here(monkeypatch, *words, "--sample_number", 401)
    with pytest.raises(UserError, match=r"row \d+ .*skip_bad_rows leaves such rows out"):
        select_here(monkeypatch, *words, "--sample_number", 300)


def test_bands_of_tokens(choose, data):
    """Every strategy chooses only among the answers within the band, both ends included."""
    _, scores, embeddings = data
    lines = Path(scores).read_text().splitlines()
    tokens = np.array([json.loads(line)["num_answer_tokens"] for line in lines])
    inside = np.flatnonzero((tokens >= 5) & (tokens <= 14))
    words = ["--scores", scores, "--min_tokens", 5, "--max_tokens", 14, "--sample_number"]
    chosen, manifest = choose("--strategy", "random", *words, len(inside))
    assert chosen == inside.tolist()
    assert manifest["dropped"] == {"under 5 tokens": 12, "over 14 tokens": 18}
    for strategy in ("ifd", "mid_ppl", "longest", "kcenter", "facility", "cluster"):
        more = ["--embeddings", embeddings] if strategy[0] in "kfc" else []
        more += ["--clusters", 3] if strategy == "cluster" else []
        chosen, _ = choose("--strategy", strategy, *words, 5, *more)
        assert len(chosen) == 5 and set(chosen) <= set(inside)


def test_facility_location_on_the_best_by_ifd(choose, data, bundles):
    """Superfiltering.D: the best --top_rate by ifd_ppl, of these the rows that represent them."""
    _, scores, embeddings = data
    words = ["--scores", scores, "--embeddings", embeddings]
    best, _ = choose("--strategy", "ifd_ppl", "--scores", scores, "--sample_number", 8)
    chosen, _ = choose(
        "--strategy", "ifd_ppl+facility", *words, "--sample_number", 2, "--top_rate", 8 / NUM_ROWS
    )
    assert set(chosen) <= set(best) and set(bundles[chosen]) == set(bundles[best]) == {0, 1}
    with pytest.raises(UserError, match="--top_rate 0.2 leaves 12 rows, fewer than the 13"):
        choose("--strategy", "ifd_ppl+facility", *words, "--sample_number", 13)
    everything, _ = choose("--strategy", "facility", "--embeddings", embeddings, "--sample_rate", 1)
    assert len(everything) == 60


def test_long_rows_are_warned_about(choose, data, capsys):
    _, scores, _ = data
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    for line in lines:
        line["num_tokens"] = 1000 + line["index"]  # 35 rows have more than 1,024
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = ScorePaths(scores).record
    record.write_text(json.dumps({**read_json(record), "cutoff_len": 1050}))
    choose("--strategy", "random", "--scores", scores, "--sample_rate", 1)
    said = capsys.readouterr().out
    assert "warning: 35 of 60 chosen rows are longer than 1,024 tokens" in said
    assert "--cutoff_len 1059 keeps all of them whole" in said
    assert "warning: 9 of 60 chosen rows are longer than 1,050 tokens, the --cutoff_len" in said


def test_random_matched_with_a_budget(choose, tmp_path):
    choose("--strategy", "longest", "--sample_number", 20)
    for ending in ("", ".manifest"):
        (tmp_path / f"long.json{ending}").write_bytes((tmp_path / f"out.json{ending}").read_bytes())
    words = ["--strategy", "random_matched", "--match", tmp_path / "long.json"]
    chosen, manifest = choose(*words, "--sample_number", 5)
    assert len(chosen) == 5 and set(chosen) <= set(range(40, 60))
    assert manifest["answer_length"]["mean_chosen"] == pytest.approx(50.5, abs=3)
    _, manifest = choose(*words, "--sample_number", 1)  # of the middle length, not the shortest
    assert manifest["answer_length"]["mean_chosen"] == pytest.approx(50.5, abs=1)


def test_random_matched(choose, data, tmp_path):
    choose("--strategy", "longest", "--sample_number", 20)
    for ending in ("", ".manifest"):
        (tmp_path / f"long.json{ending}").write_bytes((tmp_path / f"out.json{ending}").read_bytes())
    matched, manifest = choose("--strategy", "random_matched", "--match", tmp_path / "long.json")
    assert matched == list(range(40, 60)) and manifest["also_in_match"] == 20
    manifest_path = tmp_path / "long.json.manifest"
    whole = json.loads(manifest_path.read_text())
    for wrong in (None, [], ["a"], [1.5], [-1], [60], [True]):
        manifest_path.write_text(json.dumps(whole | {"chosen": wrong}))
        with pytest.raises(UserError, match="does not say which rows were chosen"):
            choose("--strategy", "random_matched", "--match", tmp_path / "long.json")
    manifest_path.write_text(json.dumps(whole))
    data[0].write_text(data[0].read_text() + " ")
    with pytest.raises(UserError, match="chosen from another file"):
        choose("--strategy", "random_matched", "--match", tmp_path / "long.json")


def test_dedup(choose, data):
    rows = json.loads(data[0].read_text())
    for row in rows[:10]:
        row["instruction"] = "The SAME, instruction"
    data[0].write_text(json.dumps(rows))
    chosen, manifest = choose("--strategy", "random", "--sample_number", 51, "--dedup", 1)
    assert chosen == [0, *range(10, 60)]
    assert manifest["dropped"] == {"near-identical instruction": 9}
    # A share of the rows that it leaves.
    words = "--strategy", "random", "--dedup", 1
    assert choose(*words, "--sample_rate", 1)[0] == chosen
    assert len(choose(*words, "--sample_rate", 0.49)[0]) == 25


def test_answers_that_are_not_learned_have_no_length(tmp_path, monkeypatch):
    """As in the scores: trl's prompt may hold long answers, and only the completion is learned."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    context = [turns[0], {"role": "assistant", "content": "b" * 99}, turns[0]]
    rows = [{"prompt": context, "completion": turns[1:]}]
    rows += [{"prompt": "a", "completion": "b" * 9}]
    source, output = tmp_path / "rows.json", tmp_path / "out.json"
    source.write_text(json.dumps(rows))
    words = ["--strategy", "longest", "--sample_number", 1, "--output", output]
    select_here(monkeypatch, "--dataset", source, *words)
    assert json.loads(output.read_text()) == rows[1:]
    assert read_json(f"{output}.manifest")["answer_length"]["mean_all"] == 5


def test_thoughts_and_tool_calls_have_a_length(tmp_path, monkeypatch):
    """They are learned, too."""
    call = {"function": {"name": "weather", "arguments": {"city": "Porto", "day": "today"}}}
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "b", "reasoning_content": "c" * 40},
        {"role": "assistant", "content": "b" * 20},
    ]
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]} for answer in answers]
    source, output = tmp_path / "rows.json", tmp_path / "out.json"
    source.write_text(json.dumps(rows))
    words = ["--strategy", "longest", "--sample_number", 2, "--output", output]
    select_here(monkeypatch, "--dataset", source, *words)
    assert json.loads(output.read_text()) == rows[:2]


def test_half_a_surrogate_pair_in_another_column(tmp_path, monkeypatch):
    """train.py reads such rows: the column is none of theirs. JSON expresses it by an escape."""
    rows = [{"instruction": "a", "output": "颜", "id": id} for id in ("\ud800", "颜")]
    source, output = tmp_path / "rows.json", tmp_path / "out.json"
    source.write_text(json.dumps(rows))
    words = ["--strategy", "longest", "--sample_number", 2, "--output", output]
    select_here(monkeypatch, "--dataset", source, *words)
    assert json.loads(output.read_text("utf-8")) == rows


@pytest.mark.parametrize("kind", ["lines", "folder"])
def test_format_and_order_stay(kind, tmp_path, monkeypatch):
    lines = [
        f'{{"messages": [{{"role": "user", "content": "q{n}"}},  {{"role": "assistant", '
        f'"content": "caf\\u00e9 颜 {n}"}}], "id": {n}.0}}'
        for n in range(30)
    ]
    source = tmp_path / "source"
    source.mkdir()
    if kind == "lines":
        text = "\ufeff" + "\n".join(lines[:10]) + "\n \n" + "\n".join(lines[10:])
        (source / "a.jsonl").write_text(text, "utf-8")
    else:
        (source / "a.json").write_text("[" + ",".join(lines[:10]) + "]", "utf-8")
        (source / "b.jsonl").write_text("\n".join(lines[10:]), "utf-8")
    output = tmp_path / "new" / "out.jsonl"
    select_here(
        monkeypatch,
        "--dataset",
        source,
        "--strategy",
        "random",
        "--sample_rate",
        0.5,
        "--output",
        output,
    )
    written = output.read_text("utf-8").splitlines()
    numbers = read_json(tmp_path / "new/out.jsonl.manifest")["chosen"]
    assert len(numbers) == 15
    assert [json.loads(line) for line in written] == [json.loads(lines[n]) for n in numbers]
    if kind == "lines":
        assert written == [lines[n] for n in numbers]  # byte for byte


@pytest.mark.parametrize(
    ("read", "written", "is_array"),
    [("json", "jsonl", False), ("jsonl", "json", True)],
)
def test_the_name_says_lines_or_array(read, written, is_array, tmp_path, monkeypatch):
    """Other programs rely on the name: pandas, jq, the hub."""
    rows = [{"instruction": f"q{n}", "output": "颜"} for n in range(6)]
    lines = "\n".join(json.dumps(row) for row in rows)
    source, output = tmp_path / f"rows.{read}", tmp_path / f"out.{written}"
    source.write_text(json.dumps(rows) if read == "json" else lines, "utf-8")
    select_here(
        monkeypatch,
        "--dataset",
        source,
        "--strategy",
        "random",
        "--sample_number",
        6,
        "--output",
        output,
    )
    text = output.read_text("utf-8")
    assert (json.loads(text) if is_array else list(map(json.loads, text.splitlines()))) == rows


def test_bad_input(choose, data, tmp_path, monkeypatch):
    path, scores, embeddings = data
    (tmp_path / "out.json").write_text("precious")
    before = (tmp_path / "out.json").read_bytes()
    few = ["--sample_number", 5]
    by_ifd = ["--strategy", "ifd", "--scores", scores]
    by_cluster = ["--strategy", "cluster", "--embeddings", embeddings]

    def refused(message, *words):
        with pytest.raises(UserError, match=message):
            choose(*words)
        assert (tmp_path / "out.json").read_bytes() == before

    refused("--strategy ifd needs --scores", "--strategy", "ifd", *few)
    written = "score.py --mode embed writes it"
    refused(f"needs --embeddings: {written}", "--strategy", "k-center", *few)
    refused(f"needs --embeddings: {written}", "--strategy", "facility_location", *few)
    near = ["--strategy", "rds", "--embeddings", "p.embeddings.npy", *few]
    refused(
        "--target rows.json: give the file that ends in .embeddings.npy",
        *near,
        "--target",
        "rows.json",
    )
    for names in ("", ",", "a.embeddings.npy,", "a.embeddings.npy,,b.embeddings.npy"):
        refused("--target has an empty name", *near, "--target", names)
    refused("ifd needs --scores", "--strategy", "ifd", *few, "--scores", "")
    refused("needs --match", "--strategy", "random_matched")
    refused("give --sample_rate or --sample_number", *by_ifd)
    refused("contradicts --sample_number", *by_ifd, *few, "--sample_rate", 0.1)
    refused("contradicts --per_cluster", *by_cluster, *few, "--per_cluster", 3)
    refused("--balance needs --strategy random", *by_ifd, *few, "--balance", "source")
    at_random = ["--strategy", "random", *few]
    refused("one file without a column `source`", *at_random, "--balance", "source")
    refused("--balance cluster needs --embeddings", *at_random, "--balance", "cluster")
    refused("--max_tokens needs --scores", *at_random, "--max_tokens", 9)
    band = ["--min_tokens", 9, "--max_tokens", 8]
    refused("--min_tokens 9 is above --max_tokens 8", *by_ifd, *few, *band)
    refused("--top_rate needs --strategy ifd_ppl", *by_ifd, *few, "--top_rate", 0.5)
    needed = "--clusters needs --strategy cluster or --balance cluster"
    refused(needed, *by_ifd, *few, "--clusters", 3)
    refused(needed, *at_random, "--balance", "source", "--clusters", 3)
    refused("--sample_rate: '1.5' is not a fraction", *by_ifd, "--sample_rate", 1.5)
    refused("--dedup 0.2: must be", *by_ifd, *few, "--dedup", 0.2)
    refused("'75,25' is not two percentiles", *by_cluster, "--band", "75,25")
    left = r"cannot choose 59 rows: only \d+ of 60 are left \(dropped 1: longer .*; \d+: ifd of 1"
    refused(left, *by_ifd, "--sample_number", 59)
    none = r"none of the 60 rows is left \(dropped 60: under 900 tokens\)"
    refused(none, *by_ifd, "--sample_rate", 0.1, "--min_tokens", 900)
    refused("61 clusters of 60 rows", *by_cluster, "--clusters", 61)
    refused("--output .* is an input", *by_ifd, *few, "--output", scores)
    # Without their record, scores and embeddings are lost.
    record = ScorePaths(scores).record
    refused("--output .* is an input", *by_ifd, *few, "--output", record)
    refused("--output .* is an input", *by_cluster, *few, "--output", record)
    refused("is a folder", *by_ifd, *few, "--output", tmp_path)
    os.mkfifo(tmp_path / "device")
    refused("or a device", *by_ifd, *few, "--output", tmp_path / "device", "--overwrite")
    for name in ("x.png", "x.parquet", "x.csv", "x"):
        refused("rows are written as JSON. Give", *by_ifd, *few, "--output", tmp_path / name)
    refused("no row is in the --band", *by_cluster, "--clusters", 1, "--band", "49.99,50")
    refused(
        "give the file that ends in .embeddings.npy",
        "--strategy",
        "kcenter",
        *few,
        "--embeddings",
        ScorePaths(scores).perplexity,
    )

    values = np.load(embeddings)
    values[17, 3] = np.nan
    np.save(embeddings, values)
    refused("embedding of row 18 is not finite", *by_cluster, "--clusters", 5)
    np.save(embeddings, values[:50])
    refused("float32 of shape \\(60, D\\)", *by_cluster, "--clusters", 5)
    embeddings.write_bytes(b"not an array")
    refused("cannot be read", *by_cluster, "--clusters", 5)
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:40]))
    refused("has 40 of 60 rows. Run score.py again", *by_ifd, *few)
    scores.write_text("".join([*lines, lines[7]]))
    refused("row 8 appears twice: two runs of score.py wrote to it", *by_ifd, *few)
    rewards = [line.replace('"ifd": ', '"reward": ') for line in lines[30:]]
    scores.write_text("".join([*lines[:30], *rewards]))
    refused("it has lines of --mode ifd and of --mode reward", *by_ifd, *few)
    scores.write_text("".join(lines).replace('"index": 3,', '"index": 300,'))
    refused("has a score of row 301, but the data set has 60", *by_ifd, *few)
    scores.write_text("".join(lines).replace('"ifd": ', '"ifd": "x', 1))
    refused("not a line of score.py", *by_ifd, *few)
    for value in ("1" + 400 * "0", 100_000 * "[" + 100_000 * "]", "NaN", "1e999"):
        scores.write_text("".join(lines).replace('"ifd": ', f'"ifd": {value}, "x": ', 1))
        refused("not a line of score.py", *by_ifd, *few)
    scores.write_text("".join(lines).replace('"reason": null', '"reason": 5', 1))
    refused("not a line of score.py", *by_ifd, *few)
    scores.write_text("".join(lines))
    content = record.read_text()
    path.write_text(path.read_text() + "\n")
    refused("belongs to another file than --dataset", *by_ifd, *few)
    record.unlink()
    refused("there is no scores.record.json beside it", *by_ifd, *few)
    record.write_text(content)
    rows = json.loads(path.read_text())
    rows[8]["output"] = " "
    path.write_text(json.dumps(rows))
    refused("row 9.*there is no answer", "--strategy", "random", *few)
    chosen, manifest = choose("--strategy", "random", "--sample_number", 59, "--skip_bad_rows")
    assert 8 not in chosen and manifest["dropped"] == {"broken": 1}
    with pytest.raises(UserError, match="out.json exists"):
        select_here(
            monkeypatch,
            "--dataset",
            path,
            "--strategy",
            "random",
            *few,
            "--output",
            tmp_path / "out.json",
            "--skip_bad_rows",
        )


def test_perplexities_not_yet_computed(choose, data):
    path, scores, embeddings = data
    values = np.load(ScorePaths(scores).perplexity)
    values[30] = np.inf
    np.save(ScorePaths(scores).perplexity, values)
    _, manifest = choose("--strategy", "cluster", "--embeddings", embeddings, "--clusters", 3)
    assert manifest["dropped"] == {"no perplexity": 1} and 30 not in manifest["chosen"]
    values[31] = np.nan
    np.save(ScorePaths(scores).perplexity, values)
    with pytest.raises(UserError, match="row 32 has no embedding yet"):
        choose("--strategy", "cluster", "--embeddings", embeddings, "--clusters", 3)


def test_plot(choose, data, tmp_path, monkeypatch):
    path, scores, embeddings = data
    for words in (
        ["--strategy", "ifd", "--scores", scores, "--sample_number", 5],
        ["--strategy", "cluster", "--scores", scores, "--embeddings", embeddings, "--clusters", 4],
    ):
        (tmp_path / "out.png").unlink(missing_ok=True)
        choose(*words, "--plot")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    select_here(
        monkeypatch,
        "--dataset",
        path,
        "--strategy",
        "ifd",
        "--scores",
        scores,
        "--plot",
        "--sample_number",
        5,
        "--output",
        tmp_path / "选择.json",
    )
    assert (tmp_path / "选择.png").exists()
    (tmp_path / "out.json").unlink()
    for there, other in (("out.json.manifest", "out.png"), ("out.png", "out.json.manifest")):
        (tmp_path / other).unlink(missing_ok=True)
        (tmp_path / there).write_text("precious")
        with pytest.raises(UserError, match=f"{there} exists"):
            select_here(
                monkeypatch,
                "--dataset",
                path,
                "--strategy",
                "ifd",
                "--scores",
                scores,
                "--sample_number",
                5,
                "--plot",
                "--output",
                tmp_path / "out.json",
            )
        assert (tmp_path / there).read_text() == "precious"
    (tmp_path / "out.png").unlink()
    choose("--strategy", "random", "--sample_number", 5, "--plot")  # the lengths
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_leaves_the_old_file(choose, data, tmp_path, monkeypatch):
    choose("--strategy", "random", "--sample_number", 5)
    before = (tmp_path / "out.json").read_bytes(), (tmp_path / "out.json.manifest").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        choose("--strategy", "random", "--sample_number", 6)
    assert before == (
        (tmp_path / "out.json").read_bytes(),
        (tmp_path / "out.json.manifest").read_bytes(),
    )
    assert not list(tmp_path.glob("*.partial"))
