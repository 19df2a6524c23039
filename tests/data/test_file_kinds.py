"""Every kind of file gives the rows that the plain file gives. Oracles: json, pyarrow, datasets."""

import datetime
import gzip
import json
import math
import os
import pickle
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, command
from test_dataset import GOOD, assistant, user, write

from minisft.common.errors import UserError
from minisft.data import objects, records, unpack
from minisft.data.dataset import load_rows, open_rows
from minisft.data.objects import find_objects
from minisft.data.records import open_records

RECORDS = [
    {**GOOD, "output": text}
    for text in ('"', "\\", '\\"', '{"a": [', "}", "颜\u2028色", "a\n\n{", "\\\\", "😀", "]")
]
ANSWERS = [record["output"] for record in RECORDS]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "minisft"


def answers(dataset, **options):
    return [row.messages[-1]["content"] for row in open_rows(dataset, **options)]


def indented(records, **options):
    return "\n".join(json.dumps(record, indent=2, **options) for record in records)


class TestObjects:
    """Objects over several lines, found without reading the file at once."""

    @pytest.mark.parametrize("block_size", [1, 2, 7, 2**22])
    @pytest.mark.parametrize("ensure_ascii", [True, False])
    def test_rows_are_those_of_json(self, tmp_path, monkeypatch, block_size, ensure_ascii):
        monkeypatch.setattr(objects, "BLOCK_SIZE", block_size)
        text = "\ufeff\n" + indented(RECORDS, ensure_ascii=ensure_ascii) + "\n"
        path = write(tmp_path / "rows.jsonl", text)
        assert answers(path) == ANSWERS
        records = open_records(path)
        assert [records[number] for number in range(len(records))] == RECORDS
        lines = [number for number, line in enumerate(text.split("\n"), 1) if line[-1:] == "{"]
        assert [records.place(number) for number in range(len(records))] == [
            f"row {number} (line {line})" for number, line in enumerate(lines, 1)
        ]
        assert sum(records.sizes()) == path.stat().st_size - len("\ufeff\n".encode())

    def test_random_objects(self, tmp_path, monkeypatch):
        monkeypatch.setattr(objects, "BLOCK_SIZE", 50)
        generator = np.random.default_rng(0)
        alphabet = list('ab\\"{}[]:, \n\té颜')
        for trial in range(30):
            texts = ["".join(generator.choice(alphabet, 20)) for _ in range(20)]
            records = [{text: [text, {"b": trial}]} for text in texts]
            path = write(tmp_path / "rows.json", indented(records))
            starts, _ = find_objects(path)
            content = path.read_bytes()
            parts = [content[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]
            assert list(map(json.loads, parts)) == records

    def test_hold_only_offsets(self, tmp_path):
        path = write(tmp_path / "rows.json", indented([{**GOOD, "output": "x" * 5000}] * 200))
        assert len(pickle.dumps(open_rows(path))) < 200 * 30

    @pytest.mark.parametrize("separator", ["", " ", "\n", "\n\n"])
    def test_one_after_another(self, tmp_path, separator):
        path = write(tmp_path / "rows.json", separator.join(map(json.dumps, RECORDS)))
        assert answers(path) == ANSWERS

    def test_a_single_object(self, tmp_path):
        for indent in (None, 4):
            path = write(tmp_path / "rows.json", json.dumps(RECORDS[0], indent=indent))
            assert answers(path) == ANSWERS[:1]

    def test_mistakes(self, tmp_path):
        broken = indented(RECORDS[:2]).replace('"input": ""', '"input" ""', 1)
        path = write(tmp_path / "rows.json", broken)
        with pytest.raises(UserError, match=r"row 1 \(line 1\): line 3 column 11: not valid JSON"):
            open_rows(path)
        assert answers(path, skipped=[]) == ANSWERS[1:2]
        for text, message in (
            (indented(RECORDS[:2])[:-1], "line 6: the object that begins here has no end"),
            (indented(RECORDS[:1]) + "\n}\n", "line 6: not valid JSON between two objects"),
            (indented(RECORDS[:1]) + ",\n{}", "line 5: not valid JSON between two objects"),
            (indented(RECORDS[:1]) + "\nx\n{}", r"row 1 \(line 1\): line 6 .*: Extra data"),
        ):
            with pytest.raises(UserError, match=message):
                open_rows(write(path, text))

    def test_a_first_line_that_is_cut_off_is_a_broken_row(self, tmp_path):
        lines = [json.dumps(GOOD)[:-10], json.dumps(GOOD), json.dumps(GOOD)]
        path = write(tmp_path / "rows.jsonl", "\n".join(lines))
        assert len(open_rows(path, skipped=[])) == 2


class TestLargeArrays:
    """Rows of an array that is too large to be parsed at once."""

    @pytest.fixture(autouse=True)
    def small_limit(self, monkeypatch):
        monkeypatch.setattr(records, "PARSED_BYTES", 5)

    @pytest.mark.parametrize("block_size", [1, 2, 7, 2**22])
    @pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
    def test_rows_are_those_of_json(self, tmp_path, monkeypatch, block_size, options):
        monkeypatch.setattr(objects, "BLOCK_SIZE", block_size)
        text = "\ufeff\n" + json.dumps(RECORDS, **options) + " \n"
        path = write(tmp_path / "rows.json", text)
        assert answers(path) == ANSWERS
        found = open_records(path)
        assert [found[number] for number in range(len(found))] == RECORDS
        is_first = "  {" if "indent" in options else "[{"
        lines = [number for number, line in enumerate(text.split("\n"), 1) if is_first in line[:3]]
        assert found.lines.tolist() == (lines * len(RECORDS))[: len(RECORDS)]
        assert found.size == path.stat().st_size
        assert len(pickle.dumps(found)) < 1000

    def test_random_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(objects, "BLOCK_SIZE", 50)
        generator = np.random.default_rng(0)
        alphabet = list('ab\\"{}[]:, \n\té颜')
        for trial in range(30):
            texts = ["".join(generator.choice(alphabet, 20)) for _ in range(20)]
            expected = [{text: [text, {"b": [trial]}, []]} for text in texts]
            path = write(tmp_path / "rows.json", json.dumps(expected, indent=trial % 2 or None))
            assert list(open_records(path)) == expected

    def test_mistakes(self, tmp_path):
        row, path = json.dumps(GOOD), tmp_path / "rows.json"
        for text, message in (
            (f"[{row},\n{row[:-9]}", "line 2: the object that begins here has no end"),
            (f"[{row},\n{row}", "the array has no end. Is the file complete?"),
            (f"[{row},\n{row}\n]]", "line 3: not valid JSON between two objects"),
            (f"[{row},\n{row}\n],", "line 3: not valid JSON between two objects"),
            (f"[{row},\n1, {row}]", r"row 1 \(line 1\): line 1 column .*: Extra data"),
            (f"[{row}\n{row[:-1]}:}}]", r"row 2 \(line 2\): .*not valid JSON"),
            (f"[{row}]\n{row}", r"row 1 \(line 1\): line 1 .*: Extra data"),
        ):
            with pytest.raises(UserError, match=message):
                open_rows(write(path, text))
        # What does not begin with an object is parsed at once.
        for text, message in (("[]   ", "has no rows"), (f"[1,{row}]", "row 1: a row must be")):
            with pytest.raises(UserError, match=message):
                open_rows(write(path, text))

    def test_compressed(self, tmp_path):
        path = tmp_path / "rows.json.gz"
        path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
        assert answers(path) == ANSWERS and open_records(path).path == path


class TestWrapped:
    @pytest.mark.parametrize("indent", [None, 2])
    def test_data(self, tmp_path, indent):
        content = json.dumps({"version": 1, "data": RECORDS}, indent=indent)
        assert answers(write(tmp_path / "rows.json", content)) == ANSWERS

    def test_a_row_with_a_column_data_is_a_row(self, tmp_path):
        path = write(tmp_path / "rows.json", json.dumps({**GOOD, "data": [{"a": 1}]}))
        assert answers(path) == ["Red."]

    @pytest.mark.parametrize("indent", [None, 2])
    def test_lmflow(self, tmp_path, indent):
        def wrapped(type, *instances):
            content = {"type": type, "instances": list(instances)}
            return write(tmp_path / "rows.json", json.dumps(content, indent=indent))

        rows = load_rows(wrapped("text2text", {"input": "Q", "output": "A"}))
        assert rows[0].messages == [user("Q"), assistant("A")]
        row = {"conversation_id": 1, "system": "S", "tools": [], "messages": rows[0].messages}
        (talk,) = load_rows(wrapped("conversation", row))
        assert talk.messages == [{"role": "system", "content": "S"}, *rows[0].messages]
        path = wrapped("text_only", {"text": "one"}, {"text": "two"})
        assert load_rows(path, plain_text=True) == ["one", "two"]
        with pytest.raises(UserError, match="plain text is for --stage pt"):
            load_rows(path)
        with pytest.raises(UserError, match="LMFlow's type 'image_text', only text_only"):
            load_rows(wrapped("image_text", {"text": "one"}))


class TestNames:
    def test_commas(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a,b.json", "c.json", "d, e,f.json"):
            write(tmp_path / name, [{**GOOD, "output": name}])
        assert answers("a,b.json") == ["a,b.json"]
        names = ["c.json", "a,b.json", "d, e,f.json", "c.json"]
        assert answers(" c.json ,a,b.json,d, e,f.json, c.json,") == names

    def test_the_longest_name_that_exists(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a", "a,b.json", "b.json"):
            write(tmp_path / name, [{**GOOD, "output": name}])
        assert answers("a,b.json,a") == ["a,b.json", "a"]
        assert answers("a, b.json") == ["a", "b.json"]

    def test_splits_of_a_folder(self, tmp_path, monkeypatch):
        """The files that the hub's data set of these names has."""
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "folder"
        (folder / "data").mkdir(parents=True)
        names = ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"]
        for name in names:
            table = pyarrow.Table.from_pylist([{**GOOD, "output": name}])
            pyarrow.parquet.write_table(table, folder / name)
        said = []
        assert answers(folder, say=said.append) == names[:2]
        (line,) = said
        assert line.startswith(f"{folder}: only the files of the split train") and names[2] in line
        assert answers(f"{folder}:test") == answers("folder:test") == names[2:]
        assert answers("folder/data") == names[:2]
        with pytest.raises(UserError, match="no file for the split 'dev' among data/test-0"):
            open_rows("folder:dev")
        for name in names[:2]:
            (folder / name).unlink()
        assert answers(folder) == names[2:]  # a folder of test files, as of --eval_dataset
        write(folder / "validation.json", [GOOD])
        with pytest.raises(UserError, match="split 'train' among data/test-0.*Name .*folder:SPLIT"):
            open_rows(folder)

    def test_numbered_files_of_a_split(self, tmp_path):
        for name in ("train1.json", "train2.json", "test1.json"):
            write(tmp_path / name, [{**GOOD, "output": name}])
        assert answers(tmp_path) == ["train1.json", "train2.json"]
        assert answers(f"{tmp_path}:test") == ["test1.json"]

    def test_all_kinds_in_a_folder(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), tmp_path / "b.parquet")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS[1]).encode()))
        write(tmp_path / "c.json", RECORDS[2:3])
        assert answers(tmp_path) == [ANSWERS[1], ANSWERS[0], ANSWERS[2]]


