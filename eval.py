r"""Evaluate models: multiple-choice benchmarks, or answers of several models side by side.

    python eval.py ceval --model_name_or_path base --adapter runs/cherry \
        --data_dir ceval-exam --output_dir runs/cherry-ceval
    python eval.py compare --models base=base tuned=base+runs/cherry \
        --dataset compare.json --output_dir runs/comparison

The first word says what to measure: ceval, cmmlu, mmlu or compare. Each has its own --help.
"""

import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from minisft.common.script import run_script
from minisft.common.torchrun import announced_processes
from minisft.evaluation.options import parse_options

if __name__ == "__main__":
    # Before torch is imported, so that --help and a mistyped flag answer at once.
    command_line = run_script(partial(parse_options, __doc__))
else:
    command_line = None

import torch

from minisft.checkpoints.hub import model_or_base
from minisft.common import processes
from minisft.common.devices import resolve_device, resolve_dtype, type_for_answers
from minisft.common.errors import UserError
from minisft.common.json_files import read_json, write_json
from minisft.common.model_flags import dtype_option, template_settings
from minisft.common.progress import ProgressBar
from minisft.common.single_writer import single_writer
from minisft.common.words import counted
from minisft.data.dataset import open_rows, unused_values
from minisft.evaluation import resume
from minisft.evaluation.benchmark_files import language_note, read_subjects
from minisft.evaluation.benchmarks import BENCHMARKS, Benchmark, Subject
from minisft.evaluation.choice_prompts import PromptBuilder
from minisft.evaluation.choice_report import choice_protocol, write_summary
from minisft.evaluation.compare import (
    Answer,
    Item,
    ReferenceLoss,
    answer_items,
    fingerprint,
    read_items,
    reference_losses,
)
from minisft.evaluation.judge import (
    Judge,
    LocalJudge,
    collect_verdicts,
    comparisons_with_first,
    cost_line,
    judge_report,
)
from minisft.evaluation.measures import differences, measure
from minisft.evaluation.models import NamedModel, check_model, parse_models, paths_of, split_adapter
from minisft.evaluation.multiple_choice import answer_subject
from minisft.evaluation.predictions import (
    Baseline,
    read_baseline,
    unfinished_subjects,
    write_predictions,
)
from minisft.evaluation.remote_judge import RemoteJudge
from minisft.evaluation.report_bars import draw_bars
from minisft.evaluation.report_lines import compare_protocol, measure_lines, verdict_lines
from minisft.evaluation.report_page import write_results
from minisft.evaluation.text_metrics import scorers
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.model.decoder import CausalLM
from minisft.text.template_choice import settings_without_effect
from minisft.text.tool_texts import TOOLS_AS_TEXT


def main(command: tuple[str, Namespace] | None = None) -> None:
    """Run the measurement that the command line names."""
    name, options = command or parse_options(__doc__)
    if name == "compare":
        compare(options)
    else:
        answer_benchmark(name, options)


def answer_benchmark(name: str, options: Namespace) -> None:
    """Check the options and read the questions of a benchmark, then answer them."""
    benchmark = BENCHMARKS[name]
    options.model_name_or_path = model_or_base(options.model_name_or_path, options.adapter)
    inputs = [options.model_name_or_path, options.adapter]
    output_dir = resume.check_output(options, inputs, resume.CHOICE_OPTIONS)
    subjects = read_subjects(
        benchmark,
        options.data_dir,
        options.split,
        options.num_fewshot,
        [key.strip() for key in options.subjects.split(",") if key.strip()],
        options.max_samples,
    )
    rows_dir = output_dir / f"{name}-{options.split}"
    baseline = None
    if options.baseline_dir:
        baseline = read_baseline(subjects, Path(options.baseline_dir) / rows_dir.name)

    device = processes.start(resolve_device(options.device))
    lock = processes.on_rank0(single_writer(output_dir, is_folder=True))
    with lock, resume.saying_how_to_go_on(options, resume.CHOICE_OPTIONS):
        measure_accuracy(options, benchmark, subjects, baseline, rows_dir, device)
    processes.stop()


