"""score.py against the usual way: batch size 1, all logits, a loop over tokens.

    python bench/score.py --model_name_or_path ../shared/data/models/stories260K --dataset F.json
    python bench/score.py --config_dir C --num_hidden_layers 2 --tokenizer_dir T --dataset F.json
    python bench/score.py --memory           # peak memory for 2,000, 20,000 and 200,000 short rows

The reference follows the code of arXiv 2308.12032: transformers, two passes for each row, the
logits of every position, and a log-softmax for each token. With --config_dir the model has random
weights in the shape of that config.json. Both sides score the same rows in turns; minisft also
reads, encodes and writes them, while the reference gets token ids.
"""

import argparse
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import NLLLoss  # noqa: E402
from torch.nn.functional import log_softmax  # noqa: E402

from bench.limits import matrix_speed  # noqa: E402
from bench.measure import ROOT, flags, peak_memory, start  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from bench.shapes import write_checkpoint  # noqa: E402
from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.common.json_files import read_json  # noqa: E402
from minisft.common.words import counted  # noqa: E402
from minisft.data.dataset import Rows, open_rows  # noqa: E402
from minisft.model.decoder import CausalLM  # noqa: E402
from minisft.selection.ifd import IfdScorer  # noqa: E402
from minisft.selection.score_writer import ScoreWriter  # noqa: E402
from minisft.selection.scoring import RowReader, score_rows  # noqa: E402
from minisft.text.chat_template import ChatTemplate
from minisft.text.template_choice import get_template  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402
from minisft.training.operations import forward_operations  # noqa: E402


@dataclass
class PreparedRow:
    """A row for the reference: ids of the two passes, and where the answer starts in each."""

    index: int
    conditioned: list[int]
    conditioned_start: int
    direct: list[int]
    direct_start: int


@dataclass
class Comparison:
    """speeds: {side: [(rows per second, rows per CPU second) of every round]}."""

    speeds: dict[str, list[np.ndarray]]
    num_rows: int
    tokens_per_row: float  # of both passes
    answers_per_row: float  # those of them whose loss counts
    difference: float  # the largest relative difference of a score


def reference_ifd(model: Any, rows: Sequence[PreparedRow], device: torch.device) -> list[float]:
    """The IFD of rows, in the usual way."""

    def mean_loss(ids: list[int], start: int) -> float:
        """The mean loss of the tokens from `start` on."""
        tokens = torch.tensor([ids], device=device)
        labels = tokens.clone()
        labels[0, :start] = -100
        with torch.no_grad():
            logits = model(tokens, labels=labels, output_hidden_states=True).logits
        losses = []
        for place in range(1, tokens.shape[1]):
            distribution = log_softmax(logits[0, place - 1], dim=-1)
            losses.append(NLLLoss()(distribution[None], tokens[0, place][None]).cpu())
        return torch.stack(losses[start - 1 :]).mean().item()

    return [
        mean_loss(row.conditioned, row.conditioned_start) / mean_loss(row.direct, row.direct_start)
        for row in rows
    ]


def prepare(reader: RowReader, numbers: np.ndarray) -> list[PreparedRow]:
    """The rows for the reference; rows that get no score are left out."""
    plans = reader[numbers]
    if not isinstance(plans, list):
        raise plans
    prepared = []
    for plan in plans:
        if len(plan.passes) == 2:
            parts = [(item.ids.tolist(), int(item.is_answer.argmax())) for item in plan.passes]
            prepared.append(PreparedRow(plan.index, *parts[0], *parts[1]))
    return prepared


def compare(
    options: Namespace, ours: CausalLM, theirs: Any, rows: Rows, template: ChatTemplate
) -> Comparison:
    """Score the same rows both ways, in turns.

    ours, theirs: the models of minisft and transformers on the same device; theirs may be None.
    rows: all are scored, because minisft would compute the others of a batch, too. The reference
    scores the first options.reference_rows rows, or all if that is None.
    """
    device = next(ours.parameters()).device
    reader = RowReader(rows, IfdScorer(template))
    numbers = np.arange(len(rows))
    prepared = prepare(reader, numbers)
    reference_rows = prepared[: options.reference_rows]

    def score(numbers: np.ndarray) -> dict[int, float]:
        """The IFD of rows by minisft, which also writes its files."""
        values = {}
        with tempfile.TemporaryDirectory() as folder:
            writer = ScoreWriter(Path(folder) / "scores.jsonl", {}, len(numbers), ("ifd",), 0)
            for scores in score_rows(ours, reader, numbers, options.batch_tokens, options.workers):
                writer.add(scores)
                values.update((score.index, score.record["ifd"]) for score in scores)
            writer.finish()
        return values

    def clocks() -> np.ndarray:
        """(wall time, CPU time)."""
        return np.array([time.perf_counter(), time.process_time()])

    score(numbers[: options.warm_up_rows])
    if theirs is not None:
        reference_ifd(theirs, prepared[:2], device)
    speeds, difference = {"ours": [], "theirs": []}, 0.0
    for _ in range(options.rounds):
        began = clocks()
        actual = score(numbers)
        middle = clocks()
        speeds["ours"].append(len(prepared) / (middle - began))
        if theirs is not None:
            expected = reference_ifd(theirs, reference_rows, device)
            speeds["theirs"].append(len(reference_rows) / (clocks() - middle))
            pairs = zip(reference_rows, expected, strict=True)
            difference = max(abs(actual[row.index] / value - 1) for row, value in pairs)
    lengths = [len(row.conditioned) + len(row.direct) for row in prepared]
    starts = [row.conditioned_start + row.direct_start for row in prepared]
    num_tokens, num_answers = float(np.mean(lengths)), float(np.mean(np.subtract(lengths, starts)))
    return Comparison(speeds, len(prepared), num_tokens, num_answers, difference)


