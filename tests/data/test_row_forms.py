"""Rows in other layouts and other orders: what they become, what is learned, what is said."""

import json
import math

import pytest
import trl
from test_dataset import GOOD, assistant, turns, user, write
from transformers import AutoTokenizer

from minisft.chat.prompts import parse_prompt
from minisft.common.errors import UserError
from minisft.data.dataset import load_rows, open_rows
from minisft.data.encode_preferences import encode_preferences
from minisft.data.encoding import encode_row
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def read(tmp_path, record, ranking=False, **options):
    """(the row of a file that holds `record` and a usual row, what was said about the file)."""
    other = {"prompt": "Q", "chosen": "a", "rejected": "b"} if ranking else GOOD
    path, said = write(tmp_path / "rows.json", [record, other]), []
    rows = load_rows(path, ranking=ranking, say=said.append, **options)
    assert all(line.startswith(f"{path}: 1 of 2 rows ") for line in said)
    return rows[0], [line.split(" rows ")[1] for line in said]


SYSTEM = {"role": "system", "content": "S"}
CALLS = [{"name": name, "arguments": {}} for name in "fg"]
# Record -> messages, and the beginning of each line that is said.
FORMS = {
    "trl, texts": (
        {"prompt": "1 + 2?", "completion": "3", "system": "S"},
        [SYSTEM, user("1 + 2?"), assistant("3")],
        [],
    ),
    "trl, turns": (
        {"prompt": [SYSTEM, user("Q"), assistant("A"), user("R")], "completion": [assistant("B")]},
        [SYSTEM, user("Q"), assistant("A", train=False), user("R"), assistant("B")],
        ["have answers in the prompt"],
    ),
    "trl, JSON text": (
        {"prompt": json.dumps([user("Q")]), "completion": [assistant("B", thinking="T")]},
        [user(json.dumps([user("Q")])), assistant("B", reasoning_content="T")],
        [],
    ),
    "input and output": ({"input": "Q", "output": "A"}, [user("Q"), assistant("A")], []),
    "a number": (
        {**GOOD, "output": 0.1},
        [user(GOOD["instruction"]), assistant("0.1")],
        ["have a number, an object"],
    ),
    "an object": (
        {"prompt": "Q", "completion": {"颜色": [1, None]}},
        [user("Q"), assistant('{"颜色": [1, null]}')],
        ["have a number, an object"],
    ),
    "true, in a turn": (
        {"messages": [user("Q"), assistant(True)]},
        [user("Q"), assistant("true")],
        ["have a number, an object"],
    ),
    "a call as an object": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": CALLS[0]},
            ]
        },
        [user("Q"), assistant("", tool_calls=CALLS[:1])],
        [],
    ),
    "names of assistants": (
        turns("human", "chatgpt", "user", "bing", "human", "bard"),
        [user("x"), assistant("x")] * 3,
        [],
    ),
    "two questions": (
        turns("human", "human", "gpt"),
        [user("x\nx"), assistant("x")],
        ["have consecutive turns"],
    ),
    "three answers": (
        {"messages": [user("Q"), assistant("A", thinking="T"), assistant("B"), assistant("C")]},
        [user("Q"), assistant("A\nB\nC", reasoning_content="T")],
        ["have consecutive turns"],
    ),
    "two calls": (
        {"messages": [user("Q"), *[assistant("", tool_calls=[call]) for call in CALLS]]},
        [user("Q"), assistant("", tool_calls=CALLS)],
        ["have consecutive turns"],
    ),
    "a text, then a call": (
        {"messages": [user("Q"), assistant("Wait."), assistant("", tool_calls=CALLS)]},
        [user("Q"), assistant("Wait.", tool_calls=CALLS)],
        ["have consecutive turns"],
    ),
    "two system prompts": (
        {
            "system": "S",
            "messages": [{"role": "system", "content": "T"}, user("Q"), assistant("A")],
        },
        [{"role": "system", "content": "S\nT"}, user("Q"), assistant("A")],
        ["have consecutive turns"],
    ),
    "one system prompt in two places": (
        {"system": "S", "messages": [SYSTEM, user("Q"), assistant("A")]},
        [SYSTEM, user("Q"), assistant("A")],
        ["have consecutive turns"],
    ),
    "an opening turn": (
        {"messages": [SYSTEM, assistant("Hi."), user("Q"), assistant("A")]},
        [SYSTEM, assistant("Hi.", train=False), user("Q"), assistant("A")],
        ["begin with the assistant"],
    ),
    "a last question": (
        turns("human", "gpt", "human"),
        [user("x"), assistant("x")],
        ["end without an answer"],
    ),
    "an object that is not a turn": (
        {**GOOD, "output": {"role": "admin", "from": "Oslo"}},
        [user(GOOD["instruction"]), assistant('{"role": "admin", "from": "Oslo"}')],
        ["have a number, an object"],
    ),
    "a class": (
        {**GOOD, "label": 1},
        [user(GOOD["instruction"]), assistant(GOOD["output"])],
        ["have a label that is ignored"],
    ),
    "another class": (
        {"prompt": "Q", "completion": "A", "label": 2},
        [user("Q"), assistant("A")],
        [],
    ),
    "columns of other formats": (
        {"messages": [user("Q"), assistant("A")], **dict.fromkeys([*GOOD, "chosen", "rejected"])},
        [user("Q"), assistant("A")],
        [],
    ),
    "an unread number": (
        {**GOOD, "score": math.nan},
        [user(GOOD["instruction"]), assistant(GOOD["output"])],
        [],
    ),
    "a last result": (
        {
            "messages": [
                user("Q"),
                assistant("", tool_calls=CALLS),
                {"role": "tool", "content": "1"},
            ]
        },
        [user("Q"), assistant("", tool_calls=CALLS)],
        ["end without an answer"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_in_other_forms(name, tmp_path):
    record, messages, beginnings = FORMS[name]
    row, said = read(tmp_path, record)
    assert row.messages == messages
    assert len(said) == len(beginnings)
    assert all(line.startswith(begin) for line, begin in zip(said, beginnings, strict=True))


REFUSED = {
    "answers of which one is learned": (
        {"messages": [user("Q"), assistant("A", weight=0), assistant("B")]},
        "messages 2 and 3: two answers .* only one of them",
    ),
    "a second thought": (
        {"messages": [user("Q"), assistant("A"), assistant("B", thinking="T")]},
        "messages 2 and 3: .* its own thoughts",
    ),
    "an answer instead of a result": (
        {"messages": [user("Q"), assistant("", tool_calls=CALLS), assistant("B")]},
        "messages 2 and 3: .* after tool calls; expected tool",
    ),
    "two people": (
        {"messages": [user("Q", name="a"), user("R", name="b"), assistant("B")]},
        "messages 1 and 2: two user turns with different names",
    ),
    "a completed beginning of an answer": (
        {"prompt": [user("Q"), assistant("A")], "completion": [assistant("B")]},
        "messages 2 and 3: .* only one of them is supervised",
    ),
    "an opening turn and a question": (
        {"messages": [assistant("Hi."), user("Q")]},
        "there is no answer: the last turn",
    ),
    "only an answer": ({"messages": [assistant("A")]}, "there is no question"),
    "a number as prompt": (
        {"prompt": 5, "completion": "A"},
        "prompt must be a string or a list of turns, not a number",
    ),
    "a list as input": ({"input": ["Q"], "output": "A"}, "input must be a string, not a list"),
    "a turn as output": (
        {**GOOD, "output": {"role": "model", "content": "A"}},
        "output must be a string, not an object",
    ),
    **{
        f"a judgement, {number}": (record, f"{list(record)[-1]} says if the answer is good or bad")
        for number, record in enumerate(
            (
                {"prompt": "Q", "completion": "A", "label": False},
                {"prompt": [user("Q")], "completion": [assistant("A")], "label": 1},
                {"messages": [user("Q"), assistant("A")], "label": True},
                {**turns("human", "gpt"), "label": 0.0},
                {**GOOD, "label": "False"},
                {**GOOD, "kto_tag": 0},
            )
        )
    },
    **{
        f"not finite, {number}": (record, "NaN and Infinity are not JSON")
        for number, record in enumerate(
            (
                {**GOOD, "output": math.nan},
                {"prompt": "Q", "completion": {"a": [-math.inf]}},
                {"messages": [user("Q"), assistant(math.inf)]},
                {
                    "messages": [
                        user("Q"),
                        assistant("", tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}]),
                    ]
                },
                {
                    "messages": [user("Q"), assistant("A")],
                    "tools": [{"name": "f", "x": math.nan}],
                },
            )
        )
    },
    "preferences": (
        {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
        "preference data has several answers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_what_is_learned(name, tmp_path):
    record, message = REFUSED[name]
    with pytest.raises(UserError, match=f"row 1: {message}"):
        read(tmp_path, record)


def test_a_number_too_large_for_a_float(tmp_path):
    path = write(tmp_path / "rows.jsonl", json.dumps({**GOOD, "output": 7}).replace("7", "1e999"))
    with pytest.raises(UserError, match="row 1 .line 1.: NaN and Infinity are not JSON"):
        load_rows(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({}, None), ({"response": "label"}, "true"), ({"kto_tag": "label"}, "preference data")],
)
def test_labels_that_an_entry_reads(columns, message, tmp_path):
    """An entry leaves columns out on purpose, so this is only said."""
    columns = {"prompt": "instruction", "response": "output", **columns}
    write(tmp_path / "rows.json", [{**GOOD, "label": True}])
    write(tmp_path / "dataset_info.json", {"it": {"file_name": "rows.json", "columns": columns}})
    said = []
    if message == "preference data":
        with pytest.raises(UserError, match=message):
            load_rows("it", dataset_dir=tmp_path)
        return
    (row,) = load_rows("it", dataset_dir=tmp_path, say=said.append)
    assert row.messages[-1]["content"] == (message or GOOD["output"])
    assert ("1 of 1 rows have a label that is ignored" in "".join(said)) == (message is None)


@pytest.mark.parametrize("prompt", ["Q", user("Q"), [user("Q")], json.dumps({"a": 1})])
def test_preferences_with_a_completion(prompt, tmp_path):
    """chosen and rejected follow the prompt; as a usual row, it has the completion."""
    record = {"prompt": prompt, "completion": "C", "chosen": "A", "rejected": {"role": "king"}}
    asked = prompt if isinstance(prompt, str) else "Q"
    row, said = read(tmp_path, record, ranking=True)
    answers = ("A", '{"role": "king"}')
    assert [row.messages, *row.rejected] == [[user(asked), assistant(text)] for text in answers]
    assert [line[:13] for line in said] == ["have a number"]
    path = write(tmp_path / "rows.json", [record])
    (row,) = load_rows(path, say=said.append)
    assert row.messages == [user(asked), assistant("C")]


def test_preferences_of_data(tmp_path):
    """Objects and numbers are answers; turns keep their errors."""
    row, _ = read(tmp_path, {**GOOD, "output": [3, {"from": "Oslo"}, "t"]}, ranking=True)
    texts = [messages[-1]["content"] for messages in (row.messages, *row.rejected)]
    assert texts == ["3", '{"from": "Oslo"}', "t"]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "rows.json", "ranking": True, "columns": columns}
    write(tmp_path / "dataset_info.json", {"it": entry})
    write(tmp_path / "rows.json", [{**GOOD, "chosen": {"a": 1}, "rejected": 2}])
    (row,) = load_rows("it", dataset_dir=tmp_path, ranking=True)
    assert row.messages[-1]["content"] == '{"a": 1}'
    with pytest.raises(UserError, match="chosen: unknown speaker 'model'"):
        read(
            tmp_path,
            {"prompt": "Q", "chosen": {"role": "model", "content": "A"}, "rejected": 1},
            True,
        )


@pytest.mark.parametrize("ranking", [True, None])
def test_preferences_in_a_table_with_other_rows(ranking, tmp_path):
    """Columns of other formats are null; a label that says which answer is better is not KTO's."""
    record = {"prompt": "Q", "completion": None, "chosen": "A", "rejected": "B", "label": 1}
    row, _ = read(tmp_path, {**dict.fromkeys(GOOD), **record}, ranking=ranking)
    assert [row.messages, *row.rejected] == [[user("Q"), assistant(text)] for text in "AB"]


@pytest.mark.parametrize("ranking", [True, None])
def test_preferences_of_openai(ranking, tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    record = {
        "input": {"messages": [SYSTEM, user("Q")], "tools": [tool], "parallel_tool_calls": True},
        "preferred_output": [assistant("A")],
        "non_preferred_output": [assistant("B")],
    }
    row, said = read(tmp_path, record, ranking=ranking)
    assert [row.messages, *row.rejected] == [[SYSTEM, user("Q"), assistant(text)] for text in "AB"]
    assert row.tools == [tool] and not said
    numbers = {"preferred_output": assistant(1), "non_preferred_output": [assistant({"a": 2})]}
    row, said = read(tmp_path, {**record, **numbers, "label": True}, ranking=ranking)
    assert [row.messages[-1], row.rejected[0][-1]] == [assistant("1"), assistant('{"a": 2}')]
    assert len(said) == 1
    with pytest.raises(UserError, match='input must be an object with "messages"'):
        read(tmp_path, {**record, "input": "Q"}, ranking=True)


def test_an_opening_turn_of_preferences_is_context(tmp_path):
    record = {"prompt": [assistant("Hi."), user("Q"), user("R")], "chosen": 3, "rejected": "4"}
    row, said = read(tmp_path, record, ranking=True)
    opening = [assistant("Hi.", train=False), user("Q\nR")]
    assert [row.messages, *row.rejected] == [[*opening, assistant(text)] for text in "34"]
    assert len(said) == 3


def test_large_files_say_how_many_rows_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr("minisft.data.dataset.CHECKED_BYTES", 100)
    monkeypatch.setattr("minisft.data.dataset.CHECKED_ROWS", 5)
    lines = [json.dumps({**GOOD, "output": number}) for number in range(20)]
    path, said = write(tmp_path / "rows.jsonl", "\n".join(lines)), []
    assert open_rows(path, say=said.append)[19].messages[-1]["content"] == "19"
    assert len(said) == 1 and "5 of the first 5 rows have a number" in said[0]
    said.clear()
    monkeypatch.setattr("minisft.data.dataset.CHECKED_ROWS", 1000)
    open_rows(path, say=said.append)
    assert "20 of the first 20 rows have a number" in said[0]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer.load(tiny_tokenizer_dir)


def learned_texts(row, template, tokenizer):
    (example,) = encode_row(row, template, 1024)
    shown = template.show(example.ids.tolist(), example.supervised.tolist())
    return [part.split("]]")[0] for part in shown.split("[[")[1:]]


@pytest.mark.parametrize("name", ["alpaca", "chatml", "plain", "llama2", "llama3", "vicuna"])
def test_an_opening_turn_is_written_and_not_learned(name, tmp_path, tokenizer):
    template = get_template(name, tokenizer)
    row, _ = read(tmp_path, {"messages": [assistant("Hello."), user("Name"), assistant("Red.")]})
    (learned,) = learned_texts(row, template, tokenizer)
    assert "Red." in learned and "Hello." not in learned
    text = template.render(row.messages)
    assert text.index("Hello.") < text.index("Name")
    assert ("Hello.\nName" in text) != template.facts.knows_opening


def test_the_completion_is_what_trl_learns(tmp_path, tokenizer, tiny_tokenizer_dir):
    """trl's text of the completion is our supervised text, its prompt the text before."""
    template = get_template("chatml", tokenizer)
    oracle = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    oracle.chat_template = template.text
    record = {
        "prompt": [SYSTEM, user("Name"), assistant("Blue."), user("Again")],
        "completion": [assistant("Red.")],
    }
    row, _ = read(tmp_path, record)
    expected = trl.apply_chat_template(record, oracle)
    assert template.render(row.messages) == expected["prompt"] + expected["completion"]
    learned = learned_texts(row, template, tokenizer)
    assert [text.strip() for text in learned] == [expected["completion"].strip()]


def test_prompts_of_chat(tmp_path):
    assert parse_prompt({"prompt": [user("Q"), user("R")]})[0] == [user("Q\nR")]
    assert parse_prompt({"input": "Q", "output": "A"})[0] == [user("Q")]
    assert parse_prompt(turns("human", "bard", "human"))[0][-1] == user("x")
    assert parse_prompt({**dict.fromkeys(GOOD), "prompt": "Q"})[0] == [user("Q")]
    assert parse_prompt({**turns("human", "gpt"), "label": False})[0] == [user("x")]
    opening = {"messages": [assistant("Hi."), user("Q")]}
    assert parse_prompt(opening)[0] == [assistant("Hi.", train=False), user("Q")]


def test_preferences_are_encoded(tmp_path, tokenizer):
    record = {
        "input": {"messages": [assistant("Hi."), user("Q")]},
        "preferred_output": [assistant("A")],
        "non_preferred_output": [assistant("B")],
    }
    row, _ = read(tmp_path, record, ranking=True)
    (example,), report = encode_preferences([row], get_template("chatml", tokenizer), 1000)
    assert len(example.lengths) == 2 and not report
