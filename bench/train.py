"""Tokens per second of fine-tuning, against transformers' Trainer with peft.

    python bench/train.py --num_layers 2 --tokenizer_dir TinyLlama --dataset alpaca_en_demo.json
    python bench/train.py --shape llama3-8b --device cuda --dtype bfloat16 --cutoff_len 2048 \\
        --synthetic_rows 256 --compile
    python bench/train.py ... --sides minisft packed        # what --packing gains
    python bench/train.py --shape baichuan2-13b --num_layers 4 --synthetic_rows 8 --batch_size 1 \\
        --cutoff_len 2048 --sides minisft rotary            # what ALiBi costs

The sides train on the same rows, encoded by minisft, from the same random weights, each in a
separate process; they take turns. Only tokens without padding count, and only the second of two
epochs, when kernels are warm. Trainer runs with its defaults (float32, rows in random order) and at
its best (the given type, rows grouped by length). The side `rotary` is minisft on the same weights,
with rotary positions in place of ALiBi.

Both sides log once an epoch, because a log waits for the GPU. Padding is given as a share of all
computed tokens. Peak memory is that of the process on a CPU, and of the allocator on a GPU. "Of the
device" is the speed of a step's operations (`training_operations` in
minisft/training/operations.py) as a share of the speed of a large matrix product.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.limits import forget_peak, matrix_speed, peak_memory  # noqa: E402
from bench.measure import flags, output_of  # noqa: E402
from bench.peer_trainer import EncodedRow, Result, steps_per_epoch, train_with_trainer  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from bench.shapes import SHAPES, write_checkpoint  # noqa: E402
from bench.training_run import new_run  # noqa: E402
from minisft.common.metric_lines import read_metrics  # noqa: E402
from minisft.data.batching import Batches  # noqa: E402
from minisft.data.dataset import load_rows  # noqa: E402
from minisft.data.encoding import Example  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.model.decoder import CausalLM  # noqa: E402
from minisft.model.lora import LoraConfig  # noqa: E402
from minisft.text.template_choice import get_template  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402
from minisft.training.build import load_trainable, model_on_meta  # noqa: E402
from minisft.training.lengths import already_encoded  # noqa: E402
from minisft.training.objective import NextToken  # noqa: E402
from minisft.training.operations import training_operations  # noqa: E402
from minisft.training.options import parse_options as parse_training_options  # noqa: E402
from train import train  # noqa: E402

MINISFT_SIDES = ("minisft", "packed", "rotary")


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer_dir", help="folder of the model's tokenizer")
    parser.add_argument("--dataset", help="Alpaca rows; needs --tokenizer_dir")
    parser.add_argument("--num_rows", type=int, default=64)
    synthetic = "instead of --dataset: rows of random tokens, all --cutoff_len long"
    parser.add_argument("--synthetic_rows", type=int, default=0, help=synthetic)
    parser.add_argument("--cutoff_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--finetuning_type", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", default="float32", help="type of all sides but `defaults`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--optim", default="adamw_torch", help="minisft's optimizer")
    parser.add_argument("--pure_bf16", action="store_true", help="minisft's, with full training")
    sides = [*MINISFT_SIDES, "best", "defaults"]
    default = ["minisft", "best", "defaults"]
    parser.add_argument("--sides", nargs="+", default=default, choices=sides)
    parser.add_argument("--repeats", type=int, default=3)
    add_results_option(parser)
    options = parser.parse_args(arguments)
    if "rotary" in options.sides and not SHAPES[options.shape].get("alibi"):
        parser.error("--sides rotary needs a --shape with ALiBi, such as baichuan2-13b")
    return options


def prepare(options: Namespace, folder: Path) -> list[EncodedRow]:
    """Write the checkpoint to `folder`/model, and to `folder`/rotary; returns the rows."""
    model_dir = folder / "model"
    write_checkpoint(
        model_dir, options.shape, options.num_layers, tokenizer_dir=options.tokenizer_dir
    )
    if "rotary" in options.sides:
        write_with_rotary(model_dir, folder / "rotary")
    if options.synthetic_rows:
        return synthetic_rows(options.shape, [options.cutoff_len] * options.synthetic_rows)
    template, rows = get_template("alpaca", Tokenizer.load(model_dir)), []
    for row in load_rows(options.dataset)[: options.num_rows]:
        [text] = template.encode(row.messages)
        rows.append((text.ids[: options.cutoff_len], text.supervised[: options.cutoff_len]))
    return rows


def write_with_rotary(model_dir: Path, folder: Path) -> None:
    """The checkpoint with rotary positions in place of ALiBi: links, and another config.json."""
    without_config = shutil.ignore_patterns("config.json")
    shutil.copytree(model_dir, folder, ignore=without_config, copy_function=os.link)
    content = json.loads((model_dir / "config.json").read_text()) | {"alibi": False}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def model_dir_of(options: Namespace) -> Path:
    """The checkpoint that a side trains."""
    return Path(options.folder) / ("rotary" if options.side == "rotary" else "model")


def synthetic_rows(shape: str, lengths: Sequence[int]) -> list[EncodedRow]:
    """Rows of random tokens; the last three quarters of each are supervised."""
    generator, vocab_size = np.random.default_rng(0), SHAPES[shape]["vocab_size"]
    rows = []
    for length in lengths:
        ids = generator.integers(3, vocab_size, length).tolist()
        rows.append((ids, [place >= length // 4 for place in range(length)]))
    return rows


def training_options(options: Namespace, num_rows: int = 1) -> Namespace:
    """The options of train.py for minisft's side, which trains this many rows."""
    words = flags(
        model_name_or_path=model_dir_of(options),
        dataset="-",
        template="alpaca",
        output_dir=options.folder,
        learning_rate=1e-4,
        finetuning_type=options.finetuning_type,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=2,
        logging_steps=steps_per_epoch(options, num_rows),
        save_steps=1_000_000,
        compile=options.compile,
        gradient_checkpointing=options.gradient_checkpointing,
        optim=options.optim,
        pure_bf16=options.pure_bf16,
        packing=options.side == "packed",
    )
    return parse_training_options(words)


