"""Training and evaluation rows, read and encoded as the options say.

batches, eval_examples = load_data(options, tokenizer, template, config, print)
for examples in training_steps(batches, rows_per_step=32, start=0, stop=1000):
    ...
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from minisft.common.errors import UserError
from minisft.common.model_flags import template_options, template_settings
from minisft.common.words import counted
from minisft.data import dataset
from minisft.data.batching import Batches
from minisft.data.build_batches import (
    batches_of_rows,
    batches_of_texts,
    first_blocks,
    first_examples,
    held_out_examples,
)
from minisft.data.encode_preferences import encode_preferences
from minisft.data.encoding import Example, encode_rows
from minisft.data.workers import WorkerKilled
from minisft.model.config import ModelConfig
from minisft.text.chat_template import ChatTemplate
from minisft.text.marked import marked, supervised_marks
from minisft.text.template_choice import get_template, settings_without_effect
from minisft.text.tokenizer import Tokenizer
from minisft.training.vocabulary import note_on_spelled_tokens


def load_data(
    options: Namespace,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: ModelConfig,
    say: Callable[[str], None],
) -> tuple[Batches, list[Example] | None]:
    """(batches to train on, held-out examples or None). Reports rows that are truncated or skipped.

    template: None with --stage pt, which reads plain text. UserError if no row is usable.
    """
    plain_text, ranking = options.stage == "pt", options.stage in ("rm", "dpo")
    max_length = length_limit(options, config)
    flag = "block_size" if plain_text else "cutoff_len"
    if max_length < getattr(options, flag):
        say(f"--{flag}: reduced to {max_length} tokens, the context length of the model")
    skipped: list[str] | None = [] if options.skip_bad_rows else None
    reading: dict[str, Any] = dict(
        dataset_dir=options.dataset_dir,
        plain_text=plain_text,
        ranking=ranking,
        skipped=skipped,
        seed=options.seed,
        say=say,
        offline=options.dry_run,
        replace=options.replace,
    )
    first = {"max_samples": options.max_samples}
    rows = dataset.open_rows(options.dataset or options.train_dir, **reading, **first)
    eval_rows = None
    if options.eval_dataset or options.valid_dir:
        eval_rows = dataset.open_rows(options.eval_dataset or options.valid_dir, **reading, **first)
    elif options.validation_split:
        rows, eval_rows = dataset.split(rows, options.validation_split, options.seed)
    if options.mix:
        rows = dataset.mix(rows, options.mix, **reading)
    if note := note_on_spelled_tokens(rows, options):
        say(f"note: {note}")
    if note := dataset.unused_values(rows.files + (eval_rows.files if eval_rows else [])):
        say(note)
    if skipped:
        say(f"{counted(len(skipped), 'broken row')} left out, the first: {skipped[0]}")

    batching_options: dict[str, Any] = dict(
        vocab_size=config.vocab_size, seed=options.seed, num_workers=options.dataloader_num_workers
    )
    if plain_text or template is None:
        batches = batches_of_texts(
            rows, tokenizer, max_length, packing=options.packing, **batching_options
        )
    else:
        if options.mask_history and not ranking:
            batching_options["encode"] = partial(encode_rows, mask_history=True)
        if ranking:  # a reward belongs to a complete conversation, so do not truncate it
            encode = partial(encode_preferences, drop_long=options.stage == "rm")
            batching_options["encode"] = encode
        batches = batches_of_rows(rows, template, max_length, **batching_options)
    sample = batches.sample_report
    for note, count in sample.notes.items():
        say(f"warning: {count} of {sample.num_rows} sampled rows have {note}")
    if sample := replace(sample, notes=Counter()):
        limit = f" at --cutoff_len {max_length}" if sample.long_rows else ""
        say(f"a sample of {sample.num_rows} rows{limit}: {sample}")
    if note := learned_note(batches, len(rows)):
        say(note)
    return batches, None if eval_rows is None else held_out_examples(batches, eval_rows, say)


def learned_note(batches: Batches, num_rows: int) -> str | None:
    """How many of the rows an epoch has, if nothing is learned from some; else None."""
    if not batches.sample_report.num_left_out:
        return None
    about = "about " if len(batches.rows) > batches.num_examples else ""
    return (
        f"{about}{batches.num_examples:,} of {num_rows:,} rows have something to learn; epochs, "
        "steps and progress count these"
    )


def load_template(
    options: Namespace, tokenizer: Tokenizer, say: Callable[[str], None]
) -> ChatTemplate | None:
    """The chat template; None for plain text (--stage pt)."""
    if options.stage == "pt":
        return None
    template = get_template(
        options.template,
        tokenizer,
        **template_options(options),
        now=options.template_date,
    )
    say(f"template: {template.name}")
    for line in settings_without_effect(template, **template_settings(options)):
        say(line)
    if template.facts.note:
        say(f"note: {template.facts.note}")
    return template


def show_samples(
    options: Namespace, batches: Batches, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Print the first rows as the model reads them, supervised tokens marked, and their lengths.

    With --stage pt, the first blocks. --show_ids adds the token ids.
    """
    marks = supervised_marks(sys.stdout)
    first = first_blocks if options.stage == "pt" else first_examples
    for number, example in enumerate(first(batches, options.show_samples), start=1):
        texts = example.texts()
        for place, text in enumerate(texts, start=1):
            ids, supervised = text.ids.tolist(), text.supervised.tolist()
            say(marked(tokenizer, ids, supervised, marks))
            if options.show_ids:
                say(f"ids: {' '.join(map(str, ids))}")
            answer = ""
            if options.stage in ("rm", "dpo"):
                answer = f", answer {place} of {len(texts)}, the best first"
            say(
                f"(sample {number}{answer}: {len(ids)} tokens, {sum(supervised)} of them "
                f"supervised, {marks.meaning})\n"
            )


def length_limit(options: Namespace, config: ModelConfig) -> int:
    """Longest row, or block of plain text, in tokens."""
    wanted = options.block_size if options.stage == "pt" else options.cutoff_len
    return min(wanted, config.context_length)


def evaluation_note(options: Namespace, config: ModelConfig, num_rows: int) -> str:
    """The rows and tokens that evaluation figures cover. eval.py compare truncates no rows."""
    limit = length_limit(options, config)
    if options.stage == "rm":  # a reward belongs to a complete conversation
        return f" ({counted(num_rows, 'row')} of at most {limit} tokens)"
    if options.stage == "pt":
        return f" ({counted(num_rows, 'block')} of {limit} tokens)"
    return f" ({counted(num_rows, 'row')}, truncated at {limit} tokens)"


class BrokenRow(UserError):
    """A row of a large file, which is not checked before training, cannot be read."""


def training_steps(
    batches: Batches, rows_per_step: int, start: int, stop: int
) -> Iterator[list[Example]]:
    """The examples of the optimizer steps start .. stop - 1, over all ranks.

    BrokenRow if a row cannot be read, WorkerKilled if the process is gone that reads it; the steps
    before it are complete.
    """
    try:
        yield from batches.steps(rows_per_step, start, stop)
    except WorkerKilled:
        raise
    except UserError as error:
        raise BrokenRow(str(error)) from error
