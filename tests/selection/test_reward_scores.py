"""score.py --mode reward: rewards equal transformers, preferences equal what train.py logs."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from conftest import as_flags, command

import score
import train
from minisft.checkpoints.folders import save_model
from minisft.common.errors import UserError
from minisft.common.metric_lines import in_words, read_metrics
from minisft.data.dataset import Row
from minisft.model.config import ModelConfig
from minisft.model.reward import RewardModel
from minisft.selection.passes import Plan
from minisft.selection.reward_scores import RewardScorer, preference_fields
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

FIGURES = ("accuracy", "margin", "reward_chosen", "reward_rejected")


@pytest.fixture
def judge(checkpoint):
    """A random reward model, in the folder of `checkpoint`."""
    torch.manual_seed(1)
    model = RewardModel(ModelConfig.load(checkpoint))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    save_model(model, checkpoint)
    return checkpoint


def asked(number):
    return {"role": "user", "content": f"Say {number}."}


def answered(text):
    return {"role": "assistant", "content": text}


def rows_and_texts():
    """Preferences in all formats, and the conversations of each row, the best first.

    The last four rows: one answer, the same answer twice, an answer too long, a broken row.
    """
    rows, texts = [], []
    for number in range(24):
        answers = [f"yes {number}" * (1 + number % 5), "the cat sat " * (1 + 7 * number % 4), "no"]
        answers = answers[: 3 if number % 3 == 0 else 2]
        chosen, rejected = answers[:2]
        texts.append([[asked(number), answered(one)] for one in answers])
        if number % 3 == 0:
            rows.append({"instruction": f"Say {number}.", "output": answers})
        elif number % 3 == 1:
            rows.append({"prompt": f"Say {number}.", "chosen": chosen, "rejected": rejected})
        else:
            rows.append(
                {
                    "conversations": [{"from": "human", "value": f"Say {number}."}],
                    "chosen": {"from": "gpt", "value": chosen},
                    "rejected": {"from": "gpt", "value": rejected},
                }
            )
    for answers in ("the mat", ["yes", "yes"], ["yes", "no " * 200], ["yes"]):
        rows.append({"instruction": "Say 24.", "output": answers})
    return rows, [*texts, [[asked(24), answered("the mat")]]]


@pytest.fixture
def pairs(tmp_path):
    """A file of those rows."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_and_texts()[0]))
    return path


def words_of(judge, rows, output, *more):
    return [
        *as_flags(
            model_name_or_path=judge,
            dataset=rows,
            template="plain",
            dtype="float32",
            device="cpu",
            dataloader_num_workers=0,
            mode="reward",
            output=output,
        ),
        *more,
    ]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def their_rewards(judge, conversations):
    """The rewards by transformers, one conversation at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    template = get_template("plain", Tokenizer.load(judge))
    return [
        model.eval()(torch.tensor([template.encode(one)[0].ids])).logits.item()
        for one in conversations
    ]


def check(lines, judge):
    """Every number of every row, from transformers' rewards."""
    _, texts = rows_and_texts()
    assert [line["index"] for line in lines] == list(range(28))
    for line, conversations in zip(lines, texts, strict=False):
        rewards = their_rewards(judge, conversations)
        pairs = list(combinations(rewards, 2))
        expected = (
            {"reward": rewards[0]}
            if not pairs
            else {
                "accuracy": np.mean([better > worse for better, worse in pairs]),
                "margin": np.mean([better - worse for better, worse in pairs]),
                "reward_chosen": np.mean([better for better, _ in pairs]),
                "reward_rejected": np.mean([worse for _, worse in pairs]),
            }
        )
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert line.keys() == {"index", *expected, "num_answer_tokens", "num_tokens", "reason"}
        assert line["num_tokens"] > line["num_answer_tokens"]
        assert line["reason"] is None
    same, long, broken = lines[25:]
    assert same["reason"] == "the answers are the same"
    assert long["reason"].startswith("longer than cutoff_len: ")
    assert all(line[name] is None for line in (same, long) for name in FIGURES)
    assert broken["reason"].startswith("broken: ") and broken["reward"] is None


def test_preferences_equal_transformers(judge, pairs, tmp_path, here):
    """In any batch and with two processes; the means are printed at the end."""
    output = tmp_path / "s.jsonl"
    said = here(score, *words_of(judge, pairs, output, "--skip_bad_rows")).splitlines()
    lines = read(output)
    check(lines, judge)
    means = {name: np.mean([line[name] for line in lines[:24]]) for name in FIGURES}
    assert said[-1].startswith("Choose rows: python select.py ") and "--strategy margin" in said[-1]
    assert said[-2] == f"preferences of 24 rows: {in_words(means)}"
    assert 0 < means["accuracy"] < 1 and "not scored 1: the answers are the same" in said
    assert len({line["accuracy"] for line in lines[:24]}) > 2  # of three answers some, of two all
    done = command(
        *words_of(judge, pairs, tmp_path / "two.jsonl", "--skip_bad_rows", "--batch_tokens", 64),
        script="score.py",
        processes=2,
    )
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    check(read(tmp_path / "two.jsonl"), judge)
    assert said[-2].partition(",")[0] in done.stdout


