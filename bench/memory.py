"""Peak memory of LoRA, QLoRA and full training, against transformers with peft and bitsandbytes.

    python bench/memory.py                   # all settings; writes a table of docs/scaling.md
    python bench/memory.py --only "LoRA, vocabulary of 32k"

Each side takes three steps in its own process, with AdamW, the same random weights and the same
rows of random tokens, three quarters of them supervised. Weights are stored in bfloat16 and trained
in float32 (with pure_bf16 in bfloat16). adamw_8bit is bitsandbytes' AdamW8bit on their side.
transformers computes its own loss (`model(..., labels=...)`) and its attention by sdpa, as in
Trainer. The figure is the growth of the resident memory at its peak, from before the model is
loaded. Each side trains a tiny model first, so that imports and kernels do not count. Widths are
small, so that a run takes minutes, but vocabularies are real. So logits have a larger share than
usual.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.measure import forget_peak_memory, output_of, peak_memory  # noqa: E402
from bench.shapes import write_checkpoint  # noqa: E402
from bench.tables import update  # noqa: E402
from bench.training_run import CHECKPOINTING, FULL, SUPERVISED, Setting, prepare  # noqa: E402
from minisft.training.build import trained_parameters
from train import train_step  # noqa: E402

SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "vocab_size": 256,
}
NUM_STEPS = 3
QLORA = ("--quantization_bit", "4")
EIGHT_BITS, PURE_BF16 = ("--optim", "adamw_8bit"), ("--pure_bf16",)
METHODS = {
    "LoRA": (),
    "LoRA, checkpointing": CHECKPOINTING,
    "QLoRA": QLORA,
    "QLoRA, checkpointing": QLORA + CHECKPOINTING,
    "full": FULL,
    "full, checkpointing": FULL + CHECKPOINTING,
    "full, adamw_8bit": FULL + EIGHT_BITS,
    "full, pure_bf16": FULL + PURE_BF16,
    "full, adamw_8bit, pure_bf16": FULL + EIGHT_BITS + PURE_BF16,
}
SETTINGS = {
    f"{method}, vocabulary of {size // 1000}k": Setting(
        SHAPE | {"vocab_size": size},
        num_rows=4,
        length=512,
        dtype="bfloat16" if "--pure_bf16" in flags else "float32",
        flags=flags,
    )
    for size in (32000, 128256)
    for method, flags in METHODS.items()
}
HEAD = ["setting", "minisft, MiB", "transformers + peft, MiB", "ratio"]


def train_minisft(folder: Path, setting: Setting) -> None:
    """Take the steps with train.py's own functions."""
    run, batches = prepare(folder, setting)
    for _ in range(NUM_STEPS):
        train_step(run, batches)


def train_with_peft(folder: Path, setting: Setting) -> None:
    """Take the same steps with transformers, peft and bitsandbytes."""
    model = peft_model(folder, setting).train()
    model.config.use_cache = False
    if "--gradient_checkpointing" in setting.flags:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = trained_parameters(model)
    if "adamw_8bit" in setting.flags:
        from bitsandbytes.optim import AdamW8bit  # not in the process of the other side

        optimizer = AdamW8bit(trainable, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    for _ in range(NUM_STEPS):
        shape = setting.num_rows, setting.length
        tokens = torch.randint(0, setting.config["vocab_size"], shape)
        labels = tokens.clone()
        labels[:, : round((1 - SUPERVISED) * setting.length)] = -100
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def peft_model(folder: Path, setting: Setting) -> Any:
    """The model with its trainable parameters."""
    # Imported here, so that the process of the other side does not hold them.
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    is_checkpointed = "--gradient_checkpointing" in setting.flags
    quantization = None
    if "--quantization_bit" in setting.flags:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, setting.dtype), quantization_config=quantization
    )
    if "--finetuning_type" in setting.flags:
        return model
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=is_checkpointed)
    elif is_checkpointed:
        model.enable_input_require_grads()
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")
    return get_peft_model(model, config)


def measure(side: str, folder: str, name: str) -> int:
    """Bytes by which training grows the peak of this process."""
    setting = SETTINGS[name]
    torch.manual_seed(0)
    train = train_minisft if side == "minisft" else train_with_peft
    train(Path(folder) / "tiny", replace(setting, config=TINY))
    before = forget_peak_memory()
    train(Path(folder) / "real", setting)
    return peak_memory() - before


def main() -> None:
    """Measure each setting on both sides, in a process each, and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="measure only these settings")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(measure(*options.side))
        return
    for name in options.only or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / "real/model", SETTINGS[name].config)
            write_checkpoint(Path(folder) / "tiny/model", TINY)
            ours, theirs = (
                int(output_of(__file__, "--side", side, folder, name).split()[-1])
                for side in ("minisft", "peft")
            )
        row = [name, f"{ours / 2**20:,.0f}", f"{theirs / 2**20:,.0f}", f"{ours / theirs:.2f}"]
        print(*row, sep=" | ", flush=True)
        update("scaling.md", "memory", HEAD, [row], order=SETTINGS)


if __name__ == "__main__":
    main()
