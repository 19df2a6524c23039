"""The GPU of a Mac, --device mps, tested without a Mac: choices, and nothing needs float64.

FakeTensorMode gives tensors without values that say they are on mps; few operations know them on
another machine. RefuseFloat64 fails where a Mac would, also on a CPU that plays the Mac.
"""

import pytest
import torch
from run_builder import training_options
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import score
import train
from minisft.common import devices, processes
from minisft.common.devices import in_float64, move, resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling, choose_tokens, random_generator
from minisft.training.build import build_model
from minisft.training.optimizer import build_optimizer

MPS = torch.device("mps")


class RefuseFloat64(TorchDispatchMode):
    """Operations may not give float64 on this device."""

    def __init__(self, device="mps"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            is_here = isinstance(tensor, torch.Tensor) and tensor.device.type == self.device
            if is_here and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: no float64 on {self.device}")
        return result


@pytest.fixture
def mac(monkeypatch):
    """torch says that there is a Mac's GPU, with macOS 14."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)


def test_what_auto_chooses_on_a_mac(mac, monkeypatch):
    assert resolve_device("auto") == resolve_device("mps") == MPS
    assert resolve_dtype("auto", MPS) == torch.float32
    assert not devices.has_fast_bfloat16.real(MPS)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device mps works in one process only"):
        processes.start(MPS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto", must_exist=False) == torch.device("cuda")


def test_bfloat16_needs_macos_14(mac, monkeypatch):
    assert resolve_dtype("bfloat16", MPS) == torch.bfloat16
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    with pytest.raises(UserError, match="--dtype bfloat16: mps has it since macOS 14"):
        resolve_dtype("bfloat16", MPS)
    assert resolve_dtype("float16", MPS) == torch.float16


def test_without_a_mac_the_flag_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps: torch sees no GPU of a Mac"):
        resolve_device("mps")
    assert resolve_device("mps", must_exist=False) == MPS


def test_compile_is_refused_before_the_weights_are_loaded(tmp_path, checkpoint):
    options = training_options(compile=True)
    with pytest.raises(UserError, match="--compile does not work on mps"):
        build_model(options, tmp_path / "nowhere", torch.float32, MPS)
    assistant = Assistant(checkpoint, template="plain", device="cpu")
    assistant.device = MPS
    with pytest.raises(UserError, match="--compile does not work on mps"):
        assistant.compile()


def test_a_plan_for_a_mac(checkpoint, rows_file, here):
    said = here(
        train,
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        device="mps",
        output_dir="-",
        dry_run=True,
    )
    assert "float32 on 1 x mps" in said


def test_adamw_without_its_fused_kernel():
    with FakeTensorMode():
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.empty(3, 3, device=MPS))
        optimizer = build_optimizer(layer, training_options())
    assert optimizer.defaults["fused"] is False
    assert build_optimizer(torch.nn.Linear(2, 2), training_options()).defaults["fused"] is True


def test_sampling_draws_in_float64_on_the_cpu():
    with FakeTensorMode(), RefuseFloat64():
        logits = torch.zeros(2, 50, device=MPS)
        chosen = choose_tokens(logits, Sampling(top_k=0), [random_generator(1, 0)] * 2)
        assert chosen.device.type == "mps" and chosen.shape == (2,)
        assert in_float64(logits).device.type == "cpu"
        with pytest.raises(TypeError, match="no float64 on mps"):  # the mode works
            logits.double()


def test_stored_float64_becomes_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    stored = torch.zeros(3, dtype=torch.float64)
    assert move(stored, MPS).dtype == torch.float32 and move(stored, "cpu").dtype == torch.float64


def test_nothing_else_needs_float64(checkpoint, rows_file, tmp_path, here, monkeypatch):
    """Train, score and chat on a CPU that refuses it. in_float64 would compute elsewhere."""
    monkeypatch.setattr("minisft.generation.sampling.in_float64", lambda tensor: tensor)
    monkeypatch.setattr("minisft.selection.ifd.in_float64", lambda tensor: tensor)
    files = dict(model_name_or_path=checkpoint, dataset=rows_file, template="alpaca")
    common = dict(device="cpu", dtype="float32", dataloader_num_workers=0, max_samples=6, **files)
    output = tmp_path / "out"
    with RefuseFloat64("cpu"):
        for flags in (
            dict(finetuning_type="full", packing=True),
            dict(quantization_bit=8, stage="sft"),
            dict(quantization_bit=4, validation_split=2, eval_exact_match=True, eval_steps=1),
        ):
            here(
                train, output_dir=output, overwrite_output_dir=True, max_steps=1, **common, **flags
            )
        here(score, output=tmp_path / "scores.jsonl", mode="all", **common)
        assistant = Assistant(checkpoint, output, template="alpaca", device="cpu")
        sampling = Sampling(max_new_tokens=3, top_p=0.9, repetition_penalty=1.2, seed=1)
        assert list(assistant.stream([{"role": "user", "content": "Hi"}], sampling)) is not None
