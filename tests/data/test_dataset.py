"""Reading data: every format against hand-written results, broken rows, and the real files."""

import json
import os

import pytest
from conftest import command

from minisft.common.errors import UserError
from minisft.data.__main__ import convert, main
from minisft.data.dataset import load_rows, mix, open_rows, split


def write(path, content, encoding="utf-8"):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    return path


def conversation_of(tmp_path, record):
    """The messages and tools of a file with the one row `record`."""
    rows = load_rows(write(tmp_path / "one.json", [record]))
    assert len(rows) == 1
    return rows[0].messages, rows[0].tools


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


GOOD = {"instruction": "Name a colour.", "input": "", "output": "Red."}


class TestFormats:
    def test_alpaca_keeps_the_input_apart_and_learns_history(self, tmp_path):
        record = {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Be short.",
            "history": [["Hello", "Hi"], ["How are you?", "Well."]],
            "quality": "good",
        }
        messages, tools = conversation_of(tmp_path, record)
        assert messages == [
            {"role": "system", "content": "Be short."},
            user("Hello"),
            assistant("Hi"),
            user("How are you?"),
            assistant("Well."),
            user("Add.", input="1 2"),
            assistant("3"),
        ]
        assert tools is None

    @pytest.mark.parametrize("absent", ["", None])
    def test_alpaca_without_input_has_no_input_key(self, tmp_path, absent):
        expected = [user("Name a colour."), assistant("Red.")]
        assert conversation_of(tmp_path, {**GOOD, "input": absent})[0] == expected
        without = {name: value for name, value in GOOD.items() if name != "input"}
        assert conversation_of(tmp_path, without)[0] == expected

    def test_sharegpt_with_system_tools_and_calls(self, tmp_path):
        tool = {"name": "add", "parameters": {}}
        call = {"name": "add", "arguments": {"left": 1, "right": 2}}
        record = {
            "system": "Use tools.",
            "tools": json.dumps([tool]),
            "conversations": [
                {"from": "human", "value": "1 + 2?"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3."},
            ],
        }
        messages, tools = conversation_of(tmp_path, record)
        assert tools == [tool]
        assert messages == [
            {"role": "system", "content": "Use tools."},
            user("1 + 2?"),
            assistant("", tool_calls=[call]),
            {"role": "tool", "content": "3"},
            assistant("It is 3."),
        ]

    def test_messages_as_data_sets_spell_them(self, tmp_path):
        """Parts of text, legacy calls, results as objects, thoughts, and learning marks."""
        record = {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "1 "}, {"text": "+ 2?"}]},
                assistant(None, function_call={"name": "add", "arguments": '{"a": 1}'}, weight=0),
                {"role": "function", "name": "add", "content": {"sum": 3}},
                assistant("3.", reasoning="Easy.", train=True),
                user("Sure?"),
                assistant("Yes.", thinking="Hm.", mask=False, weight=1),
            ]
        }
        expected = [
            {"role": "system", "content": "S"},
            user("1 + 2?"),
            assistant("", weight=0, tool_calls=[{"name": "add", "arguments": {"a": 1}}]),
            {"role": "tool", "name": "add", "content": '{"sum": 3}'},
            assistant("3.", train=True, reasoning_content="Easy."),
            user("Sure?"),
            assistant("Yes.", weight=1, mask=False, reasoning_content="Hm."),
        ]
        assert conversation_of(tmp_path, record)[0] == expected
        # The output of convert is read as the same conversation.
        convert(write(tmp_path / "in.json", [record]), tmp_path / "out.json")
        assert [row.messages for row in open_rows(tmp_path / "out.json")] == [expected]

    @pytest.mark.parametrize("arguments", [{}, "{}", "", None])
    def test_calls_without_arguments(self, tmp_path, arguments):
        call = {"type": "function", "function": {"name": "now", "arguments": arguments}}
        record = {"messages": [user("Q"), assistant(None, tool_calls=[call])]}
        expected = assistant("", tool_calls=[{"name": "now", "arguments": {}}])
        assert conversation_of(tmp_path, record)[0] == [user("Q"), expected]

    def test_sharegpt_system_turn_may_lead(self, tmp_path):
        turns = [("system", "S"), ("human", "Q"), ("gpt", "A")]
        record = {"conversations": [{"from": name, "value": text} for name, text in turns]}
        assert [message["role"] for message in conversation_of(tmp_path, record)[0]] == [
            "system",
            "user",
            "assistant",
        ]

    @pytest.mark.parametrize("blank", ["", None, " \n"])
    def test_a_blank_system_prompt_is_none(self, tmp_path, blank):
        expected = [user("Name a colour."), assistant("Red.")]
        turns = [("system", blank), ("human", "Name a colour."), ("gpt", "Red.")]
        for record in (
            {**GOOD, "system": blank},
            {"conversations": [{"from": name, "value": text} for name, text in turns]},
            {"messages": [{"role": "system", "content": blank}, *expected]},
        ):
            assert conversation_of(tmp_path, record)[0] == expected

    @pytest.mark.parametrize("value", ["add(1, 2)", '{"arguments": {}}', '{"name": "add"', "[]"])
    def test_text_that_is_no_function_call_stays_text(self, tmp_path, value):
        turns = [("human", "Q"), ("function_call", value), ("observation", ""), ("gpt", "A")]
        record = {"conversations": [{"from": name, "value": text} for name, text in turns]}
        assert conversation_of(tmp_path, record)[0][1] == assistant(value)

    @pytest.mark.parametrize("thoughts", ["<think>Hm.</think>", "<think>\n\n</think>"])
    def test_thoughts_before_a_function_call(self, tmp_path, thoughts):
        """As in LLaMA-Factory."""
        call = {"name": "add", "arguments": {"left": 1}}
        turns = [("human", "Q"), ("function_call", f"{thoughts}\n\n{json.dumps(call)}")]
        record = {"conversations": [{"from": name, "value": text} for name, text in turns]}
        expected = [user("Q"), assistant(thoughts, tool_calls=[call])]
        assert conversation_of(tmp_path, record)[0] == expected
        convert(write(tmp_path / "in.json", [record]), tmp_path / "out.json")
        assert [row.messages for row in open_rows(tmp_path / "out.json")] == [expected]

    def test_functions_are_tools(self, tmp_path):
        functions = [{"name": "add", "parameters": {}}]
        messages = [user("Q"), assistant("A")]
        for tools, expected in (
            ({}, functions),
            ({"tools": None}, functions),
            ({"tools": []}, None),
        ):
            record = {"messages": messages, "functions": functions, **tools}
            assert conversation_of(tmp_path, record) == (messages, expected)

    def test_openai_messages_with_parallel_tool_calls(self, tmp_path):
        function = {"name": "add", "arguments": '{"left": 1}'}
        calls = [{"id": name, "type": "function", "function": function} for name in "ab"]
        record = {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "a", "content": "2"},
                {"role": "tool", "tool_call_id": "b", "content": "3"},
                {"role": "assistant", "content": "A"},
            ]
        }
        expected = {"name": "add", "arguments": {"left": 1}}
        assert conversation_of(tmp_path, record)[0] == [
            {"role": "system", "content": "S"},
            user("Q"),
            assistant("", tool_calls=[{**expected, "id": "a"}, {**expected, "id": "b"}]),
            {"role": "tool", "tool_call_id": "a", "content": "2"},
            {"role": "tool", "tool_call_id": "b", "content": "3"},
            assistant("A"),
        ]

    def test_firefly(self, tmp_path):
        record = {"kind": "NLI", "input": "前提与假设", "target": "蕴含"}
        assert conversation_of(tmp_path, record)[0] == [user("前提与假设"), assistant("蕴含")]


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
    def test_array_or_lines_by_content(self, tmp_path, name, encoding):
        records = [{**GOOD, "output": f"颜色 {number}"} for number in range(3)]
        path = tmp_path / name
        lines = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        for content in (records, json.dumps(records, indent=2), lines + "\n"):
            rows = load_rows(write(path, content, encoding))
            assert [row.messages[1]["content"] for row in rows] == ["颜色 0", "颜色 1", "颜色 2"]
            assert [(row.source, row.index) for row in rows] == [(str(path), n) for n in range(3)]

    def test_line_separators_inside_a_string_do_not_end_the_row(self, tmp_path):
        record = {**GOOD, "output": "one\u2028two\x85three"}
        path = write(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False))
        assert load_rows(path)[0].messages[1]["content"] == record["output"]

    def test_comma_separated_files_in_their_order(self, tmp_path):
        first = write(tmp_path / "b.json", [GOOD, GOOD])
        second = write(tmp_path / "a.jsonl", json.dumps(GOOD))
        rows = load_rows(f"{first}, {second}")
        expected = [(str(first), 0), (str(first), 1), (str(second), 0)]
        assert [(row.source, row.index) for row in rows] == expected

    def test_texts(self, tmp_path):
        plain = write(tmp_path / "a.txt", "\ufefffirst line\r\n\n 第二行\nlast")
        lines = write(tmp_path / "b.jsonl", '{"text": "one\\ntwo"}\n{"text": " "}\n')
        assert load_rows(plain, plain_text=True) == ["first line", " 第二行", "last"]
        assert load_rows(f"{plain},{lines}", plain_text=True)[3:] == ["one\ntwo"]


