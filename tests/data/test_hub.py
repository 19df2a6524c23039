"""Data sets of the hub by name, from a stand-in for the hub on this machine."""

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from conftest import command
from huggingface_hub import constants
from test_dataset import GOOD, write

from minisft.checkpoints.folders import load_model
from minisft.checkpoints.hub import resolve
from minisft.common.errors import UserError
from minisft.data import hub
from minisft.data.dataset import open_rows
from minisft.data.hub import parse_hub_name

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files`, {repository: {name: bytes}}, as the hub does; `asked` are the paths."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo_id, card="", **files):
        self.files[repo_id] = {"README.md": f"---\n{card}\n---\nText".encode(), **files}

    def downloaded(self):
        return sorted({path.split("/resolve/")[1].partition("/")[2] for path in self.asked})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path.lstrip("/")
        parts = path.removeprefix("api/").split("/")
        if parts[2:3] == ["resolve"]:  # files of models have no prefix
            parts.insert(0, "models")
        repo_id, rest = "/".join(parts[1:3]), parts[3:]
        if repo_id == "org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        files = self.server.files.get(repo_id)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["resolve"]:
            self.server.asked.append(path)
            content = files["/".join(rest[2:])]
            if content is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(content or b""), "oid": "0" * 40}
                for name, content in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        block = files["README.md"].decode().split("---")[1]
        card = json.loads(block) if block.strip() else {}  # JSON is also YAML
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "sha": COMMIT, "siblings": siblings, "cardData": card}
        self.answer(200, json.dumps(info).encode())

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with Hub() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture
def the_hub(server, tmp_path, monkeypatch):
    """The stand-in, without files, and empty caches."""
    server.files, server.asked = {}, []
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return server


def parquet(*outputs):
    table = pyarrow.Table.from_pylist([{**GOOD, "output": output} for output in outputs])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def lines(*outputs):
    return "\n".join(json.dumps({**GOOD, "output": output}) for output in outputs).encode()


def answers(dataset, **options):
    return [row.messages[-1]["content"] for row in open_rows(dataset, **options)]


def test_parquet_of_the_training_split(the_hub):
    the_hub.put(
        "org/name",
        **{
            "data/train-00001-of-00002.parquet": parquet("c"),
            "data/train-00000-of-00002.parquet": parquet("a", "b"),
            "data/test-00000-of-00001.parquet": parquet("d"),
            "train.jsonl": lines("a", "b", "c"),
            "dataset_infos.json": b"{}",
        },
    )
    assert answers("org/name") == ["a", "b", "c"]
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    assert the_hub.downloaded() == ["README.md", *shards]
    assert answers("org/name:test") == ["d"]
    assert answers("org/name,org/name:test") == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="org/name: no file for the split 'validation' among data/"):
        open_rows("org/name:validation")


def test_json_where_there_is_no_parquet_or_no_pyarrow(the_hub, monkeypatch):
    the_hub.put("org/name", **{"rows.jsonl": lines("a"), "notes.txt": b"text\n"})
    assert answers("org/name") == ["a"]
    the_hub.put("org/texts", **{"notes.txt": b"one\ntwo\n"})
    assert list(open_rows("org/texts", plain_text=True)) == ["one", "two"]
    files = {"rows.jsonl": lines("a"), "rows.parquet": parquet("b")}
    the_hub.put("org/both", **files)
    assert answers("org/both") == ["b"]
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert answers("org/both") == ["a"]


def test_a_card_names_the_files(the_hub):
    configs = [
        {"config_name": "main", "data_files": [{"split": "train", "path": "main/*.jsonl"}]},
        {
            "config_name": "more",
            "data_dir": "more",
            "data_files": [
                {"split": "train", "path": ["a.jsonl", "b.jsonl"]},
                {"split": "test", "path": "**/c.jsonl"},
            ],
        },
    ]
    files = {f"{name}.jsonl": lines(name) for name in ("main/a", "more/a", "more/b", "more/x/c")}
    the_hub.put("org/name", json.dumps({"configs": configs}), **files, **{"main/x/d.jsonl": b""})
    assert answers("org/name/main") == ["main/a"]
    assert answers("org/name/more") == ["more/a", "more/b"]
    assert answers("org/name/more:test") == ["more/x/c"]
    for name, message in (
        ("org/name", "has the subsets main, more; choose one: org/name/main"),
        ("org/name/less", "has the subsets main, more; choose one"),
        ("org/name/main:test", "has no split 'test'; choose one of train: org/name:train"),
    ):
        with pytest.raises(UserError, match=message):
            open_rows(name)
    configs[1]["default"] = True
    the_hub.put("org/name", json.dumps({"configs": configs}), **files)
    assert answers("org/name") == ["more/a", "more/b"]


def test_a_card_that_names_no_files(the_hub):
    """The file names show the splits, as in `datasets`. Test rows are no training rows."""
    names = ("en/train-0", "en/test-0", "zh/train1", "zh/train2", "zh/test1")
    files = {f"{name}.jsonl": lines(name) for name in names}
    configs = [{"config_name": name, "data_dir": f"./{name}/"} for name in ("en", "zh")]
    the_hub.put("org/name", json.dumps({"configs": configs}), **files)
    assert answers("org/name/en") == ["en/train-0"]
    assert answers("org/name/en:test") == ["en/test-0"]
    assert answers("org/name/zh") == ["zh/train1", "zh/train2"]
    configs = [{"config_name": "default"}, {"config_name": "empty", "data_dir": "none"}]
    the_hub.put("org/more", json.dumps({"configs": configs}), **files)
    assert answers("org/more") == ["en/train-0", "zh/train1", "zh/train2"]
    with pytest.raises(UserError, match="no parquet or JSON file in none"):
        open_rows("org/more/empty")


def test_a_folder_with_the_name_of_a_split(the_hub, tmp_path):
    """As in `datasets`, its own name says nothing about the files in it."""
    datasets = pytest.importorskip("datasets")
    files = {f"training/{name}.jsonl": lines(name) for name in ("train", "test")}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    theirs = datasets.load_dataset(
        str(tmp_path), data_dir="training", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(theirs["output"]) == ["train"]
    configs = [{"config_name": "default", "data_dir": "training"}]
    the_hub.put("a/b", json.dumps({"configs": configs}), **files)
    the_hub.put("a/c", **files)
    write(tmp_path / "dataset_info.json", {"it": {"hf_hub_url": "a/c", "folder": "training"}})
    assert answers("a/b") == answers("it", dataset_dir=tmp_path) == ["train"]


def test_a_copy_of_a_data_set(tmp_path):
    """`datasets` follows the card in a folder, too."""
    datasets = pytest.importorskip("datasets")
    files = [{"split": "train", "path": "a.jsonl"}, {"split": "test", "path": "b.jsonl"}]
    configs = [{"config_name": "main", "data_files": files, "default": True}]
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jsonl").write_bytes(lines(name))

    def put(text):
        (folder / "README.md").write_text(text)

    def theirs(split):
        loaded = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        return list(loaded["output"])

    put(f"---\n{json.dumps({'configs': configs})}\n---\nText")
    assert answers(folder) == theirs("train") == ["a"]
    assert answers(f"{folder}:test") == theirs("test") == ["b"]
    with pytest.raises(UserError, match="rows has no split 'dev'; choose one of train, test"):
        open_rows(f"{folder}:dev")
    # Cards that do not name the files of one subset, and texts that are no card.
    several = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in "ab"]
    for content in (json.dumps({"configs": several}), '{"configs": 1}', "words", "{"):
        put(f"---\n{content}\n---\nText")
        assert answers(folder) == ["a", "b", "c"]


def test_an_entry_of_dataset_info(the_hub, tmp_path):
    the_hub.put(
        "a/b", **{"en/train.jsonl": lines("a"), "en/test.jsonl": lines("b"), "zh.json": b""}
    )
    entry = {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "folder": "en", "split": "test"}
    write(tmp_path / "dataset_info.json", {"it": entry, "broken": {"hf_hub_url": "a/c"}})
    assert answers("it", dataset_dir=tmp_path) == ["b"]
    the_hub.put("a/c", **{"data.csv": b"a,b"})
    with pytest.raises(UserError, match="broken: a/c has no parquet or JSON files, only data.csv"):
        open_rows("broken", tmp_path)


@pytest.mark.parametrize(
    "pattern", ["en/**/*.jsonl", "**/train*", "en/**", "**/en/**/t[!x]*1.jsonl"]
)
def test_two_stars_are_any_number_of_folders(pattern, the_hub):
    """Even none, as in fsspec, which `datasets` uses."""
    fsspec = pytest.importorskip("fsspec.utils")
    names = [f"{name}.jsonl" for name in ("en/train1", "en/a/train2", "en/a/b/train3", "en/a/b/c")]
    expected = [name for name in names if re.match(fsspec.glob_translate(pattern), name)]
    configs = [{"config_name": "default", "data_files": pattern}]
    the_hub.put("a/b", json.dumps({"configs": configs}), **{name: lines(name) for name in names})
    assert sorted(answers("a/b")) == sorted(expected) and names[0] in expected


@pytest.mark.parametrize("pattern", ["**", "*", "en/**", "**/*", "**/*.json*"])
def test_files_beside_the_rows(pattern, the_hub, tmp_path):
    """`datasets` finds the same files in a folder."""
    load, data_files = map(pytest.importorskip, ("datasets.load", "datasets.data_files"))
    names = ["a.jsonl", "en/b.jsonl", "en/config.json", "config.json", "dataset_infos.json"]
    names += ["README.md", "LICENSE", "en/load.py", "en/notes.md", ".gitattributes", ".x/c.jsonl"]
    names += ["__x__/d.jsonl", "en/.e.jsonl"]
    files = {name: lines(name) for name in names}
    for name, content in files.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    paths = data_files.DataFilesList.from_local_or_remote(
        [pattern], str(tmp_path / "local"), load._ALL_ALLOWED_EXTENSIONS
    )
    paths = paths.filter(extensions=load._MODULE_TO_EXTENSIONS["json"])
    expected = sorted(path.partition("/local/")[2] for path in paths)
    card = json.dumps({"configs": [{"config_name": "default", "data_files": pattern}]})
    del files["README.md"]  # `put` writes it
    the_hub.put("a/b", card, **files)
    assert sorted(answers("a/b")) == expected


def test_a_card_that_names_a_shard(the_hub, monkeypatch):
    """One of three, also from the cache. A name that is spelled out must exist."""
    shards = [f"data/rows-0000{number}-of-00003.jsonl" for number in range(3)]
    configs = [
        {"config_name": "one", "data_files": shards[1]},
        {"config_name": "some", "data_files": "data/rows-0000[12]-of-*.jsonl"},
        {"config_name": "two", "data_files": [shards[0], "data/rows-3.jsonl"]},
    ]
    files = {name: lines(name) for name in shards}
    the_hub.put("a/b", json.dumps({"configs": configs}), **files)
    assert answers("a/b/one") == shards[1:2] and answers("a/b/some") == shards[1:]
    with pytest.raises(UserError, match="a/b: no file matches data/rows-3.jsonl"):
        open_rows("a/b/two")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers("a/b/one") == shards[1:2]


def test_a_folder_in_place_of_the_files_of_the_card(the_hub, tmp_path):
    files = {f"{name}.jsonl": lines(name) for name in ("en/train", "en/test", "zh/train")}
    configs = [{"config_name": "default", "data_files": "zh/*.jsonl"}]
    the_hub.put("a/b", json.dumps({"configs": configs}), **files)
    write(tmp_path / "dataset_info.json", {"it": {"hf_hub_url": "a/b", "folder": "en"}})
    assert answers("it", dataset_dir=tmp_path) == ["en/train"]
    assert answers("a/b") == ["zh/train"]


def test_offline_the_cache_has_the_same_rows(the_hub, tmp_path, monkeypatch):
    card = json.dumps({"configs": [{"config_name": "main", "data_files": "data/*.parquet"}]})
    names = [f"data/rows-0000{number}-of-00002.parquet" for number in range(2)]
    the_hub.put("org/name", card, **{name: parquet(name) for name in names})
    assert answers("org/name") == names
    asked = len(the_hub.asked)
    assert answers("org/name", offline=True) == names and len(the_hub.asked) == asked
    the_hub.put("org/more", **{"rows.json": b""})
    with pytest.raises(UserError, match="download of org/more failed .it is not in the cache"):
        open_rows("org/more", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers("org/name") == names
    (snapshot,) = (tmp_path / "hub").glob("*/snapshots/*")
    (snapshot / names[1]).unlink()
    with pytest.raises(UserError, match="only 1 of the files data/rows-of-00002"):
        open_rows("org/name")
    with pytest.raises(UserError, match="org/other: download of org/other failed .*no such file"):
        open_rows("org/other")


def test_failures_name_the_address_and_what_helps(the_hub, tmp_path, monkeypatch):
    reasons = {"org/none": "there is no such repository", "org/gated": "accept its terms.*HF_TOKEN"}
    for name, reason in reasons.items():
        message = f"download of {name} from {the_hub.url} failed .{reason}.*HF_ENDPOINT names"
        for start in (open_rows, resolve):
            with pytest.raises(UserError, match=message):
                start(name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        away = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there afterwards
    monkeypatch.setattr(constants, "ENDPOINT", away)
    for start in (open_rows, resolve):
        with pytest.raises(UserError, match="download of org/name from http://127.0.0.1:.* failed"):
            start("org/name")
    the_hub.put("org/name", **{"rows.jsonl": lines("a")})
    monkeypatch.setattr(constants, "ENDPOINT", the_hub.url)
    assert answers("org/name") == ["a"]
    monkeypatch.setattr(constants, "ENDPOINT", away)
    assert answers("org/name") == ["a"]  # from the cache


def test_a_file_that_is_listed_but_missing(the_hub):
    the_hub.put("org/name", **{"train.jsonl": None})
    with pytest.raises(UserError, match="download of org/name from .* failed .404"):
        open_rows("org/name")


def test_a_model(the_hub, checkpoint):
    """Only the files that a model needs."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    the_hub.put("org/model", **files, **{"pytorch_model.bin": b"", "onnx/model.onnx": b""})
    folder = resolve("org/model")
    assert {path.name for path in folder.iterdir()} == files.keys()
    assert load_model(folder).config.vocab_size == 300
    asked = len(the_hub.asked)
    assert resolve("org/model") == folder and len(the_hub.asked) == asked


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert parse_hub_name("org/name.v1-2") == ("org/name.v1-2", None, None)
    assert parse_hub_name("org/name/main:test") == ("org/name", "main", "test")
    for name in ("name", "data/rows", "org/rows.json", "org/r.jsonl.gz", "./org/name", "/org/name"):
        assert parse_hub_name(name) is None
    with pytest.raises(UserError, match="data/rows: there is no such file or folder"):
        open_rows("data/rows")


def test_the_variable_names_the_hub(the_hub, tmp_path, monkeypatch):
    """HF_ENDPOINT, as for a mirror, in a process of its own."""
    the_hub.put("org/name", **{"rows.parquet": parquet("a", "b")})
    monkeypatch.setenv("HF_ENDPOINT", the_hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # lm_eval_oracle.py sets it
    done = command(
        "convert", "org/name", tmp_path / "out.jsonl", before=["-m", "minisft.data"], script=None
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
