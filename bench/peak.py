"""What --dry_run says of memory, against what training takes; writes the table of docs/scaling.md.

    python bench/peak.py                  # all settings, a process each, some minutes
    python bench/peak.py --only LoRA full # some of them

Every setting is a small model (wide enough for tensors to be what counts) with random weights, and
three steps by train.py's own functions on rows of random tokens. Two things are measured:

tensors  the most bytes that torch's allocator had given out at any time of the third step, counted
         by its profiler from every allocation and release. This is what the plan computes, and what
         a GPU calls max_memory_allocated.
process  how much the resident memory of the process grew at its peak, from before the model was
         loaded: the tensors, buffers of kernels, mapped files. A tiny model has been trained
         before, so that imports and kernels do not count. The C library is told to give every
         tensor pages of its own, as it does by itself from 32 MiB on, which those of real models
         have; smaller ones it would keep when they are given back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

SMALL = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LARGE_VOCABULARY = SMALL | {"vocab_size": 128256, "hidden_size": 256, "num_hidden_layers": 2}
QWEN3 = SMALL | {"model_type": "qwen3", "head_dim": 64}
FULL, CHECKPOINTING = ["--finetuning_type", "full"], ["--gradient_checkpointing"]
REWARD, DPO = ["--stage", "rm"], ["--stage", "dpo"]
# name: (model, rows of a micro-batch, their length, micro-batches of a step, type, flags); of the
# two answers of a row each has that length.
SETTINGS = {
    "LoRA": (SMALL, 8, 256, 1, "float32", []),
    "LoRA, half the batch": (SMALL, 4, 256, 1, "float32", []),
    "LoRA, longer rows": (SMALL, 4, 1024, 1, "float32", []),
    "LoRA, checkpointing": (SMALL, 8, 512, 1, "float32", CHECKPOINTING),
    "LoRA of q and v, dropout": (
        SMALL,
        8,
        256,
        1,
        "float32",
        ["--lora_target", "q_proj,v_proj", "--lora_dropout", "0.05"],
    ),
    "LoRA, packing": (SMALL, 8, 256, 1, "float32", ["--packing"]),
    "LoRA, bfloat16": (SMALL, 8, 256, 1, "bfloat16", []),
    "LoRA, embedding and output saved": (
        SMALL,
        8,
        256,
        1,
        "float32",
        ["--modules_to_save", "embed_tokens,lm_head"],
    ),
    "LoRA, Qwen3": (QWEN3, 8, 256, 1, "float32", []),
    "LoRA, vocabulary of 128k": (LARGE_VOCABULARY, 8, 256, 1, "float32", []),
    "QLoRA, 4 bits": (SMALL, 8, 256, 1, "float32", ["--quantization_bit", "4"]),
    "QLoRA, 8 bits, checkpointing": (
        SMALL,
        8,
        256,
        1,
        "float32",
        ["--quantization_bit", "8", *CHECKPOINTING],
    ),
    "full": (SMALL, 8, 256, 1, "float32", FULL),
    "full, checkpointing": (SMALL, 8, 256, 1, "float32", FULL + CHECKPOINTING),
    "full, accumulation": (SMALL, 4, 256, 2, "float32", FULL),
    "full, bfloat16": (SMALL, 8, 256, 1, "bfloat16", FULL),
    "full, bfloat16, checkpointing, accumulation": (
        SMALL,
        4,
        256,
        2,
        "bfloat16",
        FULL + CHECKPOINTING,
    ),
    "full, vocabulary of 128k": (LARGE_VOCABULARY, 8, 256, 1, "float32", FULL),
    "full, tied, accumulation": (
        LARGE_VOCABULARY | {"tie_word_embeddings": True},
        2,
        256,
        2,
        "float32",
        FULL,
    ),
    "reward, LoRA": (SMALL, 4, 256, 1, "float32", REWARD),
    "reward, full": (SMALL, 4, 256, 1, "float32", REWARD + FULL),
    "DPO, LoRA": (SMALL, 4, 256, 1, "float32", DPO),
    "DPO, LoRA, vocabulary of 128k": (LARGE_VOCABULARY, 4, 256, 1, "float32", DPO),
    "DPO, full": (SMALL, 4, 256, 1, "float32", DPO + FULL),
    "DPO, full, checkpointing": (SMALL, 4, 256, 1, "float32", DPO + FULL + CHECKPOINTING),
    "DPO, full, reference computed before": (
        SMALL,
        4,
        256,
        1,
        "float32",
        DPO + FULL + ["--precompute_reference"],
    ),
}
HEADS = [
    "setting",
    "micro-batch",
    "planned, MiB",
    "tensors, MiB",
    "process, MiB",
    "planned / tensors",
    "planned / process",
    "the peak is at",
]
SUPERVISED = 0.75  # share of a row


def status(name):
    """Bytes that the kernel reports of this process: VmRSS now, VmHWM at its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def forget_peak():
    """Let VmHWM begin anew; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def write_model(folder, fields):
    """A checkpoint in bfloat16 with random weights, written by another process."""
    code = (
        "import json, sys, torch; from minisft.model.config import ModelConfig; "
        "from minisft.model.decoder import CausalLM; "
        "from minisft.checkpoints.folders import save_model; "
        "model = CausalLM(ModelConfig.from_dict(json.loads(sys.argv[2]))); model.initialize(); "
        "save_model(model, sys.argv[1], torch.bfloat16)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(fields)], cwd=ROOT, check=True
    )


def new_run(options, model, lora_config, num_rows, dtype, device, objective):
    """A new Run, as `main` of train.py fills it."""
    from minisft.common import processes
    from minisft.training.metrics import Progress
    from minisft.training.optimizer import build_optimizer
    from minisft.training.run import (
        Run,
        build_precision,
        build_schedule,
        count_rows_per_step,
        wrap_model,
    )

    rows_per_step = count_rows_per_step(options, processes.world_size())
    schedule = build_schedule(options, num_rows, rows_per_step)
    path = Path(options.output_dir) / "metrics.jsonl"
    return Run(
        options,
        model,
        lora_config,
        objective,
        build_optimizer(model, options),
        schedule,
        build_precision(options, dtype, device),
        Progress(schedule.total_steps, path, device),
        wrap_model(model, options),
    )


def prepare(folder, fields, batch_size, length, accumulated, dtype, flags):
    """A Run as train.py makes it, and this process's micro-batches."""
    import numpy as np
    import torch

    from minisft.common import processes
    from minisft.data import batching, encoding
    from minisft.data.encode_report import EncodeReport
    from minisft.training.build import load_trainable
    from minisft.training.options import parse_options
    from train import build_objective

    options = parse_options(
        [
            "--model_name_or_path",
            str(folder / "model"),
            "--dataset",
            "-",
            "--output_dir",
            str(folder),
            "--per_device_train_batch_size",
            str(batch_size),
            "--max_steps",
            "100",
            "--gradient_accumulation_steps",
            str(accumulated),
            *flags,
        ]
    )
    device, dtype, draw = torch.device("cpu"), getattr(torch, dtype), np.random.default_rng(0)
    model, lora_config = load_trainable(options, folder / "model", dtype, device)
    lengths = [length] * 2 if options.stage in ("rm", "dpo") else [length]
    supervised = np.tile(np.arange(length) >= (1 - SUPERVISED) * length, len(lengths))
    examples = [
        encoding.Example(draw.integers(0, fields["vocab_size"], sum(lengths)), supervised, lengths)
        for _ in range(batch_size * accumulated * processes.world_size())
    ]
    batches = batching.Batches(examples, lambda rows: (rows, EncodeReport()))
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    objective = build_objective(options, model, batches, None, autocast)
    run = new_run(options, model, lora_config, len(examples), dtype, device, objective)
    parts = batching.micro_batches(examples, batch_size, processes.rank(), processes.world_size())
    return run, [run.collate(part) for part in parts]


