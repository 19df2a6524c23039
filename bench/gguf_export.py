"""How long a checkpoint takes to a GGUF file, and how much memory, beside a plain copy.

    python bench/gguf_export.py                       # 1.1 billion random weights in bfloat16
    python bench/gguf_export.py --num_hidden_layers 2 --quantizations f16 q4_k_m

The copy is of the checkpoint's weights, by the system. Memory is the largest resident set of
export.py, with Python and torch, which alone take the amount in the first line.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_checkpoint(folder, tokenizer_dir, num_hidden_layers):
    """TinyLlama's shape, random numbers."""
    import torch

    from minisft.checkpoints import folders
    from minisft.model.config import ModelConfig
    from minisft.model.decoder import CausalLM
    from minisft.text.tokenizer import Tokenizer

    torch.set_default_dtype(torch.bfloat16)
    model = CausalLM(
        ModelConfig.from_dict(
            {
                "model_type": "llama",
                "vocab_size": 32000,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": num_hidden_layers,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
            }
        )
    )
    model.initialize()
    folders.save_model(model, folder, max_shard_size=10**12)
    Tokenizer.load(tokenizer_dir).save(folder)


def measure(*words):
    """Run a Python program -> (seconds, peak resident bytes)."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))}: failed")
    return time.monotonic() - began, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_hidden_layers", type=int, default=22)
    parser.add_argument(
        "--quantizations", nargs="+", default=["f16", "q8_0", "q4_0", "q4_k_m", "q6_k"]
    )
    parser.add_argument("--tokenizer", default=ROOT / "examples" / "base")
    parser.add_argument("--folder", help="where to write, for a disk with room (default: /tmp)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        # In a process of its own: what starts others counts as their memory at first.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint,
            args=(folder / "model", options.tokenizer, options.num_hidden_layers),
        )
        writer.start()
        writer.join()
        stored = folder / "model" / "model.safetensors"
        began = time.monotonic()
        shutil.copyfile(stored, folder / "copy")
        copying, size = time.monotonic() - began, stored.stat().st_size
        (folder / "copy").unlink()
        _, memory = measure("-c", "import minisft.checkpoints.gguf_export")
        print(
            f"{size // 2:,} weights in bfloat16; Python and torch alone take "
            f"{memory / 2**20:,.0f} MiB"
        )
        print(f"{'':>8} {'seconds':>9} {'copies':>8} {'MB':>8} {'peak MiB':>10}")
        print(f"{'copy':>8} {copying:>9.1f} {1:>8.1f} {size / 1e6:>8,.0f}")
        for quantization in options.quantizations:
            output = folder / "model.gguf"
            seconds, memory = measure(
                "export.py",
                "--model_name_or_path",
                folder / "model",
                "--format",
                "gguf",
                "--quantization",
                quantization,
                "--output",
                output,
            )
            print(
                f"{quantization:>8} {seconds:>9.1f} {seconds / copying:>8.1f} "
                f"{output.stat().st_size / 1e6:>8,.0f} {memory / 2**20:>10,.0f}",
                flush=True,
            )
            output.unlink()


if __name__ == "__main__":
    main()
