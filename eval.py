"""Measure a model: multiple-choice benchmarks, and free answers of several models side by side.

    python eval.py ceval --model_name_or_path base --adapter runs/cherry \
        --data_dir ceval-exam --output_dir runs/cherry-ceval
    python eval.py compare --models base=base tuned=base+runs/cherry \
        --dataset compare.json --output_dir runs/comparison

The first word says what is measured: ceval, cmmlu, mmlu or compare; each has its own --help.
"""

import math
import os
import sys
from pathlib import Path

from minisft.evaluation_options import parse_choice_options, parse_compare_options
from minisft.options import (
    UserError,
    check_output_dir,
    recorded_options,
    resolve_device,
    resolve_dtype,
    run,
    save_options,
)

CHOICES = ("ceval", "cmmlu", "mmlu")
# What the rows of a run that is gone on with must have in common with those it has.
IDENTITY = ("model_name_or_path", "adapter", "dtype", "bf16", "fp16", "data_dir", "num_fewshot",
            "template", "max_length", "max_samples", "n_times", "seed")
# The same for the answers of a comparison.
ANSWER_IDENTITY = ("models", "dtype", "bf16", "fp16", "template", "dataset", "max_samples",
                   "max_new_tokens", "temperature", "top_k", "top_p", "seed")


def main():
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in CHOICES:
        multiple_choice(name, parse_choice_options(name, arguments))
    elif name == "compare":
        compare(parse_compare_options(arguments))
    elif name in ("-h", "--help"):
        print(__doc__.rstrip())
    else:
        raise UserError(f"'{name}' is nothing to measure; the first word is one of "
                        f"{', '.join(CHOICES)}, compare")


def multiple_choice(name, options):
    """Answer the questions of a benchmark, subject by subject, and sum up."""
    output_dir = check_output_dir(options.output_dir, options.overwrite_output_dir
                                  or options.resume, options.model_name_or_path, options.adapter)
    check_resumable(options, IDENTITY)

    from minisft import multiple_choice, parallel
    from minisft.assistant import Assistant
    from minisft.benchmarks import BENCHMARKS
    from minisft.choice_report import read_rows, write_rows

    benchmark = BENCHMARKS[name]
    options.split = options.split or benchmark.splits[0]
    subjects = read_questions(benchmark, options)
    device = parallel.start(resolve_device(options))
    # A plain text needs no template; that of this name fits every tokenizer.
    template = "plain" if options.template == "none" else options.template
    assistant = Assistant(options.model_name_or_path, options.adapter, template, device,
                          resolve_dtype(options, device))
    template = None if options.template == "none" else assistant.template
    max_length = min(options.max_length or assistant.max_length, assistant.max_length)
    prompts = multiple_choice.Prompts(benchmark, assistant.tokenizer, template, max_length)

    rows_dir = output_dir / f"{name}-{options.split}"
    waiting = begin(options, output_dir, rows_dir, subjects)
    mine = waiting[parallel.rank() :: parallel.world_size()]
    with progress_bar(sum(len(one.questions) for one in mine) * options.n_times) as bar:
        for subject in mine:
            bar.set_postfix_str(subject.key)
            rows = []
            for number in range(options.n_times):
                rows += multiple_choice.answer_subject(
                    assistant.model, prompts, subject, options.num_fewshot, number, options.seed,
                    options.batch_size, bar.update)
            write_rows(rows_dir / f"{subject.key}.csv", rows)
    parallel.barrier()
    if parallel.rank() == 0:
        rows_of = {one.key: read_rows(rows_dir / f"{one.key}.csv") for one in subjects}
        report_choices(benchmark, options, assistant, template, subjects, rows_of, rows_dir)
    parallel.stop()


def read_questions(benchmark, options):
    """The subjects that the options ask for."""
    from dataclasses import replace

    from minisft.benchmarks import read_subjects

    if options.split not in benchmark.splits:
        raise UserError(f"--split {options.split}: {benchmark.title} has "
                        f"{', '.join(benchmark.splits)}")
    wanted = [one.strip() for one in options.subjects.split(",") if one.strip()]
    subjects = read_subjects(benchmark, options.data_dir, options.split, options.num_fewshot,
                             wanted)
    return [replace(one, questions=one.questions[: options.max_samples]) for one in subjects]


def check_resumable(options, identity):
    """UserError where --resume would mix the results of different runs."""
    recorded = recorded_options(options.output_dir) if options.resume else {}
    for name in identity if recorded else ():
        if recorded.get(name) != getattr(options, name):
            raise UserError(f"--resume: {options.output_dir} is from a run with {name} "
                            f"{recorded.get(name)}, not {getattr(options, name)}; give the same, "
                            "or another --output_dir")