def measure_accuracy(
    options: Namespace,
    benchmark: Benchmark,
    subjects: list[Subject],
    baseline: Baseline | None,
    rows_dir: Path,
    device: torch.device,
) -> None:
    """Answer the questions, subject by subject, and report the accuracy."""
    output_dir = rows_dir.parent
    if note := language_note(benchmark, subjects):
        processes.print_rank0(note)
    # Plain text needs no template, but an Assistant has one. This one fits every tokenizer.
    template_name = "plain" if options.template == "none" else options.template
    assistant = load_assistant(
        options, options.model_name_or_path, options.adapter, template_name, device
    )
    template = None if options.template == "none" else assistant.template
    max_length = min(options.max_length or assistant.max_length, assistant.max_length)
    builder = PromptBuilder(benchmark, assistant.tokenizer, template, max_length)

    unfinished = subjects
    if options.resume:
        unfinished = unfinished_subjects(subjects, rows_dir, options.n_times)
        num_finished = len(subjects) - len(unfinished)
        processes.print_rank0(f"{num_finished} of {len(subjects)} subjects are finished")
    processes.barrier()  # no rank writes before all have looked
    if processes.rank() == 0:
        results = f"{rows_dir.name}/*.csv", "summary.json", "submission.json"
        inputs = [options.model_name_or_path, options.adapter]
        resume.start_output_dir(options, output_dir, inputs, results)
    processes.barrier()

    answer_subjects(options, assistant.model, builder, unfinished, rows_dir)
    processes.barrier()
    if processes.rank() == 0:
        protocol = choice_protocol(benchmark, options, assistant.dtype, template)
        write_summary(options, protocol, subjects, rows_dir, baseline)


def answer_subjects(
    options: Namespace,
    model: CausalLM,
    builder: PromptBuilder,
    subjects: list[Subject],
    rows_dir: Path,
) -> None:
    """Write the predictions for this rank's share of the subjects, a file for each."""
    num_questions = sum(len(subject.questions) for subject in subjects)
    questions = counted(num_questions, "question")
    processes.print_rank0(f"{questions} in {counted(len(subjects), 'subject')}")
    # The largest subjects first, so that no rank works on one alone at the end.
    subjects = sorted(subjects, key=lambda subject: -len(subject.questions))
    share = subjects[processes.rank() :: processes.world_size()]
    num_questions = sum(len(subject.questions) for subject in share) * options.n_times
    with ProgressBar(num_questions, "question") as bar:
        for subject in share:
            bar.show(subject.key)
            rows = []
            for run in range(options.n_times):
                rows += answer_subject(
                    model,
                    builder,
                    subject,
                    options.num_fewshot,
                    run,
                    options.seed,
                    options.batch_size,
                    bar.update,
                )
            write_predictions(rows_dir / f"{subject.key}.csv", rows)


def compare(options: Namespace) -> None:
    """Check the options and read the questions; then ask all models, and let a judge compare."""
    if announced_processes() > 1:
        raise UserError("compare runs in a single process. Start it without torchrun.")
    models = parse_models(options.models)
    output_dir = resume.check_output(options, paths_of(models), resume.ANSWER_OPTIONS)
    scorers()  # reports a missing package before anything is computed
    check_judge(options)
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed=options.seed
    )
    rows = open_rows(
        options.dataset,
        dataset_dir=options.dataset_dir,
        max_samples=options.max_samples,
        replace=options.replace,
    )
    if note := unused_values(rows.files):
        print(note)
    items = read_items(rows)
    going_on = resume.saying_how_to_go_on(options, resume.ANSWER_OPTIONS)
    with single_writer(output_dir, is_folder=True), going_on:
        compare_answers(options, models, items, sampling, output_dir)