def operations_per_row(model: CausalLM, result: Comparison) -> float:
    """Operations to score a row. Only answers need logits.

    A beginning that all rows of a batch share counts for each of them, though it is computed once.
    """
    length = result.tokens_per_row / 2
    logits = 2 * model.config.vocab_size * model.config.hidden_size
    every_token = forward_operations(model, length) - logits
    return result.tokens_per_row * every_token + result.answers_per_row * logits


def load_and_compare(options: Namespace, model_dir: Path) -> None:
    """Load a checkpoint on both sides, compare them, and print rows per second."""
    # Imported here, because gpu_stages.py also uses this module without a peer.
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    ours = load_model(model_dir, dtype, device)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    rows = open_rows(options.dataset, skipped=[], max_samples=options.num_rows)
    template = get_template(options.template, Tokenizer.load(model_dir))
    result = compare(options, ours, theirs.to(device).eval(), rows, template)
    print(
        f"{result.num_rows} rows, {device}, {options.dtype}, "
        f"{counted(torch.get_num_threads(), 'thread')}, "
        f"{options.rounds} rounds in turns; largest relative difference of a score "
        f"{result.difference:.1e}"
    )
    for clock, name in enumerate(("rows/s", "rows per CPU second")):
        ours_median, theirs_median = (
            statistics.median(speed[clock] for speed in result.speeds[side])
            for side in ("ours", "theirs")
        )
        ratio = ours_median / theirs_median
        print(
            f"{name:20} ours {ours_median:>9,.2f}   theirs {theirs_median:>9,.2f}   = {ratio:.1f} x"
        )
        if clock == 0:
            operations = ours_median * operations_per_row(ours, result)
            add_figure(
                options.results,
                f"scoring by IFD in {options.dtype}",
                ours_median,
                "rows/s",
                peer_name="a row at a time",
                peer=theirs_median,
                ratio=ratio,
                share=operations / matrix_speed(torch.device(device), dtype),
                limit="matrix product",
            )


def print_memory(options: Namespace) -> None:
    """Print the peak memory of score.py on few and on many short rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, peaks = Path(options.folder or temporary), []
        folder.mkdir(parents=True, exist_ok=True)
        for count in options.row_counts:
            path = folder / f"{count}.jsonl"
            if not path.exists():
                lines = (
                    f'{{"instruction": "Say {number}", "output": "ok"}}\n'
                    for number in range(count)
                )
                path.write_text("".join(lines))
            began = time.monotonic()
            peaks.append(score_peak(options, path))
            print(
                f"{count:>9,} rows  {peaks[-1] / 2**20:>7,.1f} MiB peak  "
                f"{time.monotonic() - began:>7.0f} s",
                flush=True,
            )
    few, many = options.row_counts[0], options.row_counts[-1]
    print(f"{(peaks[-1] - peaks[0]) / (many - few):.1f} bytes per additional row")


def score_peak(options: Namespace, path: Path) -> int:
    """Peak resident bytes of score.py on the rows of a file, mapped files included."""
    words = flags(
        dataset=path,
        template="plain",
        model_name_or_path=options.model_name_or_path or ROOT / "examples/base",
        mode=options.mode,
        dataloader_num_workers=0,
        output=path.with_suffix(".scores.jsonl"),
    )
    process, peak_path = start("score.py", *words), path.with_suffix(".peak")
    peak = int(peak_path.read_text()) if peak_path.exists() else 0  # a stopped run leaves it
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        peak_path.write_text(str(peak))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return peak


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--config_dir", help="folder of a config.json, for random weights")
    parser.add_argument("--num_hidden_layers", type=int)
    parser.add_argument("--tokenizer_dir", help="folder of the tokenizer (default: --config_dir)")
    parser.add_argument("--dataset")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_rows", type=int, default=200)
    reference = "rows that the reference scores (default: all)"
    parser.add_argument("--reference_rows", type=int, help=reference)
    parser.add_argument("--batch_tokens", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up_rows", type=int, default=8, help="scored first, not timed")
    add_results_option(parser)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--row_counts", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--mode", default="all", help="--mode of score.py, for --memory")
    folder = "keep the files here; the same command then continues an interrupted --memory"
    parser.add_argument("--folder", help=folder)
    return parser.parse_args(arguments)


def main() -> None:
    """Compare speeds, or measure memory."""
    options = parse_options()
    if options.memory:
        print_memory(options)
        return
    if not options.config_dir:
        load_and_compare(options, Path(options.model_name_or_path))
        return
    with tempfile.TemporaryDirectory() as folder:
        config = read_json(Path(options.config_dir) / "config.json")
        write_checkpoint(
            folder,
            config,
            options.num_hidden_layers,
            torch.float32,
            options.tokenizer_dir or options.config_dir,
        )
        load_and_compare(options, Path(folder))


if __name__ == "__main__":
    main()
