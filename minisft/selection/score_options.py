"""The flags of `score.py`.

options = parse_options(["--model_name_or_path", "examples/base", "--output", "runs/scores.jsonl",
                         "--dataset", "examples/data/train.json"])
options.mode                                 # "ifd", the default
"""

from argparse import Namespace
from collections.abc import Sequence

from minisft.common.command_line import OptionParser, non_negative_int, positive_int
from minisft.common.errors import UserError
from minisft.common.model_flags import (
    add_dataset_flags,
    add_model_flags,
    add_replace_flag,
    add_template_flags,
)

EXAMPLES = """\
  python score.py --model_name_or_path M --dataset rows.json --output scores.jsonl
  python score.py --model_name_or_path M --dataset rows.json --mode embed --output scores.jsonl
  python score.py --adapter runs/rm --mode reward --dataset rows.json --output rewards.jsonl
"""
EPILOGUE = """\
The output has a line of JSON for every row:
  index              number of the row in its file, from 0. With several files, the count goes
                     through all of them. Rows that --max_samples or num_samples in
                     dataset_info.json leaves out count too, and get no scores.
  loss_conditioned   mean negative log-likelihood of the answer's tokens, given the prompt
  loss_direct        the same, given only the marker that opens an answer
  ifd                loss_conditioned / loss_direct: near 1, the instruction hardly helps
  ifd_ppl            the ratio of the perplexities, exp(loss_conditioned - loss_direct); null above
                     1e38
  num_answer_tokens  of all answers of the conversation, without end-of-turn tokens
  num_tokens         of the row, as train.py would see it
  reason             why the row has no score, else null
With --mode reward, instead of the losses and their ratios:
  reward             of the conversation; only differences between answers have a meaning
and for a row with several answers (chosen and rejected, or a list as output, the best first), where
num_answer_tokens is that of the best and num_tokens that of the longest:
  accuracy           1 if the better answer has the higher reward, else 0
  margin             reward_chosen - reward_rejected
  reward_chosen, reward_rejected
                     of the two answers; with more answers these four are means over all pairs of a
                     better and a worse answer, as in training
Then choose the rows to train on:
  python select.py --dataset F --scores S.jsonl --strategy ifd --sample_rate 0.05 --output F2.json
"""


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of score.py; by default from the command line."""
    parser = OptionParser(
        EXAMPLES,
        "model_name_or_path adapter dataset mode output cutoff_len",
        description="Score every row of a data set by Instruction-Following Difficulty, or by a "
        "reward model.",
        neighbours={"batch_size": ((), "use --batch_tokens: it counts tokens, not rows")},
    )
    add, switch = add_model_flags(parser)
    add("--adapter", help="LoRA adapter to score with, such as the pre-experience")

    add, switch = parser.section("data")
    add_dataset_flags(add, required=True)
    first = "score only the first N rows of each data set"
    add("--max_samples", type=positive_int, help=first)
    add_replace_flag(add)
    switch("--skip_bad_rows", "give broken rows a reason instead of stopping")
    add_template_flags(add, auto="that of the training")
    add("--cutoff_len", type=positive_int, default=512, help="longer rows get no score")
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
        help="ifd: scores; embed: embeddings, and perplexity of the prompts; all: both; "
        "reward: by a reward model",
    )
    add(
        "--pooling",
        choices=["mean", "weighted"],
        default="mean",
        help="embeddings: mean state of the prompt, for clusters; or weighted mean of prompt and "
        "answer, for select.py --strategy rds",
    )
    add(
        "--batch_tokens",
        type=positive_int,
        help="tokens of a batch, padding included (default: 1024 on a CPU, 8192 on a GPU)",
    )
    add(
        "--output",
        required=True,
        metavar="F.jsonl",
        help="file for the scores; the other files go beside it",
    )
    switch("--overwrite", "replace scores of another model, template or file")
    parser.epilog = EPILOGUE
    options = parser.parse_options(arguments)
    if not options.output.endswith(".jsonl"):
        raise UserError(f"--output {options.output}: give a file name that ends in .jsonl")
    if "pooling" in parser.given(options) and options.mode not in ("embed", "all"):
        raise UserError(f"--pooling has no effect with --mode {options.mode}: it computes none")
    return options