def compare_answers(
    options: Namespace,
    models: list[NamedModel],
    items: list[Item],
    sampling: Sampling,
    output_dir: Path,
) -> None:
    """Answer the questions, measure the answers, and write the report."""
    answers_dir = output_dir / "answers"
    files = "answers/*.json", "verdicts.jsonl", "results.json", "report.html", "report.png"
    resume.start_output_dir(options, output_dir, paths_of(models), files)
    answers_dir.mkdir(exist_ok=True)

    results: dict[str, Any] = {
        "protocol": compare_protocol(options, len(items)),
        "models": {},
        "questions": [{"question": item.question, "reference": item.reference} for item in items],
    }
    for model in models:
        answers, losses = answer_questions(model, options, items, sampling, answers_dir)
        results["models"][model.name] = measure(items, answers, losses) | {"answers": answers}
    (_, first), *others = results["models"].items()
    results["differences_to_first"] = {name: differences(first, report) for name, report in others}
    print("\n".join(measure_lines(results)))
    write_results(results, output_dir)  # before the judge, which may fail
    try:
        draw_bars(results, output_dir / "report.png")
    except ImportError:
        print("no report.png: matplotlib is not installed (see requirements/plot.txt)")

    if options.judge_model:
        results["judge"] = judge_answers(options, results, output_dir / "verdicts.jsonl")
        print("\n".join(verdict_lines(results)))
        write_results(results, output_dir)
    print(f"wrote {output_dir / 'report.html'}")


def answer_questions(
    model: NamedModel,
    options: Namespace,
    items: list[Item],
    sampling: Sampling,
    answers_dir: Path,
) -> tuple[list[Answer], list[ReferenceLoss | None]]:
    """(answers, losses of the references) of a model. --resume uses those in the folder."""
    path = answers_dir / f"{model.name}.json"
    if options.resume and path.is_file():
        content = read_json(path)
        if content.get("questions") != fingerprint(items):
            raise UserError(
                f"{path}: answers other questions than {options.dataset} has now. Remove it, or "
                "give another --output_dir."
            )
        return content["answers"], content["losses"]
    device = resolve_device(options.device)
    assistant = load_assistant(options, model.path, model.adapter, options.template, device)
    facts = assistant.template.facts
    if changed := sum(facts.changes_tools(item.messages, item.tools) for item in items):
        print(f"{model.name}: {changed} of {len(items)} rows have {TOOLS_AS_TEXT}")
    with ProgressBar(len(items), "question", model.name) as bar:
        answers = answer_items(assistant, items, sampling, options.batch_size, bar.update)
    if all(answer["is_skipped"] for answer in answers):
        raise UserError(
            f"--max_new_tokens {sampling.max_new_tokens}: no question leaves room for that in "
            f"{model.name}'s context of {assistant.max_length} tokens. Choose a smaller number."
        )
    losses = reference_losses(assistant, items, options.batch_size)
    write_json({"questions": fingerprint(items), "answers": answers, "losses": losses}, path)
    return answers, losses


def check_judge(options: Namespace) -> None:
    """UserError if the judge cannot be used, before the models answer."""
    if options.judge_url:
        load_judge(options)
    elif options.judge_model:
        check_model(*split_adapter(options.judge_model))


def load_judge(options: Namespace) -> Judge:
    """The judge behind --judge_url, or else the model on this machine."""
    if options.judge_url:
        key = os.environ.get("OPENAI_API_KEY")
        return RemoteJudge(options.judge_url, options.judge_model, key)
    path, adapter = split_adapter(options.judge_model)
    device = resolve_device(options.device)
    assistant = load_assistant(options, path, adapter, options.judge_template, device)
    name = f"{options.judge_model}, template {assistant.template.name}"
    return LocalJudge(assistant, name, options.batch_size)


def judge_answers(options: Namespace, results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The judge's verdicts on every model against the first, which are kept in the file `path`."""
    judge = load_judge(options)
    comparisons = comparisons_with_first(results)
    every = [comparison for of_model in comparisons.values() for comparison in of_model]
    print(cost_line(every, options.judge_price_in, options.judge_price_out), flush=True)
    with ProgressBar(2 * len(every), "question", "judge") as bar:
        verdicts = {
            name: collect_verdicts(judge, of_model, path, bar.update)
            for name, of_model in comparisons.items()
        }
    return judge_report(judge.name, verdicts)


def load_assistant(
    options: Namespace, path: str, adapter: str | None, template: str, device: torch.device
) -> Assistant:
    """A model with its adapter and template, in the number type that the options name."""
    dtype = resolve_dtype(dtype_option(options), device, type_for_answers(device))
    settings, bits = template_settings(options), options.quantization_bit
    assistant = Assistant(path, adapter, template, device, dtype, quantization_bit=bits, **settings)
    for line in settings_without_effect(assistant.template, **settings):
        processes.print_rank0(f"{assistant.name}: {line}")
    return assistant


if __name__ == "__main__":
    run_script(partial(main, command_line))
