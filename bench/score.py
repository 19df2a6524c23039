"""score.py beside the reference way: batch size 1, logits everywhere, a loop over tokens.

    python bench/score.py --model_name_or_path ../shared/data/models/stories260K --dataset F.json
    python bench/score.py --config_dir C --num_hidden_layers 2 --tokenizer_dir T --dataset F.json
    python bench/score.py --memory           # peak memory for 2,000, 20,000 and 200,000 short rows

The reference way is what is usual (arXiv 2308.12032): transformers, two passes a row, the logits of
every position, and for every token a log-softmax of its own. With --config_dir a model of random
weights has the shape that a config.json there says. Both sides score the same rows in turns; ours
reads, encodes and writes them too, theirs is given token ids.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def random_checkpoint(options, folder):
    """A checkpoint of random weights in the shape of --config_dir, with its tokenizer."""
    import torch

    from minisft.checkpoints.folders import save_model
    from minisft.common.json_files import read_json
    from minisft.model.config import ModelConfig
    from minisft.model.decoder import CausalLM

    content = read_json(Path(options.config_dir) / "config.json")
    if options.num_hidden_layers:
        content["num_hidden_layers"] = options.num_hidden_layers
    model = CausalLM(ModelConfig.from_dict(content))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model, folder)
    for path in Path(options.tokenizer_dir or options.config_dir).glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def reference(model, rows, device):
    """Rows of (ids, start of the answer, ids of the direct pass, its start) -> their IFD."""
    import torch
    from torch.nn import NLLLoss
    from torch.nn.functional import log_softmax

    def mean_loss(ids, start):
        ids = torch.tensor([ids], device=device)
        labels = ids.clone()
        labels[0, :start] = -100
        with torch.no_grad():
            logits = model(ids, labels=labels, output_hidden_states=True).logits
        losses = []
        for place in range(1, ids.shape[1]):
            distribution = log_softmax(logits[0, place - 1], dim=-1)
            losses.append(NLLLoss()(distribution[None], ids[0, place][None]).cpu())
        return torch.stack(losses[start - 1 :]).mean().item()

    return [mean_loss(*row[:2]) / mean_loss(*row[2:]) for row in rows]


def compare(options, ours, theirs, rows, template):
    """Score the same rows both ways, in turns.

    ours, theirs: minisft's and transformers' model on one device. rows: as dataset.open_rows gives
    them; the reference way scores only the first options.reference_rows of them, all if None.
    Returns a dict: "speeds" is {side: [(rows a second, rows a CPU second) of every round]}, "rows"
    how many were scored, "tokens" how many a row has in its two passes (mean), "difference" the
    largest relative difference of a score.
    """
    import numpy as np

    from minisft.selection.ifd import IfdScorer
    from minisft.selection.score_writer import ScoreWriter
    from minisft.selection.scoring import RowReader, score_rows

    device = theirs.device
    reader = RowReader(rows, IfdScorer(template))
    numbers = np.arange(min(options.num_rows, len(rows)))
    prepared, tokens = [], []
    for plan in reader[numbers]:
        if len(plan.passes) == 2:
            parts = [(one.ids.tolist(), int(one.is_answer.argmax())) for one in plan.passes]
            prepared.append((*parts[0], *parts[1], plan.index))
            tokens.append(len(parts[0][0]) + len(parts[1][0]))
    chosen = prepared[: options.reference_rows]

    def score(folder):
        writer = ScoreWriter(Path(folder) / "scores.jsonl", {}, len(numbers), ("ifd",), 0)
        values = {}
        for scores in score_rows(ours, reader, numbers, options.batch_tokens, options.workers):
            writer.add(scores)
            values.update((score.index, score.record["ifd"]) for score in scores)
        writer.finish()
        return [values[row[-1]] for row in prepared]

    def clocks():
        return np.array([time.perf_counter(), time.process_time()])

    reference(theirs, [row[:4] for row in prepared[:2]], device)  # prepares kernels
    speeds, worst = {"ours": [], "theirs": []}, 0.0
    for _ in range(options.rounds):
        began = clocks()
        expected = reference(theirs, [row[:4] for row in chosen], device)
        middle = clocks()
        with tempfile.TemporaryDirectory() as folder:
            found = score(folder)
        speeds["theirs"].append(len(chosen) / (middle - began))
        speeds["ours"].append(len(prepared) / (clocks() - middle))
        worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=False))
    return {
        "speeds": speeds,
        "rows": len(prepared),
        "tokens": sum(tokens) / len(tokens),
        "difference": worst,
    }


def load_and_compare(options, model_dir):
    """Load a checkpoint into both sides, compare them, and print rows per second."""
    import torch
    import transformers

    from minisft.checkpoints.folders import load_model
    from minisft.data import dataset
    from minisft.text.template_choice import get_template
    from minisft.text.tokenizer import Tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    ours = load_model(model_dir, dtype, device)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    result = compare(
        options,
        ours,
        theirs.to(device).eval(),
        dataset.open_rows(options.dataset, skipped=[]),
        get_template(options.template, Tokenizer.load(model_dir)),
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    speeds = result["speeds"]
    print(
        f"{result['rows']} rows, {device}, {options.dtype}, {threads} thread(s), "
        f"{options.rounds} rounds in turns; largest relative difference of a score "
        f"{result['difference']:.1e}"
    )
    for clock, name in enumerate(("rows/s", "rows per CPU second")):
        medians = [statistics.median(one[clock] for one in speeds[side]) for side in speeds]
        print(
            f"{name:20} ours {medians[0]:>9,.2f}   theirs {medians[1]:>9,.2f}   "
            f"= {medians[0] / medians[1]:.1f} x"
        )


def memory(options):
    """Peak memory of score.py on few and on many rows, all of them short."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, peaks = Path(options.folder or temporary), []
        folder.mkdir(parents=True, exist_ok=True)
        for count in options.row_counts:
            path = folder / f"{count}.jsonl"
            if not path.exists():
                path.write_text(
                    "".join(
                        f'{{"instruction": "Say {number}", "output": "ok"}}\n'
                        for number in range(count)
                    )
                )
            began = time.monotonic()
            peaks.append(peak_memory(options, path))
            print(
                f"{count:>9,} rows  {peaks[-1] / 2**20:>7,.1f} MiB peak  "
                f"{time.monotonic() - began:>7.0f} s",
                flush=True,
            )
    few, many = options.row_counts[0], options.row_counts[-1]
    print(f"{(peaks[-1] - peaks[0]) / (many - few):.1f} bytes for each row more")


