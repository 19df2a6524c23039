"""Time and memory to export a checkpoint to GGUF, beside a plain copy of its files.

    python bench/gguf_export.py                       # 1.1 billion random weights in bfloat16
    python bench/gguf_export.py --num_hidden_layers 2 --quantizations f16 q4_k_m

Memory is the largest resident set of export.py. The first line says how much of it Python and torch
take alone.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import ROOT, flags, start  # noqa: E402


def write_model(folder: Path, num_layers: int, tokenizer_dir: str) -> None:
    """Write a checkpoint of TinyLlama's shape with random weights."""
    # Not at the top: a parent's memory counts for the processes it starts, so it must stay small.
    from bench.shapes import write_checkpoint

    write_checkpoint(folder, "tinyllama", num_layers, tokenizer_dir=tokenizer_dir)


def measure(*words: object) -> tuple[float, int]:
    """Run Python with these words: (seconds, peak resident bytes)."""
    began, process = time.monotonic(), start(*words)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))} failed")
    return time.monotonic() - began, usage.ru_maxrss * 1024


def copy_files(paths: Iterable[Path], folder: Path) -> float:
    """Copy files into a new folder and remove it again; returns the seconds of the copy."""
    folder.mkdir()
    began = time.monotonic()
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    """Export in every quantization and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_hidden_layers", type=int, default=22)
    quantizations = ["f16", "q8_0", "q4_0", "q4_k_m", "q6_k"]
    parser.add_argument("--quantizations", nargs="+", default=quantizations)
    parser.add_argument("--tokenizer", default=ROOT / "examples" / "base")
    parser.add_argument("--folder", help="write here, on a disk with room (default: /tmp)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        arguments = folder / "model", options.num_hidden_layers, options.tokenizer
        writer = get_context("spawn").Process(target=write_model, args=arguments)
        writer.start()
        writer.join()
        stored = list((folder / "model").glob("*.safetensors"))
        size = sum(path.stat().st_size for path in stored)
        copying = copy_files(stored, folder / "copy")
        _, memory = measure("-c", "import minisft.checkpoints.gguf_export")
        print(
            f"{size // 2:,} weights in bfloat16; Python and torch alone take "
            f"{memory / 2**20:,.0f} MiB"
        )
        print(f"{'':>8} {'seconds':>9} {'copies':>8} {'MB':>8} {'peak MiB':>10}")
        print(f"{'copy':>8} {copying:>9.1f} {1:>8.1f} {size / 1e6:>8,.0f}")
        for quantization in options.quantizations:
            output = folder / "model.gguf"
            words = flags(
                model_name_or_path=folder / "model",
                format="gguf",
                quantization=quantization,
                output=output,
            )
            seconds, memory = measure("export.py", *words)
            print(
                f"{quantization:>8} {seconds:>9.1f} {seconds / copying:>8.1f} "
                f"{output.stat().st_size / 1e6:>8,.0f} {memory / 2**20:>10,.0f}",
                flush=True,
            )
            output.unlink()


if __name__ == "__main__":
    main()
