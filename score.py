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

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from minisft.common.command_line import OptionParser, non_negative_int, positive_int
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags, dtype_option
from minisft.common.outputs import check_output_file
from minisft.common.script import run_script

EPILOGUE = """\
The output has a line of JSON for every row:
  index              number of the row in its file, from 0. With several files, the count goes
                     through all of them. Rows that num_samples in dataset_info.json leaves out
                     count too, and get no scores.
  loss_conditioned   mean negative log-likelihood of the answer's tokens, given the prompt
  loss_direct        the same, given only the marker that opens an answer
  ifd                loss_conditioned / loss_direct: near 1, the instruction hardly helps
  ifd_ppl            the ratio of the perplexities, exp(loss_conditioned - loss_direct); null above
                     1e38
  num_answer_tokens  of all answers of the conversation, without end-of-turn tokens
  reason             why the row has no score, else null
With --mode reward, instead of the losses and their ratios:
  reward             of the conversation; only differences between answers have a meaning
and for a row with several answers (chosen and rejected, or a list as output, the best first), where
num_answer_tokens is that of the best:
  accuracy           1 if the better answer has the higher reward, else 0
  margin             reward_chosen - reward_rejected
  reward_chosen, reward_rejected
                     of the two answers; with more answers these four are means over all pairs of a
                     better and a worse answer, as in training
Then choose the rows to train on:
  python select.py --dataset F --scores scores.jsonl --strategy ifd --sample_rate 0.05 --output F2
"""


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of score.py. arguments: by default those of the command line."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser)
    add("--adapter", help="LoRA adapter to score with, such as the pre-experience")

    add, switch = parser.section("data")
    add("--dataset", required=True, help="files, folders, names in dataset_info.json; by commas")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    switch("--skip_bad_rows", "give broken rows a reason instead of stopping")
    add("--template", default="auto", help="chat template (auto: that of the training)")
    add("--default_system", help="system prompt of conversations without one")
    add("--max_length", type=positive_int, default=512, help="longer rows get no score")
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=2,
        help="processes that read and encode rows ahead (0: none)",
    )

    add, switch = parser.section("scores")
    add(
        "--mode",
        choices=["ifd", "embed", "all", "reward"],
        default="ifd",
        help="ifd: scores; embed: embeddings and perplexity of the prompts; all: both; "
        "reward: by a reward model",
    )
    add(
        "--batch_tokens",
        type=positive_int,
        help="tokens of a batch, padding included (default: 2048 on a CPU, 8192 on a GPU)",
    )
    add("--output", required=True, metavar="F.jsonl", help="file of scores; others go beside it")
    switch("--overwrite", "replace scores of another model, template or file")
    parser.epilog = EPILOGUE
    options = parser.parse_options(arguments)
    if not options.output.endswith(".jsonl"):
        raise UserError(f"--output {options.output}: give a file name that ends in .jsonl")
    return options


def main() -> None:
    options = parse_options()

    # Imported after the options, so that --help and a mistyped flag answer at once.
    import torch
    from tqdm import tqdm

    from minisft.checkpoints.adapter_forms import tokenizer_dir, vocabulary_size
    from minisft.checkpoints.adapters import load_adapter
    from minisft.checkpoints.folders import load_model
    from minisft.checkpoints.hub import resolve
    from minisft.checkpoints.reward_models import check_head, load_reward_model
    from minisft.common import processes
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.model.config import ModelConfig
    from minisft.model.lora import merge_lora
    from minisft.model.quantized import convert_parameters
    from minisft.selection.ifd import IfdScorer
    from minisft.selection.provenance import score_record
    from minisft.selection.reward_scores import RewardScorer, mean_preference_fields
    from minisft.selection.rows import open_every_row
    from minisft.selection.score_files import ScorePaths
    from minisft.selection.score_writer import ScoreWriter
    from minisft.selection.scoring import RowReader, max_row_length, score_rows
    from minisft.text.chat_template import trained_template
    from minisft.text.tokenizer import Tokenizer
    from minisft.training.metrics import in_words

    device = processes.start(resolve_device(options.device))
    dtype = resolve_dtype(dtype_option(options), device)
    say = processes.print_rank0
    uses_rewards = options.mode == "reward"

    rows, is_drawn = open_every_row(
        options.dataset, options.dataset_dir, options.skip_bad_rows, uses_rewards, say
    )
    for path in ScorePaths(options.output).all():
        check_output_file("--output", path, [file.records.path for file in rows.files])

    # The weights come last, since they are slow to load: mistakes above show at once.
    model_dir = resolve(options.model_name_or_path)
    adapter_dir = options.adapter and resolve(options.adapter, "adapter_config.json")
    if uses_rewards:
        check_head(model_dir, adapter_dir)
    config = ModelConfig.load(model_dir)
    config.vocab_size = vocabulary_size(config, adapter_dir)
    template = trained_template(
        options.template,
        Tokenizer.load(tokenizer_dir(model_dir, adapter_dir)),
        adapter_dir or model_dir,
        options.default_system,
    )
    max_length = min(options.max_length, max_row_length(config))
    if max_length < options.max_length:
        say(f"--max_length {max_length}: this model cannot score longer rows")

    if uses_rewards:
        parts = ("reward",)
        scorer = RewardScorer(template, max_length, config.vocab_size)
    else:
        parts = ("ifd", "embed") if options.mode == "all" else (options.mode,)
        scorer = IfdScorer(template, max_length, config.vocab_size, parts)

    # Rank 0 writes, and knows which rows are done already.
    writer = None
    if processes.rank() == 0:
        record = score_record(
            options, rows, is_drawn, model_dir, adapter_dir, template, max_length, dtype
        )
        writer = ScoreWriter(
            options.output, record, len(rows), parts, config.hidden_size, options.overwrite
        )
    pending = processes.broadcast_from_rank0(lambda: writer and writer.pending())
    say(
        f"{len(rows):,} rows, {len(pending):,} to do; template {template.name}, {device}, "
        f"{str(dtype).removeprefix('torch.')}, {processes.world_size()} process(es)"
    )

    load = load_reward_model if uses_rewards else load_model
    model = load(model_dir, dtype, device, options.quantization_bit)
    if adapter_dir:
        load_adapter(model, adapter_dir)
        if dtype == torch.float32 and not options.quantization_bit:
            # Fewer multiplications. Smaller types would round the merged weights.
            merge_lora(model)
        convert_parameters(model.eval(), dtype)

    reader = RowReader(rows, scorer, is_drawn)
    batch_tokens = options.batch_tokens or (8192 if device.type == "cuda" else 2048)
    reasons: Counter[str] = Counter()
    began = time.monotonic()
    bar = tqdm(
        total=len(rows),
        initial=len(rows) - len(pending),
        unit="row",
        disable=writer is None or not sys.stderr.isatty(),
    )
    for scores in score_rows(model, reader, pending, batch_tokens, options.dataloader_num_workers):
        if writer:
            writer.add(scores)
        for score in scores:
            if reason := score.record["reason"]:
                reasons[reason.partition(":")[0]] += 1
        bar.update(len(scores))
    bar.close()

    if writer:
        written = ", ".join(map(str, writer.finish()))
        say(f"wrote {written}; {len(pending) / (time.monotonic() - began):,.1f} rows/s")
        for reason, count in reasons.most_common():
            say(f"not scored {count:,}: {reason}")
        if uses_rewards:
            num_preferences, means = mean_preference_fields(writer.paths.scores)
            if num_preferences:
                say(f"preferences of {num_preferences:,} rows: {in_words(means)}")
    processes.stop()


if __name__ == "__main__":
    run_script(main)
