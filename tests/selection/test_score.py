"""score.py: scores equal transformers row by row; runs that stop, continue, and refuse to mix."""

import functools
import json
import math
import os
import random
import re
import shutil
import sys
from datetime import datetime

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from forks import Forked, run_script
from standing import lines_in, standing_still, wait_until

import score as script
from minisft.common.errors import UserError

NUM_ROWS = 120
PROMPT = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:"
)
FIELDS = ("loss_conditioned", "loss_direct", "ifd", "ifd_ppl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """(model folder, 120 rows of cherry_alpaca that have an answer, a file of them)."""
    content = (shared_data / "instruct/cherry_alpaca.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(content) if row["output"].strip()][:NUM_ROWS]
    path = tmp_path_factory.mktemp("cherry") / "rows.json"
    path.write_text(json.dumps(rows))
    return shared_data / "models/stories260K", rows, path


@functools.cache
def row_by_row(model_dir, rows_path):
    """The plain way: transformers, one row at a time, two passes, all logits."""
    import sentencepiece
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    whole = transformers.AutoTokenizer.from_pretrained(model_dir)

    def look(ids, start):
        """(mean loss of ids[start:], mean of the last hidden states of all ids)"""
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        targets, logits = torch.tensor(ids[start:]), out.logits[0, start - 1 : -1].double()
        loss = torch.nn.functional.cross_entropy(logits, targets).item()
        return loss, out.hidden_states[-1][0].mean(0).numpy()

    expected = []
    for row in json.loads(rows_path.read_text()):
        more = ", paired with an input that provides further context" if row["input"] else ""
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = whole(PROMPT.format(more, row["instruction"], given)).input_ids
        marker = [1, *tokenizer.encode("### Response:")]
        # After a digit, an answer gets no space before it, and its first token does not merge.
        answer = whole("0" + row["output"], add_special_tokens=False).input_ids
        zero = whole("0", add_special_tokens=False).input_ids
        assert answer[: len(zero)] == zero
        answer = answer[len(zero) :]
        if len(prompt + answer) + 1 > 512:  # with the end-of-turn token
            expected.append(None)
            continue
        conditioned, _ = look(prompt + answer, len(prompt))
        direct, _ = look(marker + answer, len(marker))
        # A third of the embeddings is enough.
        prompt_loss, embedding = look(prompt, 1) if len(expected) % 3 == 0 else (None, None)
        expected.append(
            {
                "num_answer_tokens": len(answer),
                "loss_conditioned": conditioned,
                "loss_direct": direct,
                "ifd": conditioned / direct,
                "ifd_ppl": math.exp(conditioned) / math.exp(direct),
                "embedding": embedding,
                "perplexity": prompt_loss and math.exp(prompt_loss),
            }
        )
    return expected


def check(scores, expected):
    assert [one["index"] for one in scores] == list(range(len(expected)))
    for one, reference in zip(scores, expected, strict=True):
        if reference is None:
            assert one["reason"].startswith("longer than cutoff_len") and one["ifd"] is None
            continue
        assert one["reason"] is None
        assert one["num_answer_tokens"] == reference["num_answer_tokens"]
        for name in FIELDS:
            assert one[name] == pytest.approx(reference[name], rel=1e-4), (one["index"], name)


def words_of(model, rows, output, *more):
    return [
        *map(
            str,
            (
                "--model_name_or_path",
                model,
                "--dataset",
                rows,
                "--template",
                "alpaca",
                "--dataloader_num_workers",
                0,
                "--dtype",
                "float32",
                "--output",
                output,
                *more,
            ),
        )
    ]


def score(model, rows, output, *more, torchrun=None):
    words = words_of(model, rows, output, *more)
    return command(*words, script="score.py", torchrun=torchrun)


def score_here(monkeypatch, *words):
    """Run score.py in this process, which has loaded torch already. Mistakes raise UserError."""
    monkeypatch.setattr(sys, "argv", ["score.py", *words_of(*words)])
    script.main()


@pytest.mark.xdist_group("row_by_row")  # which is computed once
def test_equals_transformers_row_by_row(real, tmp_path):
    model, _, path = real
    expected = row_by_row(model, path)
    assert sum(one is not None for one in expected) > 60
    done = score(model, path, tmp_path / "s.jsonl", "--mode", "all")
    assert done.returncode == 0, done.stderr
    check(read(tmp_path / "s.jsonl"), expected)
    embeddings = np.load(tmp_path / "s.embeddings.npy", mmap_mode="r")
    perplexity = np.load(tmp_path / "s.perplexity.npy", mmap_mode="r")
    assert embeddings.dtype == perplexity.dtype == np.float32
    assert np.isfinite(embeddings).all() and embeddings.shape == (NUM_ROWS, 64)
    for number, one in enumerate(expected):
        if one and one["perplexity"]:
            np.testing.assert_allclose(embeddings[number], one["embedding"], rtol=1e-3, atol=1e-4)
            assert perplexity[number] == pytest.approx(one["perplexity"], rel=1e-4)


@pytest.mark.xdist_group("row_by_row")  # which is computed once
def test_batch_order_and_processes_make_no_difference(real, tmp_path):
    model, rows, path = real
    order = random.Random(1).sample(range(NUM_ROWS), NUM_ROWS)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps(rows[number]) + "\n" for number in order))
    done = score(model, shuffled, tmp_path / "s.jsonl", "--batch_tokens", 700, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    expected = row_by_row(model, path)
    check(read(tmp_path / "s.jsonl"), [expected[number] for number in order])


@pytest.fixture
def many(tmp_path):
    """A file of 400 rows: of all lengths, a conversation, a broken row."""
    generator = random.Random(0)
    rows = [
        {
            "instruction": "the cat " * generator.randint(1, 9),
            "output": "sat on the mat " * generator.randint(1, 9),
        }
        for _ in range(400)
    ]
    rows[7] = {
        "conversations": [
            {"from": "human", "value": "the rat"},
            {"from": "gpt", "value": "sat"},
            {"from": "human", "value": "the hat"},
            {"from": "gpt", "value": "on the mat"},
        ]
    }
    rows[11]["output"] = ""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Before finished rows are written; and when their lines are written and their embeddings are not.
@pytest.mark.parametrize(
    "function, calls",
    [("minisft.selection.score_writer:ScoreWriter.add", [420]), ("numpy:load", [2 * 20 - 1])],
)
def test_a_killed_run_continues(function, calls, checkpoint, many, tmp_path, monkeypatch, capfd):
    whole, output, told = (tmp_path / name for name in ("whole.jsonl", "s.jsonl", "told"))
    # bfloat16, in which other batches would give other scores.
    words = ["--skip_bad_rows", "--mode", "all", "--batch_tokens", 128, "--dtype", "bfloat16"]
    score_here(monkeypatch, checkpoint, many, whole, *words)
    standing = [*standing_still(function, calls, told)[1:], ROOT / "score.py"]
    flags = words_of(checkpoint, many, output, *words)
    process = Forked("tests/standing.py", [*standing, *flags])
    wait_until(lambda: lines_in(told), process)
    process.kill()
    process.communicate()
    left = output.read_bytes()
    finished = left.count(b"\n")
    assert 19 <= finished < 400
    output.write_bytes(left + b'{"index": 12, "loss_cond')  # as if killed within a line
    score_here(monkeypatch, checkpoint, many, output, *words)
    to_do = int(re.findall("400 rows, ([0-9]+) to do", capfd.readouterr().out)[-1])
    assert to_do == 400 - finished if function.endswith("add") else to_do > 400 - finished
    assert output.read_bytes() == whole.read_bytes()
    broken = read(output)[11]
    assert broken["reason"].startswith("broken: ") and "there is no answer" in broken["reason"]
    for name in ("embeddings", "perplexity"):
        ours, theirs = (np.load(tmp_path / f"{stem}.{name}.npy") for stem in ("s", "whole"))
        np.testing.assert_array_equal(ours, theirs)
    score_here(monkeypatch, checkpoint, many, output, *words)
    assert "400 rows, 0 to do" in capfd.readouterr().out


@pytest.mark.parametrize("mode", ["ifd", "all"])
def test_a_full_disk(mode, checkpoint, many, tmp_path, monkeypatch):
    """One line names the file; the same command continues; what was written stays."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "s.jsonl"
    words = ["--skip_bad_rows", "--batch_tokens", 512]
    score_here(monkeypatch, checkpoint, many, whole, *words, "--mode", mode)
    if mode == "all":  # scores of an earlier run, without embeddings
        score_here(monkeypatch, checkpoint, many, output, *words)
    before = output.read_bytes() if output.exists() else b""
    # 400 embeddings of 32 numbers take 51,328 bytes, the scores more.
    file = {"ifd": "s.jsonl", "all": "s.embeddings.npy"}[mode]
    flags = words_of(checkpoint, many, output, *words, "--mode", mode)
    done = run_script("tests/full_disk.py", ["score.py", *flags])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / file}: could not be written: File too large")
    assert "Make room; the same command continues where it stopped." in done.stderr
    assert {path.name for path in tmp_path.glob("s.*")} == {"s.jsonl", "s.record.json"}
    left = output.read_bytes()
    assert left == before if before else left.count(b"\n") > 20
    done = command(*flags, script="score.py")
    num_missing = 399 if before else 400 - left.count(b"\n")  # the broken row comes first
    assert done.returncode == 0 and f"400 rows, {num_missing} to do" in done.stdout, done.stderr
    if mode == "ifd":
        assert output.read_bytes() == whole.read_bytes()
        return
    # The losses are those of --mode ifd, whose batches some kernels round differently.
    rows, expected = read(output), read(whole)
    assert len(rows) == 400
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    for name in ("embeddings", "perplexity"):
        ours, theirs = (tmp_path / f"{stem}.{name}.npy" for stem in ("s", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_scores_of_another_day_keep_the_date(checkpoint, rows_file, tmp_path, monkeypatch):
    """With a template that writes the date, rows that are scored later get the first date."""
    path = checkpoint / "tokenizer_config.json"
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    text = "{{ strftime_now('%d %b') }}{% for m in messages %}" + turn + "{% endfor %}" + opening
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
    output, words = tmp_path / "s.jsonl", ["--template", "auto"]

    def score_on(day, *more):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.fromisoformat(day)

        monkeypatch.setattr("minisft.text.chat_template.datetime", Clock)
        score_here(monkeypatch, checkpoint, rows_file, output, *words, *more)
        return [row["loss_conditioned"] for row in read(output)]

    whole = score_on("2001-02-03")
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:10]))
    assert score_on("2002-12-31") == pytest.approx(whole, rel=1e-5)
    other = score_on("2002-12-31", "--overwrite")
    assert all(abs(new - old) > 1e-3 for new, old in zip(other, whole, strict=True))


