"""Compare the memory that --dry_run plans with the memory of training; a table of docs/scaling.md.

    python bench/peak.py                  # all settings, in a process each: some minutes
    python bench/peak.py --only LoRA full

A setting is a small model with random weights, wide enough that its tensors dominate, and three
steps of train.py on rows of random tokens. Two figures are measured:

tensors  the most bytes that torch's allocator holds at any time of the third step, from its
         profiler, which records every allocation. This is what the plan computes, and what
         max_memory_allocated returns on a GPU.
process  the growth of the process's peak from before the model is loaded: tensors, buffers of
         kernels, mapped files. A tiny model is trained first, so that imports and kernels do not
         count. The C library is set to give every tensor its own pages, as it does for 32 MiB or
         more; it would not return smaller tensors to the system.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from bench.measure import forget_peak_memory, output_of, peak_memory  # noqa: E402
from bench.shapes import write_in_own_process  # noqa: E402
from bench.tables import update  # noqa: E402
from bench.training_run import CHECKPOINTING, FULL, Setting, prepare  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.training import memory, plan  # noqa: E402
from minisft.training.build import model_on_meta  # noqa: E402
from train import train_step  # noqa: E402

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
TIED = LARGE_VOCABULARY | {"tie_word_embeddings": True}
QWEN3 = SMALL | {"model_type": "qwen3", "head_dim": 64}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 4,
    "num_hidden_layers": 1,
}
REWARD, DPO = ("--stage", "rm"), ("--stage", "dpo")
Q_AND_V = ("--lora_target", "q_proj,v_proj", "--lora_dropout", "0.05")
SAVED = ("--modules_to_save", "embed_tokens,lm_head")
FOUR_BITS, INT8 = ("--quantization_bit", "4"), ("--quantization_bit", "8")
EIGHT_BITS, PURE_BF16 = ("--optim", "adamw_8bit"), ("--pure_bf16",)
SETTINGS = {
    "LoRA": Setting(SMALL),
    "LoRA, half the batch": Setting(SMALL, num_rows=4),
    "LoRA, longer rows": Setting(SMALL, num_rows=4, length=1024),
    "LoRA, checkpointing": Setting(SMALL, length=512, flags=CHECKPOINTING),
    "LoRA of q and v, dropout": Setting(SMALL, flags=Q_AND_V),
    "LoRA, packing": Setting(SMALL, flags=("--packing",)),
    "LoRA, bfloat16": Setting(SMALL, dtype="bfloat16"),
    "LoRA, embedding and output saved": Setting(SMALL, flags=SAVED),
    "LoRA, Qwen3": Setting(QWEN3),
    "LoRA, vocabulary of 128k": Setting(LARGE_VOCABULARY),
    "QLoRA, 4 bits": Setting(SMALL, flags=FOUR_BITS),
    "QLoRA, 8 bits, checkpointing": Setting(SMALL, flags=INT8 + CHECKPOINTING),
    "full": Setting(SMALL, flags=FULL),
    "full, checkpointing": Setting(SMALL, flags=FULL + CHECKPOINTING),
    "full, accumulation": Setting(SMALL, num_rows=4, num_micro_batches=2, flags=FULL),
    "full, bfloat16": Setting(SMALL, dtype="bfloat16", flags=FULL),
    "full, bfloat16, checkpointing, accumulation": Setting(
        SMALL, num_rows=4, num_micro_batches=2, dtype="bfloat16", flags=FULL + CHECKPOINTING
    ),
    "full, adamw_8bit": Setting(SMALL, flags=FULL + EIGHT_BITS),
    "full, pure_bf16": Setting(SMALL, dtype="bfloat16", flags=FULL + PURE_BF16),
    "full, adamw_8bit, pure_bf16, checkpointing": Setting(
        SMALL, dtype="bfloat16", flags=FULL + EIGHT_BITS + PURE_BF16 + CHECKPOINTING
    ),
    "full, vocabulary of 128k": Setting(LARGE_VOCABULARY, flags=FULL),
    "full, tied, accumulation": Setting(TIED, num_rows=2, num_micro_batches=2, flags=FULL),
    "reward, LoRA": Setting(SMALL, num_rows=4, flags=REWARD),
    "reward, full": Setting(SMALL, num_rows=4, flags=REWARD + FULL),
    "DPO, LoRA": Setting(SMALL, num_rows=4, flags=DPO),
    "DPO, LoRA, vocabulary of 128k": Setting(LARGE_VOCABULARY, num_rows=4, flags=DPO),
    "DPO, full": Setting(SMALL, num_rows=4, flags=DPO + FULL),
    "DPO, full, checkpointing": Setting(SMALL, num_rows=4, flags=DPO + FULL + CHECKPOINTING),
    "DPO, full, reference computed before": Setting(
        SMALL, num_rows=4, flags=(*DPO, *FULL, "--precompute_reference")
    ),
}
HEAD = [
    "setting",
    "micro-batch",
    "planned, MiB",
    "tensors, MiB",
    "process, MiB",
    "planned / tensors",
    "planned / process",
    "the peak is at",
]


def most_allocated(function: Callable[[], object]) -> int:
    """The most bytes that torch allocates during function(), beyond what it holds before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: Any = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(folder: Path, setting: Setting) -> dict[str, Any]:
    """{"planned", "tensors", "process": bytes, "at": name of the peak} of the model in a folder."""
    before = forget_peak_memory()
    run, batches = prepare(folder, setting)
    for _ in range(2):
        train_step(run, batches)
    process = peak_memory() - before
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    reference = getattr(getattr(run.objective, "reference", None), "model", run.model)
    tensors = (*run.model.parameters(), *run.model.buffers(), *reference.parameters(), *moments)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    allocated = most_allocated(lambda: train_step(run, batches))

    dtype, batch = getattr(torch, setting.dtype), batches[0]
    is_ranked = hasattr(batch, "tokens")  # Answers, not a tuple
    tokens, supervised = (batch.tokens, batch.supervised) if is_ranked else batch[:2]
    sizes = tokens.numel(), int(supervised[:, 1:].sum())
    model = model_on_meta(run.options, ModelConfig.load(folder / "model"), dtype)
    step = plan.planned_step(run.options, model, sizes, dtype, "cpu", 1)
    peak = max(memory.phases(model, step), key=lambda phase: phase.total)
    return {
        "planned": peak.total,
        "tensors": sum(held.values()) + allocated,
        "process": process,
        "at": peak.name,
    }


