"""Multiple-choice questions per second, against lm-evaluation-harness, both in one process.

    python bench/multiple_choice.py --data_dir ceval-exam --subjects law --max_samples 16
    python bench/multiple_choice.py --data_dir ceval-exam --shape tinyllama --num_layers 4 \
        --tokenizer_dir TinyLlama-1.1B-Chat-v0.6

Both sides get the same five-shot prompts as texts. Tokenizing is part of the time, loading is not.
Without --model_name_or_path the weights are random. The sides take turns; the ratio is the median
over the turns. The largest difference of a log-likelihood is printed too.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from bench.limits import matrix_speed  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from bench.shapes import SHAPES, write_checkpoint  # noqa: E402
from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.common.words import counted  # noqa: E402
from minisft.evaluation.benchmark_files import read_subjects  # noqa: E402
from minisft.evaluation.benchmarks import BENCHMARKS, LETTERS  # noqa: E402
from minisft.evaluation.choice_prompts import PromptBuilder  # noqa: E402
from minisft.evaluation.multiple_choice import answer_subject  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result of the function, its wall time in seconds)."""
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def harness_requests(benchmark: Any, subjects: Sequence[Any], num_fewshot: int) -> list[Instance]:
    """The four requests of each question, with the texts that the harness builds from a task."""
    delimiter = benchmark.letter.format(letter="")
    requests = []
    for subject in subjects:
        demonstrations = [
            f"{benchmark.ask(question)}{delimiter}{question.answer}\n\n"
            for question in subject.demonstrations[:num_fewshot]
        ]
        opening = benchmark.heading.format(subject=subject.name) + "".join(demonstrations)
        for question in subject.questions:
            context = opening + benchmark.ask(question)
            requests += [
                Instance("loglikelihood", {}, (context, delimiter + letter), index)
                for index, letter in enumerate(LETTERS)
            ]
    return requests


def compare(options: Namespace, model_dir: Path) -> None:
    """Take turns; print questions per second of both sides and their ratio."""
    benchmark = BENCHMARKS[options.benchmark]
    wanted = options.subjects.split(",") if options.subjects else ()
    subjects = read_subjects(
        benchmark,
        options.data_dir,
        options.split,
        options.num_fewshot,
        wanted,
        options.max_samples,
    )
    num_questions = sum(len(subject.questions) for subject in subjects)
    model, tokenizer = load_model(model_dir, torch.float32), Tokenizer.load(model_dir)
    builder = PromptBuilder(benchmark, tokenizer, max_length=options.max_length)
    harness = HFLM(
        pretrained=str(model_dir),
        max_length=options.max_length,
        dtype="float32",
        device="cpu",
        batch_size=options.batch_size,
    )
    requests = harness_requests(benchmark, subjects, options.num_fewshot)

    def ours() -> list[Any]:
        """The log-likelihoods of minisft."""
        rows = [
            row
            for subject in subjects
            for row in answer_subject(
                model, builder, subject, options.num_fewshot, batch_size=options.batch_size
            )
        ]
        assert {row.num_fewshot for row in rows} == {options.num_fewshot}, "raise --max_length"
        return [value for row in rows for value in row.log_likelihoods]

    def theirs() -> list[float]:
        """The log-likelihoods of the harness."""
        return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    turns = [(timed(ours), timed(theirs)) for _ in range(options.repeats)]
    (our_scores, _), (their_scores, _) = turns[0]
    difference = max(abs(a - b) for a, b in zip(our_scores, their_scores, strict=True))
    seconds = [[side_seconds for _, side_seconds in turn] for turn in turns]
    mean_length = statistics.mean(
        len(tokenizer.encode(request.args[0])) for request in requests[:: len(LETTERS)]
    )
    print(
        f"{num_questions} questions of {mean_length:.0f} tokens on average, "
        f"{options.num_fewshot}-shot, {counted(torch.get_num_threads(), 'thread')}"
    )
    names = "minisft", "lm-evaluation-harness"
    speeds = [num_questions / statistics.median(column) for column in zip(*seconds, strict=True)]
    for name, speed in zip(names, speeds, strict=True):
        print(f"{name:<24} {speed:>8.2f} questions/s")
    ratio = statistics.median(turn[1] / turn[0] for turn in seconds)
    print(f"ratio {ratio:.1f}, largest difference of a log-likelihood {difference:.1e}")
    with FlopCounterMode(display=False) as counter:
        ours()
    operations = speeds[0] / num_questions * counter.get_total_flops()
    add_figure(
        options.results,
        f"multiple choice, {options.num_fewshot}-shot, in float32",
        speeds[0],
        "questions/s",
        peer_name=names[1],
        peer=speeds[1],
        ratio=ratio,
        share=operations / matrix_speed(torch.device("cpu"), torch.float32),
        limit="matrix product",
    )


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--benchmark", choices=list(BENCHMARKS), default="ceval")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--subjects", default="")
    parser.add_argument("--max_samples", type=int)
    parser.add_argument("--num_fewshot", type=int, default=5)
    parser.add_argument("--model_name_or_path", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--tokenizer_dir", type=Path, help="tokenizer, with random weights")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    add_results_option(parser)
    options = parser.parse_args(arguments)
    if not (options.model_name_or_path or options.tokenizer_dir):
        parser.error("give --model_name_or_path, or --tokenizer_dir for random weights")
    return options


def main() -> None:
    """Compare on a checkpoint, or on random weights."""
    options = parse_options()
    if options.model_name_or_path:
        compare(options, options.model_name_or_path)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            folder, options.shape, options.num_layers, tokenizer_dir=options.tokenizer_dir
        )
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