def test_scores_are_never_mixed(checkpoint, rows_file, tmp_path, monkeypatch):
    output = tmp_path / "s.jsonl"
    assert score(checkpoint, rows_file, output).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    assert set(before) == {output, tmp_path / "s.record.json"}
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace("\n", " "))
    changed = tmp_path / "changed.json"
    changed.write_text(rows_file.read_text().replace("Say", "Sing"))
    for model, rows, more, message in (
        (other, rows_file, [], f"another model ({checkpoint}, not {other})"),
        (checkpoint, changed, [], f"another dataset ({rows_file}, not {changed})"),
        (checkpoint, rows_file, ["--template", "plain"], "another template (alpaca, not plain)"),
        (checkpoint, rows_file, ["--cutoff_len", 64], "another cutoff_len (512, not 64)"),
        (checkpoint, rows_file, ["--dtype", "bfloat16"], "another dtype (float32, not bfloat16)"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            score_here(monkeypatch, model, rows, output, *more)
        assert before == {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    rows_file.write_text(changed.read_text())
    done = score(checkpoint, rows_file, output)
    assert done.returncode == 2 and "another dataset (same name, changed content)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    (tmp_path / "s.record.json").unlink()
    with pytest.raises(UserError, match="there is no s.record.json"):
        score_here(monkeypatch, checkpoint, rows_file, output)
    score_here(monkeypatch, checkpoint, rows_file, output, "--overwrite")
    assert [one["index"] for one in read(output)] == list(range(24))


def test_scores_of_another_thinking_are_not_mixed(checkpoint, rows_file, tmp_path, monkeypatch):
    """The marker has an empty thought without --enable_thinking, so s(A) differs."""
    words = [checkpoint, rows_file, tmp_path / "s.jsonl", "--template", "qwen3"]
    score_here(monkeypatch, *words)
    score_here(monkeypatch, *words, "--enable_thinking", "false")  # the default
    with pytest.raises(UserError, match="another template_text .same name, changed content"):
        score_here(monkeypatch, *words, "--enable_thinking", "true")


def test_num_samples(checkpoint, rows_file, tmp_path, monkeypatch):
    """Only the rows that train.py would use are scored and chosen, by their number in the file."""
    from minisft.data.dataset import open_rows

    output, chosen = tmp_path / "s.jsonl", tmp_path / "c.json"
    rows = json.loads(rows_file.read_text())
    rows[5]["output"] = ""
    rows_file.write_text(json.dumps(rows))
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"few": {"file_name": "rows.json", "num_samples": 10}}))
    taken = [row.index for row in open_rows("few", tmp_path, skipped=[], seed=42)]
    named = ["--dataset_dir", tmp_path, "--skip_bad_rows"]
    score_here(monkeypatch, checkpoint, "few", output, "--mode", "all", *named)
    lines = read(output)
    assert [one["index"] for one in lines] == list(range(24))
    assert [one["index"] for one in lines if one["reason"] is None] == taken
    assert lines[5]["reason"].startswith("broken: ")
    assert {one["reason"] for one in lines} >= {
        None,
        "left out by num_samples",
    }
    for words, count in (
        (["--strategy", "random", "--sample_number", 10], 10),
        (["--strategy", "longest", "--scores", output, "--sample_rate", 0.5], 5),
    ):
        done = command(
            "--dataset",
            "few",
            *named,
            "--output",
            chosen,
            "--overwrite",
            *words,
            script="select.py",
        )
        assert done.returncode == 0, done.stderr
        assert "(13 more are left out by num_samples)" in done.stdout
        manifest = json.loads((tmp_path / "c.json.manifest").read_text())
        assert len(manifest["chosen"]) == count and set(manifest["chosen"]) <= set(taken)
        assert manifest["answer_length"]["mean_all"] == np.mean(
            [
                lines[n]["num_answer_tokens"] if "--scores" in words else len(rows[n]["output"])
                for n in taken
            ]
        )
    info.write_text(info.read_text().replace("10", "11"))
    with pytest.raises(UserError, match="another dataset"):
        score_here(monkeypatch, checkpoint, "few", output, *named)


