"""Tokens a second of fine-tuning, against transformers' Trainer with peft.

    python bench/train.py --num_layers 2 --tokenizer_dir TinyLlama --dataset alpaca_en_demo.json
    python bench/train.py --shape llama3-8b --device cuda --dtype bfloat16 --cutoff_len 2048 \\
        --synthetic_rows 256 --compile
    python bench/train.py ... --sides minisft packed        # what --packing buys

Both sides train the same rows, encoded by us, from the same random weights, in processes of their
own that take turns. Only tokens that are not padding count, and only the second of two epochs, so
that kernels are prepared and both sides have done the same rows. For Trainer there are its defaults
(float32, rows in random order) and its best (the type named, rows grouped by length). Padding is
its share of all that was computed. Peak memory is the process's on the CPU and the allocator's on
a GPU. "Of the device" is the speed of the operations that a step needs (`training_operations` in
minisft/training/operations.py), over that of one large matrix product on the same device.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OURS = ("minisft", "packed")


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer_dir", help="folder of the model's tokenizer")
    parser.add_argument("--dataset", help="alpaca rows, with --tokenizer_dir")
    parser.add_argument("--num_rows", type=int, default=64)
    parser.add_argument(
        "--synthetic_rows",
        type=int,
        default=0,
        help="instead of --dataset: rows of random tokens, all --cutoff_len long",
    )
    parser.add_argument("--cutoff_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--finetuning_type", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", default="float32", help="of both sides, but Trainer's defaults")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["minisft", "best", "defaults"],
        choices=[*OURS, "best", "defaults"],
    )
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def prepare(options, folder):
    """Write the checkpoint and the rows, as token ids with the supervised part marked."""
    from bench.shapes import write_checkpoint

    write_checkpoint(
        folder / "model", options.shape, options.num_layers, tokenizer_dir=options.tokenizer_dir
    )
    if options.synthetic_rows:
        rows = synthetic_rows(options.shape, [options.cutoff_len] * options.synthetic_rows)
    else:
        from minisft.data.dataset import load_rows
        from minisft.text.template_choice import get_template
        from minisft.text.tokenizer import Tokenizer

        template = get_template("alpaca", Tokenizer.load(folder / "model"))
        encoded = [
            template.encode(row.messages)[0]
            for row in load_rows(options.dataset)[: options.num_rows]
        ]
        rows = [
            (ids[: options.cutoff_len], supervised[: options.cutoff_len])
            for ids, supervised in encoded
        ]
    (folder / "rows.json").write_text(json.dumps(rows))


def synthetic_rows(shape, lengths):
    """Rows of random tokens; the last three quarters of each are supervised."""
    import numpy as np

    from bench.shapes import SHAPES

    draw = np.random.default_rng(0)
    return [
        (
            draw.integers(3, SHAPES[shape]["vocab_size"], length).tolist(),
            [place >= length // 4 for place in range(length)],
        )
        for length in lengths
    ]


def training_flags(options):
    """The options of train.py for minisft's side."""
    from minisft.training.options import parse_options as training_options

    switches = [
        f"--{name}" for name in ("compile", "gradient_checkpointing") if getattr(options, name)
    ]
    switches += ["--packing"] * (options.side == "packed")
    return training_options(
        [
            "--model_name_or_path",
            str(Path(options.folder) / "model"),
            "--dataset",
            "-",
            "--template",
            "alpaca",
            "--output_dir",
            options.folder,
            "--finetuning_type",
            options.finetuning_type,
            "--per_device_train_batch_size",
            str(options.batch_size),
            "--num_train_epochs",
            "2",
            "--logging_steps",
            "1",
            "--save_steps",
            "1000000",
            *switches,
        ]
    )


def train_minisft(options, model, lora_config, rows):
    """train.py's own loop, two epochs of the rows -> what was measured of every step.

    model: as train.py's load_trainable returns it, with its LoraConfig.
    """
    import numpy as np
    import torch

    from bench.limits import peak_memory
    from bench.peak import new_run
    from minisft.data import batching, encoding
    from minisft.data.encode_report import EncodeReport
    from minisft.training.metrics import read_metrics
    from minisft.training.objective import NextToken
    from train import train

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    examples = [encoding.Example(np.array(ids), np.array(supervised)) for ids, supervised in rows]
    settings = training_flags(options)
    objective = NextToken(model)
    run = new_run(settings, model, lora_config, len(examples), dtype, device, objective)
    batches = batching.Batches(examples, lambda chosen: (chosen, EncodeReport()))
    collate, computed = run.collate, []

    def counted(examples):
        batch = collate(examples)
        computed.append(batch[0].numel())
        return batch

    run.collate = counted
    train(run, batches, None)
    run.progress.close()
    log = read_metrics(Path(options.folder) / "metrics.jsonl")
    tokens = np.diff([0, *(row["tokens"] for row in log)])
    seconds = tokens / [row["tokens_per_second"] for row in log]
    return {
        "seconds": seconds.tolist(),
        "tokens": tokens.tolist(),
        "padding": (computed - tokens).tolist(),
        "peak": peak_memory(device),
    }


