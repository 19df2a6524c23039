"""--max_samples in every script that reads data: the first N rows of each data set."""

import json
import sys

import pytest
from conftest import command

import eval as evaluate
import score
import train
from minisft.chat.prompts import Prompts
from minisft.data import __main__ as data
from minisft.data.dataset import open_rows


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
    assert "6 rows; training" in said and "evaluation loss" in said


def test_scores_and_the_selection_from_them(checkpoint, two_files, tmp_path, here):
    output = tmp_path / "s.jsonl"
    words = dict(model_name_or_path=checkpoint, dataset=two_files, template="alpaca")
    here(score, output=output, max_samples=5, dataloader_num_workers=0, **words)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(32))
    scored = [line["index"] for line in lines if line["ifd"] is not None]
    assert scored == [*range(5), *range(24, 29)]
    assert lines[5]["reason"] == "not drawn: num_samples or --max_samples"

    flags = ["--dataset", two_files, "--scores", output, "--strategy", "longest"]
    flags += ["--sample_rate", 0.5, "--output", tmp_path / "few.json"]
    done = command(*flags, script="select.py", max_samples=5)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "few.json.manifest").read_text())
    assert len(manifest["chosen"]) == 5 and set(manifest["chosen"]) <= set(scored)
    done = command(*flags, "--overwrite", script="select.py")
    assert done.returncode == 2 and "or to another --max_samples" in done.stderr


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
