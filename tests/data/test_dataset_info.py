"""The names that --dataset accepts: the real registry, every key of an entry, and the hub."""

import hashlib
import json

import pytest
from huggingface_hub import constants
from test_dataset import GOOD, assistant, user, write

from minisft.common.errors import UserError
from minisft.data.dataset import load_rows, open_rows


def registered(tmp_path, entry, records=(GOOD,), name="rows.json", **options):
    """The Rows of an entry "it" whose file holds `records`."""
    write(tmp_path / name, list(records))
    entry = {"file_name": name, **entry}
    write(tmp_path / "dataset_info.json", {"it": entry, "others": {"file_name": "o.json"}})
    return open_rows("it", dataset_dir=tmp_path, **options)


def messages_of(*arguments, **options):
    return [row.messages for row in registered(*arguments, **options)]


class TestRealRegistry:
    def test_every_entry_whose_file_is_there(self, shared_data):
        """Every entry loads the rows of its file, or the error names the kind of data."""
        folder, seen = shared_data / "instruct", []
        for name, entry in json.loads((folder / "dataset_info.json").read_text()).items():
            path = folder / entry.get("file_name", "")
            if not path.is_file():
                continue
            seen.append(name)
            reading = dict(dataset_dir=folder, say=lambda text: None)
            if entry.get("ranking"):
                with pytest.raises(UserError, match=f"{name}: preference data"):
                    open_rows(name, **reading)
            elif "response" not in entry.get("columns", {"response": 0, "messages": 0}) and (
                "messages" not in entry.get("columns", {"messages": 0})
            ):
                with pytest.raises(UserError, match="--stage pt"):
                    open_rows(name, **reading)
                lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
                texts = list(open_rows(name, plain_text=True, **reading))
                assert texts == [
                    json.loads(line)["text"] if path.suffix == ".jsonl" else line for line in lines
                ]
            else:
                assert len(open_rows(name, **reading)) == len(json.loads(path.read_text()))
        assert seen == [
            "identity",
            "alpaca_en_demo",
            "alpaca_zh_demo",
            "glaive_toolcall_zh_demo",
            "dpo_en_demo",
            "wiki_demo",
            "c4_demo",
        ]

    def test_several_names_and_files(self, shared_data):
        folder = shared_data / "instruct"
        rows = open_rows(f"identity, {folder / 'firefly_6_rows.jsonl'},alpaca_zh_demo", folder)
        assert len(rows) == 91 + 6 + 1000

    def test_entries_of_other_places_say_what_to_do(self, shared_data):
        for name, reason in (
            ("deepctrl", "file_name"),
            ("mllm_demo", "images"),
            ("kto_en_demo", "preference"),
            ("glaive_toolcall_en_demo", "no file"),
        ):
            with pytest.raises(UserError, match=f"{name}: .*{reason}"):
                open_rows(name, shared_data / "instruct")

    def test_unknown_name_suggests(self, shared_data):
        with pytest.raises(UserError, match="did you mean alpaca_en_demo or"):
            open_rows("alpaca_en_dem", shared_data / "instruct")
        with pytest.raises(UserError, match="no such file or folder, .*--dataset_dir"):
            open_rows("zzz", shared_data / "instruct")

    def test_an_ending_that_was_left_out(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text("{}")
        with pytest.raises(UserError, match=r"did you mean .*rows\.jsonl\?"):
            open_rows(str(tmp_path / "rows"), tmp_path)
        for name in ("rows", "rows.jsonl"):  # files in --dataset_dir
            with pytest.raises(UserError, match=rf"did you mean {tmp_path}/rows\.jsonl\?"):
                open_rows(name, tmp_path)


def test_a_column_of_the_prompt_that_nothing_reads(tmp_path):
    """As in OpenHermes, and in Dolly."""
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"conversations": turns, "system_prompt": "Be brief."}]))
    said = []
    open_rows(str(rows), say=said.append)
    assert f"{rows} has system_prompt, which is ignored" in said[0]
    assert '"columns": {"system": "system_prompt"' in said[0]
    rows.write_text(json.dumps([{"instruction": "Q", "context": "C", "response": "A"}]))
    with pytest.raises(
        UserError, match='the columns are instruction, context, response. .*"output"'
    ):
        load_rows(str(rows))


