"""Files of prompts through chat.py: in order, in batches, continued after a kill."""

import json
import shutil
from contextlib import closing

import pytest
import torch
from conftest import ROOT, as_flags, command
from forks import Forked, run_script
from standing import lines_in, standing_still, wait_until

import chat
from minisft.chat import prompts
from minisft.chat.options import parse_options
from minisft.common.errors import UserError
from minisft.data.dataset import load_rows
from minisft.generation.answer import Response
from minisft.generation.assistant import Assistant
from minisft.generation.generate import Sampling

SAMPLED = Sampling(12, temperature=1.3, seed=5)
TEXTS = [f"the {'cat and the ' * (number % 5)}hat {number} 你好" for number in range(11)]


@pytest.fixture
def assistant(tiny_chat_model_dir):
    return Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ask(text):
    return {"messages": [{"role": "user", "content": text}]}


def test_answers_are_in_order_and_equal_single_prompts(
    tiny_chat_model_dir, assistant, prompts_file, tmp_path
):
    flags = as_flags(
        model_name_or_path=tiny_chat_model_dir,
        device="cpu",
        dtype="float32",
        file=prompts_file,
        output=tmp_path / "answers.jsonl",
        batch_size=4,
        max_new_tokens=12,
        temperature=1.3,
        top_k=0,
        top_p=1,
        seed=6,  # with 5, two tokens nearly tie, and rounding would decide
    )
    done = command(*flags, script="chat.py")
    assert done.returncode == 0 and done.stderr.endswith("answers.jsonl: 11 answers\n")
    sampling = Sampling(12, temperature=1.3, top_k=0, top_p=1, seed=6)
    rows = read(tmp_path / "answers.jsonl")
    for number, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        responses, scores = assistant.inference([ask(text)], sampling, rows=[number])
        assert row["messages"] == [
            *ask(text)["messages"],
            {"role": "assistant", "content": responses[0]},
        ]
        assert row["score"] == pytest.approx(scores[0], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.txt"]
    done = command(*flags, script="chat.py")
    assert done.returncode == 2 and "answers.jsonl exists" in done.stderr


def test_interrupted_run_continues(assistant, prompts_file, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "answers.jsonl"
    partial, whole = output.with_name("answers.jsonl.partial"), tmp_path / "whole.jsonl"
    prompts.answer_file(assistant, prompts_file, whole, SAMPLED, 2)
    answer, answered = assistant.answer, []

    def interrupted(conversations, *arguments, **more):
        if len(answered) >= 6:
            raise KeyboardInterrupt
        answered.extend(conversations)
        return answer(conversations, *arguments, **more)

    assistant.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        prompts.answer_file(assistant, prompts_file, output, SAMPLED, 2)
    assert "6 of 11 answers are in" in capsys.readouterr().err
    assert len(read(partial)) == 1 + 6 and not output.exists()
    partial.write_bytes(partial.read_bytes()[:-4])  # cut in the last line
    with pytest.raises(UserError, match="belongs to a run with another top_k. Add --overwrite"):
        prompts.answer_file(assistant, prompts_file, output, SAMPLED, 2, settings={"top_k": 7})
    again = []
    assistant.answer = lambda given, *rest, **more: (
        again.extend(given) or answer(given, *rest, **more)
    )
    assert prompts.answer_file(assistant, prompts_file, output, SAMPLED, 2) == 11
    assert len(again) == 11 - 4  # the batch of the incomplete line, as it was
    for row, expected in zip(read(output), read(whole), strict=True):
        assert row["messages"] == expected["messages"]
        assert row["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert not partial.exists()


def test_overwriting_replaces_the_output_and_what_another_run_left(
    assistant, prompts_file, tmp_path
):
    output, greedy = tmp_path / "answers.jsonl", Sampling(4, greedy=True)
    partial = tmp_path / "answers.jsonl.partial"
    output.write_text("old")
    prompts.Answers(partial, {"seed": 1}).close()
    with pytest.raises(UserError, match="answers.jsonl exists.*or add --overwrite"):
        prompts.answer_file(assistant, prompts_file, output, greedy)
    assert prompts.answer_file(assistant, prompts_file, output, greedy, overwrite=True) == 11
    assert len(read(output)) == 11 and not partial.exists()
    # A run of the same settings goes on.
    with closing(prompts.Answers(partial, {"seed": 1})) as answers:
        answers.add([0], [Response("yes", "", -0.5)])
    with closing(prompts.Answers(partial, {"seed": 1}, overwrite=True)) as answers:
        assert list(answers.rows) == [0]
    partial.write_text("no JSON\n")
    with closing(prompts.Answers(partial, {"seed": 1}, overwrite=True)) as answers:
        assert answers.rows == {}


def test_cut_last_line_is_answered_again(tmp_path):
    """The last line is cut after an interruption; the run then continues, twice."""
    path = tmp_path / "out.partial"
    for row in range(3):
        answers = prompts.Answers(path, {"seed": 1})
        assert answers.rows == {one: Response("yes", "hm", -0.5) for one in range(row)}
        answers.add([row], [Response("yes", "hm", -0.5)])
        answers.close()
        path.write_bytes(path.read_bytes() + b'[7, "n')


@pytest.mark.parametrize("line", ["[", 100_000 * "[" + 100_000 * "]"], ids=["cut", "nested"])
def test_damaged_answers_are_refused(line, tmp_path):
    path = tmp_path / "out.partial"
    path.write_text(f'{{"seed": 1}}\n{line}\n')
    with pytest.raises(UserError, match="out.partial is damaged .* Remove it"):
        prompts.Answers(path, {"seed": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_keeps_its_answers(tiny_chat_model_dir, tmp_path):
    path, told = tmp_path / "many.txt", tmp_path / "told"
    path.write_text("the cat\n" * 9)
    flags = as_flags(
        model_name_or_path=tiny_chat_model_dir,
        file=path,
        output=tmp_path / "out",
        batch_size=1,
        max_new_tokens=4,
        device="cpu",
    )
    words = standing_still("minisft.chat.prompts:Answers.add", [4], told)[1:]
    process = Forked("tests/standing.py", [*words, ROOT / "chat.py", *flags])
    wait_until(lambda: lines_in(told), process)
    process.kill()
    process.communicate()
    _, *answers = read(tmp_path / "out.partial")
    assert len({row for row, *_ in answers}) == 3 == len(answers)
    assert not (tmp_path / "out").exists()


def flags_of(model_dir, prompts_file, output, dtype):
    """Sampled answers in batches of four, where rounding decides some tokens."""
    return as_flags(
        model_name_or_path=model_dir,
        file=prompts_file,
        output=output,
        batch_size=4,
        max_new_tokens=12,
        temperature=1.3,
        seed=5,
        device="cpu",
        dtype=dtype,
    )


def test_killed_runs_in_bfloat16_equal_an_undisturbed_one(
    tiny_chat_model_dir, prompts_file, tmp_path
):
    """In a low precision other batches would give other answers and scores."""
    whole, output, told = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / "told"
    flags = flags_of(tiny_chat_model_dir, prompts_file, whole, "bfloat16")
    assert command(*flags, script="chat.py").returncode == 0
    flags = flags_of(tiny_chat_model_dir, prompts_file, output, "bfloat16")
    partial = tmp_path / "out.jsonl.partial"
    for num_kills in (1, 2):
        words = standing_still("minisft.chat.prompts:Answers.add", [2], told)[1:]
        process = Forked("tests/standing.py", [*words, ROOT / "chat.py", *flags])
        wait_until(lambda times=num_kills: lines_in(told) == times, process)
        process.kill()
        process.communicate()
        partial.write_bytes(partial.read_bytes()[:-4])  # as if killed while it was writing
    assert len(read_complete(partial)) == 1 + 3
    done = command(*flags, script="chat.py")
    assert done.returncode == 0 and output.read_bytes() == whole.read_bytes()


def test_an_interrupted_run_keeps_what_decides_its_rounding(assistant, prompts_file, tmp_path):
    """The number type, and the rows, of which --max_samples would make other batches."""
    output, answer = tmp_path / "out.jsonl", assistant.answer

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    assistant.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        prompts.answer_file(assistant, prompts_file, output, SAMPLED, max_samples=5)
    with pytest.raises(UserError, match="belongs to a run with another max_samples. Add"):
        prompts.answer_file(assistant, prompts_file, output, SAMPLED)
    assistant.dtype = torch.bfloat16
    with pytest.raises(
        UserError, match="belongs to a run with another dtype. Add --overwrite to begin"
    ):
        prompts.answer_file(assistant, prompts_file, output, SAMPLED, max_samples=5)
    assistant.dtype, assistant.answer = torch.float32, answer
    assert prompts.answer_file(assistant, prompts_file, output, SAMPLED, max_samples=5) == 5


def test_an_interrupted_run_keeps_its_weights(tiny_chat_model_dir, prompts_file, tmp_path):
    """Another training has written to the folder of the model meanwhile."""
    folder, output = shutil.copytree(tiny_chat_model_dir, tmp_path / "model"), tmp_path / "out"
    options = parse_options(flags_of(folder, prompts_file, output, "float32"))

    def answer(**changes):
        assistant = Assistant(folder, device="cpu", dtype="float32")
        vars(assistant).update(changes)
        chat.answer_file(options, assistant, SAMPLED, None)

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(answer=interrupted)
    weights = folder / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "copy")
    (tmp_path / "copy").replace(weights)
    with pytest.raises(UserError, match="another model_files. Add --overwrite"):
        answer()


def read_complete(path):
    """The complete lines of a file whose last line is cut."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_a_full_disk(tiny_chat_model_dir, prompts_file, tmp_path):
    """While answers are written, and when they are put in order. No answer is lost."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = flags_of(tiny_chat_model_dir, prompts_file, whole, "float32")
    assert command(*flags, script="chat.py").returncode == 0
    flags = flags_of(tiny_chat_model_dir, prompts_file, output, "float32")
    partial, num_answers = tmp_path / "out.jsonl.partial", []
    size = whole.stat().st_size
    for limit, name in ((1000, "out.jsonl.partial"), (size - 1, "out.jsonl")):
        done = run_script("tests/full_disk.py", [limit, "chat.py", *flags])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"error: {tmp_path / name}: could not be written: File too large" in done.stderr
        assert "Make room; the same command continues" in done.stderr
        assert sorted(tmp_path.glob("out*")) == [partial]
        num_answers.append(partial.read_bytes().count(b"\n") - 1)
    assert 0 < num_answers[0] < num_answers[1] == 11
    done = command(*flags, script="chat.py")
    assert done.returncode == 0 and output.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.glob("out*")) == [output]


def test_rows_of_every_format(assistant, tmp_path):
    """The answer of a row is not used; its system prompt wins over that of --default_system."""
    rows = [
        "only text",
        {"prompt": "p"},
        {"question_id": 1, "text": "t", "category": "c"},
        {"instruction": "i", "input": "x", "output": "secret", "history": [["a", "b"]]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "m"}]},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "secret"}]},
        {"kind": "k", "input": "f", "target": "secret"},
        {"messages": [{"role": "user", "content": "u"}], "tools": [{"name": "add"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / "answers.jsonl"
    prompts.answer_file(
        assistant, tmp_path / "rows.json", output, Sampling(3, greedy=True), system="general"
    )
    answers = read(output)
    general, own = [{"role": "system", "content": text} for text in ("general", "s")]
    asked = [row["messages"][:-1] for row in answers]
    assert [messages[0] for messages in asked] == [general] * 4 + [own] + [general] * 3
    assert [messages[-1]["content"] for messages in asked] == [
        "only text",
        "p",
        "t",
        "i\nx",
        "m",
        "h",
        "f",
        "u",
    ]
    assert len(asked[3]) == 4
    assert [row.messages for row in load_rows(str(output))] == [row["messages"] for row in answers]
    assert "secret" not in output.read_text()
    assert answers[-1]["tools"] == [{"name": "add"}]
    responses, _ = assistant.inference(
        [{"messages": asked[-1], "tools": [{"name": "add"}]}], Sampling(3, greedy=True)
    )
    assert answers[-1]["messages"][-1]["content"] == responses[0]


def test_bad_rows_are_listed_before_the_first_answer(assistant, tmp_path):
    lines = [
        '{"prompt": "good"}',
        '{"prompt": " "}',
        "",
        '{"prompt": "a\\u0007"}',
        "{broken",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
        '{"other": 1}',
        json.dumps({"prompt": "x" * 30_000}),
        '{"messages": [{"role": "system", "content": "a"}]}',
        '{"messages": [{"role": ["user"], "content": "a"}]}',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    assistant.answer = None
    with pytest.raises(UserError) as error:
        prompts.answer_file(assistant, path, tmp_path / "new" / "out", Sampling(3))
    for said in (
        "rows without a valid prompt:",
        "row 2 (line 2): there is no question",
        "row 3 (line 4): the message has the control character U+0007",
        "row 4 (line 5)",
        "row 5 (line 6): ",
        "row 6 (line 7): ",
        "row 7 (line 8): the message is too long",
        "row 8 (line 9): there is no question",
        "row 9 (line 10): ",
    ):
        assert said in str(error.value)
    path.write_text('{"prompt": ""}\n' * 30)
    with pytest.raises(UserError, match="and 20 more of 30 rows"):
        prompts.answer_file(assistant, path, tmp_path / "out", Sampling(3))
    assert list(tmp_path.iterdir()) == [path]
