"""How time grows with length, batch, model and processes, and memory with everything.

    python bench/scaling.py               # both tables of docs/scaling.md, on an idle machine
    python bench/scaling.py --computed    # only the one that --dry_run computes, in seconds
    python bench/scaling.py --only LoRA   # only one line of the measured one

Measured: tokens a second of train.py's own steps on rows of random tokens in float32, on as many
threads as torch takes, each setting in a process of its own, best of the steps after the first.
Computed: the memory of Llama-3-8B's shape on GPUs, one setting changed at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from peak import CHECKPOINTING, FULL, prepare, write_model  # noqa: E402

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
# what changes: (model, rows, their length, processes, flags)
MEASURED = {
    "LoRA": (MODEL, 8, 256, 1, []),
    "rows of 1,024, as many tokens": (MODEL, 2, 1024, 1, []),
    "rows of 2,048, as many tokens": (MODEL, 1, 2048, 1, []),
    "a quarter of the batch": (MODEL, 2, 256, 1, []),
    "twice the batch": (MODEL, 16, 256, 1, []),
    "twice the layers": (MODEL | {"num_hidden_layers": 12}, 8, 256, 1, []),
    "twice the width": (TWICE_AS_WIDE, 8, 256, 1, []),
    "checkpointing": (MODEL, 8, 256, 1, CHECKPOINTING),
    "base in 4 bits": (MODEL, 8, 256, 1, ["--quantization_bit", "4"]),
    "in full": (MODEL, 8, 256, 1, FULL),
    "two processes": (MODEL, 8, 256, 2, []),
    "in full, two processes": (MODEL, 8, 256, 2, FULL),
}
LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LORA = ["--gradient_checkpointing", "--per_device_train_batch_size", "4", "--cutoff_len", "2048"]
COMPUTED = {
    "LoRA, checkpointing, 4 x 2,048": LORA,
    "8 x 2,048": [*LORA, "--per_device_train_batch_size", "8"],
    "4 x 4,096": [*LORA, "--cutoff_len", "4096"],
    "1 x 2,048": [*LORA, "--per_device_train_batch_size", "1"],
    "no checkpointing": LORA[1:],
    "base in 4 bits": [*LORA, "--quantization_bit", "4"],
    "rank 64": [*LORA, "--lora_rank", "64"],
    "embedding and output matrix trained": [*LORA, "--modules_to_save", "embed_tokens,lm_head"],
    "in full": [*LORA, *FULL],
    "in full, 8 processes, ddp": [*LORA, *FULL, "--num_processes", "8"],
    "in full, 8 processes, fsdp": [*LORA, *FULL, "--num_processes", "8", "--parallel", "fsdp"],
    "in full, 64 processes, fsdp": [*LORA, *FULL, "--num_processes", "64", "--parallel", "fsdp"],
}
NUM_STEPS = 4


def measure(name, folder):
    """Seconds of the best step, in a process that torchrun may have started with others."""
    import torch

    from minisft.common import processes
    from train import train_step

    fields, batch_size, length, _, flags = MEASURED[name]
    processes.start(torch.device("cpu"))
    run, batches = prepare(Path(folder), fields, batch_size, length, 1, "float32", flags)
    times = []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        train_step(run, batches)
        times.append(time.perf_counter() - began)
    processes.print_rank0(json.dumps(min(times[1:])))
    processes.stop()


def measured_rows(names):
    """Rows of the measured table; a speed is that of all processes together."""
    from minisft.training.build import model_on_meta
    from minisft.training.operations import training_operations

    rows = []
    for name in names:
        fields, batch_size, length, count, flags = MEASURED[name]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", fields)
            done = subprocess.run(
                [sys.executable, *(launch if count > 1 else []), __file__, "--one", name, folder],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
        seconds, tokens = json.loads(done.stdout.splitlines()[-1]), count * batch_size * length
        model = model_on_meta(*planned(fields, flags))
        operations = tokens * training_operations(model, length, CHECKPOINTING[0] in flags)
        rows.append(
            [
                name,
                f"{batch_size} x {length:,}",
                count,
                f"{tokens / seconds:,.0f}",
                f"{operations / seconds / 1e9:,.0f}",
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def planned(fields, flags):
    """What model_on_meta takes."""
    import torch

    from minisft.model.config import ModelConfig
    from minisft.training.options import parse_options

    options = parse_options(
        ["--model_name_or_path", "-", "--dataset", "-", "--output_dir", "-", *flags]
    )
    return options, ModelConfig.from_dict(fields), torch.bfloat16


def computed_rows():
    """The rows of the computed table, from `train.py --dry_run`."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA3_8B))
        for name, flags in COMPUTED.items():
            done = subprocess.run(
                [
                    sys.executable,
                    ROOT / "train.py",
                    "--dry_run",
                    "--model_name_or_path",
                    folder,
                    "--dataset",
                    "nowhere",
                    "--output_dir",
                    folder,
                    "--device",
                    "cuda",
                    *flags,
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
            rows.append([name, *(line[2] if line[0] != "total" else line[1] for line in lines)])
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--computed", action="store_true", help="only what is not measured")
    parser.add_argument("--only", nargs="+", choices=MEASURED, help="leave the others as they are")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one)
        return
    from tables import update

    if not options.only:
        update(
            "scaling.md",
            "grows",
            [
                "Llama-3-8B, GB at the peak",
                "weights",
                "gradients",
                "optimizer",
                "activations",
                "logits",
                "total",
            ],
            computed_rows(),
            order=COMPUTED,
        )
    if not options.computed:
        import torch

        update(
            "scaling.md",
            "speed",
            ["change", "micro-batch", "processes", "tokens/s", "10^9 operations/s"],
            measured_rows(options.only or MEASURED),
            order=MEASURED,
            note=f"torch {torch.__version__}, {torch.get_num_threads()} threads in all.",
        )


if __name__ == "__main__":
    main()
