"""Rows with several answers: every layout, the supervised tokens, and mistakes."""

import json

import numpy as np
import pytest

from minisft.common.errors import UserError
from minisft.data.build_batches import batches_of_rows
from minisft.data.dataset import open_rows
from minisft.data.encode_preferences import encode_preferences
from minisft.data.preferences import parse_preferences
from minisft.data.row_values import BadRow
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content):
    return {"role": "assistant", "content": content}


HISTORY = [user("Q"), assistant("A")]
SYSTEM = {"role": "system", "content": "S"}
LAYOUTS = {
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Add."}],
            "chosen": {"from": "gpt", "value": "3"},
            "rejected": {"from": "gpt", "value": "4"},
        },
        [user("Add.")],
    ),
    "sharegpt, several turns": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
                {"from": "human", "value": "Add."},
            ],
            "system": "S",
            "chosen": {"from": "gpt", "value": "3"},
            "rejected": {"from": "gpt", "value": "4"},
        },
        [SYSTEM, *HISTORY, user("Add.")],
    ),
    "alpaca": (
        {
            "instruction": "Add.",
            "input": "1 2",
            "chosen": "3",
            "rejected": "4",
            "system": "S",
            "history": [["Q", "A"]],
            "output": "not this",
        },
        [SYSTEM, *HISTORY, user("Add.", input="1 2")],
    ),
    "alpaca, a list": (
        {"instruction": "Add.", "input": "1 2", "output": ["3", "4"], "history": [["Q", "A"]]},
        [*HISTORY, user("Add.", input="1 2")],
    ),
    "texts": ({"prompt": "Add.", "chosen": "3", "rejected": "4"}, [user("Add.")]),
    "messages": (
        {
            "prompt": [SYSTEM, *HISTORY, user("Add.")],
            "chosen": [assistant("3")],
            "rejected": [assistant("4")],
            "score": 7,
        },
        [SYSTEM, *HISTORY, user("Add.")],
    ),
    "openai": (
        {
            "messages": [*HISTORY, user("Add.")],
            "chosen": assistant("3"),
            "rejected": assistant("4"),
        },
        [*HISTORY, user("Add.")],
    ),
    "whole conversations": (
        {
            "chosen": [*HISTORY, user("Add."), assistant("3")],
            "rejected": [*HISTORY, user("Add."), assistant("4")],
        },
        [*HISTORY, user("Add.")],
    ),
    "whole, and the prompt beside them": (
        {
            "prompt": "Add.",
            "chosen": [user("Add."), assistant("3")],
            "rejected": [user("Add."), assistant("4")],
        },
        [user("Add.")],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    record, prompt = LAYOUTS[layout]
    conversations, tools = parse_preferences(record)
    assert conversations == [[*prompt, assistant("3")], [*prompt, assistant("4")]]
    assert tools is None


def test_calls_of_functions_are_answers():
    call = {"name": "add", "arguments": {"a": 1}}
    record = {
        "conversations": [{"from": "human", "value": "Add."}],
        "tools": [{"name": "add"}],
        "chosen": {"from": "function_call", "value": json.dumps(call)},
        "rejected": {"from": "gpt", "value": "I cannot."},
    }
    (best, worse), tools = parse_preferences(record)
    assert best[-1]["tool_calls"] == [call] and worse[-1] == assistant("I cannot.")
    assert tools == [{"name": "add"}]


PROMPT = {"prompt": "Add."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "Add.", "output": "3"}, "need the columns chosen and rejected, or a list"),
        ({"instruction": "Add.", "output": ["3"]}, "a list of at least two answers"),
        (
            {"instruction": "Add.", "output": ["3", " "]},
            "answer 2 of output: the assistant turn is",
        ),
        (
            {"instruction": "Add.", "output": ["3", 4]},
            "answer 2 of output: a turn must be a JSON object",
        ),
        ({"instruction": "", "output": ["3", "4"]}, "there is no question"),
        ({**PROMPT, "chosen": "3", "rejected": ""}, "rejected: the assistant turn is empty"),
        ({**PROMPT, "chosen": "3", "rejected": None}, "rejected: a turn must be a JSON object"),
        ({**PROMPT, "chosen": [], "rejected": "4"}, "chosen is empty"),
        (
            {**PROMPT, "chosen": "3", "rejected": {"from": "gpt", "value": "4", "weight": 0}},
            "rejected is not to be learned",
        ),
        (
            {**PROMPT, "chosen": {"from": "robot", "value": "3"}, "rejected": "4"},
            "chosen: unknown speaker",
        ),
        (
            {"prompt": [assistant("Q")], "chosen": "3", "rejected": "4"},
            "with chosen: there is no question",
        ),
        ({"chosen": "3", "rejected": "4"}, "chosen and rejected have no question"),
        (
            {"chosen": [user("Q"), assistant("3")], "rejected": "4"},
            "with rejected: there is no question",
        ),
        (
            {"chosen": [user("Q"), assistant("3")], "rejected": [user("Z"), assistant("4")]},
            "the answers belong to different questions",
        ),
        ({**PROMPT, "chosen": "3", "rejected": "\ud800"}, "half of a surrogate pair"),
        (["3"], "a row must be a JSON object"),
    ],
)
def test_mistakes(record, message):
    with pytest.raises(BadRow, match=message):
        parse_preferences(record)


