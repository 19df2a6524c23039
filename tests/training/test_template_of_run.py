"""A run and its chat template: the date stays, rows become several examples, samples show them."""

import json
import re

import numpy as np
import pytest
from conftest import as_flags, command
from run_builder import training_options

import train
from minisft.common.metric_lines import read_metrics
from minisft.common.outputs import recorded_options
from minisft.data.dataset import open_rows
from minisft.data.encoding import encode_rows
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training.resume import template_date

DATED = """{{ strftime_now('%d %b %Y') }}
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TAGS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TURNS = [
    {"role": role, "content": f"{role} {number}"}
    for number in range(3)
    for role in ("user", "assistant")
]


def with_template(checkpoint, text):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
    return checkpoint


def shown_text(printed):
    """The output of --show_samples, without colours."""
    return re.sub(r"\033\[\d+m", "", printed)


def test_a_run_keeps_its_date_on_resume(checkpoint, rows_file, tmp_path):
    """A run resumed "another day" has the losses of an uninterrupted run."""
    with_template(checkpoint, DATED)
    flags = ["--model_name_or_path", checkpoint, "--dataset", rows_file, "--show_samples", 1]
    flags += as_flags(max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dated = ["--template_date", "2001-02-03"]
    done = command(*flags, *dated, "--output_dir", whole)
    assert done.returncode == 0, done.stderr
    assert "03 Feb 2001\n<|im_start|>user" in shown_text(done.stdout)
    assert command(*flags, *dated, "--output_dir", parts).returncode == 0
    (parts / "adapter_model.safetensors").unlink()
    resume = ["--resume_from_checkpoint", parts / "checkpoint-2"]
    again = command(*flags, "--output_dir", parts, *resume)
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    assert "03 Feb 2001\n<|im_start|>user" in shown_text(again.stdout)
    assert recorded_options(parts)["template_date"].startswith("2001-02-03")
    new = command(*flags, "--output_dir", tmp_path / "new")  # a new run has the date of today
    assert new.returncode == 0 and "03 Feb 2001" not in shown_text(new.stdout)
    losses = [
        [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
        for run in (whole, parts, tmp_path / "new")
    ]
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 4


@pytest.fixture
def qwen3(checkpoint, shared_data):
    path = shared_data / "chat_templates" / "Qwen-Qwen3-0.6B.jinja"
    return with_template(checkpoint, path.read_text())


def test_a_run_without_template_has_no_date(tmp_path):
    assert template_date(training_options(stage="pt", output_dir=tmp_path)) is None
    assert template_date(training_options(output_dir=tmp_path)) is not None


def test_a_row_whose_answers_have_prompts_of_their_own(qwen3, tmp_path):
    """Qwen3 omits earlier thoughts. The report, samples and plans include all examples."""
    thinking = [*TURNS[:3], {**TURNS[3], "reasoning_content": "Hm."}]
    rows = [{"messages": TURNS}, {"messages": thinking}, {"messages": TURNS[:2]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    template = get_template("auto", Tokenizer.load(qwen3))
    examples, report = encode_rows(open_rows(path), template, cutoff_len=512)
    assert (report.num_rows, report.num_split, len(examples)) == (3, 2, 3 + 2 + 1)
    assert "2 of 3 rows became 5 examples, one per answer, because the template" in str(report)
    flags = ["--model_name_or_path", qwen3, "--dataset", path, "--cutoff_len", 512]
    flags += ["--output_dir", tmp_path / "run"]
    planned = command(*flags, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    num_tokens = sum(len(example.ids) for example in examples)
    assert f"an epoch    3 rows, {num_tokens:,} tokens" in planned.stdout
    warning = "warning: 1 of 3 sampled rows have answers with thoughts. They are learned after the"
    assert warning in planned.stdout
    done = command(*flags, "--show_samples", 2, "--num_train_epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 rows became 5 examples" in done.stdout
    assert done.stdout.count("have answers with thoughts") == 1  # not again after the epoch
    assert warning in done.stdout and "--enable_thinking true changes that" in done.stdout
    learned = re.findall(r"\[\[(?! and )(.*?)\]\]", done.stdout, re.DOTALL)
    answers = ["assistant 0", "assistant 1", "assistant 2", "assistant 0"]
    thought = "<think>\nHm.\n</think>\n\nassistant 1<|im_end|>"
    assert learned == [*(f"{answer}<|im_end|>" for answer in answers), thought]


def test_marks_in_rows_decide_which_answers_are_learned(qwen3, tmp_path):
    """weight, train and mask of single answers, --mask_history of all but the last."""
    with_template(qwen3, DATED)
    marked = [
        [*TURNS[:1], {**TURNS[1], "weight": 0}, *TURNS[2:]],
        [*TURNS[:3], {**TURNS[3], "train": False}, *TURNS[4:]],
        [*TURNS[:5], {**TURNS[5], "mask": True}],
        [TURNS[0], {**TURNS[1], "train": False}],
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": messages} for messages in marked]))
    tokenizer = Tokenizer.load(qwen3)
    template = get_template("auto", tokenizer)

    def learned(**more):
        examples, report = encode_rows(open_rows(path), template, cutoff_len=512, **more)
        texts = []
        for example in examples:
            ids = np.where(example.supervised, example.ids, -1).tolist()
            texts.append(tokenizer.decode([id for id in ids if id >= 0]))
        return texts, report

    texts, report = learned()
    expected = [["assistant 1", "assistant 2"], ["assistant 0", "assistant 2"]]
    expected.append(["assistant 0", "assistant 1"])
    assert texts == ["".join(answers) for answers in expected]
    assert report.num_unlearned == 1 and "none of their answers is supervised" in str(report)
    texts, report = learned(mask_history=True)
    assert texts == ["assistant 2", "assistant 2"] and report.num_unlearned == 2


def test_thoughts_in_the_text_of_an_answer(qwen3):
    """<think> at the beginning becomes thoughts if the template writes them, else it stays text."""
    tokenizer = Tokenizer.load(qwen3)
    apart = [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]
    for spelled in ("<think>\nHm.\n</think>\n\nassistant 0", " <think>Hm.</think>assistant 0"):
        in_text = [TURNS[0], {**TURNS[1], "content": spelled}]
        template = get_template("auto", tokenizer)
        assert template.encode(in_text) == template.encode(apart)
        [example] = get_template("chatml", tokenizer).encode(in_text)
        assert spelled.strip() in tokenizer.decode(example.ids)
    empty = [TURNS[0], {**TURNS[1], "content": "<think>\n\n</think>\n\nassistant 0"}]
    assert template.encode(empty) == template.encode(TURNS[:2])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_CALL = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "One."},
]


def test_tools_that_the_template_does_not_support_are_reported_once(checkpoint, tmp_path):
    """Every script that reads rows counts them; rows without tools get no message."""
    with_template(checkpoint, DATED)
    path = tmp_path / "rows.jsonl"
    offered = {"messages": TURNS[:2], "tools": json.dumps([CALL["function"]])}
    rows = [{"messages": WITH_CALL}, offered, {"messages": TURNS[:2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = as_flags(model_name_or_path=checkpoint)
    data = ["--dataset", path, "--cutoff_len", 512]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"messages": row["messages"][:-1]}) + "\n" for row in rows)
    )
    jobs = {
        "train.py": [*model, "--dataset", path, "--cutoff_len", 512, "--max_steps", 1],
        "score.py": [*model, *data, "--output", tmp_path / "scores.jsonl"],
        "chat.py": [
            *model,
            "--file",
            prompts,
            "--output",
            tmp_path / "said",
            "--max_new_tokens",
            1,
        ],
        "eval.py": ["compare", "--models", f"a={checkpoint}", "--dataset", path],
    }
    jobs["train.py"] += ["--output_dir", tmp_path / "run"]
    jobs["eval.py"] += ["--output_dir", tmp_path / "compared", "--max_new_tokens", 1]
    for script, words in jobs.items():
        done = command(*words, script=script)
        assert done.returncode == 0, done.stderr
        said = re.findall(r"(\d) of (?:the first )?3 rows have tools", done.stdout + done.stderr)
        assert said == ["1" if script == "chat.py" else "2"], (script, done.stdout, done.stderr)
    path.write_text(json.dumps(rows[2]))
    done = command(*jobs["train.py"], "--overwrite_output_dir")
    assert done.returncode == 0 and "have tools" not in done.stdout


def test_every_script_reports_settings_that_the_template_does_not_read(
    checkpoint, rows_file, tmp_path
):
    with_template(checkpoint, DATED)
    settings = ["--enable_thinking", "false", "--template_kwargs", '{"mood": "good"}']
    model = as_flags(model_name_or_path=checkpoint)
    jobs = {
        "train.py": [*model, "--dataset", rows_file, "--output_dir", "run", "--max_steps", 1],
        "score.py": [*model, "--dataset", rows_file, "--output", "scores.jsonl"],
        "export.py": [*model, "--output_dir", "folder"],
        "eval.py": ["compare", "--models", f"a={checkpoint}", "--dataset", rows_file],
    }
    jobs["eval.py"] += ["--output_dir", "compared", "--max_new_tokens", 1, "--max_samples", 2]
    for script, words in jobs.items():
        names = {"run", "scores.jsonl", "folder", "compared"}
        words = [tmp_path / word if word in names else word for word in words]
        done = command(*words, *settings, script=script)
        assert done.returncode == 0, done.stderr
        for flag in ("--enable_thinking false", "--template_kwargs mood"):
            line = f"{flag} has no effect: the template auto does not read it"
            assert (done.stdout + done.stderr).count(line) == 1, (script, done.stdout, done.stderr)
    gguf = command(
        *model, "--format", "gguf", "--output", tmp_path / "m.gguf", *settings, script="export.py"
    )
    assert gguf.stdout.count("has no effect") == 2, gguf.stdout


def test_an_adapter_alone_is_trained_further_as_before(checkpoint, rows_file, tmp_path, here):
    """The base, the template and the system prompt are those of its training."""
    config = checkpoint / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "max_position_embeddings": 256}))
    template = tmp_path / "mine.jinja"
    template.write_text(TAGS)
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--dataset", rows_file, "--device", "cpu", *as_flags(max_steps=1)]
    flags += as_flags(dataloader_num_workers=0)
    words = ["--model_name_or_path", checkpoint, "--template", template, "--output_dir", first]
    here(train, *flags, *words, "--default_system", "Be brief.")
    template.unlink()
    said = shown_text(here(train, *flags, "--adapter", first, "--dry_run", "--show_samples", 1))
    assert "<system>Be brief.</system>" in said
    card = (first / "README.md").read_text()
    assert "# first\n" in card and "--adapter path/to/first\n" in card and "dpo_beta" not in card
    # What was used: the default --cutoff_len is 1024, the model's context 256.
    assert "| cutoff_len | 256 |" in card and "| dtype | float32 |" in card
    assert "| max_steps | 1 |" in card and "num_train_epochs" not in card
    second.mkdir()
    (second / "README.md").write_text("mine")
    here(train, *flags, "--adapter", first, "--output_dir", second, "--overwrite_output_dir")
    assert (second / "README.md").read_text() == "mine"
    recorded = recorded_options(second)
    assert recorded["model_name_or_path"] == str(checkpoint)
    assert (recorded["adapter"], recorded["default_system"]) == (str(first), "Be brief.")
    other = ["--adapter", second, "--template", "plain", "--default_system", "Be kind."]
    said = shown_text(here(train, *flags, *other, "--dry_run", "--show_samples", 1))
    assert "<system>" not in said and "Be kind." in said