def begin(options, output_dir, rows_dir, subjects):
    """Prepare the folder; returns the subjects still to do, the largest first."""
    from minisft import parallel

    done = {path.stem for path in rows_dir.glob("*.csv")} if options.resume else set()
    parallel.barrier()  # nobody writes before all have looked
    if parallel.rank() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in rows_dir.glob("*.csv") if not options.resume else ():
            path.unlink()
        save_options(options, output_dir / "options.toml")
    parallel.barrier()
    waiting = [one for one in subjects if one.key not in done]
    parallel.say(f"{sum(len(one.questions) for one in waiting):,} questions in {len(waiting)} "
                 f"subjects; {len(subjects) - len(waiting)} subjects are done")
    return sorted(waiting, key=lambda one: -len(one.questions))


def progress_bar(total, name=None):
    """A bar that counts questions, silent where nobody watches."""
    from tqdm import tqdm

    from minisft import parallel

    return tqdm(total=total, desc=name, unit="question",
                disable=parallel.rank() != 0 or not sys.stderr.isatty())


def report_choices(benchmark, options, assistant, template, subjects, rows_of, rows_dir):
    """Write summary.json, and submission.json where the answers are not told; print a table."""
    from minisft import choice_report
    from minisft.json_files import write_json

    output_dir = Path(options.output_dir)
    summary = {"protocol": protocol(benchmark, options, assistant, template)}
    summary |= choice_report.summarize(subjects, rows_of, options.num_fewshot)
    if "macro" in summary:
        if options.baseline_dir:
            summary["baseline"] = choice_report.compare_with(
                subjects, rows_of, Path(options.baseline_dir) / rows_dir.name)
        print(choice_report.table(summary))
    else:
        write_json(choice_report.submission(subjects, rows_of), output_dir / "submission.json")
        print(f"this split has no answers: wrote {output_dir / 'submission.json'} to be handed in")
    if "baseline" in summary:
        change = summary["baseline"]
        low, high = change["interval"]
        print(f"against the baseline: {100 * change['difference']:+.1f} points "
              f"({100 * low:+.1f} to {100 * high:+.1f}), McNemar's p = {change['p_value']:.3g}")
    if summary["dropped_demonstrations"] or summary["questions_cut"]:
        print(f"{summary['questions_with_dropped_demonstrations']} questions had no room for all "
              f"demonstrations: {summary['dropped_demonstrations']} were dropped; "
              f"{summary['questions_cut']} questions had to be cut themselves")
    write_json(summary, output_dir / "summary.json")
    print(f"{summary['protocol']}\nwrote {output_dir / 'summary.json'}")


def protocol(benchmark, options, assistant, template):
    """In words how the figures came about, without which they cannot be compared."""
    form = f"as turns of the template {template.name}" if template else "as plain text"
    times = f", mean of {options.n_times} runs with other demonstrations" * (options.n_times > 1)
    limit = f"; the first {options.max_samples} questions of each subject" * bool(
        options.max_samples)
    subjects = f"; subjects {options.subjects}" * bool(options.subjects)
    adapter = f" with {options.adapter}" * bool(options.adapter)
    dtype = str(assistant.dtype).removeprefix("torch.")
    shown = f"{options.num_fewshot}-shot" + " with the first rows of dev" * bool(
        options.num_fewshot)
    return (f"{benchmark.title}, {options.split} split{subjects}{limit}; {shown}{times}; the "
            f"authors' prompt {form}; the letter with the highest likelihood in its place behind "
            f"it; {options.model_name_or_path}{adapter} in {dtype}; intervals 95 %, Wilson's for "
            "questions, normal over subjects")


def compare(options):
    """Answers of all models, one after another; then their measures, the judge, the page."""
    from minisft import dataset
    from minisft.compare import differences, measure, parse_model, read_items
    from minisft.text_metrics import scorers

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("compare runs in one process: start it without torchrun")
    models = [parse_model(one) for one in options.models]
    names = [name for name, _, _ in models]
    if len(set(names)) < len(names):
        raise UserError("--models: two have the same name")
    output_dir = check_output_dir(options.output_dir, options.overwrite_output_dir
                                  or options.resume, *[path for one in models for path in one[1:]])
    check_resumable(options, ANSWER_IDENTITY)
    scorers()  # what is not installed is said before anything is computed
    rows = dataset.open_rows(options.dataset, dataset_dir=options.dataset_dir)
    items = read_items(rows[: options.max_samples])
    (output_dir / "answers").mkdir(parents=True, exist_ok=True)
    save_options(options, output_dir / "options.toml")
    results = {"protocol": compare_protocol(options, len(items)), "models": {}, "questions": [
        {"question": item.question, "reference": item.reference} for item in items]}
    for model in models:
        answers, losses = answers_of(model, options, items, output_dir / "answers")
        results["models"][model[0]] = measure(items, answers, losses) | {"answers": answers}
    first = results["models"][names[0]]
    results["differences_to_first"] = {
        name: differences(first, results["models"][name]) for name in names[1:]}
    if options.judge_model:
        results["judge"] = judge_answers(options, results, output_dir)
    report_comparison(results, output_dir)


