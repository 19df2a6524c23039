"""FSDP: two and four processes, each with a shard of the model, train the same as one."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import as_flags, command
from parallel_runs import (
    assert_equal_runs,
    assert_like_one_process,
    flags,
    logged,
    resumed,
    train_forked,
    write_bases,
)
from run_builder import new_run, training_options
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from minisft.checkpoints.folders import load_model
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.tensor_files import StoredTensor
from minisft.training import checkpoint, fsdp, resume
from minisft.training.build import load_trainable

# The fixture costs much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("fsdp")

# Eighteen ragged rows, twice, in steps of eight: the last step of an epoch has two rows, too few
# for four processes. Neither two nor four divides the LoRA rank.
KINDS = {
    "full": as_flags(
        model_name_or_path="tied",
        finetuning_type="full",
        gradient_checkpointing=True,
        validation_split=5,
        eval_steps=2,
        load_best_model_at_end=True,
        per_device_eval_batch_size=1,
    ),
    "lora": ["--model_name_or_path", "plain", "--lora_rank", 3, "--validation_split", 5],
}
NEW = [f"<{number}>" for number in range(21)]  # more than the bases have rows to spare
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
    "baichuan 7B": [
        *("--model_name_or_path", "baichuan-7B", "--finetuning_type", "full"),
        "--gradient_checkpointing",
    ],
    "baichuan 13B": [
        *("--model_name_or_path", "baichuan-13B", "--finetuning_type", "full", "--packing"),
    ],
    "baichuan 13B, lora": ["--model_name_or_path", "baichuan-13B", "--lora_target", "W_pack"],
    "new tokens": ["--model_name_or_path", "tied", "--new_special_tokens", ",".join(NEW)],
    "new tokens, full": [
        *("--model_name_or_path", "tied", "--finetuning_type", "full"),
        *("--add_tokens", ",".join(NEW)),
    ],
    "packed": ["--model_name_or_path", "plain", "--packing"],
    "float16": ["--model_name_or_path", "plain", "--dtype", "float16"],
}


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
    yield flags(2, "new tokens/ddp", *SHORT["new tokens"], "--max_steps", 3, kind="ddp")


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["2", "2-4", "2-4-1", "1-2"])
def test_any_number_of_processes_trains_as_one(kind, other, runs):
    """Equal losses, gradient norms and weights; resumed with more and with fewer processes."""
    assert len([row for row in logged(runs / kind / "1") if "loss" in row]) == 6
    assert_equal_runs(runs / kind / "1", runs / kind / other)


@pytest.mark.parametrize("kind, source", [("full", "2"), ("lora", "dropped")])
def test_stopped_and_resumed_with_as_many_is_exact(kind, source, runs):
    """One of the two gets a signal in the fourth step. Then both save and end."""
    assert (runs / kind / "again" / "checkpoint-4").is_dir()
    assert_equal_runs(runs / kind / source, runs / kind / "again", rtol=0, atol=0)
    if source == "dropped":  # dropout drew numbers, so this was a real test
        with pytest.raises(AssertionError):
            assert_equal_runs(runs / kind / "1", runs / kind / source)


@pytest.mark.parametrize("name", SHORT)
def test_other_ways_to_train(name, runs):
    assert_like_one_process(runs / name)


def test_new_tokens_with_a_model_on_every_process(runs):
    assert_equal_runs(runs / "new tokens/1", runs / "new tokens/ddp")


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


@pytest.mark.parametrize("extra", [[], ["--finetuning_type", "full"]])
def test_a_process_holds_its_rows_alone(extra, runs, monkeypatch):
    """Four processes together hold and read the model once, not four times.

    After a forward pass only the output matrix and its group are gathered, until resharded.
    """
    options = training_options(*extra, model_name_or_path=runs / "plain", parallel="fsdp")
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
    return run, [(float(step.sums["loss"]), float(step.grad_norm)) for step in steps]


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
    """A group of one process, for a single GPU: steps, saving and resuming."""
    device, runs_of = torch.device(device), []
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore()
    )
    try:
        for kind in ("ddp", "fsdp"):
            options = training_options(
                output_dir=tmp_path, finetuning_type="full", learning_rate="1e-2", parallel=kind
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


def test_a_failed_checkpoint_leaves_no_files(runs, tmp_path, monkeypatch):
    """After rank 0 has failed and removed the folder, the other rank does not create it again."""
    options = training_options(output_dir=tmp_path / "out", finetuning_type="full", parallel="fsdp")
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        run = start(options, runs / "plain", torch.device("cpu"))
        # The optimizer needs a state to save. A forward pass would not do: with torch 2.11, a fake
        # group gathers uninitialized memory.
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        together = [True]

        def wait():  # the second call waits for a rank that has ended
            if not together:
                raise RuntimeError("the other process has ended")
            together.clear()

        monkeypatch.setattr(processes, "barrier", wait)
        monkeypatch.setattr(processes, "all_gather", lambda value: [value, value])
        with pytest.raises(UserError, match="is not saved: the other process has ended"):
            resume.save_checkpoint(run)
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "out").exists()


def test_damage_to_a_part_is_found(runs, tmp_path):
    """A file of the optimizer's state has changed or is missing."""
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
        training_options(*extra, parallel="fsdp")


def test_a_single_process_cannot_shard(runs, tmp_path):
    done = command(
        model_name_or_path=runs / "plain",
        dataset=runs / "rows.json",
        template="plain",
        parallel="fsdp",
        output_dir=tmp_path / "out",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--parallel fsdp" in done.stderr and "torchrun" in done.stderr