def train_with_trainer(options, model, rows):
    """transformers' Trainer, two epochs of the rows -> what was measured of every step.

    model: transformers' own, which LoRA wraps by peft.
    """
    import time

    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from bench.limits import peak_memory, wait

    best, device = options.side == "best", torch.device(options.device)
    model.config.use_cache = False
    if options.finetuning_type == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear"),
        )
        if options.gradient_checkpointing:
            model.enable_input_require_grads()
    times, tokens, padding = [], [], []

    def collate(batch):
        width = -(-max(len(one["input_ids"]) for one in batch) // 8) * 8
        tokens.append(sum(len(one["input_ids"]) for one in batch))
        padding.append(width * len(batch) - tokens[-1])

        def padded(name, filler):
            return torch.tensor([one[name] + [filler] * (width - len(one[name])) for one in batch])

        mask = torch.tensor(
            [[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"])) for one in batch]
        )
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": mask,
        }

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait(device)
            times.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            wait(device)
            times.append(time.perf_counter())

    data = [
        {
            "input_ids": ids,
            "length": len(ids),
            "labels": [one if kept else -100 for one, kept in zip(ids, supervised, strict=True)],
        }
        for ids, supervised in rows
    ]
    arguments = TrainingArguments(
        options.folder + "/trainer",
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=2,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        report_to=[],
        bf16=best and options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=options.gradient_checkpointing,
        torch_compile=options.compile and best,
        train_sampling_strategy="group_by_length" if best else "random",
    )
    Trainer(
        model, arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]
    ).train()
    steps = len(times) - 1
    return {
        "seconds": np.diff(times).tolist(),
        "tokens": tokens[:steps],
        "padding": padding[:steps],
        "peak": peak_memory(device),
    }


def second_epoch(result):
    """(tokens a second, peak memory in bytes, share of padding), without the epoch that warms up.

    Every row is in the second epoch exactly once.
    """
    warm = len(result["tokens"]) // 2
    tokens, padding = (sum(result[name][warm:]) for name in ("tokens", "padding"))
    return tokens / sum(result["seconds"][warm:]), result["peak"], padding / (tokens + padding)


def one_side():
    """In a process of its own: load, train, print what was measured of every step."""
    options = parse_options()
    import torch
    import transformers

    from bench.limits import forget_peak

    transformers.utils.logging.set_verbosity_error()
    forget_peak(torch.device(options.device))  # that of the imports
    rows = json.loads((Path(options.folder) / "rows.json").read_text())
    model_dir, dtype = Path(options.folder) / "model", getattr(torch, options.dtype)
    if options.side in OURS:
        from minisft.training.build import load_trainable

        model, lora_config = load_trainable(
            training_flags(options), model_dir, dtype, torch.device(options.device)
        )
        result = train_minisft(options, model, lora_config, rows)
    else:
        in_float32 = options.side == "defaults" or options.finetuning_type == "full"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32 if in_float32 else dtype
        )
        result = train_with_trainer(options, model, rows)
    print(json.dumps(result))


def main():
    options = parse_options()
    if options.side:
        one_side()
        return
    results = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        for _ in range(options.repeats):
            for side in options.sides:
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                results[side].append(second_epoch(json.loads(done.stdout.splitlines()[-1])))
        report(options, results, folder)


def report(options, results, folder):
    """Print the medians, the ratios and the share of the device's speed."""
    import torch

    from bench.limits import matrix_speed
    from minisft.model.config import ModelConfig
    from minisft.training.build import model_on_meta
    from minisft.training.operations import training_operations

    dtype, options.folder = getattr(torch, options.dtype), folder
    config = ModelConfig.load(Path(folder) / "model")
    rows = json.loads((Path(folder) / "rows.json").read_text())
    length = statistics.mean(len(ids) for ids, _ in rows)
    model = model_on_meta(training_flags(options), config, dtype)
    operations = training_operations(model, length)
    fastest = matrix_speed(torch.device(options.device), dtype)
    print(
        f"{options.shape}, {config.num_hidden_layers} layers, {options.finetuning_type}, "
        f"{len(rows)} rows of {length:.0f} tokens, batch {options.batch_size}, "
        f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads"
    )
    ours = results.get("minisft", [(math.nan,)] * options.repeats)
    for side, runs in results.items():
        speed, peak, padding = (statistics.median(one) for one in zip(*runs, strict=True))
        ratio = statistics.median(mine[0] / run[0] for mine, run in zip(ours, runs, strict=True))
        print(
            f"{side:>10}: {speed:10,.1f} tokens/s, {peak / 2**20:9,.0f} MiB, "
            f"{padding:5.1%} padding, "
            f"{speed * operations / fastest:4.0%} of the device, minisft / it {ratio:5.2f}"
        )


if __name__ == "__main__":
    main()