class TestColumns:
    def test_columns_that_are_not_named_are_ignored_and_reported(self, tmp_path):
        record = {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "S",
            "history": [["Q", "A"]],
        }
        said = []
        columns = {"prompt": "instruction", "response": "output"}
        assert messages_of(tmp_path, {"columns": columns}, [record], say=said.append) == [
            [user("Add."), assistant("3")]
        ]
        assert len(said) == 1
        for column in ("'input' (as query)", "'history' (as history)", "'system' (as system)"):
            assert column in said[0]

        everything = {**columns, "query": "input", "system": "system", "history": "history"}
        assert messages_of(tmp_path, {"columns": everything}, [record], say=said.append) == [
            [
                {"role": "system", "content": "S"},
                user("Q"),
                assistant("A"),
                user("Add.", input="1 2"),
                assistant("3"),
            ]
        ]
        assert len(said) == 1

    def test_without_columns_alpaca_has_its_three(self, tmp_path):
        said = []
        record = {**GOOD, "input": "x", "history": [["Q", "A"]]}
        assert messages_of(tmp_path, {}, [record], say=said.append) == [
            [user(GOOD["instruction"], input="x"), assistant("Red.")]
        ]
        assert "'history'" in said[0]

    def test_other_names(self, tmp_path):
        record = {"question": "Q", "answer": "A", "system_prompt": "S", "output": "not this"}
        columns = {"prompt": "question", "response": "answer", "system": "system_prompt"}
        said = []
        assert messages_of(tmp_path, {"columns": columns}, [record], say=said.append) == [
            [{"role": "system", "content": "S"}, user("Q"), assistant("A")]
        ]

    def test_a_named_column_that_rows_lack(self, tmp_path):
        columns = {"prompt": "question", "response": "output"}
        with pytest.raises(UserError, match="row 1: no column 'question'.*instruction"):
            registered(tmp_path, {"columns": columns})

    def test_sharegpt_with_tags(self, tmp_path):
        tags = {
            "role_tag": "who",
            "content_tag": "text",
            "user_tag": "U",
            "assistant_tag": "A",
            "system_tag": "S",
            "observation_tag": "O",
            "function_tag": "F",
        }
        call = {"name": "f", "arguments": {}}
        turns = [("S", "s"), ("U", "u"), ("F", json.dumps(call)), ("O", "o"), ("A", "a")]
        record = {
            "talk": [{"who": who, "text": text} for who, text in turns],
            "functions": json.dumps([{"name": "f"}]),
        }
        entry = {
            "formatting": "sharegpt",
            "tags": tags,
            "columns": {"messages": "talk", "tools": "functions"},
        }
        (row,) = registered(tmp_path, entry, [record])
        assert row.tools == [{"name": "f"}]
        assert row.messages == [
            {"role": "system", "content": "s"},
            user("u"),
            assistant("", tool_calls=[call]),
            {"role": "tool", "content": "o"},
            assistant("a"),
        ]
        del tags["system_tag"]
        with pytest.raises(
            UserError, match="row 1: unknown speaker 'S'; the tags in dataset_info.json are U, A"
        ):
            registered(tmp_path, entry, [record])

    def test_openai(self, tmp_path):
        function = {"name": "f", "arguments": "{}"}
        record = {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
                {"role": "tool", "content": "o"},
                {"role": "assistant", "content": "a"},
            ]
        }
        assert messages_of(tmp_path, {"formatting": "openai"}, [record]) == [
            [
                user("u"),
                assistant("", tool_calls=[{"name": "f", "arguments": {}}]),
                {"role": "tool", "content": "o"},
                assistant("a"),
            ]
        ]

    def test_turns_keep_their_other_fields(self, tmp_path):
        """Thoughts, learning marks and legacy roles are kept; a turn with images is refused."""
        record = {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "u"}]},
                {"role": "assistant", "content": "a", "weight": 0, "thinking": "t"},
            ]
        }
        answer = assistant("a", weight=0, reasoning_content="t")
        expected = [{"role": "system", "content": "S"}, user("u"), answer]
        assert messages_of(tmp_path, {"formatting": "openai"}, [record]) == [expected]
        record["messages"][1]["images"] = ["a.png"]
        with pytest.raises(UserError, match="row 1: turn 2: it has images; minisft learns text"):
            messages_of(tmp_path, {"formatting": "openai"}, [record])

    def test_text_in_another_column(self, tmp_path):
        rows = registered(
            tmp_path, {"columns": {"prompt": "content"}}, [{"content": "one"}], plain_text=True
        )
        assert list(rows) == ["one"]


