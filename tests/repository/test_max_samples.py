"""--max_samples in every script that reads data: the first N rows of each data set."""

import json
import sys

import pytest
from conftest import command

import eval as evaluate
import score
import train
from minisft.chat.prompts import Prompts
from minisft.common.errors import UserError
from minisft.data import __main__ as data
from minisft.data.dataset import open_rows
from minisft.selection.choose import read_match
from minisft.selection.provenance import check_computed_from, dataset_record
from minisft.selection.rows import left_out_by, open_every_row


@pytest.fixture
def two_files(rows_file, tmp_path):
    """Two data sets of 24 and 8 rows, separated by a comma."""
    more = tmp_path / "more.json"
    rows = [{"instruction": f"Ask {number}", "output": "Yes."} for number in range(8)]
    more.write_text(json.dumps(rows))
    return f"{rows_file},{more}"


def test_rows_of_each_data_set(two_files):
    rows = open_rows(two_files, max_samples=5)
    assert [row.index for row in rows] == [*range(5), *range(5)]
    assert len(open_rows(two_files, max_samples=10)) == 18


def test_num_samples_are_drawn_first(rows_file, tmp_path):
    info = {"few": {"file_name": rows_file.name, "num_samples": 9}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    drawn = [row.index for row in open_rows("few", tmp_path)]
    assert [row.index for row in open_rows("few", tmp_path, max_samples=4)] == drawn[:4]


def test_training_and_evaluation(checkpoint, two_files, rows_file, tmp_path, here):
    said = here(
        train,
        model_name_or_path=checkpoint,
        dataset=two_files,
        eval_dataset=rows_file,
        max_samples=3,
        max_steps=1,
        template="alpaca",
        output_dir=tmp_path / "out",
        dataloader_num_workers=0,
    )
    assert "6 rows, 3 held out; training" in said and "evaluation loss" in said
    assert "(3 rows, truncated at " in said


def test_scores_and_the_selection_from_them(checkpoint, two_files, tmp_path, here):
    output = tmp_path / "s.jsonl"
    words = dict(model_name_or_path=checkpoint, dataset=two_files, template="alpaca")
    here(score, output=output, max_samples=5, dataloader_num_workers=0, **words)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(32))
    scored = [line["index"] for line in lines if line["ifd"] is not None]
    assert scored == [*range(5), *range(24, 29)]
    assert lines[5]["reason"] == "left out by --max_samples"
    said = here(score, output=output, max_samples=5, dataloader_num_workers=0, **words)
    assert "nothing to do: all 10 rows are in" in said
    with pytest.raises(UserError, match=r"--max_samples \(the first 5 rows, not all rows\)"):
        here(score, output=output, dataloader_num_workers=0, **words)

    flags = ["--dataset", two_files, "--scores", output, "--strategy", "longest"]
    flags += ["--sample_rate", 0.5, "--output", tmp_path / "few.json"]
    done = command(*flags, script="select.py", max_samples=5)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "few.json.manifest").read_text())
    assert len(manifest["chosen"]) == 5 and set(manifest["chosen"]) <= set(scored)
    said = done.stdout
    assert "few.json: 5 of 10 rows (22 more are left out by --max_samples) by longest" in said
    assert "dropped" not in said
    for more, advice in (
        ([], "add --max_samples 5, or run score.py without it."),
        (["--max_samples", 3], "give --max_samples 5, or run score.py with --max_samples 3."),
    ):
        done = command(*flags, *more, "--overwrite", script="select.py")
        assert done.returncode == 2
        assert f"s.jsonl has the scores of the first 5 rows: {advice}" in done.stderr


def test_only_the_rows_in_use_are_counted(tmp_path):
    """Two files of one data set: the limit holds for both, and later rows are not even read."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"instruction": "Who?", "output": "I am {{name}}."}] * 3
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "b.json").write_text(json.dumps([*rows, {"instruction": "broken"}]))
    said = []
    assert len(open_rows(str(folder), max_samples=2, say=said.append)) == 2
    (line,) = said
    assert "(2 of 2 rows)" in line
    said.clear()
    rows = open_rows(str(folder), max_samples=5, say=said.append)
    assert [row.index for row in rows] == [0, 1, 2, 0, 1]
    assert ["(3 of 3 rows)" in said[0], "(2 of 2 rows)" in said[1]] == [True, True]
    with pytest.raises(UserError, match="b.json, row 4"):
        open_rows(str(folder), say=said.append)


def test_a_limit_that_the_scores_do_not_have(rows_file, tmp_path):
    """Each file of scores, embeddings and --match says what its rows were."""
    every, first = (
        dataset_record(*open_every_row(str(rows_file), ".", False, False, limit), limit)
        for limit in (None, 7)
    )
    path = tmp_path / "s.embeddings.npy"
    path.write_text("")
    (tmp_path / "s.record.json").write_text(json.dumps({"dataset": every}))
    check_computed_from(path, every)
    with pytest.raises(UserError, match=r"the embeddings of all rows: leave out --max_samples, or"):
        check_computed_from(path, first)
    changed = [{**every[0], "sha256": "0"}]
    with pytest.raises(UserError, match="belongs to another file than --dataset"):
        check_computed_from(path, changed)
    (tmp_path / "few.json.manifest").write_text(json.dumps({"dataset": first, "chosen": [1]}))
    with pytest.raises(UserError, match="chosen among the first 7 rows: give --max_samples 7"):
        read_match(str(tmp_path / "few.json"), 24, every)


def test_both_limits_are_named(rows_file, tmp_path):
    info = {"few": {"file_name": rows_file.name, "num_samples": 9}, "all": {}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert left_out_by("few", str(tmp_path), None) == "left out by num_samples"
    assert left_out_by("few", str(tmp_path), 4) == "left out by num_samples or --max_samples"
    assert left_out_by(str(rows_file), str(tmp_path), 4) == "left out by --max_samples"


def test_convert_and_prompts(two_files, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    words = ["data", "convert", two_files, str(output), "--max_samples", "2"]
    monkeypatch.setattr(sys, "argv", words)
    data.main()
    assert len(json.loads(output.read_text())) == 4
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    assert len(Prompts(tmp_path / "p.txt", max_samples=2)) == 2
    assert len(Prompts(tmp_path / "p.txt", max_samples=9)) == 3


def test_comparison(tiny_chat_model_dir, two_files, tmp_path, here):
    pytest.importorskip("sacrebleu", reason="the extra eval is missing")
    words = ["compare", "--models", f"a={tiny_chat_model_dir}", "--dataset", two_files]
    here(evaluate, *words, max_samples=2, max_new_tokens=2, device="cpu", output_dir=tmp_path / "o")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert len(results["questions"]) == 4