def test_an_interrupted_run_continues(judge, pairs, tmp_path, here):
    """The means are over all rows, including those scored before the interruption."""
    output, words = tmp_path / "s.jsonl", ["--skip_bad_rows", "--batch_tokens", 64]
    said = here(score, *words_of(judge, pairs, output, *words))
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[3:20]) + lines[20][:30])
    again = here(score, *words_of(judge, pairs, output, *words))
    assert "27 of 28 rows, 10 to do" in again  # one is broken
    check(read(output), judge)
    assert again.splitlines()[-2] == said.splitlines()[-2]
    before = output.read_bytes()
    nothing = here(score, *words_of(judge, pairs, output, *words))
    assert "28 rows, 0 to do" in nothing and "nothing to do: " in nothing
    assert "rows/s" not in nothing and nothing.splitlines()[-2] == said.splitlines()[-2]
    assert output.read_bytes() == before


def test_the_means_are_those_of_an_evaluation(judge, pairs, tmp_path, here):
    """train.py --stage rm has the same means on the same rows, and leaves out the same rows."""
    rows = [row for number, row in enumerate(rows_and_texts()[0]) if number not in (24, 27)]
    (tmp_path / "only_pairs.json").write_text(json.dumps(rows))
    here(
        train,
        model_name_or_path=judge,
        dataset=tmp_path / "only_pairs.json",
        eval_dataset=tmp_path / "only_pairs.json",
        template="plain",
        stage="rm",
        output_dir=tmp_path / "rm",
        max_steps=1,
        dtype="float32",
        device="cpu",
        dataloader_num_workers=0,
        cutoff_len=512,
    )
    evaluated = read_metrics(tmp_path / "rm/metrics.jsonl")[-1]
    words = words_of(judge, tmp_path / "only_pairs.json", tmp_path / "s.jsonl")
    said = here(score, *words, "--adapter", tmp_path / "rm")
    expected = {name: evaluated[f"eval_{name}"] for name in FIGURES}
    scored = [line for line in read(tmp_path / "s.jsonl") if line["reason"] is None]
    found = {name: np.mean([line[name] for line in scored]) for name in FIGURES}
    assert len(scored) == 24 and found == pytest.approx(expected, abs=1e-5)
    assert f"preferences of 24 rows: {in_words(expected)}\n" in said


def test_a_data_set_of_pairs_by_name(judge, pairs, tmp_path, here):
    """dataset_info.json describes its columns."""
    rows = [{"q": f"Say {number}.", "good": "yes", "bad": "no"} for number in range(6)]
    (tmp_path / "named.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "named": {
                    "file_name": "named.json",
                    "ranking": True,
                    "num_samples": 4,
                    "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
                }
            }
        )
    )
    said = here(score, *words_of(judge, "named", tmp_path / "s.jsonl", "--dataset_dir", tmp_path))
    assert "preferences of 4 rows" in said and "not scored 2: left out by num_samples" in said
    lines = [line for line in read(tmp_path / "s.jsonl") if line["reason"] is None]
    chosen = [[asked(line["index"]), answered("yes")] for line in lines]
    assert [line["reward_chosen"] for line in lines] == pytest.approx(
        their_rewards(judge, chosen), abs=1e-5
    )


def test_rows_are_chosen_by_margin(judge, pairs, tmp_path, here):
    """Preference rows have no other score; the error says so."""
    rows = rows_and_texts()[0][:24]
    path, scores = tmp_path / "only.json", tmp_path / "s.jsonl"
    path.write_text(json.dumps(rows))
    here(score, *words_of(judge, path, scores))
    words = ["--dataset", path, "--scores", scores, "--sample_number", 7, "--output"]
    done = command(
        *words, tmp_path / "best.json", "--strategy", "margin", "--plot", script="select.py"
    )
    assert done.returncode == 0 and (tmp_path / "best.png").exists(), done.stderr
    lines = read(scores)
    best = sorted(sorted(range(24), key=lambda row: -lines[row]["margin"])[:7])
    assert json.loads((tmp_path / "best.json").read_text()) == [rows[row] for row in best]
    for strategy, message in (
        ("reward", "has no reward: score.py --mode reward computes it, of rows with one ans"),
        ("ifd", "preference data"),
    ):
        done = command(*words, tmp_path / "no.json", "--strategy", strategy, script="select.py")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="preference data"):
        here(score, *words_of(judge, path, tmp_path / "t.jsonl", "--mode", "ifd"))


def test_a_last_answer_that_is_not_learned_counts(judge):
    """The reward is that of the complete conversation."""
    scorer = RewardScorer(get_template("plain", Tokenizer.load(judge)))
    messages = [asked(1), answered("yes"), asked(2), answered("no")]
    unlearned = [*messages[:3], {**messages[3], "weight": 0}]
    passes, same = (scorer.plan(0, Row(turns)).passes for turns in (messages, unlearned))
    assert passes[0].ids.tolist() == same[0].ids.tolist()


def test_a_reward_that_is_not_finite_is_a_reason(judge):
    scorer = RewardScorer(get_template("plain", Tokenizer.load(judge)))
    assert scorer.score(Plan(3), [1.0, float("nan")]).record == {
        "index": 3,
        "reward": None,
        **dict.fromkeys(FIGURES),
        "num_answer_tokens": 0,
        "num_tokens": 0,
        "reason": "the reward is not a finite number",
    }
    assert preference_fields([2.0, 2.0])["accuracy"] == 0  # equal is not better