def test_a_broken_row_is_named_or_left_out(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = LAYOUTS["texts"][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, "chosen": ""}, good)))
    with pytest.raises(UserError, match="pairs.jsonl, row 2 .line 2.: chosen: .*--skip_bad_rows"):
        open_rows(path, ranking=True)
    skipped = []
    rows = open_rows(path, ranking=True, skipped=skipped)
    assert [row.index for row in rows] == [0, 2] and len(skipped) == 1
    # The row has no single answer to learn either, and the error suggests the right stage.
    with pytest.raises(UserError, match="row 1 .*preference data.*--stage dpo or rm"):
        open_rows(path)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ({"instruction": "Add."}, {"output": "three"}),
        ({"kind": "x", "input": "Add."}, {"target": "three"}),
        (
            {"conversations": [{"from": "human", "value": "Add."}]},
            {
                "conversations": [
                    {"from": "human", "value": "Add."},
                    {"from": "gpt", "value": "three"},
                ]
            },
        ),
        ({"messages": [user("Add.")]}, {"messages": [user("Add."), assistant("three")]}),
    ],
)
def test_sft_learns_the_single_answer_of_a_preference_row(tmp_path, prompt, answer):
    """A note says that the other answers are not read. Without a single answer the row is
    refused."""
    compared, said = {"chosen": "3", "rejected": "4"}, []
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{**prompt, **answer, **compared}] * 2 + [{**prompt, **answer}]))
    rows = open_rows(path, say=said.append)
    assert [row.messages for row in rows] == [[user("Add."), assistant("three")]] * 3
    assert said == [
        f"{path}: only the single answer of each row is read; train.py --stage rm and dpo "
        "learn from chosen and rejected"
    ]
    path.write_text(json.dumps([{**prompt, **answer}, {**prompt, **compared}]))
    with pytest.raises(UserError, match=r"row 2: preference data.*--stage dpo or rm"):
        open_rows(path, say=said.append)
    path.write_text(json.dumps([{**prompt, **answer}]))
    open_rows(path, say=said.append)
    if "kind" not in prompt:
        path.write_text(json.dumps([{**prompt, **compared}]))
        open_rows(path, ranking=True, say=said.append)
    assert len(said) == 1