def allocated(function):
    """The most bytes that torch had given out while function() ran, over what was held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(folder, fields, batch_size, length, accumulated, dtype, flags):
    """{"planned", "tensors", "process": bytes, "at": the moment} of the model in a folder."""
    import torch

    from minisft.model.config import ModelConfig
    from minisft.training import memory, plan
    from minisft.training.build import model_on_meta
    from train import train_step

    before = forget_peak()
    run, batches = prepare(folder, fields, batch_size, length, accumulated, dtype, flags)
    for _ in range(2):
        train_step(run, batches)
    process = status("VmHWM") - before
    states = [one for state in run.optimizer.state.values() for one in state.values()]
    reference = getattr(getattr(run.objective, "reference", None), "model", run.model)
    held = {
        one.data_ptr(): one.nbytes
        for one in (*run.model.parameters(), *run.model.buffers(), *reference.parameters(), *states)
    }
    tensors = sum(held.values()) + allocated(lambda: train_step(run, batches))
    model = model_on_meta(run.options, ModelConfig.load(folder / "model"), getattr(torch, dtype))
    tokens, supervised = (
        (one.tokens, one.supervised) if hasattr(one := batches[0], "tokens") else one[:2]
    )
    step = plan.planned_step(
        run.options,
        model,
        (tokens.numel(), int(supervised[:, 1:].sum())),
        getattr(torch, dtype),
        "cpu",
        1,
    )
    peak = max(memory.phases(model, step), key=lambda phase: phase.total)
    return {"planned": peak.total, "tensors": tensors, "process": process, "at": peak.name}


def measure_one(name):
    """measure() of a setting, behind a step of a tiny model: what is loaded once is not counted."""
    fields, *setting = SETTINGS[name]
    tiny = fields | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 4,
        "num_hidden_layers": 1,
    }
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write_model(Path(one) / "model", tiny)
        measure(Path(one), tiny, 1, 16, *setting[2:])
        write_model(Path(other) / "model", fields)
        return measure(Path(other), fields, *setting)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="leave the others as they are")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.one)))
        return
    from tables import update

    for name in options.only or SETTINGS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
        )
        found = json.loads(done.stdout.splitlines()[-1])
        _, batch_size, length, accumulated, dtype, flags = SETTINGS[name]
        pairs = " x 2" if "--stage" in flags else ""
        row = [
            name,
            f"{batch_size}{pairs} x {length:,}" + f" x {accumulated}" * (accumulated > 1),
            *(f"{found[one] / 2**20:,.0f}" for one in ("planned", "tensors", "process")),
            *(f"{found['planned'] / found[one]:.2f}" for one in ("tensors", "process")),
            found["at"],
        ]
        print(*row, sep=" | ", flush=True)
        update("scaling.md", "peak", HEADS, [row], order=SETTINGS)


if __name__ == "__main__":
    main()
