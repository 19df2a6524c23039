"""The flags of `eval.py`: a parser for the multiple-choice benchmarks, one for comparisons.

options = parse_choice_options("ceval", ["--model_name_or_path", "examples/base",
                                         "--data_dir", "ceval-exam", "--output_dir", "runs/c"])
options.num_fewshot                          # 5
"""

from minisft.common.command_line import (
    OptionParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import add_device_flags, add_model_flags


def parse_choice_options(name, arguments):
    """The options of `eval.py ceval`, `cmmlu` and `mmlu`."""
    parser = OptionParser(
        prog=f"eval.py {name}",
        description="Answer multiple-choice questions and count what is right.",
    )
    add, switch = add_model_flags(parser)
    add("--adapter", metavar="DIR", help="folder of a LoRA adapter, used without merging")
    add, switch = parser.section("questions")
    add("--data_dir", required=True, help="the benchmark's folder of CSV files, or its zip")
    add(
        "--split",
        choices=["val", "test", "dev"],
        help="which questions (default: val for ceval, test for the others)",
    )
    add("--subjects", default="", help="only these, separated by commas")
    add(
        "--max_samples", type=positive_int, help="only the first questions of each, for a quick try"
    )
    add(
        "--num_fewshot",
        type=non_negative_int,
        default=5,
        help="demonstrations before every question",
    )
    add(
        "--template",
        default="none",
        help="none: plain text, as published; auto or a name: as turns of a conversation",
    )
    add(
        "--max_length",
        type=positive_int,
        help="longest prompt in tokens (else the model's context)",
    )
    add(
        "--n_times",
        type=positive_int,
        default=1,
        help="repeat with other demonstrations, or another order of them, and average",
    )
    add(
        "--seed", type=non_negative_int, default=42, help="of the demonstrations of the repetitions"
    )
    add("--batch_size", type=positive_int, default=8, help="questions that are computed together")
    add = add_output_flags(
        parser, "the results", "keep the subjects that are finished in that folder, do the others"
    )
    add("--baseline_dir", help="an earlier run's output folder: test the difference to it")
    options = parser.parse_options(arguments)
    check_options(options)
    if options.n_times > 1 and not options.num_fewshot:
        raise UserError(
            "--n_times repeats with other demonstrations; with --num_fewshot 0 there are none"
        )
    return options


def add_output_flags(parser, results, resume):
    """Where the results go and what is done with those there; returns how to add another flag."""
    add, switch = parser.section("output")
    add("--output_dir", required=True, help=f"folder for {results}")
    switch("--overwrite_output_dir", "write into a folder that has something in it")
    switch("--resume", resume)
    return add


def check_options(options):
    """UserError where flags that both parsers have contradict each other."""
    if options.resume and options.overwrite_output_dir:
        raise UserError("--resume keeps what --overwrite_output_dir throws away: give one of them")


def in_bits(options):
    """In words whether the models are quantised."""
    bits = options.quantization_bit
    return f" with linear layers in {bits} bits" if bits else ""


def parse_compare_options(arguments):
    """The options of `eval.py compare`; UserError where flags do not go together."""
    parser = OptionParser(
        prog="eval.py compare",
        description="The same questions to several models; measure and judge.",
    )
    add, switch = parser.section("models")
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME=DIR[+ADAPTER]",
        help="models and their names; the others are compared with the first",
    )
    add_device_flags(add, switch)
    add(
        "--template",
        default="auto",
        help="conversation format of all models (auto: what each was trained with)",
    )
    add, switch = parser.section("questions and answers")
    add("--dataset", required=True, help="files or names, as for train.py; answers are references")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    add("--max_samples", type=positive_int, help="only the first rows")
    add("--max_new_tokens", type=positive_int, default=512, help="longest answer in tokens")
    add(
        "--temperature",
        type=non_negative_float,
        default=0.0,
        help="0: the most probable token always",
    )
    add(
        "--top_k", type=non_negative_int, default=50, help="draw from this many best tokens; 0: all"
    )
    add(
        "--top_p", type=positive_float, default=0.7, help="draw from the best with this probability"
    )
    add("--seed", type=non_negative_int, default=42, help="of the draws; the same for every model")
    add("--batch_size", type=positive_int, default=8, help="answers that are written together")
    add, switch = parser.section("judge")
    add("--judge_model", help="folder or DIR+ADAPTER; with --judge_url the model's name there")
    add("--judge_template", default="auto", help="conversation format of a judge without address")
    add("--judge_url", help="such as http://127.0.0.1:8000/v1; key: OPENAI_API_KEY")
    add("--judge_price_in", type=non_negative_float, default=0.0, help="of a million tokens read")
    add(
        "--judge_price_out",
        type=non_negative_float,
        default=0.0,
        help="of a million tokens written",
    )
    add_output_flags(
        parser,
        "results.json, report.html and report.png",
        "keep the answers and verdicts that are in that folder, get the others",
    )
    options = parser.parse_options(arguments)
    check_options(options)
    if options.judge_url and not options.judge_model:
        raise UserError("--judge_url needs --judge_model: what the model is called there")
    if options.judge_url and options.judge_template != "auto":
        raise UserError(
            "--judge_template is for a judge of ours; one behind --judge_url has its own format"
        )
    if options.judge_model and len(options.models) < 2:
        raise UserError("--judge_model needs two models or more to compare")
    return options
