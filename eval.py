r"""Measure a model: multiple-choice benchmarks, and free answers of several models side by side.

    python eval.py ceval --model_name_or_path base --adapter runs/cherry \
        --data_dir ceval-exam --output_dir runs/cherry-ceval
    python eval.py compare --models base=base tuned=base+runs/cherry \
        --dataset compare.json --output_dir runs/comparison

The first word says what is measured: ceval, cmmlu, mmlu or compare; each has its own --help.
"""

import os
import sys
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.model_flags import dtype_option
from minisft.common.outputs import check_output_dir, recorded_options, save_options
from minisft.common.script import run_script
from minisft.evaluation.options import in_bits, parse_choice_options, parse_compare_options

CHOICES = ("ceval", "cmmlu", "mmlu")
# What the rows of a run that is gone on with must have in common with those it has.
IDENTITY = (
    "model_name_or_path",
    "adapter",
    "dtype",
    "bf16",
    "fp16",
    "quantization_bit",
    "data_dir",
    "split",
    "num_fewshot",
    "template",
    "max_length",
    "max_samples",
    "n_times",
    "seed",
)
COMPARISON_FILES = ("verdicts.jsonl", "results.json", "report.html", "report.png")
# The same as IDENTITY for the answers of a comparison.
ANSWER_IDENTITY = (
    "models",
    "dtype",
    "bf16",
    "fp16",
    "quantization_bit",
    "template",
    "dataset",
    "max_samples",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
)


def main():
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in CHOICES:
        multiple_choice(name, parse_choice_options(name, arguments))
    elif name == "compare":
        compare(parse_compare_options(arguments))
    elif name in ("-h", "--help"):
        print(__doc__.rstrip())
    else:
        raise UserError(
            f"'{name}' is nothing to measure; the first word is one of "
            f"{', '.join(CHOICES)}, compare"
        )


def multiple_choice(name, options):
    """Answer the questions of a benchmark, subject by subject, and sum up."""
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.evaluation.benchmarks import BENCHMARKS
    from minisft.evaluation.choice_report import read_baseline, read_finished, write_rows

    benchmark = BENCHMARKS[name]
    options.split = options.split or benchmark.splits[0]
    output_dir = check_output_dir(
        options.output_dir,
        options.overwrite_output_dir or options.resume,
        options.model_name_or_path,
        options.adapter,
    )
    check_resumable(options, IDENTITY)

    subjects, rows_dir = read_questions(benchmark, options), output_dir / f"{name}-{options.split}"
    baseline = options.baseline_dir and read_baseline(
        subjects, Path(options.baseline_dir) / rows_dir.name
    )

    from minisft.common import processes
    from minisft.evaluation import multiple_choice
    from minisft.generation.assistant import Assistant

    device = processes.start(resolve_device(options.device))
    # A plain text needs no template; that of this name fits every tokenizer.
    template = "plain" if options.template == "none" else options.template
    assistant = Assistant(
        options.model_name_or_path,
        options.adapter,
        template,
        device,
        resolve_dtype(dtype_option(options), device),
        quantization_bit=options.quantization_bit,
    )
    template = None if options.template == "none" else assistant.template
    max_length = min(options.max_length or assistant.max_length, assistant.max_length)
    prompts = multiple_choice.Prompts(benchmark, assistant.tokenizer, template, max_length)

    waiting = begin(options, output_dir, rows_dir, subjects)
    mine = waiting[processes.rank() :: processes.world_size()]
    with progress_bar(sum(len(one.questions) for one in mine) * options.n_times) as bar:
        for subject in mine:
            bar.set_postfix_str(subject.key)
            rows = []
            for number in range(options.n_times):
                rows += multiple_choice.answer_subject(
                    assistant.model,
                    prompts,
                    subject,
                    options.num_fewshot,
                    number,
                    options.seed,
                    options.batch_size,
                    bar.update,
                )
            write_rows(rows_dir / f"{subject.key}.csv", rows)
    processes.barrier()
    if processes.rank() == 0:
        rows_of = {
            one.key: read_finished(rows_dir / f"{one.key}.csv", one, options.n_times)
            for one in subjects
        }
        report_choices(benchmark, options, assistant, template, subjects, rows_of, baseline)
    processes.stop()


