"""The flags of `eval.py`: for the multiple-choice benchmarks, and for comparisons.

name, options = parse_options("", ["ceval", "--model_name_or_path", "examples/base",
                                   "--data_dir", "ceval-exam", "--output_dir", "runs/c"])
name, options.num_fewshot                    # ("ceval", 5)
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from minisft.common.command_line import (
    OptionParser,
    check_rules,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import (
    add_device_flags,
    add_model_flags,
    add_replace_flag,
    add_template_settings,
)
from minisft.evaluation.benchmarks import BENCHMARKS

CHOICE_EXAMPLES = """\
  python eval.py ceval --model_name_or_path M --data_dir D --output_dir runs/base
  python eval.py ceval --adapter runs/a --data_dir D --output_dir runs/tuned
  python eval.py ceval --adapter runs/a --data_dir D --output_dir runs/t --baseline_dir runs/base
"""
COMPARE_EXAMPLES = """\
  python eval.py compare --models base=M tuned=runs/a --dataset held.json --output_dir runs/c
  python eval.py compare --models base=M tuned=M+runs/a --dataset held.json --output_dir runs/c \\
      --max_samples 50 --max_new_tokens 128
  python eval.py compare --models base=M tuned=runs/a --dataset held.json --output_dir runs/c \\
      --judge_model JUDGE
"""


def parse_options(usage: str, arguments: Sequence[str] | None = None) -> tuple[str, Namespace]:
    """The first word, a benchmark or `compare`, and the options that follow it.

    usage: what `eval.py --help` prints. arguments: by default those of the command line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(usage.rstrip())
        sys.exit()
    if name == "compare":
        return name, parse_compare_options(rest)
    if name in BENCHMARKS:
        return name, parse_choice_options(name, rest)
    begin = f"Begin with {', '.join(BENCHMARKS)} or compare"
    if name.startswith("-"):
        is_choice = any(re.match("--data[-_]dir", word) for word in words)
        example = CHOICE_EXAMPLES if is_choice else COMPARE_EXAMPLES
        raise UserError(
            f"{name} comes too early. {begin}, as in: {example.splitlines()[0].strip()}"
        )
    raise UserError(f"'{name}' is not something to measure. {begin}.")


