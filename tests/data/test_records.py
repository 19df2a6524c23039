"""Rows read by offset equal those of the complete file, for files of any size."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from test_dataset import GOOD, write

from minisft.common.errors import UserError
from minisft.data import dataset
from minisft.data.dataset import load_rows, open_rows
from minisft.data.records import open_records


class TestRows:
    """Rows read by offset are the rows of the complete file."""

    @pytest.fixture
    def lines(self, tmp_path):
        generator = np.random.default_rng(0)
        lengths = map(int, generator.integers(1, 300, 500))
        records = [{**GOOD, "output": "a" + "颜x\u2028"[length % 3] * length} for length in lengths]
        gaps = ["\n" + "\r\n  \n\t\n"[: 2 * int(generator.integers(0, 4))] for _ in records]
        lines = [
            " " * (number % 2) + json.dumps(record, ensure_ascii=False) + gap
            for number, (record, gap) in enumerate(zip(records, gaps, strict=True))
        ]
        return write(tmp_path / "many.jsonl", "\ufeff" + "".join(lines)), records

    @pytest.mark.parametrize("block_size", [3, 7, 1000, 2**22])
    def test_are_those_of_the_whole_file(self, lines, block_size, monkeypatch):
        monkeypatch.setattr("minisft.data.records.BLOCK_SIZE", block_size)
        path, records = lines
        rows = open_rows(path)
        expected = [record["output"] for record in records]
        assert [row.messages[-1]["content"] for row in rows] == expected
        whole = path.read_bytes().decode("utf-8-sig").split("\n")
        numbers = [number for number, line in enumerate(whole, start=1) if line.strip(" \r\t")]
        assert [rows.files[0].records.line(number) for number in range(500)] == numbers
        assert rows[-1].index == 499 and rows.sizes().sum() == path.stat().st_size
        with pytest.raises(IndexError):
            rows[500]

    def test_reading_one_does_not_pass_over_all_blank_lines(self, lines, monkeypatch):
        """A file with as many blank lines as rows would take a time that grows with the square."""
        records = open_records(lines[0])
        monkeypatch.setattr(
            "minisft.data.records.np", SimpleNamespace(searchsorted=np.searchsorted)
        )
        assert records[499] == lines[1][499]

    def test_hold_only_offsets(self, lines):
        rows = open_rows(lines[0])
        assert len(pickle.dumps(rows)) < 500 * 20

    def test_selections_of_several_files(self, lines, tmp_path):
        other = write(tmp_path / "other.json", [{**GOOD, "output": str(n)} for n in range(7)])
        rows = open_rows(f"{other},{lines[0]}")
        assert len(rows) == 507
        picked = rows[3:100:30].select([1, 0, 0, -1])
        assert [(row.source, row.index) for row in picked] == [
            (str(lines[0]), 26),
            (str(other), 3),
            (str(other), 3),
            (str(lines[0]), 86),
        ]
        both = picked + open_rows(other)
        assert [row.index for row in both] == [26, 3, 3, 86, *range(7)]
        assert len(both.sizes()) == 11

    def test_a_file_that_changes_under_the_reader(self, lines):
        rows = open_rows(lines[0])
        write(lines[0], lines[0].read_text(encoding="utf-8")[5:])
        with pytest.raises(UserError, match="changed while it was being read"):
            rows[3]

    def test_large_files_are_checked_as_they_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset, "CHECKED_BYTES", 100)
        monkeypatch.setattr(dataset, "CHECKED_ROWS", 5)
        lines = [json.dumps(GOOD)] * 20
        lines[9] = '{"instruction": "Q"'
        path = write(tmp_path / "large.jsonl", "\n".join(lines))
        rows = open_rows(path)
        assert len(rows) == 20 and rows[8].messages
        with pytest.raises(UserError, match=r"row 10 \(line 10\): line 10 column 20: not valid"):
            rows[9]
        skipped = []
        assert len(load_rows(path, skipped)) == 19 and len(skipped) == 1
        with pytest.raises(UserError, match="--skip_bad_rows leaves such rows out"):
            load_rows(path)
        lines[3] = "{}"
        with pytest.raises(UserError, match="row 4"):  # among the first, so before training
            open_rows(write(path, "\n".join(lines)))

    def test_a_pipe_is_refused(self, tmp_path):
        """As bash writes for <(...): every reader would take a part of it."""
        os.mkfifo(tmp_path / "pipe.jsonl")
        with pytest.raises(UserError, match="pipe.jsonl is not a file, and rows are read in any"):
            open_records(tmp_path / "pipe.jsonl")

    def test_not_utf8_names_the_row(self, tmp_path):
        path = tmp_path / "latin.jsonl"
        good = json.dumps(GOOD).encode()
        path.write_bytes(good + b'\n{"instruction": "caf\xe9"}\n' + good)
        with pytest.raises(UserError, match=r"row 2 \(line 2\): not UTF-8"):
            open_rows(path)
        assert len(open_rows(path, skipped=[])) == 2
        path.write_bytes(json.dumps(GOOD).encode("utf-16"))
        with pytest.raises(UserError, match="not UTF-8"):
            open_rows(path)

    @pytest.mark.parametrize(
        ("name", "way_out"), [("rows.csv", "convert it"), ("rows.json.xz", "unpack it")]
    )
    def test_unsupported_files_suggest_a_conversion(self, name, way_out, tmp_path):
        with pytest.raises(UserError, match=f"{name}: neither .*; {way_out}"):
            open_rows(write(tmp_path / name, "a,b\n"))
