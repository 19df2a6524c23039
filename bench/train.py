"""Tokens a second of fine-tuning, against transformers' Trainer with peft.

    python bench/train.py --num_layers 2 --tokenizer_dir TinyLlama --dataset alpaca_en_demo.json
    python bench/train.py --shape llama3-8b --device cuda --dtype bfloat16 --cutoff_len 2048 \\
        --synthetic_rows 256 --compile
    python bench/train.py ... --sides minisft packed        # what --packing buys

Both sides train the same rows, encoded by us, from the same random weights, in processes of their
own that take turns. Only tokens that are not padding count, and only the second of two epochs, so
that kernels are prepared and both sides have done the same rows. For Trainer there are its defaults
(float32, rows in random order) and its best (the type named, rows grouped by length). Padding is
its share of all that was computed. Peak memory
is the process's on the CPU and the allocator's on a GPU. The utilisation is that of the matrix
multiplications the model needs, over what one large multiplication reaches on the same device.
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
sys.path.insert(1, str(ROOT / "bench"))

OURS = ("minisft", "packed")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer_dir", help="folder of the model's tokenizer")
    parser.add_argument("--dataset", help="alpaca rows, with --tokenizer_dir")
    parser.add_argument("--num_rows", type=int, default=64)
    parser.add_argument("--synthetic_rows", type=int, default=0,
                        help="instead of --dataset: rows of random tokens, all --cutoff_len long")
    parser.add_argument("--cutoff_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--finetuning_type", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", default="float32", help="of both sides, but Trainer's defaults")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--sides", nargs="+", default=["minisft", "best", "defaults"],
                        choices=[*OURS, "best", "defaults"])
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def prepare(options, folder):
    """Write the checkpoint and the rows, as token ids with the supervised part marked."""
    import numpy as np
    from shapes import SHAPES, write_checkpoint

    write_checkpoint(folder / "model", options.shape, options.num_layers,
                     tokenizer_dir=options.tokenizer_dir)
    if options.synthetic_rows:
        draw = np.random.default_rng(0)
        rows = [(draw.integers(3, SHAPES[options.shape]["vocab_size"], options.cutoff_len).tolist(),
                 [False] * (options.cutoff_len // 4)
                 + [True] * (options.cutoff_len - options.cutoff_len // 4))
                for _ in range(options.synthetic_rows)]
    else:
        from minisft.data.dataset import load_rows
        from minisft.text.template import get_template
        from minisft.text.tokenizer import Tokenizer

        template = get_template("alpaca", Tokenizer.load(folder / "model"))
        encoded = [template.encode(row.messages)
                   for row in load_rows(options.dataset)[: options.num_rows]]
        rows = [(ids[: options.cutoff_len], supervised[: options.cutoff_len])
                for ids, supervised in encoded]
    (folder / "rows.json").write_text(json.dumps(rows))


def peak_memory(device):
    """Bytes: of the GPU's allocator, or of this process since `forget_peak`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def train_minisft(options, rows):
    """train.py's own steps over the rows -> seconds, tokens and padding of every step."""
    import numpy as np
    import torch

    from peak import new_run

    from minisft.data import batching, encoding
    from minisft.training.build import load_trainable
    from minisft.training.metrics import read_metrics
    from minisft.training.objective import NextToken
    from minisft.training.options import parse_options as training_options
    from train import train

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    folder = Path(options.folder)
    switches = [f"--{name}" for name in ("compile", "gradient_checkpointing")
                if getattr(options, name)]
    switches += ["--packing"] * (options.side == "packed")
    settings = training_options([
        "--model_name_or_path", str(folder / "model"), "--dataset", "-", "--template", "alpaca",
        "--output_dir", options.folder, "--finetuning_type", options.finetuning_type,
        "--per_device_train_batch_size", str(options.batch_size), "--num_train_epochs", "2",
        "--logging_steps", "1", "--save_steps", "1000000", *switches])
    model, lora_config = load_trainable(settings, folder / "model", dtype, device)
    examples = [encoding.Example(np.array(ids), np.array(supervised)) for ids, supervised in rows]
    objective = NextToken(model)
    run = new_run(settings, model, lora_config, len(examples), dtype, device, objective)
    batches = batching.Batches(examples, lambda chosen: (chosen, encoding.EncodeReport()))
    collate, computed = run.collate, []

    def counted(examples):
        batch = collate(examples)
        computed.append(batch[0].numel())
        return batch

    run.collate = counted
    train(run, batches, None)
    run.progress.close()
    log = read_metrics(folder / "metrics.jsonl")
    tokens = np.diff([0, *(row["tokens"] for row in log)])
    seconds = tokens / [row["tokens_per_second"] for row in log]
    return seconds.tolist(), tokens.tolist(), (computed - tokens).tolist()


