"""Score every row of a data set by Instruction-Following Difficulty, or by a reward model.

    python score.py --model_name_or_path examples/base --dataset examples/data/train.json \
        --template plain --output runs/scores.jsonl

    torchrun --nproc_per_node 2 score.py ...     # the same on two GPUs or processes

--mode ifd writes one JSON object per row to --output: the loss of the answer with its instruction
and without, and their ratio. --mode embed writes scores.embeddings.npy and scores.perplexity.npy
beside it, to choose rows by cluster. --mode reward writes the reward that a reward model (train.py
--stage rm) gives each conversation; for rows with several answers (chosen and rejected), how often
it prefers the better one. An interrupted command continues when it is run again.
"""

import time
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

from minisft.common.script import advice_after_ctrl_c, run_script
from minisft.data.early_checks import check_places
from minisft.selection.score_options import parse_options

if __name__ == "__main__":
    # Before torch is imported, so that --help and a mistyped flag or path answer at once.
    command_line = run_script(lambda: check_places(parse_options()))
else:
    command_line = None

import numpy as np
import torch

from minisft.checkpoints.adapter_forms import tokenizer_dir, vocabulary_size
from minisft.checkpoints.hub import model_or_base, resolve, resolve_adapter
from minisft.checkpoints.inference import add_frozen_adapter, join_and_pack, load_for_inference
from minisft.checkpoints.reward_models import check_head, load_reward_model
from minisft.common import processes
from minisft.common.devices import dtype_name, resolve_device, resolve_dtype
from minisft.common.metric_lines import in_words
from minisft.common.model_flags import dtype_option, template_options, template_settings
from minisft.common.outputs import check_output_file
from minisft.common.progress import ProgressBar
from minisft.common.single_writer import single_writer
from minisft.common.threads import busy_note
from minisft.common.words import counted
from minisft.model.config import ModelConfig
from minisft.model.reward import Model
from minisft.selection.ifd import IfdScorer
from minisft.selection.next_command import select_command
from minisft.selection.passes import TOO_LONG
from minisft.selection.provenance import recorded_date, score_record
from minisft.selection.reward_scores import RewardScorer, mean_preference_fields
from minisft.selection.rows import left_out_by, open_every_row
from minisft.selection.score_files import ScorePaths
from minisft.selection.score_writer import ScoreWriter
from minisft.selection.scoring import RowReader, Scorer, max_row_length, score_rows
from minisft.text.template_choice import settings_without_effect, trained_template
from minisft.text.tokenizer import Tokenizer

say = processes.print_rank0


def main(options: Namespace | None = None) -> None:
    """Score the rows with these options; by default those of the command line."""
    options = options or parse_options()
    options.model_name_or_path = model_or_base(options.model_name_or_path, options.adapter)
    device = processes.start(resolve_device(options.device))
    output = ScorePaths(options.output).scores
    with processes.on_rank0(single_writer(output)):
        score_data_set(options, device)
    processes.stop()


def score_data_set(options: Namespace, device: torch.device) -> None:
    """The job in order, from the rows to the sorted file of scores."""
    dtype = resolve_dtype(dtype_option(options), device)

    rows, is_drawn = open_every_row(
        options.dataset,
        options.dataset_dir,
        options.skip_bad_rows,
        options.mode == "reward",
        options.max_samples,
        say,
        options.replace,
    )
    for path in ScorePaths(options.output).all():
        check_output_file("--output", path, [file.records.path for file in rows.files])

    model_dir = resolve(options.model_name_or_path)
    adapter_dir = options.adapter and resolve_adapter(options.adapter)
    config = ModelConfig.load(model_dir)
    config.vocab_size = vocabulary_size(config, adapter_dir)
    scorer = build_scorer(options, config, model_dir, adapter_dir)
    writer = None
    if processes.rank() == 0:  # writes scores, and knows which rows are finished
        record = score_record(options, rows, is_drawn, model_dir, adapter_dir, scorer, dtype)
        writer = ScoreWriter(
            options.output,
            record,
            len(rows),
            scorer.parts,
            config.hidden_size,
            options.overwrite,
            options.pooling,
        )
    pending = processes.broadcast_from_rank0(lambda: writer and writer.pending())
    num_rows, num_to_do = int(is_drawn.sum()), int(is_drawn[pending].sum())
    of_all = f" of {len(rows):,}" if num_rows < len(rows) else ""
    say(
        f"{num_rows:,}{of_all} rows, {num_to_do:,} to do; template {scorer.template.name}, "
        f"{device}, {dtype_name(dtype)}, {counted(processes.world_size(), 'process', 'processes')}"
    )

    if device.type == "cpu" and (note := busy_note(torch.get_num_threads())):
        say(note)

    left_out = left_out_by(options.dataset, options.dataset_dir, options.max_samples)
    reader = RowReader(rows, scorer, is_drawn, left_out)
    if writer and (note := reader.tools_note(pending)):
        say(note)

    reasons, speed = Counter[str](), 0.0
    if len(pending) > 0:
        # The weights come last, since they are slow to load: mistakes above show at once.
        model = build_model(options, model_dir, adapter_dir, dtype, device)
        began = time.monotonic()
        reasons = score(options, model, reader, pending, writer)
        speed = num_to_do / (time.monotonic() - began)
    if writer:
        perplexity = writer.paths.perplexity
        written = ", ".join(
            f"{path} (of the prompts)" if path == perplexity else str(path)
            for path in writer.finish()
        )
        if len(pending) > 0:
            say(f"wrote {written}; {speed:,.1f} rows/s")
        else:
            say(
                f"nothing to do: all {num_rows:,} rows are in {written}. --overwrite computes them "
                "again."
            )
        # Where the model sets the limit, a larger flag changes nothing.
        can_raise = scorer.cutoff_len == options.cutoff_len
        for reason, count in reasons.most_common():
            advice = ""
            if reason == TOO_LONG and can_raise:
                advice = f" (now {options.cutoff_len}: raise --cutoff_len)"
            is_truncated = reason == TOO_LONG and options.mode == "embed"
            say(f"{'truncated' if is_truncated else 'not scored'} {count:,}: {reason}{advice}")
        num_preferences = 0
        if options.mode == "reward":
            num_preferences = say_mean_preferences(writer.paths.scores)
        if command := select_command(options, num_preferences > 0):
            say(f"Choose rows: {command}")