class TestEntry:
    def test_num_samples(self, tmp_path):
        records = [{**GOOD, "output": str(number)} for number in range(20)]
        answers = [
            [
                row.messages[1]["content"]
                for row in registered(
                    tmp_path, {"num_samples": number}, records, seed=seed, say=lambda text: None
                )
            ]
            for number, seed in ((5, 0), (5, 0), (5, 1), (45, 0))
        ]
        assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) == 5
        assert sorted(map(answers[3].count, set(answers[3]))) == [2] * 15 + [3] * 5

    def test_file_sha1(self, tmp_path):
        write(tmp_path / "rows.json", [GOOD])
        right = hashlib.sha1((tmp_path / "rows.json").read_bytes()).hexdigest()
        assert len(registered(tmp_path, {"file_sha1": right})) == 1
        with pytest.raises(UserError, match=f"is {right}, not {'0' * 40}"):
            registered(tmp_path, {"file_sha1": "0" * 40})

    def test_folder_of_files_by_subset_and_split(self, tmp_path):
        for name in ("en/train-0.json", "en/train-1.json", "en/test.json", "zh/train-0.json"):
            (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
            write(tmp_path / "parts" / name, [{**GOOD, "output": name}])

        def answers(**entry):
            rows = registered(tmp_path, {"file_name": "parts", **entry})
            return [row.messages[1]["content"] for row in rows]

        assert answers() == ["en/train-0.json", "en/train-1.json", "zh/train-0.json"]
        assert (
            answers(subset="en", split="test")
            == answers(folder="en", split="test")
            == ["en/test.json"]
        )
        (tmp_path / "parts/en").rename(tmp_path / "parts/training")
        assert answers(folder="training") == ["en/train-0.json", "en/train-1.json"]
        assert answers(folder="./training/", split="test") == ["en/test.json"]
        for entry in ({"subset": "fr"}, {"split": "validation"}, {"folder": "fr"}):
            with pytest.raises(UserError, match="it: .*(subset|split|folder)"):
                answers(**entry)

    @pytest.mark.parametrize(
        "entry, message",
        [
            ({"script_url": "here"}, "has a script_url, which would run"),
            ({"ms_hub_url": "a/b"}, "ModelScope"),
            ({"cloud_file_name": "s3://a"}, "has a cloud_file_name, which is not supported"),
            ({"file_name": "nowhere.json"}, "there is no file"),
            ({"file_name": 3}, "file_name must be a name"),
            (
                {"formatting": "parquet"},
                "unknown formatting 'parquet'; known are alpaca, sharegpt, openai",
            ),
            ({"columns": {"promt": "a"}}, "unknown column 'promt'; known are prompt"),
            ({"columns": {"query": "a"}}, "columns must name 'prompt'"),
            (
                {"columns": {"prompt": "a"}},
                "must name 'response'; text without answers is for --stage",
            ),
            ({"columns": ["a"]}, "columns must be an object of strings"),
            (
                {"formatting": "sharegpt", "columns": {"prompt": "a"}},
                "columns must name 'messages'",
            ),
            ({"tags": {"user": "a"}}, "unknown tag 'user'"),
            ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
            ({"num_samples": 0}, "num_samples must be a whole number above 0"),
            ({"split": "test"}, "no split 'test'"),
            ({"ranking": True}, "preference data"),
        ],
    )
    def test_mistakes_name_the_entry(self, tmp_path, entry, message):
        with pytest.raises(UserError) as caught:
            registered(tmp_path, entry)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / 'dataset_info.json'}, it: ")

    def test_a_file_that_is_no_registry(self, tmp_path):
        for content in ("{", "[]", '{"it": 3}'):
            write(tmp_path / "dataset_info.json", content)
            with pytest.raises(UserError, match="dataset_info.json.*(cannot be read|must be)"):
                open_rows("it", tmp_path)

    def test_a_file_goes_before_a_name_and_a_name_before_a_folder(self, tmp_path, monkeypatch):
        registered(tmp_path, {}, [GOOD, GOOD])
        monkeypatch.chdir(tmp_path)
        (tmp_path / "it").mkdir()
        write(tmp_path / "it" / "one.json", [GOOD])
        assert len(open_rows("it", tmp_path)) == 2
        assert len(open_rows("it", tmp_path / "it")) == 1
        write(tmp_path / "others", [GOOD])
        assert len(open_rows("others", tmp_path)) == 1


def test_hub_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        registered(tmp_path, {"hf_hub_url": "nobody/nothing-of-this-name"})
    assert "download of nobody/nothing-of-this-name failed" in str(caught.value)
    assert "file_name" in str(caught.value) and "\n" not in str(caught.value)