def measure_alone(name: str) -> dict[str, Any]:
    """`measure` of a setting, after steps of a tiny model: imports and kernels do not count."""
    setting = SETTINGS[name]
    tiny = replace(setting, config=setting.config | TINY, num_rows=1, length=16)
    for current in (tiny, setting):
        with tempfile.TemporaryDirectory() as folder:
            write_in_own_process(Path(folder) / "model", current.config)
            result = measure(Path(folder), current)
    return result


def table_row(name: str, result: dict[str, Any]) -> list[str]:
    """The row of a setting in the table."""
    setting = SETTINGS[name]
    pairs = " x 2" if "--stage" in setting.flags else ""
    accumulated = f" x {setting.num_micro_batches}" if setting.num_micro_batches > 1 else ""
    return [
        name,
        f"{setting.num_rows}{pairs} x {setting.length:,}{accumulated}",
        *(f"{result[figure] / 2**20:,.0f}" for figure in ("planned", "tensors", "process")),
        *(f"{result['planned'] / result[figure]:.2f}" for figure in ("tensors", "process")),
        result["at"],
    ]


def main() -> None:
    """Measure each setting in a separate process, and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="measure only these settings")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure_alone(options.setting)))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    for name in options.only or SETTINGS:
        output = output_of(__file__, "--setting", name, env=environment)
        row = table_row(name, json.loads(output.splitlines()[-1]))
        print(*row, sep=" | ", flush=True)
        update("scaling.md", "peak", HEAD, [row], order=SETTINGS)


if __name__ == "__main__":
    main()
