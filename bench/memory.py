"""Peak memory of LoRA, QLoRA and full training, against transformers with peft and bitsandbytes.

    python bench/memory.py                   # all settings; writes the table of docs/scaling.md
    python bench/memory.py --only "LoRA, vocabulary of 32k"

Equal settings on both sides: the same random weights, stored in bfloat16 and trained in float32,
the same rows of random tokens, three quarters of which are learned, AdamW, three steps, each side
in a process of its own. Transformers computes its own loss (`model(..., labels=...)`) and attention
through sdpa, as Trainer has them. What is compared is how much the resident memory of the process
grew at its peak, from before the model was loaded; each side has trained a tiny model before, so
that imports and kernels do not count. Widths are small and vocabularies real, so that
it runs in minutes: the part of the logits in the whole is larger than in the models themselves.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from peak import forget_peak, prepare, status, write_model  # noqa: E402

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
BATCH_SIZE, LENGTH, NUM_STEPS = 4, 512, 3
WAYS = {
    "LoRA": [],
    "LoRA, checkpointing": ["--gradient_checkpointing"],
    "QLoRA": ["--quantization_bit", "4"],
    "QLoRA, checkpointing": ["--quantization_bit", "4", "--gradient_checkpointing"],
    "full": ["--finetuning_type", "full"],
    "full, checkpointing": ["--finetuning_type", "full", "--gradient_checkpointing"],
}
SETTINGS = {
    f"{way}, vocabulary of {size // 1000}k": (SHAPE | {"vocab_size": size}, flags)
    for size in (32000, 128256)
    for way, flags in WAYS.items()
}


def train_minisft(folder, fields, flags):
    """Steps by train.py's own functions."""
    from train import train_step

    run, batches = prepare(folder, fields, BATCH_SIZE, LENGTH, 1, "float32", flags)
    for _ in range(NUM_STEPS):
        train_step(run, batches)


def train_with_peft(folder, fields, flags):
    """The same with transformers, and peft and bitsandbytes where they belong."""
    import torch

    model = their_model(folder, flags).train()
    model.config.use_cache = False
    if "--gradient_checkpointing" in flags:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for _ in range(NUM_STEPS):
        tokens = torch.randint(0, fields["vocab_size"], (BATCH_SIZE, LENGTH))
        labels = tokens.clone()
        labels[:, : LENGTH // 4] = -100
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def their_model(folder, flags):
    """The model with what is to be trained."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {}
    if "--quantization_bit" in flags:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **settings)
    if "--finetuning_type" in flags:
        return model
    if settings:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing="--gradient_checkpointing" in flags
        )
    elif "--gradient_checkpointing" in flags:
        model.enable_input_require_grads()
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")
    )


def one_side(side, folder, name):
    """In a process of its own: bytes that training needed at the most."""
    import torch

    fields, flags = SETTINGS[name]
    torch.manual_seed(0)
    train = train_minisft if side == "minisft" else train_with_peft
    train(Path(folder) / "tiny", TINY, flags)  # what is loaded once is not counted
    before = forget_peak()
    train(Path(folder) / "real", fields, flags)
    return status("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="leave the others as they are")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(one_side(*options.one))
        return
    from tables import update

    for name in options.only or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "real/model", SETTINGS[name][0])
            write_model(Path(folder) / "tiny/model", TINY)
            peaks = [
                int(
                    subprocess.run(
                        [sys.executable, __file__, "--one", side, folder, name],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                        check=True,
                    ).stdout.split()[-1]
                )
                for side in ("minisft", "peft")
            ]
        row = [name, *(f"{peak / 2**20:,.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}"]
        print(*row, sep=" | ", flush=True)
        update(
            "scaling.md",
            "memory",
            ["setting", "minisft, MiB", "transformers + peft, MiB", "ratio"],
            [row],
            order=SETTINGS,
        )


if __name__ == "__main__":
    main()