def read_questions(benchmark, options):
    """The subjects that the options ask for."""
    from dataclasses import replace

    from minisft.evaluation.benchmarks import read_subjects

    if options.split not in benchmark.splits:
        raise UserError(
            f"--split {options.split}: {benchmark.title} has {', '.join(benchmark.splits)}"
        )
    wanted = [one.strip() for one in options.subjects.split(",") if one.strip()]
    subjects = read_subjects(
        benchmark, options.data_dir, options.split, options.num_fewshot, wanted
    )
    return [replace(one, questions=one.questions[: options.max_samples]) for one in subjects]


def check_resumable(options, identity):
    """UserError where --resume would mix the results of different runs."""
    recorded = recorded_options(options.output_dir) if options.resume else {}
    for name in identity if recorded else ():
        if recorded.get(name) != getattr(options, name):
            raise UserError(
                f"--resume: {options.output_dir} is from a run with {name} "
                f"{recorded.get(name)}, not {getattr(options, name)}; give the same, "
                "or another --output_dir"
            )


def begin(options, output_dir, rows_dir, subjects):
    """Prepare the folder; returns the subjects still to do, the largest first."""
    from minisft.common import processes
    from minisft.evaluation.choice_report import read_finished

    done = set()
    for subject in subjects if options.resume else ():
        path = rows_dir / f"{subject.key}.csv"
        if path.is_file():
            read_finished(path, subject, options.n_times)
            done.add(subject.key)
    processes.barrier()  # nobody writes before all have looked
    if processes.rank() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            remove(
                [
                    *rows_dir.glob("*.csv"),
                    output_dir / "summary.json",
                    output_dir / "submission.json",
                ]
            )
        save_options(options, output_dir / "options.toml")
    processes.barrier()
    waiting = [one for one in subjects if one.key not in done]
    kept = f"; {len(done)} subjects are done" * bool(done)
    processes.print_rank0(
        f"{sum(len(one.questions) for one in waiting):,} questions in {len(waiting)} subjects{kept}"
    )
    return sorted(waiting, key=lambda one: -len(one.questions))


def remove(paths):
    """What an earlier run left: mixed with what comes now, it would pass for this run's."""
    for path in paths:
        path.unlink(missing_ok=True)


def progress_bar(total, name=None):
    """A bar that counts questions, silent where nobody watches."""
    from tqdm import tqdm

    from minisft.common import processes

    return tqdm(
        total=total,
        desc=name,
        unit="question",
        disable=processes.rank() != 0 or not sys.stderr.isatty(),
    )


def report_choices(benchmark, options, assistant, template, subjects, rows_of, baseline):
    """Write summary.json, and submission.json where the answers are not told; print a table."""
    from minisft.common.json_files import write_json
    from minisft.evaluation import choice_report

    output_dir = Path(options.output_dir)
    summary = {"protocol": protocol(benchmark, options, assistant, template)}
    summary |= choice_report.summarize(subjects, rows_of, options.num_fewshot)
    if "macro" in summary:
        if baseline:
            summary["baseline"] = choice_report.compare_with(baseline, rows_of)
        print(choice_report.table(summary))
    else:
        write_json(choice_report.submission(subjects, rows_of), output_dir / "submission.json")
        print(f"this split has no answers: wrote {output_dir / 'submission.json'} to be handed in")
    if "baseline" in summary:
        change = summary["baseline"]
        low, high = change["interval"]
        print(
            f"against the baseline, over {change['num_questions']} questions: "
            f"{100 * change['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), "
            f"McNemar's p = {change['p_value']:.3g}"
        )
    if summary["dropped_demonstrations"]:
        print(
            f"{summary['questions_with_dropped_demonstrations']} questions had no room for all "
            f"demonstrations: {summary['dropped_demonstrations']} were dropped"
        )
    if summary["questions_cut"]:
        print(
            f"{summary['questions_cut']} questions were too long even alone and lost their "
            "beginning"
        )
    write_json(summary, output_dir / "summary.json")
    print(f"{summary['protocol']}\nwrote {output_dir / 'summary.json'}")


