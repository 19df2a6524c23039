"""Training runs of train.py in one or more processes, and how to compare them.

write_bases(folder, tokenizer_dir)
train_forked(folder, [flags(1, "one", *words), flags(2, "two", *words)])
assert_equal_runs(folder / "one", folder / "two")
"""

import json
import shutil

import baichuan
import pytest
import torch
from conftest import CONFIG, as_flags
from forks import run_script
from safetensors.torch import load_file

from minisft.checkpoints.folders import save_model
from minisft.common.metric_lines import read_metrics
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM

# Processes -> batch size and accumulation; a step has eight rows.
BATCHES = {1: (8, 1), 2: (2, 2), 4: (1, 2)}


def flags(processes, output_dir, *more, kind="fsdp"):
    """[processes, words]: a run as fork_and_train.py expects it."""
    batch_size, accumulation = BATCHES[processes]
    words = [
        *as_flags(
            dataset="rows.json",
            template="plain",
            learning_rate=1e-3,
            num_train_epochs=2,
            logging_steps=1,
            dataloader_num_workers=0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            output_dir=output_dir,
        ),
        *more,
    ]
    words += ["--parallel", kind] if processes > 1 else []
    return [processes, list(map(str, words))]


def resumed(processes, output_dir, *more):
    """The same, resumed from the checkpoint named by the last word."""
    return flags(processes, output_dir, *more[:-1], "--resume_from_checkpoint", more[-1])


def write_bases(folder, tokenizer_dir):
    """Base models: a Llama, one with a tied embedding, and a Baichuan2 of each size."""
    for name in ("plain", "tied"):
        torch.manual_seed(0)
        model = CausalLM(
            ModelConfig.from_dict(
                {**CONFIG, "vocab_size": 300, "tie_word_embeddings": name == "tied"}
            )
        )
        model.initialize()
        save_model(model, folder / name)
        for path in tokenizer_dir.iterdir():
            shutil.copy(path, folder / name)
    for size in baichuan.SIZES:
        path = shutil.copytree(folder / "plain", folder / f"baichuan-{size}")
        baichuan.write_checkpoint(path, size, vocab_size=300, initializer_range=0.1)


def train_forked(folder, plan):
    """Run the training runs in `folder`."""
    (folder / "runs.json").write_text(json.dumps(list(plan)))
    done = run_script("tests/fork_and_train.py", [folder])
    assert done.returncode == 0, done.stdout + done.stderr


def final(run_dir):
    """The weights that a run has saved at its end."""
    (path,) = run_dir.glob("*model.safetensors")
    return load_file(path)


def logged(run_dir):
    """The metrics of a run, without its speed."""
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_equal_runs(first, second, rtol=1e-4, atol=1e-5, near=None):
    """Compare weights, losses, norms and evaluations of the steps that the second run has logged.

    near: absolute tolerance of logged figures, for those about zero.
    """
    rows = logged(second)
    for expected, row in zip(logged(first)[-len(rows) :], rows, strict=True):
        if near and abs(expected.get("margin", 1)) < near:  # ties, which rounding decides
            row["accuracy"] = expected["accuracy"]
        assert row == (pytest.approx(expected, rel=rtol, abs=near) if rtol else expected)
    weights, others = final(first), final(second)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=rtol, atol=atol)


def assert_like_one_process(folder, near=None):
    """Compare the runs `folder`/1 and `folder`/2.

    In bfloat16 only roughly, because FSDP and one process keep different parts in float32.
    """
    if folder.name.endswith("16"):
        losses = [[row["loss"] for row in logged(folder / number)] for number in "12"]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
    else:
        assert_equal_runs(folder / "1", folder / "2", near=near)
