"""What do the number types of GGUF cost? Our files next to llama.cpp's own of the same weights.

    python bench/gguf_perplexity.py --text ../shared/data/instruct/wiki_demo.txt

SmolLM2-135M-Instruct is exported in float16. llama.cpp (`llama_model_quantize` of the package
llama-cpp-python, or its program, --llama_quantize PATH) makes each type from that file; export.py
makes each from the same weights. minisft reads both files in float32, so that only the blocks
differ, and computes the loss on a text.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402
from real import unpack_model  # noqa: E402

from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.checkpoints.gguf_export import export_model  # noqa: E402
from minisft.checkpoints.hub import resolve  # noqa: E402
from minisft.model.loss import next_token_loss  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402

TYPES = ("f16", "q8_0", "q4_k_m", "q4_0")


def main() -> None:
    """Quantise by both, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", required=True, help="file of plain text")
    parser.add_argument("--num_tokens", type=int, default=4096, help="tokens to read of it")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--llama_quantize", help="program llama-quantize of llama.cpp")
    options = parser.parse_args()
    model_dir = Path(options.model_name_or_path or unpack_model())
    text = Path(options.text).read_text(encoding="utf-8")[: 8 * options.num_tokens]
    ids = Tokenizer.load(model_dir).encode(text)[: options.num_tokens]
    blocks = torch.tensor(ids[: len(ids) // options.length * options.length])
    blocks = blocks.view(-1, options.length)  # (B, T)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f16.gguf"
        export_model(model_dir, source, "f16")
        base = mean_loss(source, blocks)
        print(f"float16: {base:.4f} nats a token, {blocks.numel():,} tokens")
        print("type | minisft, more nats | llama.cpp, more nats | difference")
        for name in options.types:
            ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
            export_model(model_dir, ours, name)
            quantize(source, theirs, name, options.llama_quantize)
            changes = [mean_loss(path, blocks) - base for path in (ours, theirs)]
            figures = [f"{value:+.4f}" for value in (*changes, changes[0] - changes[1])]
            print(" | ".join([name, *figures]), flush=True)
            ours.unlink()
            theirs.unlink()


def quantize(source: Path, target: Path, name: str, program: str | None) -> None:
    """Let llama.cpp write a file in another number type."""
    if program:
        subprocess.run([program, str(source), str(target), name.upper()], check=True)
        return
    try:
        import llama_cpp  # optional: it is compiled for minutes
    except ImportError:
        sys.exit(
            "llama.cpp is not installed. Run: pip install llama-cpp-python, or give "
            "--llama_quantize PATH of its program."
        )
    kinds = {name: f"LLAMA_FTYPE_MOSTLY_{name.upper()}" for name in TYPES}
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, kinds[name]), os.cpu_count() or 1
    paths = (str(path).encode() for path in (source, target))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)):
        sys.exit(f"{source}: llama.cpp cannot quantise it to {name}")


@torch.inference_mode()
def mean_loss(path: Path, blocks: torch.Tensor) -> float:
    """Nats a token of the model in a GGUF file on blocks of text (B, T)."""
    model = load_model(resolve(path), torch.float32)
    total = 0.0
    for block in blocks.split(1):
        loss, _ = next_token_loss(model, block, torch.ones_like(block, dtype=torch.bool))
        total += loss.item()
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


if __name__ == "__main__":
    main()