def turns(*speakers):
    return {"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]}


BROKEN = {
    "no output": ({"instruction": "Q", "input": ""}, "no answer"),
    "blank output": ({**GOOD, "output": " \n"}, "no answer"),
    "no question": ({**GOOD, "instruction": ""}, "no question"),
    "number for input": ({**GOOD, "input": 3}, "input must be a string"),
    "crooked history": ({**GOOD, "history": [["only a question"]]}, "history"),
    "history without answer": ({**GOOD, "history": [["Q", ""]]}, "no answer"),
    "late system": (turns("human", "gpt", "system"), "unexpected system turn"),
    "unanswered": (turns("human", "human"), "no answer"),
    "only an opening turn": (turns("gpt"), "no question"),
    "only a system prompt": (turns("system"), "no answer"),
    "unknown speaker": (turns("human", "robot"), "turn 2: unknown speaker 'robot'"),
    "no turns": ({"conversations": []}, "the conversation is empty"),
    "turns not a list": ({"conversations": {"a": 1}}, "conversations must be a list"),
    "turn not an object": ({"messages": ["hello"]}, "turn 1: a turn must be a JSON object"),
    "empty turn": ({"messages": [user("")]}, "turn 1: the user turn is empty"),
    "content of numbers": ({"messages": [user([3])]}, "turn 1: content is neither text nor a list"),
    "content with an image": (
        {
            "messages": [
                user([{"type": "text", "text": "Q"}, {"type": "image_url"}]),
                assistant("A"),
            ]
        },
        "turn 1: content has a part of type image_url; only text",
    ),
    "row with images": ({**turns("human", "gpt"), "images": ["a.png"]}, "it has images"),
    "turn with audio": ({"messages": [user("Q", audio="a.wav"), assistant("A")]}, "it has audio"),
    "half a weight": ({"messages": [user("Q"), assistant("A", weight=0.5)]}, "weight is 0.5"),
    "a mask of words": ({"messages": [user("Q"), assistant("A", mask="no")]}, "mask is 'no'"),
    "a question to learn": (
        {"messages": [user("Q", train=True), assistant("A")]},
        "only answers of the assistant",
    ),
    "thoughts of a user": (
        {"messages": [user("Q", reasoning_content="T"), assistant("A")]},
        "the text of an assistant's thoughts",
    ),
    "a call without a name": (
        {"messages": [user("Q"), assistant("", tool_calls=[{"arguments": {}}])]},
        "tool_calls: a tool call needs a name",
    ),
    "bad tools": ({**turns("human", "gpt"), "tools": "[{"}, "in tools, line 1 column 3"),
    "tools of nothing": ({**turns("human", "gpt"), "tools": [1, "add"]}, "a list of objects"),
    "a call by the user": (
        {"messages": [user("Q", tool_calls=[{"name": "f", "arguments": {}}]), assistant("A")]},
        "only the assistant calls tools",
    ),
    "only a blank system prompt": ({"messages": [{"role": "system", "content": ""}]}, "is empty"),
    "firefly without target": ({"kind": "NLI", "input": "Q"}, "no answer"),
    "not an object": (["Q", "A"], "a row must be a JSON object"),
    "half a character": ({**GOOD, "output": "\ud800"}, "surrogate"),
}


class TestBrokenRows:
    @pytest.mark.parametrize("name", BROKEN)
    def test_is_named_with_file_and_row(self, tmp_path, name):
        record, reason = BROKEN[name]
        path = tmp_path / "data.json"
        path.write_text(json.dumps([GOOD, GOOD, record]))
        with pytest.raises(UserError) as caught:
            load_rows(path)
        message = str(caught.value)
        assert f"{path}, row 3: " in message and reason in message
        assert "1 of 3 rows" in message and "--skip_bad_rows" in message and "\n" not in message

    def test_are_left_out_and_counted_on_request(self, tmp_path):
        records = [record for record, _ in BROKEN.values()]
        path = tmp_path / "data.json"
        path.write_text(json.dumps([GOOD, *records, GOOD]))
        skipped = []
        rows = load_rows(path, skipped)
        assert [row.index for row in rows] == [0, len(records) + 1]
        assert len(skipped) == len(records) and all(str(path) in message for message in skipped)

    def test_json_error_in_a_line_names_line_and_column(self, tmp_path):
        # A number where a key must be: a trailing comma is reported elsewhere since Python 3.13.
        good = json.dumps(GOOD)
        path = write(tmp_path / "data.jsonl", f"{good}\n\n{good[:-1]}, 5}}\n{good}\n")
        with pytest.raises(UserError, match=rf"row 2 \(line 3\): line 3 column {len(good) + 2}"):
            load_rows(path)
        skipped = []
        assert [row.index for row in load_rows(path, skipped)] == [0, 2]
        assert len(skipped) == 1

    def test_json_error_in_an_array_names_line_and_column(self, tmp_path):
        path = write(tmp_path / "data.json", '[\n{"instruction": "Q",\n "output" "A"}\n]')
        for skipped in (None, []):
            with pytest.raises(UserError, match=r"data\.json, line 3 column 11: not valid JSON"):
                load_rows(path, skipped)

    def test_only_broken_rows_is_an_error_even_when_they_are_skipped(self, tmp_path):
        good = write(tmp_path / "a.json", [GOOD])
        bad = write(tmp_path / "b.json", [{"a": 1, "b": 2}])
        with pytest.raises(
            UserError, match=r"b\.json, row 1: no known format has the columns a, b"
        ) as caught:
            load_rows(f"{good},{bad}", skipped=[])
        for name in ("alpaca", "sharegpt", "openai", "firefly", "dataset_info.json"):
            assert name in str(caught.value)

    @pytest.mark.parametrize("content", ["", " \n", "[]", "Hi", "[" * 100_000, "[1" + "0" * 5000])
    def test_files_that_hold_no_rows(self, tmp_path, content):
        path = write(tmp_path / "data.json", content)
        with pytest.raises(UserError, match="data.json"):
            load_rows(path)

    def test_missing_files_and_files_that_are_not_text(self, tmp_path):
        with pytest.raises(UserError, match="nothing.json: there is no such file"):
            load_rows(tmp_path / "nothing.json")
        with pytest.raises(UserError, match="the folder has no"):
            load_rows(tmp_path)
        with pytest.raises(UserError, match="--dataset is empty"):
            load_rows(" , ")
        path = tmp_path / "latin.json"
        path.write_bytes('[\n{"instruction": "café"}]'.encode("latin-1"))
        with pytest.raises(UserError, match="line 2: not UTF-8"):
            load_rows(path)

    def test_texts_without_text(self, tmp_path):
        path = write(tmp_path / "data.json", [{"text": "a"}, {"body": "b"}])
        with pytest.raises(
            UserError, match=r'row 2: there is no column "text", only body; conv.*stage sft'
        ):
            load_rows(path, plain_text=True)
        with pytest.raises(UserError, match="the file has no texts"):
            load_rows(write(tmp_path / "a.txt", "\n \n"), plain_text=True)


class TestSplit:
    @pytest.fixture
    def rows(self, tmp_path):
        return open_rows(write(tmp_path / "rows.json", [GOOD] * 50))

    def test_is_a_reproducible_partition_in_order(self, rows):
        training, validation = split(rows, 0.1, seed=1)
        assert len(validation) == 5
        assert [list(part) for part in split(rows, 0.1, seed=1)] == [
            list(training),
            list(validation),
        ]
        assert list(split(rows, 0.1, seed=2)[1]) != list(validation)
        for part in (training, validation):
            assert list(part) == sorted(part, key=lambda row: row.index)
        together = sorted([*training, *validation], key=lambda row: row.index)
        assert together == list(rows)

    def test_one_or_more_is_a_number_of_rows(self, rows):
        assert len(split(rows, 7, seed=0)[1]) == len(split(rows, 7.0, seed=0)[1]) == 7

    @pytest.mark.parametrize("validation", [0, -1, 0.001, 1.5, 50, 0.999, float("nan")])
    def test_nothing_left_on_a_side_is_an_error(self, validation, rows):
        with pytest.raises(UserError, match="--validation_split"):
            split(rows, validation, seed=0)


class TestFolders:
    def test_all_files_of_rows_below(self, tmp_path):
        folder = tmp_path / "rows"
        for name in ("b.json", "a/z.jsonl", ".cache/c.json", "dataset_info.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder / name, [{**GOOD, "output": name}])
        write(folder / "notes.txt", "text")
        assert [row.messages[-1]["content"] for row in open_rows(folder)] == ["a/z.jsonl", "b.json"]
        (folder / "a" / "z.jsonl").write_text('{"text": "one"}')
        (folder / "b.json").write_text('[{"text": "two"}]')
        assert load_rows(folder, plain_text=True) == ["one", "two", "text"]

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="has no parquet, Arrow or JSON file"):
            open_rows(tmp_path)


class TestMix:
    @pytest.fixture
    def files(self, tmp_path):
        main = write(tmp_path / "main.json", [GOOD] * 80)
        general = write(tmp_path / "general.json", [{**GOOD, "output": str(n)} for n in range(50)])
        return main, general

    def answers(self, rows):
        return [row.messages[-1]["content"] for row in rows if "general" in row.source]

    def test_share_of_all_rows(self, files):
        main, general = files
        said = []
        rows = mix(open_rows(main), f"{general}:0.2", seed=1, say=said.append)
        assert len(rows) == 100 and len(set(self.answers(rows))) == 20
        assert said == [f"mixed in 20 rows of {general} to 80"]
        again, other = (
            mix(open_rows(main), f"{general}:0.2", seed=seed, say=said.append) for seed in (1, 2)
        )
        assert self.answers(again) == self.answers(rows) != self.answers(other)

    def test_rows_repeat_if_there_are_too_few(self, files):
        main, general = files
        said = []
        rows = mix(open_rows(main), f"{general}:0.6", say=said.append)
        answers = self.answers(rows)
        assert len(answers) == 120
        assert {answers.count(one) for one in set(answers)} == {2, 3} and len(set(answers)) == 50
        assert any("has only 50 rows" in line for line in said)

    @pytest.mark.parametrize("ratio", ["", ":", ":x", ":0", ":1", ":-0.5", ":0.0001", ":nan"])
    def test_invalid_ratios(self, files, ratio):
        with pytest.raises(UserError, match="--mix .* FILE:RATIO"):
            mix(open_rows(files[0]), f"{files[1].name}{ratio}")

    def test_a_ratio_for_each_file_is_refused(self, files):
        with pytest.raises(UserError, match="there is one ratio.* Give a.json,b.json:RATIO"):
            mix(open_rows(files[0]), "a.json:0.2,b.json:0.1")


class TestRealFiles:
    @pytest.mark.parametrize(
        "name, count",
        [
            ("alpaca_en_demo.json", 999),
            ("alpaca_zh_demo.json", 1000),
            ("oaast_sft_zh.json", 766),
            ("identity.json", 91),
            ("cherry_alpaca.json", 5096),
            ("cherry_alpaca_5_percent.json", 3111),
            ("compare_alpaca.json", 10),
            ("glaive_toolcall_zh_demo.json", 300),
            ("firefly_6_rows.jsonl", 6),
        ],
    )
    def test_every_row_loads(self, shared_data, name, count):
        rows = load_rows(shared_data / "instruct" / name)
        assert [row.index for row in rows] == list(range(count))
        assert all(row.messages[-1]["role"] == "assistant" for row in rows)

    def test_history_becomes_turns(self, shared_data):
        path = shared_data / "instruct" / "oaast_sft_zh.json"
        records = json.loads(path.read_text(encoding="utf-8"))
        for row, record in zip(load_rows(path), records, strict=True):
            texts = [message["content"] for message in row.messages]
            turns = [text for pair in record["history"] for text in pair]
            assert texts == [*turns, record["instruction"], record["output"]]

    def test_tool_calls_are_parsed(self, shared_data):
        path = shared_data / "instruct" / "glaive_toolcall_zh_demo.json"
        rows, records = load_rows(path), json.loads(path.read_text(encoding="utf-8"))
        calls = [call for row in rows for m in row.messages for call in m.get("tool_calls", [])]
        assert len(calls) == 216 and all(isinstance(call["arguments"], dict) for call in calls)
        assert [row.tools or [] for row in rows] == [json.loads(one["tools"]) for one in records]

    @pytest.mark.parametrize("name", ["dpo_en_demo.json", "oaast_rm_zh.json"])
    def test_preference_data_is_refused_by_name(self, shared_data, name):
        with pytest.raises(UserError, match=f"{name}, row 1: preference data"):
            load_rows(shared_data / "instruct" / name)

    @pytest.mark.parametrize("name, count", [("wiki_demo.txt", 30), ("c4_demo.jsonl", 300)])
    def test_plain_text_loads_as_text_only(self, shared_data, name, count):
        path = shared_data / "instruct" / name
        assert len(load_rows(path, plain_text=True)) == count
        with pytest.raises(UserError, match="--stage pt"):
            load_rows(path)


class TestConvert:
    """python -m minisft.data convert IN OUT"""

    def run(self, *words):
        return command("convert", *words, before=["-m", "minisft.data"], script=None)

    @pytest.mark.parametrize("ending", [".json", ".jsonl"])
    def test_firefly_becomes_sharegpt(self, shared_data, tmp_path, ending):
        source, target = shared_data / "instruct" / "firefly_6_rows.jsonl", tmp_path / f"o{ending}"
        done = self.run(source, target)
        assert done.returncode == 0 and "6 rows" in done.stdout, done.stderr
        originals = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        text = target.read_bytes().decode("utf-8")
        rows = json.loads(text) if ending == ".json" else list(map(json.loads, text.splitlines()))
        assert rows == [
            {
                "conversations": [
                    {"from": "human", "value": one["input"]},
                    {"from": "gpt", "value": one["target"]},
                ]
            }
            for one in originals
        ]
        assert originals[0]["target"][:10] in text  # as characters, not as escapes
        assert list(tmp_path.iterdir()) == [target]

    def test_every_format_means_the_same_afterwards(self, shared_data, tmp_path):
        for name in ("glaive_toolcall_zh_demo", "oaast_sft_zh", "alpaca_zh_demo"):
            source, target = shared_data / "instruct" / f"{name}.json", tmp_path / f"{name}.json"
            convert(source, target)
            for before, after in zip(load_rows(source), load_rows(target), strict=True):
                for message in before.messages:
                    if more := message.pop("input", None):
                        message["content"] += "\n" + more
                assert (after.messages, after.tools) == (before.messages, before.tools)

    def test_mistakes_leave_nothing_behind(self, tmp_path):
        good = write(tmp_path / "good.json", [GOOD])
        bad = write(tmp_path / "bad.json", [GOOD, {}])
        output, folder, device = (tmp_path / name for name in ("out.json", "folder", "device"))
        folder.mkdir()
        os.mkfifo(device)
        for words, message in (
            ((bad, output), "row 2"),
            ((good, good), "exists"),
            ((good, folder), "is a folder or a device. Give the name of a f"),
            ((good, folder, "--overwrite"), "folder is a folder or a device"),
            ((good, device, "--overwrite"), "device is a folder or a device"),
            ((good, good, "--overwrite"), "is an input"),
            ((tmp_path / "none.json", output), "no such file"),
        ):
            done = self.run(*words)
            assert done.returncode == 2 and done.stderr.startswith("error: "), words
            assert message in done.stderr and done.stderr.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {
            "bad.json",
            "good.json",
            "folder",
            "device",
        }
        assert device.is_fifo() and not list(folder.iterdir())
        assert json.loads(good.read_text()) == [GOOD]
        done = self.run(bad, output, "--skip_bad_rows")
        assert "1 row; 1 broken row left out, the first: " in done.stdout
        for words in (["--help"], ["show", "--help"]):
            done = command(*words, before=["-m", "minisft.data"], script=None)
            assert "show INPUT --model_name_or_path M" in done.stdout

    def test_show_is_short_for_train(self, checkpoint, rows_file, monkeypatch, capsys):
        words = ["show", rows_file, "--template", "plain", "--show-samples", 1]
        done = command(*words, before=["-m", "minisft.data"], script=None)
        assert done.returncode == 2 and "--model_name_or_path must be given" in done.stderr
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # run_script would set it
        words += ["--model_name_or_path", checkpoint]
        monkeypatch.setattr("sys.argv", ["minisft.data", *map(str, words)])
        main()
        said = capsys.readouterr().out
        assert "[[one 0!" in said and "(sample 1: " in said and "steps" in said
        assert "(sample 2: " not in said

    def test_a_row_that_sharegpt_cannot_express_is_broken(self, tmp_path):
        call = assistant("Well,", tool_calls=[{"name": "f", "arguments": {}}])
        bad = write(tmp_path / "bad.json", [GOOD, {"messages": [user("Q"), call]}])
        skipped = []
        assert convert(bad, tmp_path / "out.json", skipped=skipped) == 1
        assert (
            len(skipped) == 1 and "bad.json, row 2: an answer has text and tool calls" in skipped[0]
        )
        with pytest.raises(UserError, match=r"bad\.json, row 2: an answer .*--skip_bad_rows"):
            convert(bad, tmp_path / "other.json")

    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        good, output = write(tmp_path / "good.json", [GOOD]), write(tmp_path / "out.json", [])

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="out.json: could not be written: No space left"):
            convert(good, output, overwrite=True)
        assert output.read_text() == "[]" and len(list(tmp_path.iterdir())) == 2