def build_scorer(
    options: Namespace, config: ModelConfig, model_dir: Path, adapter_dir: Path | None
) -> Scorer:
    """The object that plans the passes of a row and turns their results into its score."""
    if options.mode == "reward":
        check_head(model_dir, adapter_dir)
    template = trained_template(
        options.template,
        Tokenizer.load(tokenizer_dir(model_dir, adapter_dir)),
        adapter_dir or model_dir,
        **template_options(options),
        now=None if options.overwrite else recorded_date(options.output),
    )
    for line in settings_without_effect(template, **template_settings(options)):
        say(line)
    cutoff_len = min(options.cutoff_len, max_row_length(config))
    if cutoff_len < options.cutoff_len:
        say(f"--cutoff_len {cutoff_len}: this model cannot score longer rows")
    if options.mode == "reward":
        return RewardScorer(template, cutoff_len, config.vocab_size)
    parts = ("ifd", "embed") if options.mode == "all" else (options.mode,)
    return IfdScorer(template, cutoff_len, config.vocab_size, parts, options.pooling)


def build_model(
    options: Namespace,
    model_dir: Path,
    adapter_dir: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Model:
    """The model with its adapter, in evaluation mode."""
    bits = options.quantization_bit
    merge = dtype == torch.float32 and bits is None  # smaller types would round the merged weights
    if options.mode != "reward":
        return load_for_inference(model_dir, adapter_dir, dtype, device, bits, merge=merge)
    model = load_reward_model(model_dir, dtype, device, bits)
    add_frozen_adapter(model, adapter_dir, dtype, merge)
    join_and_pack(model, dtype, device)
    return model


def score(
    options: Namespace,
    model: Model,
    reader: RowReader,
    pending: np.ndarray,
    writer: ScoreWriter | None,
) -> Counter[str]:
    """Score the pending rows. Returns {reason for no score: number of rows} of all ranks."""
    is_on_gpu = next(model.parameters()).is_cuda
    batch_tokens = options.batch_tokens or (8192 if is_on_gpu else 1024)
    num_rows, reasons = len(reader.rows), Counter()

    def advice() -> str:
        """How to go on after Ctrl-C."""
        command = "the same command" + " without --overwrite" * options.overwrite
        return f"{bar.done:,} of {num_rows:,} rows are done; {command} continues from there"

    bar = ProgressBar(num_rows, "row", done=num_rows - len(pending))
    with bar, advice_after_ctrl_c(advice):
        for scores in score_rows(
            model, reader, pending, batch_tokens, options.dataloader_num_workers
        ):
            if writer:
                writer.add(scores)
            for row_score in scores:
                if reason := row_score.record["reason"]:
                    reasons[reason.partition(":")[0]] += 1
            bar.update(len(scores))
    return reasons


def say_mean_preferences(path: Path) -> int:
    """Print the means over the rows with several answers; returns the number of these rows."""
    num_preferences, means = mean_preference_fields(path)
    if num_preferences:
        say(f"preferences of {num_preferences:,} rows: {in_words(means)}")
    return num_preferences


if __name__ == "__main__":
    run_script(partial(main, command_line))