def peak_memory(options, path):
    """Bytes that scoring the rows takes at most, by the system's account (mapped files too)."""
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "score.py",
            "--dataset",
            path,
            "--template",
            "plain",
            "--model_name_or_path",
            options.model_name_or_path or ROOT / "examples/base",
            "--mode",
            options.mode,
            "--dataloader_num_workers",
            "0",
            "--output",
            path.with_suffix(".scores.jsonl"),
        ],
        stdout=subprocess.DEVNULL,
    )
    status, noted = Path(f"/proc/{process.pid}/status"), path.with_suffix(".peak")
    peak = int(noted.read_text()) if noted.exists() else 0  # of a run that was stopped
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        noted.write_text(str(peak))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return peak


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--config_dir", help="folder of a config.json, for random weights")
    parser.add_argument("--num_hidden_layers", type=int)
    parser.add_argument("--tokenizer_dir", help="where its tokenizer is, if not there")
    parser.add_argument("--dataset")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_rows", type=int, default=200)
    parser.add_argument(
        "--reference_rows", type=int, help="the reference way scores only so many of them (all)"
    )
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--row_counts", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--mode", default="all", help="of score.py, for --memory")
    parser.add_argument("--folder", help="keep the files here; run again, --memory goes on")
    return parser.parse_args(arguments)


def main():
    options = parse_options()
    if options.memory:
        return memory(options)
    with tempfile.TemporaryDirectory() as folder:
        load_and_compare(
            options,
            random_checkpoint(options, Path(folder))
            if options.config_dir
            else Path(options.model_name_or_path),
        )


if __name__ == "__main__":
    main()