def protocol(benchmark, options, assistant, template):
    """In words how the figures came about, without which they cannot be compared."""
    form = f"as turns of the template {template.name}" if template else "as plain text"
    times = f", mean of {options.n_times} runs with other demonstrations" * (options.n_times > 1)
    limit = f"; the first {options.max_samples} questions of each subject" * bool(
        options.max_samples
    )
    subjects = f"; subjects {options.subjects}" * bool(options.subjects)
    adapter = f" with {options.adapter}" * bool(options.adapter)
    dtype = str(assistant.dtype).removeprefix("torch.") + in_bits(options)
    shown = f"{options.num_fewshot}-shot" + " with the first rows of dev" * bool(
        options.num_fewshot
    )
    return (
        f"{benchmark.title}, {options.split} split{subjects}{limit}; {shown}{times}; the "
        f"authors' prompt {form}; the letter with the highest likelihood in its place behind "
        f"it; {options.model_name_or_path}{adapter} in {dtype}; intervals 95 %, Wilson's for "
        "questions, normal over subjects"
    )


def compare(options):
    """Answers of all models, one after another; then their measures, the judge, the page."""
    from minisft.data import dataset
    from minisft.evaluation.compare import differences, measure, parse_models, read_items
    from minisft.evaluation.report_page import (
        draw_bars,
        measure_lines,
        verdict_lines,
        write_results,
    )
    from minisft.evaluation.text_metrics import scorers
    from minisft.generation.generate import Sampling

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("compare runs in one process: start it without torchrun")
    models = parse_models(options.models)
    output_dir = check_output_dir(
        options.output_dir,
        options.overwrite_output_dir or options.resume,
        *[path for one in models for path in one[1:]],
    )
    check_resumable(options, ANSWER_IDENTITY)
    scorers()  # here too what is not installed is said before anything is computed
    load_judge = judge_of(options) if options.judge_model else None
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed=options.seed
    )
    rows = dataset.open_rows(options.dataset, dataset_dir=options.dataset_dir)
    items = read_items(rows[: options.max_samples])
    answers_dir = begin_comparison(options, output_dir)
    results = {
        "protocol": compare_protocol(options, len(items)),
        "models": {},
        "questions": [{"question": item.question, "reference": item.reference} for item in items],
    }
    for model in models:
        answers, losses = answers_of(model, options, items, sampling, answers_dir)
        results["models"][model[0]] = measure(items, answers, losses) | {"answers": answers}
    (_, first), *others = results["models"].items()
    results["differences_to_first"] = {name: differences(first, one) for name, one in others}
    print("\n".join(measure_lines(results)))
    write_results(results, output_dir)  # which a judge that fails does not take away
    try:
        draw_bars(results, output_dir / "report.png")
    except ImportError:
        print("no report.png: it needs matplotlib (requirements-extras.txt)")
    if load_judge:
        results["judge"] = judge_answers(load_judge, options, results, output_dir)
        print("\n".join(verdict_lines(results)))
        write_results(results, output_dir)
    print(f"wrote {output_dir / 'report.html'}")


def begin_comparison(options, output_dir):
    """Prepare the folder; returns that of the answers."""
    folder = output_dir / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        remove([*folder.glob("*.json"), *map(output_dir.joinpath, COMPARISON_FILES)])
    save_options(options, output_dir / "options.toml")
    return folder


