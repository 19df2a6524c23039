"""Measure a CPU: every benchmark that docs/benchmarks.md has in its tables, one after the other.

    python bench/cpu.py results.json --dataset alpaca_en_demo.json --ceval_dir ceval-exam
    python bench/machines.py results.json                # the table in docs/benchmarks.md

Let the machine do nothing else: it takes half an hour on two cores. The model is SmolLM2-135M.
Each line is printed and written as soon as its benchmark has ended; the output of the benchmarks
goes to a log beside the JSON file. Figures next to llama.cpp need xllamacpp.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402
from real import unpack_model  # noqa: E402

from bench.gpu import Results, installed_versions  # noqa: E402
from bench.limits import bandwidth, matrix_speed  # noqa: E402
from bench.measure import flags  # noqa: E402
from minisft.checkpoints.gguf_export import export_model  # noqa: E402
from minisft.common.devices import type_for_answers  # noqa: E402

CPU = torch.device("cpu")
GGUF_TYPES = ("q4_0", "q8_0")


def main() -> None:
    """Run the benchmarks, and collect their lines."""
    options = parse_options()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    about = {
        "python": sys.version.split()[0],
        "date": time.strftime("%F"),
        "dry_run": False,
        **installed_versions(),
    }
    results, model_dir = Results(options.results, about), unpack_model()
    device = machine()
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        speed = matrix_speed(CPU, dtype) / 1e9
        results.add({"name": name, "figure": speed, "unit": "GFLOP/s", "device": device})
    results.add({"name": "memory copy", "figure": bandwidth(CPU) / 1e9, "unit": "GB/s"})
    with tempfile.TemporaryDirectory() as folder, open(f"{options.results}.log", "w") as log:
        for script, words in benchmarks(options, model_dir, Path(folder)):
            if options.only and script not in options.only:
                continue
            path = Path(folder) / "lines.jsonl"
            command = [sys.executable, f"bench/{script}.py", *words, *flags(results=path)]
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log)
            if done.returncode:
                results.add({"name": script, "failed": f"status {done.returncode}, see the log"})
            for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                results.add(json.loads(text))
            path.unlink(missing_ok=True)


def benchmarks(
    options: Namespace, model_dir: Path, folder: Path
) -> Iterator[tuple[str, list[str]]]:
    """(name of the script, its flags) of each benchmark. folder: for files that they read."""
    has_llama_cpp = importlib.util.find_spec("xllamacpp") is not None
    # Where bfloat16 is emulated, nobody should use it.
    is_native = type_for_answers(CPU) == torch.bfloat16
    dtypes = ["bfloat16", "float32"] if is_native else ["float32"]
    for dtype in dtypes:
        yield "load", flags(dtype=dtype, repeats=3)
    model = {"shape": "smollm2-135m", "tokenizer_dir": model_dir, "dataset": options.dataset}
    for dtype in dtypes:
        sides = ["--sides", "minisft", "packed", "best"]
        yield "train", [*flags(dtype=dtype, repeats=1, **model), *sides]
    common = flags(model_name_or_path=model_dir, llama_cpp=has_llama_cpp)
    for dtype in dtypes:
        yield "generate", [*common, *flags(dtype=dtype)]
    yield "generate", [*common, *flags(dtype=dtypes[0], quantization_bit=8)]
    for number_type in GGUF_TYPES:
        path = folder / f"{number_type.upper()}.gguf"
        export_model(model_dir, path, number_type)
        words = flags(model_name_or_path=path, dtype=dtypes[0], llama_cpp=has_llama_cpp)
        yield "generate", words
    for dtype in dtypes:
        words = flags(model_name_or_path=model_dir, dataset=options.dataset, dtype=dtype)
        yield "score", [*words, *flags(num_rows=60, rounds=2)]
    yield "kmeans", ["--kinds", "blobs", "spectrum", *flags(rounds=1)]
    if options.ceval_dir:
        words = flags(data_dir=options.ceval_dir, subjects="law", max_samples=12)
        yield "multiple_choice", [*words, *flags(model_name_or_path=model_dir)]
    # With the embedded model a step takes hardly any time: the first one waits for the data.
    yield "data", flags(tokenizer_dir=model_dir)


def machine() -> str:
    """The processor, and the instructions that its matrix products can use.

    Virtual machines often hide a processor's name; its family and model tell the generation.
    """
    if torch.cpu._is_amx_tile_supported():
        kind = "AMX"
    else:
        kind = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    words = Path("/proc/cpuinfo").read_text()
    if kind == "AVX-512" and "avx512_bf16" in words:
        kind += " and its bfloat16"
    names = ("model name", "cpu family", "model")
    found = [re.search(rf"^{name}\s*: (.+)$", words, re.MULTILINE) for name in names]
    name, family, model = [match[1] if match else "unknown" for match in found]
    processor = f"{name} (family {family}, model {model})"
    return f"{torch.get_num_threads()} cores of an {processor} with {kind}"


def parse_options() -> Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="JSON file for the lines; a log goes beside it")
    parser.add_argument("--dataset", required=True, help="Alpaca rows to train on and to score")
    parser.add_argument("--ceval_dir", help="folder of C-Eval, for multiple choice")
    parser.add_argument("--only", nargs="+", help="these benchmarks: load, train, generate, ...")
    return parser.parse_args()


if __name__ == "__main__":
    main()