def test_an_entry_that_names_one_answer_points_to_preference_training(tmp_path):
    row = {"instruction": "Add.", "output": "three", "chosen": "3", "rejected": "4"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "dataset_info.json").write_text('{"it": {"file_name": "rows.json"}}')
    said = []
    assert open_rows("it", tmp_path, say=said.append)[0].messages[-1] == assistant("three")
    (line,) = said
    assert (
        "'chosen' (as chosen), 'rejected' (as rejected). dataset_info.json does not name them"
        in line
    )
    assert line.endswith(
        "so they are ignored; train.py --stage rm and dpo learn from chosen and rejected"
    )


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            {"q": "Add.", "good": "3", "bad": "4", "instruction": "not this"},
        ),
        (
            {
                "ranking": True,
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "says",
                    "user_tag": "U",
                    "assistant_tag": "A",
                },
            },
            {
                "talk": [{"who": "U", "says": "Add."}],
                "good": {"who": "A", "says": "3"},
                "bad": {"who": "A", "says": "4"},
            },
        ),
        ({"ranking": True}, {"instruction": "Add.", "input": "", "output": ["3", "4"]}),
    ],
)
def test_dataset_info(tmp_path, entry, record):
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"it": {"file_name": "rows.json", **entry}}))
    (row,) = open_rows("it", tmp_path, ranking=True)
    assert [row.messages, *row.rejected] == [
        [user("Add."), assistant("3")],
        [user("Add."), assistant("4")],
    ]
    with pytest.raises(UserError, match="it: preference data"):
        open_rows("it", tmp_path)
    if "columns" in entry:
        del entry["columns"]["rejected"]
        info.write_text(json.dumps({"it": {"file_name": "rows.json", **entry}}))
        with pytest.raises(UserError, match="it: columns must name 'rejected'"):
            open_rows("it", tmp_path, ranking=True)


def real_rows(shared_data):
    """[(rows as they are read, conversations as json alone finds them)] of the real files."""
    folder = shared_data / "instruct"
    expected = []
    for row in json.loads((folder / "dpo_en_demo.json").read_text()):
        turns = [turn for turn in row["conversations"] if turn["from"] != "system"]
        expected.append(
            [[turn["value"] for turn in [*turns, row[name]]] for name in ("chosen", "rejected")]
        )
    yield open_rows("dpo_en_demo", folder, ranking=True), expected
    expected = []
    for row in json.loads((folder / "oaast_rm_zh.json").read_text()):
        before = [text for pair in row["history"] for text in pair] + [row["instruction"]]
        expected.append([[*before, answer] for answer in row["output"]])
    yield open_rows(folder / "oaast_rm_zh.json", ranking=True), expected


def test_real_files(shared_data):
    """Every conversation of dpo_en_demo (by dataset_info.json) and oaast_rm_zh, word for word."""
    for rows, expected in real_rows(shared_data):
        found = [
            [
                [message["content"] for message in messages if message["role"] != "system"]
                for messages in (row.messages, *row.rejected)
            ]
            for row in rows
        ]
        assert found == expected
        assert any(len(row.messages) > 3 for row in rows)


@pytest.mark.parametrize("name", ["alpaca", "llama2", "chatml", "plain"])
def test_only_the_answers_are_learned(name, shared_data, tiny_tokenizer_dir):
    """Of several turns, only those that differ are supervised: the text and end of the answer."""
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    template = get_template(name, tokenizer)
    for rows, _ in real_rows(shared_data):
        rows = sorted(rows, key=lambda row: -len(row.messages))[:5] + list(rows[:5])
        examples, report = encode_preferences(rows, template, 10**6)
        assert len(examples) == report.num_rows == 10 and not report
        for row, example in zip(rows, examples, strict=True):
            texts, conversations = example.texts(), [row.messages, *row.rejected]
            assert len(texts) == len(conversations)
            for text, messages in zip(texts, conversations, strict=True):
                ids = template.encode(messages, row.tools)[-1].ids
                prompt = template.encode_prompt(messages[:-1], row.tools)
                assert text.ids.tolist() == ids and ids[: len(prompt)] == prompt
                answer = np.flatnonzero(text.supervised)
                assert answer.tolist() == list(range(len(ids) - len(answer), len(ids))) or (
                    name == "chatml" and answer[-1] == len(ids) - 2
                )  # a line feed after each turn
                assert answer[0] == len(prompt)
                spelled = tokenizer.decode(text.ids[answer[:-1]].tolist())
                assert spelled.strip() == messages[-1]["content"].strip()


