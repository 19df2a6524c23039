"""Score every row of a data set by Instruction-Following Difficulty, or by a reward model.

    python score.py --model_name_or_path examples/base --dataset examples/data/train.json \
        --template alpaca --output runs/scores.jsonl

    torchrun --nproc_per_node 2 score.py ...     # the same on two GPUs or processes

--mode ifd writes one JSON object a row to --output: the loss of the answer behind its instruction
and alone, and their ratios. --mode embed writes beside it scores.embeddings.npy and
scores.perplexity.npy, for choosing by cluster. --mode reward writes what a reward model (train.py
--stage rm) gives the conversation; of rows with several answers (chosen and rejected), what it
gives to each, and how often it prefers the better one. Run it again to go on where it was
interrupted.
"""

import sys
import time
from collections import Counter

from minisft.common.command_line import OptionParser, non_negative_int, positive_int
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags, dtype_option
from minisft.common.script import run_script

EPILOGUE = """\
What comes out, a line of JSON for every row of the data set:
  index              number of the row in its file, from 0 (through all files, if there are several;
                     those that num_samples in dataset_info.json leaves out count, without scores)
  loss_conditioned   mean negative log-likelihood of the answer's tokens behind the prompt
  loss_direct        the same behind the answer marker alone
  ifd                loss_conditioned / loss_direct: near 1, the instruction hardly helps
  ifd_ppl            the ratio of the perplexities, exp(loss_conditioned - loss_direct); null
                     where that is beyond 1e38
  num_answer_tokens  without the one that ends the turn; of all answers in a conversation
  reason             why the row has no score, else null
With --mode reward, instead of losses and their ratios:
  reward             of the whole conversation: only differences between answers mean something
and of a row with several answers (chosen and rejected, or a list as output, the best first), whose
num_answer_tokens are those of the best:
  accuracy           1 where the better answer has more reward, else 0
  margin             reward_chosen - reward_rejected
  reward_chosen, reward_rejected
                     of the two answers; of more than two, as all of these, the mean over all pairs
                     of a better and a worse one, as in training
Then choose the rows worth training on:
  python select.py --dataset F --scores scores.jsonl --strategy ifd --sample_rate 0.05 --output F2
"""


