"""exact_match.py: the share of rows with the right answer, also in the log of a training run."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import command

from minisft.checkpoints.folders import load_model
from minisft.common.metric_lines import read_metrics
from minisft.data.encoding import Example
from minisft.evaluation.exact_match import exact_match, split_last_answer
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def example_of(template, messages):
    [example] = template.encode(messages)
    return Example(np.array(example.ids, np.int32), np.array(example.supervised))


def test_split_last_answer():
    mask = np.array([False, True, True, False, False, True, True, False])
    assert split_last_answer(Example(np.arange(8), mask)) == ([0, 1, 2, 3, 4], [5, 6])
    everything = Example(np.arange(3), np.array([True] * 3))
    assert split_last_answer(everything) == ([0], [1, 2])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_of_transformers_are_right(tiny_chat_model_dir, batch_size):
    template = get_template("chatml", Tokenizer.load(tiny_chat_model_dir))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir)

    def answered(question, **settings):
        ids = torch.tensor([template.encode_prompt([{"role": "user", "content": question}])])
        whole = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=0,
            **settings,
        )[0].numpy()
        return Example(whole.astype(np.int32), np.arange(len(whole)) >= ids.shape[1])

    # A model with random weights never ends its turn. Let a token that it writes end the turn.
    stop = int(answered("cat 0", eos_token_id=None).ids[-1])
    template.stop_token_ids = lambda: {stop}
    examples = [answered(f"cat {number}", eos_token_id=stop) for number in range(6)]
    examples = [one for one in examples if one.ids[-1] == stop and one.supervised.sum() > 4]
    assert examples
    model = load_model(tiny_chat_model_dir)
    assert exact_match(model, examples, template, batch_size) == 1.0
    wrong = example_of(
        template,
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "never said"}],
    )
    cut = Example(examples[0].ids[:-3], examples[0].supervised[:-3])
    expected = (len(examples) + 1) / (len(examples) + 2)  # the model goes on after the cut
    assert exact_match(model, [wrong, *examples, cut], template, batch_size) == expected


def test_a_training_run_logs_and_plots_it(checkpoint, tmp_path):
    words = ("cat", "hat", "mat", "rat")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in words]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = command(
        "--model_name_or_path",
        checkpoint,
        "--dataset",
        tmp_path / "rows.json",
        "--eval_dataset",
        tmp_path / "rows.json",
        "--template",
        "alpaca",
        "--finetuning_type",
        "full",
        "--learning_rate",
        "1e-2",
        "--num_train_epochs",
        "60",
        "--eval_steps",
        "30",
        "--eval_exact_match",
        "--plot_loss",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--dataloader_num_workers",
        "0",
        "--output_dir",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    shares = [
        row["eval_exact_match"]
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "eval_loss" in row
    ]
    assert len(shares) == 2 and shares[-1] == 1.0
    assert "exact match 100.0 %" in done.stdout + done.stderr
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def test_it_needs_held_out_rows(checkpoint, rows_file, tmp_path):
    done = command(
        "--model_name_or_path",
        checkpoint,
        "--dataset",
        rows_file,
        "--template",
        "alpaca",
        "--eval_exact_match",
        "--output_dir",
        tmp_path / "run",
    )
    assert done.returncode == 2 and "--eval_exact_match needs --eval_dataset" in done.stderr