class TestCompressed:
    @pytest.mark.parametrize("content", [json.dumps(RECORDS), indented(RECORDS)])
    def test_gzip(self, tmp_path, content):
        path = tmp_path / "rows.json.gz"
        path.write_bytes(gzip.compress(content.encode()))
        rows = open_rows(path)
        assert [row.messages[-1]["content"] for row in rows] == ANSWERS
        assert rows[0].source == str(path) == str(rows.files[0].records.path)

    def test_is_unpacked_once_and_again_when_it_changes(self, tmp_path, cache):
        path = tmp_path / "rows.jsonl.gz"
        for number, written in enumerate((RECORDS, RECORDS, RECORDS[:3])):
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, written)).encode()))
            os.utime(path, ns=(1, 1 + (number == 2)))
            assert answers(path) == ANSWERS[: len(written)]
            assert len(list(cache.glob("*.jsonl"))) == 1 + (number == 2)
        assert "row 2 (line 2)" in open_records(path).place(1)

    def test_texts(self, tmp_path):
        path = tmp_path / "texts.txt.gz"
        path.write_bytes(gzip.compress(b"one\ntwo\n"))
        assert load_rows(path, plain_text=True) == ["one", "two"]

    @pytest.mark.parametrize("num_bytes", [0, 20])
    def test_an_unpacked_file_that_lost_bytes_is_made_again(self, num_bytes, tmp_path, cache):
        """A crash of the machine can leave it empty or cut."""
        path = tmp_path / "rows.jsonl.gz"
        rows = [{"instruction": f"say {number}", "output": "yes"} for number in range(9)]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        for _ in range(2):
            assert len(load_rows(path)) == 9
            [unpacked] = cache.glob("*.jsonl")
            os.truncate(unpacked, num_bytes)

    def test_damage(self, tmp_path, cache):
        path = tmp_path / "rows.jsonl.gz"
        content = gzip.compress(json.dumps(RECORDS).encode())
        for damaged in (content[:-20], content[:30] + b"xxxx" + content[34:]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="rows.jsonl.gz: the file is damaged .*again"):
                open_rows(path)
        assert not list(cache.glob("*.jsonl"))

    def test_zstd(self, tmp_path, monkeypatch):
        """Python 3.14 has the module; backports.zstd is the same for earlier versions."""
        path = tmp_path / "rows.json.zst"
        if sys.version_info < (3, 14):
            path.write_bytes(unpack.ZSTD + b"rest")
            with pytest.raises(
                UserError, match="from version 3.14 on. Run `zstd -d rows.json.zst`"
            ):
                open_rows(path)
            zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is missing")
            monkeypatch.setitem(sys.modules, "compression.zstd", zstd)
        else:
            from compression import zstd
        lines = b"\n".join(json.dumps(record).encode() for record in RECORDS)
        content = zstd.compress(lines + b"\n")
        path.write_bytes(content + zstd.compress(lines))  # frames follow each other
        assert answers(path) == ANSWERS * 2
        texts = tmp_path / "texts.txt.zst"
        texts.write_bytes(zstd.compress(b"one\ntwo\n"))
        assert load_rows(texts, plain_text=True) == ["one", "two"]
        for damaged in (content[:-20], content[:30] + b"xxxxxx" + content[36:], content + b"x"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="rows.json.zst: the file is damaged .*again"):
                open_rows(path)

    def test_a_place_that_cannot_be_written(self, tmp_path, monkeypatch):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(b"{}"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(path))
        with pytest.raises(UserError, match="could not be unpacked to .*XDG_CACHE_HOME chooses"):
            open_rows(path)

    def test_a_user_without_a_home(self, tmp_path, monkeypatch):
        """As in containers that run under any number."""
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(b"{}"))
        for name in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
        with pytest.raises(UserError, match="no home folder: set XDG_CACHE_HOME"):
            open_rows(path)