def answers_of(model, options, items, folder):
    """(answers, losses of the references) of one model; those of --resume where there are any."""
    from minisft.assistant import Assistant
    from minisft.compare import answer_items, reference_losses
    from minisft.generate import Sampling
    from minisft.json_files import read_json, write_json

    name, path, adapter = model
    kept = folder / f"{name}.json"
    if options.resume and kept.is_file():
        content = read_json(kept)
        return content["answers"], content["losses"]
    device = resolve_device(options)
    assistant = Assistant(path, adapter, options.template, device, resolve_dtype(options, device))
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p,
                        seed=options.seed)
    with progress_bar(len(items), name) as bar:
        answers = answer_items(assistant, items, sampling, options.batch_size, bar.update)
    losses = reference_losses(assistant, items, options.batch_size)
    write_json({"answers": answers, "losses": losses}, kept)
    return answers, losses


def compare_protocol(options, count):
    """In words how the answers came about."""
    way = "greedily" if options.temperature == 0 else (
        f"at temperature {options.temperature}, top-k {options.top_k}, top-p {options.top_p}, seed "
        f"{options.seed}")
    return (f"{count} questions of {options.dataset}, template {options.template}, answers of at "
            f"most {options.max_new_tokens} tokens written {way}; {', '.join(options.models)}; "
            "BLEU by sacrebleu (zh), ROUGE F by rouge-score, both by character in Chinese; "
            "intervals 95 %, normal for means, Wilson's for shares")


def judge_answers(options, results, output_dir):
    """What the judge says of every model against the first."""
    from minisft import judge
    from minisft.assistant import Assistant

    if options.judge_url:
        ask = judge.RemoteJudge(options.judge_url, options.judge_model,
                                os.environ.get("OPENAI_API_KEY"))
    else:
        path, _, adapter = options.judge_model.partition("+")
        device = resolve_device(options)
        ask = judge.LocalJudge(
            Assistant(path, adapter or None, options.judge_template, device,
                      resolve_dtype(options, device)),
            options.judge_model, options.batch_size)
    (_, first), *others = results["models"].items()
    comparisons = {name: [
        judge.Comparison(item["question"], one["answer"], two["answer"])
        for item, one, two in zip(results["questions"], first["answers"], report["answers"],
                                  strict=True)] for name, report in others}
    flat = [one for some in comparisons.values() for one in some]
    print(judge.cost_line(flat, options.judge_price_in, options.judge_price_out), flush=True)
    path = output_dir / "verdicts.jsonl"
    if not options.resume:
        path.unlink(missing_ok=True)
    with progress_bar(2 * len(flat), "judge") as bar:
        outcomes = {name: judge.judge(ask, some, path, bar.update)
                    for name, some in comparisons.items()}
    return {"name": options.judge_model, "outcomes": outcomes,
            "against_first": {name: judge.tally(some) for name, some in outcomes.items()}}


def report_comparison(results, output_dir):
    """Write results.json, the page and the picture; print the figures."""
    from minisft.json_files import write_json
    from minisft.report_page import NAMES, draw_bars, page

    write_json(results, output_dir / "results.json")
    (output_dir / "report.html").write_text(page(results), encoding="utf-8")
    for name, report in results["models"].items():
        figures = ", ".join(f"{title} {100 * report['mean'][key]['mean']:.1f}"
                            for key, title in NAMES.items())
        print(f"{name}: {figures}, perplexity {report['perplexity'] or math.nan:.2f}")
    for name, report in results.get("judge", {}).get("against_first", {}).items():
        print(f"{name} against {next(iter(results['models']))}: "
              + ", ".join(f"{report[one]['count']} {one}" for one in ("win", "tie", "loss"))
              + f", {report['unreadable']} unreadable")
    try:
        draw_bars(results, output_dir / "report.png")
    except ImportError:
        print("no report.png: it needs matplotlib (requirements-extras.txt)")
    print(f"wrote {output_dir / 'report.html'}")


if __name__ == "__main__":
    run(main)