def parse_options(arguments=None):
    """The options of score.py, from the command line if no words are given."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser)
    add("--adapter", help="score with this LoRA adapter, such as the pre-experience")

    add, switch = parser.section("data")
    add(
        "--dataset",
        required=True,
        help="files, folders and names in dataset_info.json, separated by commas",
    )
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    switch("--skip_bad_rows", "give broken rows a reason instead of stopping")
    add(
        "--template",
        default="auto",
        help="conversation format, by name (auto: what the adapter or model was trained with)",
    )
    add("--default_system", help="system prompt of conversations that have none")
    add("--max_length", type=positive_int, default=512, help="longer rows are reported, not scored")
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=2,
        help="processes that read and encode rows ahead (0: none)",
    )

    add, switch = parser.section("what is computed")
    add(
        "--mode",
        choices=["ifd", "embed", "all", "reward"],
        default="ifd",
        help="ifd: scores; embed: embeddings and perplexity of the instructions; all: both; "
        "reward: what a reward model says",
    )
    add(
        "--batch_tokens",
        type=positive_int,
        help="tokens that go through the model together, padding "
        "included (2048 on a CPU, whose caches they fit, 8192 on a GPU)",
    )
    add(
        "--output",
        required=True,
        metavar="F.jsonl",
        help="file of the scores; other files get their names from it",
    )
    switch("--overwrite", "start anew where scores of another model, template or file are")
    parser.epilog = EPILOGUE
    return parser.parse_options(arguments)


def main():
    from minisft.common.devices import resolve_device, resolve_dtype

    options = parse_options()

    from minisft.common import processes
    from minisft.selection import ifd, reward_scores
    from minisft.selection.score_files import ScoreFiles, open_every_record

    device = processes.start(resolve_device(options.device))
    dtype, say = resolve_dtype(dtype_option(options), device), processes.print_rank0
    skipped = [] if options.skip_bad_rows else None
    of_rewards = options.mode == "reward"
    rows, drawn = open_every_record(
        options.dataset, options.dataset_dir, skipped, say, ranking=None if of_rewards else False
    )
    check_output(options, rows)
    folders = find_model(options)
    template, max_length, config = load_template(options, *folders, say)
    parts = ("ifd", "embed") if options.mode == "all" else (options.mode,)
    encoder = ifd.Encoder(
        rows,
        template,
        max_length,
        config.vocab_size,
        parts,
        drawn,
        reward_scores.Score if of_rewards else ifd.Score,
    )
    files = pending = None
    if processes.rank() == 0:
        record = describe(options, *folders, template, max_length, dtype, rows, drawn)
        files = ScoreFiles(
            options.output, record, len(rows), parts, config.hidden_size, options.overwrite
        )
        pending = files.pending()
    pending = processes.all_gather(pending)[0]
    say(
        f"{len(rows):,} rows, {len(pending):,} to do; template {template.name}, {device}, "
        f"{str(dtype).removeprefix('torch.')}, {processes.world_size()} process(es)"
    )

    model = load_scorer(options, *folders, dtype, device)
    # Every process scores rows of its own; what is finished is written by the first.
    batch_tokens = options.batch_tokens or (8192 if device.type == "cuda" else 2048)
    mine = ifd.score(
        model,
        encoder,
        pending,
        batch_tokens,
        options.dataloader_num_workers,
        reward_scores.compute_rewards if of_rewards else ifd.compute_losses,
    )
    write(mine, files, len(rows), len(pending), say)
    processes.stop()


def find_model(options):
    """(folder of the model, of the adapter or None); UserError where they are not what is asked."""
    from minisft.checkpoints.hub import resolve
    from minisft.checkpoints.reward_models import check_head

    model_dir = resolve(options.model_name_or_path)
    adapter_dir = options.adapter and resolve(options.adapter, "adapter_config.json")
    if options.mode == "reward":
        check_head(model_dir, adapter_dir)
    return model_dir, adapter_dir


def check_output(options, rows):
    """UserError where --output, or a file named after it, is no file to write or is read from."""
    from minisft.common.outputs import check_output_file
    from minisft.selection.score_files import paths

    if not options.output.endswith(".jsonl"):
        raise UserError(f"--output {options.output}: give the name of a file that ends in .jsonl")
    for path in paths(options.output).values():
        check_output_file("--output", path, [file.records.path for file in rows.files])


def load_template(options, model_dir, adapter_dir, say):
    """(template, longest row in tokens, config): all but the weights, since it loads quickly."""
    from minisft.model.config import ModelConfig
    from minisft.selection.ifd import longest_row
    from minisft.text.chat_template import trained_template
    from minisft.text.tokenizer import Tokenizer

    config = ModelConfig.load(model_dir)
    max_length = min(options.max_length, longest_row(config))
    if max_length < options.max_length:
        say(f"--max_length: {max_length} tokens, as far as this model can score rows")
    template = trained_template(
        options.template,
        Tokenizer.load(model_dir),
        adapter_dir or model_dir,
        options.default_system,
    )
    return template, max_length, config


def load_scorer(options, model_dir, adapter_dir, dtype, device):
    """The model that scores, a language model or a reward model, with its adapter."""
    from minisft.checkpoints.folders import load_model
    from minisft.checkpoints.reward_models import load_reward_model

    load = load_reward_model if options.mode == "reward" else load_model
    model = load(model_dir, dtype, device, options.quantization_bit)
    if adapter_dir:
        add_adapter(model, adapter_dir, options.quantization_bit)
    return model


def add_adapter(model, adapter_dir, quantization_bit):
    """Load the adapter and merge it: fewer multiplications for every row.

    In less than float32 a merged weight would be rounded, and a quantised one would become large,
    so there it stays apart.
    """
    import torch

    from minisft.checkpoints.adapters import load_adapter
    from minisft.model.lora import merge_lora
    from minisft.model.quantized import convert_parameters

    dtype = model.model.embed_tokens.weight.dtype
    load_adapter(model, adapter_dir)
    if dtype == torch.float32 and not quantization_bit:
        merge_lora(model)
    convert_parameters(model.eval(), dtype)


def describe(options, model_dir, adapter_dir, template, max_length, dtype, rows, drawn):
    """Everything that the scores depend on, by content, and by name for people."""
    from minisft.selection.score_files import record_of_data, record_of_model

    return {
        **record_of_model(model_dir, adapter_dir),
        "dataset": record_of_data(rows, drawn),
        "template": template.name,
        "default_system": template.default_system,
        "max_length": max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_bit": options.quantization_bit,
        "kind of scores": "rewards" if options.mode == "reward" else "losses",
        "names": {
            "model": options.model_name_or_path,
            "adapter": options.adapter,
            "dataset": options.dataset,
        },
    }


def write(mine, files, num_rows, num_pending, say):
    """Write the Scores of all processes as they come (files: None but in the first); tell of it."""
    from tqdm import tqdm

    reasons, began = Counter(), time.monotonic()
    bar = tqdm(
        total=num_rows,
        initial=num_rows - num_pending,
        unit="row",
        disable=not (files and sys.stderr.isatty()),
    )
    for finished in together(mine):
        if files:
            files.add(finished)
        reasons.update((one.reason or "scored").split(":")[0] for one in finished)
        bar.update(len(finished))
    bar.close()
    if files:
        written = files.finish()
        speed = num_pending / (time.monotonic() - began)
        say(f"wrote {', '.join(map(str, written))}; {speed:,.1f} rows/s")
        for reason, number in reasons.most_common():
            if reason != "scored":
                say(f"not scored {number:,}: {reason}")
        if "reward" in files.parts:
            tell_preferences(files.paths["scores"], say)


def tell_preferences(path, say):
    """Say how often, and by how much, the better of several answers has more reward."""
    from minisft.selection.reward_scores import mean_figures
    from minisft.training.metrics import in_words

    positive_int, means = mean_figures(path)
    if positive_int:
        say(f"preferences of {positive_int:,} rows: {in_words(means)}")


def together(mine):
    """Yield what all processes have finished in a round as one list, until the last is through."""
    from minisft.common import processes

    while True:
        results = processes.all_gather(next(mine, None))
        if all(one is None for one in results):
            return
        yield [score for one in results for score in one or []]


if __name__ == "__main__":
    run_script(main)