def train_with_trainer(options, rows):
    """Trainer's steps over the rows -> seconds, tokens and padding of every step."""
    import time

    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    best = options.side == "best"
    dtype = getattr(torch, options.dtype) if best else torch.float32
    full = options.finetuning_type == "full"
    model = AutoModelForCausalLM.from_pretrained(options.folder + "/model",
                                                 dtype=torch.float32 if full else dtype)
    model.config.use_cache = False
    if not full:
        model = get_peft_model(model, LoraConfig(
            r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear"))
        if options.gradient_checkpointing:
            model.enable_input_require_grads()
    times, tokens, padding = [], [], []

    def collate(batch):
        width = -(-max(len(one["input_ids"]) for one in batch) // 8) * 8
        tokens.append(sum(len(one["input_ids"]) for one in batch))
        padding.append(width * len(batch) - tokens[-1])

        def padded(name, filler):
            return torch.tensor([one[name] + [filler] * (width - len(one[name])) for one in batch])

        mask = torch.tensor([[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"]))
                             for one in batch])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100),
                "attention_mask": mask}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            times.append(time.perf_counter())

    data = [{"input_ids": ids, "length": len(ids),
             "labels": [one if kept else -100 for one, kept in zip(ids, supervised, strict=True)]}
            for ids, supervised in rows]
    arguments = TrainingArguments(
        options.folder + "/trainer", per_device_train_batch_size=options.batch_size,
        num_train_epochs=2, learning_rate=1e-4, lr_scheduler_type="cosine", report_to=[],
        bf16=best and dtype == torch.bfloat16, use_cpu=options.device == "cpu", logging_steps=1,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        gradient_checkpointing=options.gradient_checkpointing,
        torch_compile=options.compile and best,
        train_sampling_strategy="group_by_length" if best else "random",
    )
    Trainer(model, arguments, train_dataset=data, data_collator=collate,
            callbacks=[Clock()]).train()
    steps = len(times) - 1
    return np.diff(times).tolist(), tokens[:steps], padding[:steps]


def one_side():
    """In a process of its own: train, print what was measured of every step, and of memory."""
    options = parse_options()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    rows = json.loads((Path(options.folder) / "rows.json").read_text())
    if options.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    train_side = train_minisft if options.side in OURS else train_with_trainer
    seconds, tokens, padding = train_side(options, rows)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "padding": padding,
                      "peak": peak_memory(torch.device(options.device))}))


def operations_per_token(config, finetuning_type, length):
    """Floating-point operations of training one token: forward, backward, weight gradients."""
    from shapes import parameters_of

    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    forward = 2 * parameters_of(config)[0] + attention
    return forward * (3 if finetuning_type == "full" else 2)


def matrix_speed(device, dtype):
    """Operations a second that one large matrix multiplication reaches."""
    import time

    import torch

    size = 8192 if device == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=dtype)
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        _ = left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(2 * size**3 / (time.perf_counter() - began))
    return max(speeds)


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
                    stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                warm = len(result["tokens"]) // 2  # the first epoch; the second has every row once
                tokens, padding = (sum(result[name][warm:]) for name in ("tokens", "padding"))
                results[side].append((tokens / sum(result["seconds"][warm:]), result["peak"],
                                      padding / (tokens + padding)))
        report(options, results, folder)


def report(options, results, folder):
    """Print the medians, the ratios and the share of the device's speed."""
    import torch

    from minisft.model.config import ModelConfig

    config = ModelConfig.load(Path(folder) / "model")
    rows = json.loads((Path(folder) / "rows.json").read_text())
    length = statistics.mean(len(ids) for ids, _ in rows)
    operations = operations_per_token(config, options.finetuning_type, length)
    fastest = matrix_speed(options.device, getattr(torch, options.dtype))
    print(f"{options.shape}, {config.num_hidden_layers} layers, {options.finetuning_type}, "
          f"{len(rows)} rows of {length:.0f} tokens, batch {options.batch_size}, "
          f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads")
    ours = results.get("minisft", [(math.nan,)] * options.repeats)
    for side, runs in results.items():
        speed, peak, padding = (statistics.median(one) for one in zip(*runs, strict=True))
        ratio = statistics.median(mine[0] / run[0] for mine, run in zip(ours, runs, strict=True))
        print(f"{side:>10}: {speed:10,.1f} tokens/s, {peak / 2**20:9,.0f} MiB, "
              f"{padding:5.1%} padding, "
              f"{speed * operations / fastest:4.0%} of the device, minisft / it {ratio:5.2f}")


if __name__ == "__main__":
    main()