def test_a_broken_row_beyond_max_samples_is_not_read(checkpoint, rows_file, tmp_path, monkeypatch):
    """As in train.py, which would not read it either."""
    output = tmp_path / "s.jsonl"
    rows = json.loads(rows_file.read_text())
    rows[15]["output"] = ""
    rows_file.write_text(json.dumps(rows))
    score_here(monkeypatch, checkpoint, rows_file, output, "--max_samples", 10)
    assert [row["index"] for row in read(output) if row["reason"] is None] == list(range(10))
    words = ["--dataset", rows_file, "--max_samples", 10, "--strategy", "longest"]
    words += ["--sample_number", 10, "--output", tmp_path / "c.json"]
    done = command(*words, script="select.py")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c.json").read_text()) == rows[:10]
    with pytest.raises(UserError, match="row 16: there is no answer"):
        score_here(monkeypatch, checkpoint, rows_file, output, "--overwrite")


def test_mistakes(checkpoint, rows_file, many, tmp_path, monkeypatch):
    output = tmp_path / "out" / "s.jsonl"
    for words, message in (
        (["--dataset", many], "row 12 .*there is no answer"),
        (["--dataset", tmp_path / "none.json"], "no such file"),
        (["--template", "none"], "unknown template"),
        (["--adapter", checkpoint], "adapter_config.json"),
        (["--batch_tokens", "0"], "whole number"),
    ):
        with pytest.raises(UserError, match=message):
            score_here(monkeypatch, checkpoint, rows_file, output, *words)
    done = score(checkpoint, many, output)
    assert done.returncode == 2 and "there is no answer" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not output.parent.exists()
    output.parent.mkdir()
    (output.parent / "s.record.json").write_text("{}")
    output.write_text("something else\n")
    with pytest.raises(UserError, match="another model"):
        score_here(monkeypatch, checkpoint, rows_file, output)
    assert output.read_text() == "something else\n"


