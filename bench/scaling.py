"""How time grows with length, batch, model and processes, and how memory grows with everything.

    python bench/scaling.py               # both tables of docs/scaling.md, on an idle machine
    python bench/scaling.py --computed    # only the table that --dry_run computes, in seconds
    python bench/scaling.py --only LoRA   # only this line of the measured table

Measured: tokens per second of train.py's own steps on rows of random tokens in float32, with
torch's default number of threads, each setting in a separate process; the best of the steps after
the first. Computed: the memory of Llama-3-8B on GPUs, with one option changed at a time.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.measure import flags, output_of  # noqa: E402
from bench.shapes import config_json, write_checkpoint  # noqa: E402
from bench.tables import update  # noqa: E402
from bench.training_run import CHECKPOINTING, FULL, Setting, prepare  # noqa: E402
from minisft.common import processes  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.training.build import model_on_meta  # noqa: E402
from minisft.training.operations import training_operations  # noqa: E402
from train import train_step  # noqa: E402

MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TWICE_AS_WIDE = MODEL | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
MEASURED = {
    "LoRA": Setting(MODEL),
    "rows of 1,024, as many tokens": Setting(MODEL, num_rows=2, length=1024),
    "rows of 2,048, as many tokens": Setting(MODEL, num_rows=1, length=2048),
    "a quarter of the batch": Setting(MODEL, num_rows=2),
    "twice the batch": Setting(MODEL, num_rows=16),
    "twice the layers": Setting(MODEL | {"num_hidden_layers": 12}),
    "twice the width": Setting(TWICE_AS_WIDE),
    "checkpointing": Setting(MODEL, flags=CHECKPOINTING),
    "base in 4 bits": Setting(MODEL, flags=("--quantization_bit", "4")),
    "in full": Setting(MODEL, flags=FULL),
    "two processes": Setting(MODEL, num_processes=2),
    "in full, two processes": Setting(MODEL, flags=FULL, num_processes=2),
}
MEASURED_HEAD = ["change", "micro-batch", "processes", "tokens/s", "10^9 operations/s"]
LORA = ("--per_device_train_batch_size", "4", "--cutoff_len", "2048")
LORA_CHECKPOINTED = LORA + CHECKPOINTING
COMPUTED = {
    "LoRA, checkpointing, 4 x 2,048": LORA_CHECKPOINTED,
    "8 x 2,048": (*LORA_CHECKPOINTED, "--per_device_train_batch_size", "8"),
    "4 x 4,096": (*LORA_CHECKPOINTED, "--cutoff_len", "4096"),
    "1 x 2,048": (*LORA_CHECKPOINTED, "--per_device_train_batch_size", "1"),
    "no checkpointing": LORA,
    "base in 4 bits": (*LORA_CHECKPOINTED, "--quantization_bit", "4"),
    "rank 64": (*LORA_CHECKPOINTED, "--lora_rank", "64"),
    "embedding and output matrix trained": (
        *LORA_CHECKPOINTED,
        "--modules_to_save",
        "embed_tokens,lm_head",
    ),
    "in full": LORA_CHECKPOINTED + FULL,
    "in full, adamw_8bit": (*LORA_CHECKPOINTED, *FULL, "--optim", "adamw_8bit"),
    "in full, pure_bf16": (*LORA_CHECKPOINTED, *FULL, "--pure_bf16"),
    "in full, adamw_8bit, pure_bf16": (
        *(*LORA_CHECKPOINTED, *FULL, "--pure_bf16"),
        *("--optim", "adamw_8bit"),
    ),
    "in full, 8 processes, ddp": (*LORA_CHECKPOINTED, *FULL, "--num_processes", "8"),
    "in full, 8 processes, fsdp": (
        *(*LORA_CHECKPOINTED, *FULL, "--num_processes", "8"),
        *("--parallel", "fsdp"),
    ),
    "in full, 64 processes, fsdp": (
        *(*LORA_CHECKPOINTED, *FULL, "--num_processes", "64"),
        *("--parallel", "fsdp"),
    ),
}
COMPUTED_HEAD = [
    "Llama-3-8B, GB at the peak",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "total",
]
NUM_STEPS = 4


def measure(name: str, folder: str) -> None:
    """Print the seconds of the best step. torchrun may have started this process and others."""
    processes.start(torch.device("cpu"))
    run, batches = prepare(Path(folder), MEASURED[name])
    seconds = []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        train_step(run, batches)
        seconds.append(time.perf_counter() - began)
    processes.print_rank0(json.dumps(min(seconds[1:])))
    processes.stop()


def measured_row(name: str) -> list[str]:
    """A row of the measured table. The speed is that of all processes in total."""
    setting = MEASURED[name]
    launch = []
    if setting.num_processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone"]
        launch += flags(nproc_per_node=setting.num_processes)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", setting.config)
        output = output_of(*launch, __file__, "--setting", name, folder)
    seconds = json.loads(output.splitlines()[-1])
    tokens = setting.num_processes * setting.num_rows * setting.length
    config = ModelConfig.from_dict(setting.config)
    model = model_on_meta(setting.options("."), config, torch.bfloat16)
    is_checkpointed = CHECKPOINTING[0] in setting.flags
    operations = tokens * training_operations(model, setting.length, is_checkpointed)
    return [
        name,
        f"{setting.num_rows} x {setting.length:,}",
        str(setting.num_processes),
        f"{tokens / seconds:,.0f}",
        f"{operations / seconds / 1e9:,.0f}",
    ]


def computed_row(name: str, folder: str) -> list[str]:
    """A row of the computed table, from `train.py --dry_run`. folder: has the config.json."""
    words = flags(
        dry_run=True, model_name_or_path=folder, dataset="none", output_dir=folder, device="cuda"
    )
    output = output_of("train.py", *words, *COMPUTED[name])
    lines = [line.split() for line in output.splitlines() if line.startswith("  ")]
    return [name, *(line[2] if line[0] != "total" else line[1] for line in lines)]


def show(rows: Iterable[list[str]]) -> list[list[str]]:
    """The rows as a list, each printed as it comes."""
    shown = []
    for row in rows:
        print(*row, sep=" | ", flush=True)
        shown.append(row)
    return shown


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--computed", action="store_true", help="only the computed table")
    parser.add_argument("--only", nargs="+", choices=MEASURED, help="measure only these lines")
    parser.add_argument("--setting", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        measure(*options.setting)
        return
    if not options.only:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config_json("llama3-8b")))
            rows = show(computed_row(name, folder) for name in COMPUTED)
        update("scaling.md", "grows", COMPUTED_HEAD, rows, order=COMPUTED)
    if not options.computed:
        rows = show(measured_row(name) for name in options.only or MEASURED)
        note = f"torch {torch.__version__}, {torch.get_num_threads()} threads in all."
        update("scaling.md", "speed", MEASURED_HEAD, rows, order=MEASURED, note=note)


if __name__ == "__main__":
    main()
