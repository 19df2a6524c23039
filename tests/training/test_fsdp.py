"""FSDP: what two and four processes train, each with a part of the model, is what one trains."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, ROOT, command
from run_builder import new_run
from safetensors.torch import load_file
from standing import HANG_SECONDS
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from minisft.checkpoints.folders import load_model, save_model
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.tensor_files import StoredTensor
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.training import checkpoint, fsdp, resume
from minisft.training.build import load_trainable
from minisft.training.metrics import read_metrics

# Eighteen ragged rows in six steps of six: they do not go round, for four processes in a batch not
# even once. The rank divides by neither number of processes.
KINDS = {
    "full": [
        "--model_name_or_path",
        "tied",
        "--finetuning_type",
        "full",
        "--gradient_checkpointing",
        "--validation_split",
        5,
        "--eval_steps",
        2,
        "--load_best_model_at_end",
        "--per_device_eval_batch_size",
        1,
    ],
    "lora": ["--model_name_or_path", "plain", "--lora_rank", 3, "--validation_split", 5],
}
BATCHES = {1: (8, 1), 2: (2, 2), 4: (1, 2)}
SHORT = {
    "saved": ["--model_name_or_path", "tied", "--modules_to_save", "embed_tokens,lm_head"],
    "adapter": ["--model_name_or_path", "plain", "--adapter", "lora/2"],
    "scratch": [
        "--model_name_or_path",
        "tied",
        "--finetuning_type",
        "full",
        "--train_from_scratch",
    ],
    "packed": ["--model_name_or_path", "plain", "--packing"],
    "bfloat16": ["--model_name_or_path", "plain", "--dtype", "bfloat16"],
    "float16": ["--model_name_or_path", "plain", "--dtype", "float16"],
}


def flags(processes, output_dir, *more, kind="fsdp"):
    batch_size, accumulation = BATCHES[processes]
    words = [
        "--dataset",
        "rows.json",
        "--template",
        "plain",
        "--learning_rate",
        1e-3,
        "--num_train_epochs",
        2,
        "--logging_steps",
        1,
        "--dataloader_num_workers",
        0,
        "--per_device_train_batch_size",
        batch_size,
        "--gradient_accumulation_steps",
        accumulation,
        "--output_dir",
        output_dir,
        *more,
    ]
    words += ["--parallel", kind] if processes > 1 else []
    return [processes, list(map(str, words))]


def resumed(processes, output_dir, *more):
    return flags(processes, output_dir, *more[:-1], "--resume_from_checkpoint", more[-1])


def planned():
    for kind, words in KINDS.items():
        keep = ["--save_steps", 2, "--save_total_limit", 9]
        dropout = ["--lora_dropout", 0.2] if kind == "lora" else []
        yield flags(1, f"{kind}/1", *words, *keep)
        yield flags(2, f"{kind}/2", *words, *keep)
        yield resumed(4, f"{kind}/2-4", *words, *keep, f"{kind}/2/checkpoint-2")
        yield resumed(1, f"{kind}/2-4-1", *words, f"{kind}/2-4/checkpoint-4")
        yield resumed(2, f"{kind}/1-2", *words, f"{kind}/1/checkpoint-4")
        if dropout:
            yield flags(2, f"{kind}/dropped", *words, *dropout)
        yield [*flags(2, f"{kind}/again", *words, *dropout), 3]
        yield resumed(2, f"{kind}/again", *words, *dropout, "auto")
    for name, words in SHORT.items():
        for count in (1, 2):
            yield flags(count, f"{name}/{count}", *words, "--max_steps", 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer_dir):
    """The folder of all runs, made by a single process that forks."""
    folder = tmp_path_factory.mktemp("fsdp")
    write_bases(folder, tiny_tokenizer_dir)
    rows = [
        {"instruction": "go", "output": "the cat sat " * (1 + 7 * number % 11)}
        for number in range(23)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    train_forked(folder, planned())
    return folder


def write_bases(folder, tokenizer_dir):
    """Two base models, one of them with a tied embedding."""
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


def train_forked(folder, plan):
    """Work off a list of runs."""
    (folder / "runs.json").write_text(json.dumps(list(plan)))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fork_and_train.py", "runs.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def final(run_dir):
    (path,) = run_dir.glob("*model.safetensors")
    return load_file(path)


def logged(run_dir):
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_equal_runs(first, second, rtol=1e-4, atol=1e-5, near=None):
    """Weights, losses, norms and evaluations, of the steps that the second has logged.

    near: what figures may differ by that are about zero.
    """
    rows = logged(second)
    for expected, row in zip(logged(first)[-len(rows) :], rows, strict=True):
        assert row == (pytest.approx(expected, rel=rtol, abs=near) if rtol else expected)
    weights, others = final(first), final(second)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=rtol, atol=atol)


def assert_like_one_process(folder, near=None):
    """What two processes did is what one did; in bfloat16 roughly, since one that holds all keeps
    other parts in float32."""
    if folder.name.endswith("16"):
        losses = [[row["loss"] for row in logged(folder / number)] for number in "12"]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
    else:
        assert_equal_runs(folder / "1", folder / "2", near=near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["2", "2-4", "2-4-1", "1-2"])
def test_any_number_of_processes_trains_as_one(kind, other, runs):
    """Losses, norms of the gradient and weights; resumed with twice, with a quarter as many."""
    assert len([row for row in logged(runs / kind / "1") if "loss" in row]) == 6
    assert_equal_runs(runs / kind / "1", runs / kind / other)


@pytest.mark.parametrize("kind, source", [("full", "2"), ("lora", "dropped")])
def test_stopped_and_resumed_with_as_many_is_exact(kind, source, runs):
    """One of the two is sent a signal in the fourth step, after which both save and end."""
    assert (runs / kind / "again" / "checkpoint-4").is_dir()
    assert_equal_runs(runs / kind / source, runs / kind / "again", rtol=0, atol=0)
    if source == "dropped":  # and there was something to be drawn alike
        with pytest.raises(AssertionError):
            assert_equal_runs(runs / kind / "1", runs / kind / source)


@pytest.mark.parametrize("name", SHORT)
def test_other_ways_to_train(name, runs):
    assert_like_one_process(runs / name)


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


@pytest.mark.parametrize("extra", [[], ["--finetuning_type", "full"]])
def test_a_process_holds_its_rows_alone(extra, runs, monkeypatch):
    """What four processes hold and read of the files is the model once, not four times.

    After a forward pass only the output matrix and what goes with it is whole, until cut again.
    """
    options = train.parse_options(
        [
            "--model_name_or_path",
            str(runs / "plain"),
            "--dataset",
            "-",
            "--output_dir",
            "-",
            "--parallel",
            "fsdp",
            *extra,
        ]
    )
    device, parts, num_read = torch.device("cpu"), [], 0
    whole, read = load_model(runs / "plain"), StoredTensor.read

    def counted(stored, begin=0, end=None):
        nonlocal num_read
        rows = read(stored, begin, end)
        num_read += rows.numel()
        return rows

    for rank in range(4):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            model, lora_config = load_trainable(
                options, runs / "plain", torch.float32, torch.device("meta")
            )
            assert all(parameter.is_meta for parameter in model.parameters())
            monkeypatch.setattr(StoredTensor, "read", counted)
            fsdp.distribute(model, lora_config, options, runs / "plain", torch.float32, device)
            monkeypatch.undo()
            parts.append({name: one.to_local() for name, one in model.named_parameters()})
            model(torch.tensor([[1, 2, 3]]))
            assert not any(map(is_sharded, (model.lm_head.weight, model.model.norm.weight)))
            assert all(map(is_sharded, model.model.layers.parameters()))
            assert all(map(is_sharded, model.state_dict().values()))
        finally:
            dist.destroy_process_group()
    assert num_read == sum(parameter.numel() for parameter in whole.parameters())
    for name, parameter in whole.named_parameters():
        for ending in (name, name.replace("proj.", "proj.base_layer.")):
            if ending in parts[0]:
                assert torch.equal(torch.cat([part[ending] for part in parts]), parameter)
    assert (
        sum(one.numel() for part in parts for name, one in part.items() if "lora" not in name)
        == num_read
    )


def start(options, folder, device):
    """A Run of full training before its first step."""
    is_sharded = options.parallel == "fsdp"
    model, _ = load_trainable(
        options, folder, torch.float32, torch.device("meta") if is_sharded else device
    )
    if is_sharded:
        fsdp.distribute(model, None, options, folder, torch.float32, device)
    return new_run(options, model, num_rows=2, device=device)


def two_steps(options, folder, device):
    """A Run after two steps of full training on the same batch, with their losses and norms."""
    run = start(options, folder, device)
    tokens = torch.arange(24, device=device).view(2, 12)
    steps = [train.train_step(run, [(tokens, tokens > 3, None)]) for _ in range(2)]
    return run, [(float(step.sums["loss"]), step.grad_norm) for step in steps]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
        ),
    ],
)
def test_on_each_device(device, runs, tmp_path):
    """A group of one process, which a single GPU can have: steps, saving and going on."""
    device, runs_of = torch.device(device), []
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore()
    )
    try:
        for kind in ("ddp", "fsdp"):
            options = train.parse_options(
                [
                    "--model_name_or_path",
                    "-",
                    "--dataset",
                    "-",
                    "--output_dir",
                    str(tmp_path),
                    "--finetuning_type",
                    "full",
                    "--learning_rate",
                    "1e-2",
                    "--parallel",
                    kind,
                ]
            )
            runs_of.append(two_steps(options, runs / "tied", device))
        (run, expected), (sharded, figures) = runs_of
        assert figures == [pytest.approx(step, rel=1e-3) for step in expected]
        resume.save_checkpoint(sharded)
        resumed = new_run(options, sharded.model, num_rows=2, device=device)
        path = tmp_path / "checkpoint-0"
        resume.restore(resumed, resume.SavedRun(path, checkpoint.load_state(path)))
        before, after = (fsdp.moments(sharded.model, one.optimizer) for one in (sharded, resumed))
        assert before.keys() == after.keys() and all(
            torch.equal(after[name].to_local(), value.to_local())
            for name, value in before.items()
            if is_sharded(value)
        )
        for name, value in sharded.model.state_dict().items():
            torch.testing.assert_close(
                value.full_tensor(), run.model.state_dict()[name].detach(), rtol=1e-3, atol=1e-4
            )
    finally:
        dist.destroy_process_group()


def test_nothing_is_left_of_a_checkpoint_that_fails(runs, tmp_path, monkeypatch):
    """The first process has failed and removed what there was; the other one adds nothing."""
    options = train.parse_options(
        [
            "--model_name_or_path",
            "-",
            "--dataset",
            "-",
            "--output_dir",
            str(tmp_path / "out"),
            "--finetuning_type",
            "full",
            "--parallel",
            "fsdp",
        ]
    )
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        run = start(options, runs / "plain", torch.device("cpu"))
        # The optimizer needs a state to save. A forward pass would not do: with torch 2.11, a fake
        # group gathers uninitialized memory.
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        together = [True]

        def wait():  # the second time for what does not come
            if not together:
                raise RuntimeError("the other process has ended")
            together.clear()

        monkeypatch.setattr(processes, "barrier", wait)
        monkeypatch.setattr(processes, "all_gather", lambda value: [value, value])
        with pytest.raises(UserError, match="could not be written"):
            resume.save_checkpoint(run)
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "out").exists()


def test_damage_to_a_part_is_found(runs, tmp_path):
    """A part of the optimizer's state that has changed or is gone."""
    path = shutil.copytree(runs / "lora/2/checkpoint-4", tmp_path / "checkpoint-4")
    assert checkpoint.damage(path) is None
    parts = sorted((path / "optimizer").iterdir())
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"!")
    assert checkpoint.damage(path) == f"optimizer/{parts[0].name} has changed since it was saved"
    parts[0].unlink()
    assert checkpoint.damage(path) == f"optimizer/{parts[0].name} is missing"


@pytest.mark.parametrize(
    "extra", [["--quantization_bit", "4"], ["--eval_exact_match", "--validation_split", "4"]]
)
def test_contradictions(extra):
    with pytest.raises(UserError, match=f"{extra[0]} contradicts --parallel fsdp"):
        train.parse_options(
            [
                "--model_name_or_path",
                "-",
                "--dataset",
                "-",
                "--output_dir",
                "-",
                "--parallel",
                "fsdp",
                *extra,
            ]
        )


def test_alone_there_is_nothing_to_shard_over(runs, tmp_path):
    done = command(
        "--model_name_or_path",
        runs / "plain",
        "--dataset",
        runs / "rows.json",
        "--template",
        "plain",
        "--parallel",
        "fsdp",
        "--output_dir",
        tmp_path / "out",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--parallel fsdp" in done.stderr and "torchrun" in done.stderr
