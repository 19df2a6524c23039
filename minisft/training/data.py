"""What the flags of train.py say to train on and to evaluate on, read and encoded.

batches, held_out = load_data(options, tokenizer, template, config, print)
"""

from functools import partial

from minisft.data import dataset
from minisft.data.build_batches import batches_of_rows, batches_of_texts, held_out_examples
from minisft.data.encode_preferences import encode_preferences


def load_data(options, tokenizer, template, config, say):
    """(Batches to train on, held-out examples or None). Mistakes in the rows are found here."""
    plain_text, ranking = options.stage == "pt", options.stage in ("rm", "dpo")
    flag = "block_size" if plain_text else "cutoff_len"
    limit = min(getattr(options, flag), config.context_length)
    if limit < getattr(options, flag):
        say(f"--{flag}: {limit} tokens, which is the context that the model is made for")
    skipped = [] if options.skip_bad_rows else None
    reading = dict(
        dataset_dir=options.dataset_dir,
        plain_text=plain_text,
        ranking=ranking,
        skipped=skipped,
        seed=options.seed,
        say=say,
    )
    rows = dataset.open_rows(options.dataset or options.train_dir, **reading)
    rows, held_out = rows[: options.max_samples], None
    if options.eval_dataset or options.valid_dir:
        held_out = dataset.open_rows(options.eval_dataset or options.valid_dir, **reading)
    elif options.validation_split:
        rows, held_out = dataset.split(rows, options.validation_split, options.seed)
    if options.mix:
        rows = dataset.mix(rows, options.mix, **reading)
    if skipped:
        say(f"{len(skipped)} broken rows left out, the first: {skipped[0]}")
    settings = dict(
        vocab_size=config.vocab_size, seed=options.seed, num_workers=options.dataloader_num_workers
    )
    if plain_text:
        settings["packing"] = options.packing
        batches = batches_of_texts(rows, tokenizer, limit, **settings)
    else:
        if ranking:  # a reward is that of a whole conversation
            settings["encode"] = partial(encode_preferences, drop_long=options.stage == "rm")
        batches = batches_of_rows(rows, template, limit, **settings)
        if sample := batches.sample_report:
            hint = (
                f"; --cutoff_len is {limit}" if sample.num_truncated or sample.num_too_long else ""
            )
            say(f"a look at {sample.num_rows} rows: {sample}{hint}")
    return batches, held_out and held_out_examples(batches, held_out, say)