def test_an_input_is_never_overwritten(checkpoint, many, tmp_path, monkeypatch):
    before = many.read_bytes()
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "device.jsonl")
    for output, message in (
        (many, "many.jsonl is an input"),
        (tmp_path / "scores.json", "ends in .jsonl"),
        (tmp_path, "ends in .jsonl"),
        (tmp_path / "folder.jsonl", "folder.jsonl is a folder"),
        (tmp_path / "device.jsonl", "device.jsonl is a folder or a device"),
    ):
        with pytest.raises(UserError, match=message):
            score_here(monkeypatch, checkpoint, many, output, "--overwrite", "--skip_bad_rows")
    other = tmp_path / "s.record.json"  # as a data set, which is unlikely
    other.write_text(json.dumps([{"instruction": "the cat", "output": "sat"}]))
    with pytest.raises(UserError, match="s.record.json is an input"):
        score_here(monkeypatch, checkpoint, other, tmp_path / "s.jsonl", "--overwrite")
    assert many.read_bytes() == before and not list(tmp_path.glob("*.npy"))


def test_a_run_that_fails_early_leaves_nothing(checkpoint, rows_file, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    output, words = tmp_path / "s.jsonl", ["--mode", "all"]
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match="missing: model.norm.weight"):
        score_here(monkeypatch, broken, rows_file, output, *words)
    assert not list(tmp_path.glob("s.*"))
    score_here(monkeypatch, checkpoint, rows_file, output, *words)
    before = {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    assert len(before) == 4
    # --overwrite keeps the old scores if the run fails.
    with pytest.raises(UserError, match="missing: model.norm.weight"):
        score_here(monkeypatch, broken, rows_file, output, *words, "--overwrite")
    assert before == {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    score_here(monkeypatch, checkpoint, rows_file, output, "--overwrite", "--cutoff_len", 64)
    assert {path.name for path in tmp_path.glob("s.*")} == {"s.jsonl", "s.record.json"}
    assert len(read(output)) == 24
    assert json.loads((tmp_path / "s.record.json").read_text())["cutoff_len"] == 64


def test_dynamic_rotary_scaling(checkpoint, many, tmp_path, monkeypatch):
    """Rows whose angles depend on the batch get no score; other scores do not depend on it."""
    path = checkpoint / "config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "max_position_embeddings": 44,
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            }
        )
    )
    found = []
    for batch_tokens in (1, 100_000):
        output = tmp_path / f"{batch_tokens}.jsonl"
        score_here(
            monkeypatch,
            checkpoint,
            many,
            output,
            "--batch_tokens",
            batch_tokens,
            "--template",
            "plain",
            "--skip_bad_rows",
        )
        found.append(read(output))
    reasons = {one["reason"] and one["reason"].split(", ")[-1] for one in found[0]}
    assert {None, "the limit is 40"} <= reasons
    for one, other in zip(*found, strict=True):
        assert one["reason"] == other["reason"]
        if one["ifd"]:
            assert one["ifd"] == pytest.approx(other["ifd"], rel=1e-5)


