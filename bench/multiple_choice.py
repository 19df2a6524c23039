"""Multiple-choice questions a second, against lm-evaluation-harness, both in one process.

    python bench/multiple_choice.py --data_dir ceval-exam --subjects law --max_samples 16
    python bench/multiple_choice.py --data_dir ceval-exam --shape tinyllama --num_layers 4 \
        --tokenizer_dir TinyLlama-1.1B-Chat-v0.6

The same five-shot prompts as texts on both sides; making tokens of them is part of the time,
loading is not. Without --model_name_or_path the weights are random. The two take turns; the ratio
is the median over the turns. The largest difference of a log-likelihood is printed too.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402

from bench.shapes import SHAPES, write_checkpoint  # noqa: E402
from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.evaluation.benchmark_files import read_subjects  # noqa: E402
from minisft.evaluation.benchmarks import BENCHMARKS, LETTERS  # noqa: E402
from minisft.evaluation.choice_prompts import PromptBuilder  # noqa: E402
from minisft.evaluation.multiple_choice import answer_subject  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402


def timed(function):
    """(what the function returns, its wall time in seconds)."""
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def harness_requests(benchmark, subjects, num_fewshot):
    """Every question's four requests, with the texts that the harness would make of a task."""
    from lm_eval.api.instance import Instance

    delimiter = benchmark.letter.format(letter="")
    requests = []
    for subject in subjects:
        shown = [
            f"{benchmark.ask(one)}{delimiter}{one.answer}\n\n"
            for one in subject.demonstrations[:num_fewshot]
        ]
        opening = benchmark.heading.format(subject=subject.name) + "".join(shown)
        for question in subject.questions:
            context = opening + benchmark.ask(question)
            requests += [
                Instance("loglikelihood", {}, (context, delimiter + letter), index)
                for index, letter in enumerate(LETTERS)
            ]
    return requests


def compare(options, model_dir):
    """Take turns; print questions a second of both sides and their ratio."""
    from lm_eval.models.huggingface import HFLM

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
    count = sum(len(one.questions) for one in subjects)
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

    def ours():
        rows = [
            row
            for one in subjects
            for row in answer_subject(
                model, builder, one, options.num_fewshot, batch_size=options.batch_size
            )
        ]
        assert {row.num_fewshot for row in rows} == {options.num_fewshot}, "raise --max_length"
        return [value for row in rows for value in row.log_likelihoods]

    def theirs():
        return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    turns = [(timed(ours), timed(theirs)) for _ in range(options.repeats)]
    (found, _), (expected, _) = turns[0]
    difference = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    seconds = [[side[1] for side in turn] for turn in turns]
    mean_length = statistics.mean(len(tokenizer.encode(one.args[0])) for one in requests[::4])
    print(
        f"{count} questions of {mean_length:.0f} tokens on average, {options.num_fewshot}-shot, "
        f"{torch.get_num_threads()} thread(s)"
    )
    for name, side in (("minisft", 0), ("lm-evaluation-harness", 1)):
        speed = count / statistics.median(turn[side] for turn in seconds)
        print(f"{name:<24} {speed:>8.2f} questions/s")
    print(
        f"ratio {statistics.median(turn[1] / turn[0] for turn in seconds):.1f}, largest "
        f"difference of a log-likelihood {difference:.1e}"
    )


def main():
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
    parser.add_argument("--tokenizer_dir", type=Path, help="with random weights: whose tokenizer")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.model_name_or_path:
        compare(options, options.model_name_or_path)
        return
    if not options.tokenizer_dir:
        parser.error("give --model_name_or_path, or --tokenizer_dir for random weights")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            folder, options.shape, options.num_layers, tokenizer_dir=options.tokenizer_dir
        )
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