def train_minisft(
    options: Namespace, model: CausalLM, lora_config: LoraConfig | None, rows: Sequence[EncodedRow]
) -> Result:
    """Train two epochs of the rows with train.py's own loop.

    model, lora_config: from load_trainable.
    """
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    examples = [Example(np.array(ids), np.array(supervised)) for ids, supervised in rows]
    settings, objective = training_options(options, len(rows)), NextToken(model)
    run = new_run(settings, model, lora_config, len(examples), dtype, device, objective)
    collate, computed = run.collate, []

    def counting_collate(examples: Sequence[Example]) -> Any:
        """run.collate, which notes the number of computed tokens."""
        batch = collate(examples)
        computed.append(batch[0].numel())
        return batch

    run.collate = counting_collate
    train(run, Batches(examples, already_encoded))
    run.progress.close()
    log = read_metrics(Path(options.folder) / "metrics.jsonl")
    logged = np.diff([0, *(row["tokens"] for row in log)])
    seconds = logged / [row["tokens_per_second"] for row in log]
    # The first step is logged, too: an epoch can have several lines.
    is_second = np.array([row["step"] > steps_per_epoch(options, len(rows)) for row in log])
    tokens = np.array([logged[~is_second].sum(), logged[is_second].sum()])
    return {
        "seconds": [seconds[~is_second].sum(), seconds[is_second].sum()],
        "tokens": tokens.tolist(),
        "padding": (np.reshape(computed, (2, -1)).sum(1) - tokens).tolist(),
        "peak": peak_memory(device),
    }


def second_epoch(result: Result) -> tuple[float, int, float]:
    """(tokens per second, peak memory in bytes, share of padding) without the first epoch."""
    tokens, padding, seconds = (result[name][1] for name in ("tokens", "padding", "seconds"))
    return tokens / seconds, result["peak"], padding / (tokens + padding)


def train_side(options: Namespace) -> Result:
    """Load the checkpoint and train, in the process of a side."""
    # Both sides hold it, so that their memory can be compared. gpu_stages.py loads it when needed.
    import transformers

    transformers.utils.logging.set_verbosity_error()
    folder, dtype = Path(options.folder), getattr(torch, options.dtype)
    device, model_dir = torch.device(options.device), model_dir_of(options)
    rows = json.loads((folder / "rows.json").read_text())
    forget_peak(device)  # that of the imports
    if options.side in MINISFT_SIDES:
        model, lora_config = load_trainable(training_options(options), model_dir, dtype, device)
        assert isinstance(model, CausalLM)
        return train_minisft(options, model, lora_config, rows)
    in_float32 = options.side == "defaults" or options.finetuning_type == "full"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32 if in_float32 else dtype
    )
    return train_with_trainer(options, model, rows)


def report(options: Namespace, results: dict[str, list[Any]], rows: Sequence[EncodedRow]) -> None:
    """Print the medians, the ratios and the share of the device's speed."""
    dtype = getattr(torch, options.dtype)
    config = ModelConfig.load(Path(options.folder) / "model")
    length = statistics.mean(len(ids) for ids, _ in rows)
    model = model_on_meta(training_options(options), config, dtype)
    operations = training_operations(model, length)
    fastest = matrix_speed(torch.device(options.device), dtype)
    print(
        f"{options.shape}, {config.num_hidden_layers} layers, {options.finetuning_type}, "
        f"{len(rows)} rows of {length:.0f} tokens, batch {options.batch_size}, "
        f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads"
    )
    ours = results.get("minisft", [(math.nan,)] * options.repeats)
    medians = {
        side: [statistics.median(column) for column in zip(*runs, strict=True)]
        for side, runs in results.items()
    }
    for side, runs in results.items():
        speed, peak, padding = medians[side]
        ratio = statistics.median(
            our_run[0] / run[0] for our_run, run in zip(ours, runs, strict=True)
        )
        print(
            f"{side:>10}: {speed:10,.1f} tokens/s, {peak / 2**20:9,.0f} MiB, "
            f"{padding:5.1%} padding, "
            f"{speed * operations / fastest:4.0%} of the device, minisft / it {ratio:5.2f}"
        )
    best = medians.get("best")
    for side in set(results) & {"minisft", "packed"}:
        speed, peak, _ = medians[side]
        more = {"share": speed * operations / fastest, "limit": "matrix product"}
        if best:
            more |= {"peer_name": "Trainer + peft", "peer": best[0], "ratio": speed / best[0]}
            more |= {"memory_ratio": peak / best[1]}
        way = "packed" if side == "packed" else "padded"
        name = f"{options.finetuning_type} training in {options.dtype}, {way}"
        add_figure(options.results, name, speed, "tokens/s", **more)


def main() -> None:
    """Run the sides in turn and report."""
    options = parse_options()
    if options.side:
        print(json.dumps(train_side(options)))
        return
    results: dict[str, list[Any]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as options.folder:
        rows = prepare(options, Path(options.folder))
        (Path(options.folder) / "rows.json").write_text(json.dumps(rows))
        for _ in range(options.repeats):
            for side, runs in results.items():
                words = [*sys.argv[1:], "--side", side, "--folder", options.folder]
                runs.append(second_epoch(json.loads(output_of(__file__, *words).splitlines()[-1])))
        report(options, results, rows)


if __name__ == "__main__":
    main()