def test_an_adapter_is_used(checkpoint, rows_file, tmp_path, monkeypatch):
    from minisft.checkpoints.adapters import save_adapter
    from minisft.checkpoints.folders import load_model, save_model
    from minisft.model.lora import LoraConfig, add_lora, merge_lora

    model, config = load_model(checkpoint), LoraConfig(rank=4, alpha=8)
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter", config, checkpoint)
    merge_lora(model)
    merged = shutil.copytree(checkpoint, tmp_path / "merged")
    save_model(model, merged)
    score_here(
        monkeypatch, checkpoint, rows_file, tmp_path / "a.jsonl", "--adapter", tmp_path / "adapter"
    )
    score_here(monkeypatch, merged, rows_file, tmp_path / "m.jsonl")
    score_here(monkeypatch, checkpoint, rows_file, tmp_path / "b.jsonl")
    adapted, merged, base = (
        [one["ifd"] for one in read(tmp_path / f"{name}.jsonl")] for name in "amb"
    )
    np.testing.assert_allclose(adapted, merged, rtol=1e-5)
    assert np.abs(np.array(adapted) - base).max() > 1e-2
    with pytest.raises(UserError, match="another adapter"):
        score_here(monkeypatch, checkpoint, rows_file, tmp_path / "a.jsonl")