def answers_of(model, options, items, sampling, folder):
    """(answers, losses of the references) of one model; those of --resume where there are any."""
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.common.json_files import read_json, write_json
    from minisft.evaluation.compare import answer_items, fingerprint, reference_losses
    from minisft.generation.assistant import Assistant

    name, path, adapter = model
    kept = folder / f"{name}.json"
    if options.resume and kept.is_file():
        content = read_json(kept)
        if content.get("questions") != fingerprint(items):
            raise UserError(
                f"{kept}: answers other questions than {options.dataset} has now; "
                "remove it, or give another --output_dir"
            )
        return content["answers"], content["losses"]
    device = resolve_device(options.device)
    assistant = Assistant(
        path,
        adapter,
        options.template,
        device,
        resolve_dtype(dtype_option(options), device),
        quantization_bit=options.quantization_bit,
    )
    with progress_bar(len(items), name) as bar:
        answers = answer_items(assistant, items, sampling, options.batch_size, bar.update)
    if all(one["is_skipped"] for one in answers):
        raise UserError(
            f"--max_new_tokens {sampling.max_new_tokens}: no question leaves room for "
            f"that in {name}'s context of {assistant.max_length} tokens; give less"
        )
    losses = reference_losses(assistant, items, options.batch_size)
    write_json({"questions": fingerprint(items), "answers": answers, "losses": losses}, kept)
    return answers, losses


def compare_protocol(options, count):
    """In words how the answers came about."""
    way = (
        "greedily"
        if options.temperature == 0
        else (
            f"at temperature {options.temperature}, top-k {options.top_k}, top-p {options.top_p}, "
            "seed "
            f"{options.seed}"
        )
    )
    return (
        f"{count} questions of {options.dataset}, template {options.template}, answers of at "
        f"most {options.max_new_tokens} tokens written {way}; {', '.join(options.models)}"
        f"{in_bits(options)}; "
        "BLEU by sacrebleu (zh), ROUGE F by rouge-score, both by character in Chinese; "
        "intervals 95 %, normal for means, Wilson's for shares"
    )


def judge_of(options):
    """A function that gives the judge; what is wrong with it is said now."""
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.evaluation import judge
    from minisft.evaluation.compare import check_model, split_adapter
    from minisft.generation.assistant import Assistant

    if options.judge_url:
        remote = judge.RemoteJudge(
            options.judge_url, options.judge_model, os.environ.get("OPENAI_API_KEY")
        )
        return lambda: remote
    path, adapter = split_adapter(options.judge_model)
    check_model(path, adapter)

    def load():
        device = resolve_device(options.device)
        assistant = Assistant(
            path,
            adapter,
            options.judge_template,
            device,
            resolve_dtype(dtype_option(options), device),
            quantization_bit=options.quantization_bit,
        )
        name = f"{options.judge_model}, template {assistant.template.name}"
        return judge.LocalJudge(assistant, name, options.batch_size)

    return load


def judge_answers(load_judge, options, results, output_dir):
    """What the judge says of every model against the first."""
    from minisft.evaluation import judge

    ask = load_judge()
    (_, first), *others = results["models"].items()
    comparisons = {
        name: [
            judge.Comparison(item["question"], one["answer"], two["answer"])
            for item, one, two in zip(
                results["questions"], first["answers"], report["answers"], strict=True
            )
        ]
        for name, report in others
    }
    flat = [one for some in comparisons.values() for one in some]
    print(judge.cost_line(flat, options.judge_price_in, options.judge_price_out), flush=True)
    with progress_bar(2 * len(flat), "judge") as bar:
        verdicts = {
            name: judge.judge(ask, some, output_dir / "verdicts.jsonl", bar.update)
            for name, some in comparisons.items()
        }
    return {
        "name": ask.name,
        "outcomes": {
            name: [judge.outcome(*pair) for pair in pairs] for name, pairs in verdicts.items()
        },
        "against_first": {name: judge.tally(pairs) for name, pairs in verdicts.items()},
    }


if __name__ == "__main__":
    run_script(main)