def parse_choice_options(name: str, arguments: Sequence[str]) -> Namespace:
    """The options of `eval.py ceval`, `cmmlu` and `mmlu`, checked."""
    language = "en" if name == "mmlu" else "zh"
    parser = OptionParser(
        CHOICE_EXAMPLES.replace("ceval", name),
        "model_name_or_path adapter data_dir split output_dir max_samples num_fewshot",
        prog=f"eval.py {name}",
        description="Answer multiple-choice questions and measure the accuracy.",
        neighbours={
            "task": ((name,), f"the first word names the benchmark: eval.py {name}; see --split"),
            "lang": ((language,), f"the questions and prompts of {name} have one language"),
        },
    )
    add, _ = add_model_flags(parser)
    add("--adapter", metavar="DIR", help="folder of a LoRA adapter, used without merging")
    add, _ = parser.section("questions")
    add("--data_dir", required=True, help="folder or zip with the CSV files of the benchmark")
    splits = list(BENCHMARKS[name].splits)
    add("--split", choices=splits, default=splits[0], help="which questions")
    add("--subjects", default="", help="only these subjects, separated by commas")
    samples = "only the first N questions of each subject, for a quick try"
    add("--max_samples", type=positive_int, help=samples)
    shots = "demonstrations before each question"
    add("--num_fewshot", type=non_negative_int, default=5, help=shots)
    template = "none: plain text, as published; auto or a name: turns of a conversation"
    add("--template", default="none", help=template)
    add_template_settings(add)
    length = "longest prompt in tokens (else the model's context)"
    add("--max_length", type=positive_int, help=length)
    times = "ask N times with different demonstrations, or their order changed, and average"
    add("--n_times", type=positive_int, default=1, help=times)
    seed = "chooses the demonstrations of the repetitions"
    add("--seed", type=non_negative_int, default=42, help=seed)
    add("--batch_size", type=positive_int, default=8, help="questions computed at once")
    add = _add_output_flags(
        parser, "the results", "keep the finished subjects in --output_dir and answer the others"
    )
    baseline = "output folder of an earlier run to compare with"
    add("--baseline_dir", metavar="DIR", help=baseline)
    options = parser.parse_options(arguments)
    _check_resume(options)
    if options.split == "dev" and options.num_fewshot:
        raise UserError(
            "--split dev: its questions are the demonstrations, so a prompt would hold its own "
            "answer. Add --num_fewshot 0."
        )
    if options.n_times > 1 and not options.num_fewshot:
        raise UserError("--n_times changes the demonstrations; --num_fewshot 0 has none. Drop one.")
    if options.template == "none":
        for name in ("template_kwargs", "enable_thinking"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for chat templates: it needs --template")
    if "seed" in parser.given(options) and options.n_times == 1:
        raise UserError("--seed chooses the demonstrations of repetitions: it needs --n_times")
    return options


def parse_compare_options(arguments: Sequence[str]) -> Namespace:
    """The options of `eval.py compare`, checked."""
    parser = OptionParser(
        COMPARE_EXAMPLES,
        "models dataset output_dir max_samples max_new_tokens judge_model",
        prog="eval.py compare",
        description="Ask several models the same questions. Measure and judge their answers.",
        neighbours={
            "model_name_or_path": ((), "use --models NAME=MODEL"),
            "adapter": ((), "use --models NAME=MODEL+ADAPTER"),
            "do_sample": ((False,), "use --temperature above 0"),
            "greedy": ((True,), "use --temperature above 0"),
        },
    )
    add, switch = parser.section("models")
    models = "models and their names; the others are compared with the first"
    add("--models", nargs="+", required=True, metavar="NAME=DIR[+ADAPTER]", help=models)
    add_device_flags(add, switch)
    template = "chat template of all models (auto: what each was trained with)"
    add("--template", default="auto", help=template)
    add_template_settings(add)

    add, _ = parser.section("questions and answers")
    dataset = "files or names, as for train.py; their answers are the references"
    add("--dataset", required=True, help=dataset)
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    add("--max_samples", type=positive_int, help="only the first N rows of each data set")
    add_replace_flag(add)
    add("--max_new_tokens", type=positive_int, default=512, help="longest answer in tokens")
    temperature = "0: always the most probable token; above: the higher, the more varied"
    add("--temperature", type=non_negative_float, default=0.0, help=temperature)
    top_k = "sample from the k most probable tokens; 0: all"
    add("--top_k", type=non_negative_int, default=50, help=top_k)
    top_p = "nucleus sampling: keep the smallest set of tokens with this total probability"
    add("--top_p", type=positive_float, default=0.7, help=top_p)
    add(
        "--seed",
        type=non_negative_int,
        default=42,
        help="seed of sampling, the same for all models",
    )
    add("--batch_size", type=positive_int, default=8, help="answers written at once")

    add, _ = parser.section("judge")
    judge = "model that judges, DIR or DIR+ADAPTER; with --judge_url its name there"
    add("--judge_model", help=judge)
    add("--judge_template", default="auto", help="chat template of a judge on this machine")
    add("--judge_url", help="such as http://127.0.0.1:8000/v1; its key is in OPENAI_API_KEY")
    price_in, price_out = "price of a million input tokens", "price of a million output tokens"
    add("--judge_price_in", type=non_negative_float, default=0.0, help=price_in)
    add("--judge_price_out", type=non_negative_float, default=0.0, help=price_out)
    _add_output_flags(
        parser,
        "results.json, report.html and report.png",
        "keep the answers and verdicts in --output_dir and add the others",
    )
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def _add_output_flags(parser: OptionParser, results: str, resume: str) -> Any:
    """Add the section "output"; returns its `add` for more flags."""
    add, switch = parser.section("output")
    add("--output_dir", required=True, help=f"folder for {results}")
    switch("--overwrite_output_dir", "write into a folder that is not empty")
    switch("--resume", resume)
    return add


def _check_resume(options: Namespace) -> None:
    if options.resume and options.overwrite_output_dir:
        raise UserError("--resume and --overwrite_output_dir exclude each other. Give one of them.")


JUDGE = {"judge_url", "judge_template", "judge_price_in", "judge_price_out"}
SAMPLING = {"top_k", "top_p", "seed"}


def check_options(options: Namespace, given: set[str]) -> None:
    """UserError for flags of a comparison that have no effect or contradict each other.

    given: names of the flags that were given.
    """
    _check_resume(options)
    rules: list[tuple[set[str], Any, str]] = [
        (SAMPLING, options.temperature == 0, "needs --temperature above 0"),
        (JUDGE, not options.judge_model, "needs --judge_model"),
        ({"judge_model"}, len(options.models) < 2, "needs two models or more in --models"),
        (
            {"judge_template"},
            options.judge_url,
            "belongs to a judge on this machine; behind --judge_url the server has its own",
        ),
    ]
    check_rules(rules, given)
    for text in options.models:
        if re.search(r",[\w.-]+=", text):
            separate = re.sub(r",([\w.-]+=)", r" \1", text)
            raise UserError(f"--models {text}: write spaces between models: --models {separate}")