def test_long_rows(tiny_tokenizer_dir, tmp_path):
    """A long answer is truncated, or `drop_long` leaves the row out. The report counts both."""
    template = get_template("plain", Tokenizer.load(tiny_tokenizer_dir))
    rows = [{**PROMPT, "chosen": "3" * length, "rejected": "4"} for length in (5, 50, 5)]
    rows.append({"prompt": "Add." * 20, "chosen": "3", "rejected": "4"})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    rows = open_rows(path, ranking=True)
    examples, report = encode_preferences(rows, template, 30)
    assert [example.lengths[0] <= 30 for example in examples] == [True] * 3
    assert max(example.lengths[0] for example in examples) == 30
    assert str(report).startswith("2 of 4 rows (50%) truncated, 1 of them dropped")
    examples, report = encode_preferences(rows, template, 30, drop_long=True)
    assert len(examples) == 2
    assert str(report) == (
        "2 of 4 rows left out: longer than the limit; --cutoff_len 84 keeps 95% of the rows whole"
    )
    with pytest.raises(UserError, match="--cutoff_len"):
        batches_of_rows(rows, template, 3, encode=encode_preferences)


def test_multi_message_answers(tiny_tokenizer_dir, tmp_path):
    """Everything after the common beginning is learned, however many messages that is."""
    template = get_template("plain", Tokenizer.load(tiny_tokenizer_dir))
    path = tmp_path / "rows.json"
    longer = [assistant("one"), user("go"), assistant("two")]
    path.write_text(
        json.dumps(
            [
                {
                    "prompt": [*HISTORY, user("Add.")],
                    "chosen": longer,
                    "rejected": [assistant("three")],
                }
            ]
        )
    )
    (example,), _ = encode_preferences(open_rows(path, ranking=True), template, 10**6)
    shown = [template.show(text.ids.tolist(), text.supervised.tolist()) for text in example.texts()]
    learned = [[part.split("]]")[0] for part in one.split("[[")[1:]] for one in shown]
    assert learned == [["one</s>", "two</s>"], ["three</s>"]]


def test_answers_with_thoughts_are_reported(tiny_tokenizer_dir, tmp_path):
    """They are learned after another prompt than the one that chat.py uses by default."""
    path, tokenizer = tmp_path / "rows.json", Tokenizer.load(tiny_tokenizer_dir)
    chosen = [{**assistant("3"), "reasoning_content": "Hm."}]
    path.write_text(json.dumps([{**PROMPT, "chosen": chosen, "rejected": [assistant("4")]}]))
    rows = open_rows(path, ranking=True)
    _, report = encode_preferences(rows, get_template("qwen3", tokenizer), 10**6)
    assert str(report).startswith("1 of 1 rows have answers with thoughts")
    _, report = encode_preferences(
        rows, get_template("qwen3", tokenizer, enable_thinking=True), 10**6
    )
    assert "answers with thoughts" not in str(report)


def test_an_epoch_counts_the_pairs_that_are_learned(tiny_tokenizer_dir, tmp_path):
    """Pairs of equal answers are left out before training."""
    rows = [
        {"instruction": f"Q {n}", "output": ["yes", "yes" if n % 3 else "no"]} for n in range(9)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows = open_rows(str(tmp_path / "rows.json"), ranking=True)
    template = get_template("plain", Tokenizer.load(tiny_tokenizer_dir))
    batches = batches_of_rows(rows, template, 64, encode=encode_preferences)
    assert len(batches.rows) == batches.num_examples == 3
    assert batches.steps_per_epoch(2) == 2
    steps = list(batches.steps(2, 0, 2))
    assert [len(step) for step in steps] in ([2, 1], [1, 2])