CALL = {"name": "f", "arguments": {"at": "noon"}}
TALKS = [
    {
        "messages": [
            user("Q"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "1"},
            assistant("A", reasoning_content="T"),
        ],
        "tools": json.dumps([{"name": "f"}]),
        "date": datetime.date(2026, 1, 2),
    },
    {
        "messages": [
            user("R"),
            assistant("", tool_calls=[{"name": "g", "arguments": {"left": 1, "right": 2.5}}]),
        ],
        "tools": None,
        "date": None,
    },
]


class TestColumnar:
    @pytest.mark.parametrize("group", [1, 3, 1000])
    def test_parquet(self, tmp_path, group, monkeypatch):
        monkeypatch.setattr(unpack, "ROWS_AT_A_TIME", 2)
        path = tmp_path / "rows.parquet"
        table = pyarrow.Table.from_pylist(RECORDS)
        pyarrow.parquet.write_table(table, path, row_group_size=group)
        assert answers(path) == ANSWERS
        records = open_records(path)
        assert [records[number] for number in range(len(records))] == table.to_pylist()
        assert records.place(1) == "row 2" and records.path == path
        assert answers(f"{path},{path}") == ANSWERS * 2

    @pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
    def test_turns_are_those_of_json(self, tmp_path, kind):
        """Columns give every object the names of all objects; the nulls are none of the row's."""
        table, path = pyarrow.Table.from_pylist(TALKS), tmp_path / "rows.parquet"
        assert table.to_pylist()[0]["messages"][0].keys() > {"role", "content"}
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            path = path.with_suffix(".arrow")
            new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
            with new(str(path), table.schema) as writer:
                writer.write_table(table)
        lines = "\n".join(json.dumps(talk, default=str) for talk in TALKS)
        plain = load_rows(write(tmp_path / "rows.jsonl", lines))
        for row, expected in zip(load_rows(path), plain, strict=True):
            assert (row.messages, row.tools) == (expected.messages, expected.tools)
        assert open_records(path)[0]["date"] == "2026-01-02"

    def test_nan_is_null(self, tmp_path):
        """JSON has no NaN. As an answer it is missing; elsewhere it stays unread."""
        path = tmp_path / "rows.parquet"
        rows = [{**GOOD, "output": number, "scores": [number]} for number in (1.5, math.nan)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        records = open_records(path)
        assert [records[number]["scores"] for number in range(2)] == [[1.5], [None]]
        assert answers(path, skipped=(broken := [])) == ["1.5"]
        assert len(broken) == 1 and "row 2: there is no answer" in broken[0]

    def test_a_folder_that_datasets_saved(self, tmp_path):
        data = datasets.Dataset.from_list(RECORDS)
        data.save_to_disk(tmp_path / "one", num_shards=3)
        assert answers(tmp_path / "one") == ANSWERS
        data.select([7, 2]).save_to_disk(tmp_path / "two")
        assert answers(tmp_path / "two") == [ANSWERS[7], ANSWERS[2]]
        splits = {"train": data.select(range(4)), "test": data.select(range(4, 6))}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
        assert answers(tmp_path / "dict") == ANSWERS[:4]
        assert answers(tmp_path / "dict" / "test") == ANSWERS[4:6]
        assert answers(f"{tmp_path / 'dict'}:test") == ANSWERS[4:6]
        with pytest.raises(UserError, match="a single split, and has no split 'dev'"):
            open_rows(f"{tmp_path / 'one'}:dev")
        entry = {"it": {"file_name": "dict", "split": "test"}}
        write(tmp_path / "dataset_info.json", entry)
        assert answers("it", dataset_dir=tmp_path) == ANSWERS[4:6]
        (tmp_path / "dict" / "train").rename(tmp_path / "dict" / "dev")
        with pytest.raises(UserError, match="no split 'train', only dev, test. Give the folder of"):
            open_rows(tmp_path / "dict")
        entry = {"it": {"file_name": "one", "columns": {"prompt": "output", "response": "output"}}}
        write(tmp_path / "dataset_info.json", entry)
        assert answers("it", dataset_dir=tmp_path) == ANSWERS
        for path in (tmp_path / "one").glob("*00001*.arrow"):
            path.unlink()
        with pytest.raises(UserError, match="there is no such file; state.json names it"):
            open_rows(tmp_path / "one")

    def test_mistakes(self, tmp_path):
        path = tmp_path / "rows.parquet"
        table = pyarrow.Table.from_pylist([{**GOOD, "picture": [{"bytes": b"x"}]}])
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(UserError, match="the column picture holds binary data; minisft learns"):
            open_rows(path)
        names = ["instruction", "output", "output"]
        twice = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in names], names)
        pyarrow.parquet.write_table(twice, path)
        with pytest.raises(UserError, match="two columns are called output"):
            open_rows(path)
        pyarrow.parquet.write_table(table.slice(0, 0).drop(["picture"]), path)
        with pytest.raises(UserError, match="rows.parquet: the file has no rows"):
            open_rows(path)
        for content in (b"PAR1 and so on", b"ARROW1\0\0 and so on", b"\xff\xff\xff\xff\1\0\0\0"):
            path.write_bytes(content)
            with pytest.raises(UserError, match="rows.parquet: the file is damaged"):
                open_rows(path)

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="rows.parquet: .*pip install -r requirements/data.txt"):
            open_rows(path)

    def test_without_cache_the_same_rows(self, tmp_path, cache):
        """What resume relies on: bytes and order of the rows, in any run."""
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TALKS), path)
        sizes = open_rows(path).sizes().tolist()
        for file in cache.iterdir():
            file.unlink()
        assert open_rows(path).sizes().tolist() == sizes


def test_processes_that_unpack_at_once(tmp_path, cache):
    """They wait for one of them, and all get the complete file."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 20_000))
    code = "import sys; from pathlib import Path; from minisft.data.unpack import unpack; "
    code += "import zlib; print(zlib.crc32(unpack(Path(sys.argv[1])).read_bytes()))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = {process.communicate()[0].decode().strip() for process in started}
    assert outputs == {str(zlib.crc32(gzip.decompress(path.read_bytes())))}
    assert len(list(cache.glob("*.jsonl"))) == 1


def test_select_takes_them(tmp_path):
    path, output = tmp_path / "rows.parquet", tmp_path / "out.jsonl"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    done = command(
        "--strategy",
        "random",
        "--sample_number",
        10,
        script="select.py",
        dataset=path,
        output=output,
    )
    assert done.returncode == 0, done.stderr
    assert list(map(json.loads, output.read_text(encoding="utf-8").split("\n")[:-1])) == RECORDS
