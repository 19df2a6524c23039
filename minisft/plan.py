"""What a run would take, before anything is downloaded or loaded: `train.py --dry_run`.

    python train.py --config examples/recipes/llama3_8b_full.toml --dry_run --num_processes 8 \\
        --device cuda --device_memory 80GB --device_tflops 400

All it needs is config.json. Where there is no tokenizer, lengths are estimated from the bytes of
the rows; where there are no rows, every one is taken to be as long as the limit. It says which.
The memory is that of memory.py; the batches are those that training would make.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minisft import batching, memory
from minisft.config import ModelConfig
from minisft.dataset_info import find_sources
from minisft.encoding import EncodeReport, Example, encoded
from minisft.lora import LoraConfig, add_lora, resume_lora
from minisft.options import UserError, resolve_device, resolve_dtype
from minisft.quantize import count_parameters
from minisft.template import get_template
from minisft.tensor_files import parse_size
from minisft.tokenizer import FILES, Tokenizer
from minisft.training_data import load_data
from minisft.weights import load_adapter, resolve

# So many rows are encoded, the lengths of others estimated from their size; of larger data sets a
# part is dealt out into batches, which is enough to know the padding.
ENCODED_ROWS, DEALT_ROWS = 5_000, 100_000
BYTES_PER_TOKEN = 4  # of text in UTF-8, English or Chinese, within a third for most tokenizers
# What a device's memory holds beside tensors, and loses to gaps between them.
COMFORTABLE = 0.9


@dataclass
class Data:
    """What is known of the rows. Totals are of one epoch; None where there are no rows.

    largest: (tokens with padding, supervised tokens) of the largest micro-batch of any process.
    padding: share of what is computed. origin: in words, where the lengths are from.
    """

    origin: str
    largest: tuple
    num_examples: int | None = None
    num_tokens: int | None = None
    padding: float = 0.0


def show(options):
    """Print the plan of a run with the options of train.py."""
    if int(os.environ.get("RANK", 0)):  # torchrun's first process says it for all
        return
    model_dir = local_folder(options.model_name_or_path)
    config = ModelConfig.load(model_dir)
    device = options.device.partition(":")[0]
    if device != "cuda":  # which need not be here to be planned for
        device = resolve_device(options).type
    absent = device == "cuda" and not torch.cuda.is_available()
    dtype = resolve_dtype(options, torch.device(device), torch.bfloat16 if absent else None)
    num_processes = options.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    model = planned_model(options, config, dtype)
    data = look_at_data(options, config, model_dir, num_processes)
    step = memory.Step(
        *data.largest, dtype, device, options.gradient_checkpointing, options.packing,
        options.gradient_accumulation_steps > 1, num_processes, options.parallel == "fsdp")
    print("a plan: nothing is downloaded, loaded or written")
    tell_model(options, model, dtype, device, num_processes)
    num_steps = tell_data(options, data, num_processes)
    tell_memory(options, list(memory.moments(model, step)), step)
    tell_time(options, model, data, num_steps, num_processes)


def local_folder(name):
    """The folder of a model that is on this machine; UserError rather than a download."""
    if Path(name).expanduser().exists() or name.count("/") != 1:
        return resolve(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return Path(found).parent
    raise UserError(f"{name}: is not on this machine, and --dry_run downloads nothing; put its "
                    "config.json into a folder (tokenizer.json beside it for exact lengths) and "
                    "give that as --model_name_or_path")


def planned_model(options, config, dtype):
    """The model as train.py would train it, without its numbers."""
    if options.finetuning_type == "full":
        return memory.skeleton(config, torch.float32).requires_grad_(True)
    model = memory.skeleton(config, dtype, options.quantization_bit)
    if options.adapter:
        adapter_dir = resolve(options.adapter, "adapter_config.json")
        resume_lora(model, load_adapter(model, adapter_dir, options.lora_dropout))
    else:
        add_lora(model, LoraConfig.from_options(options))
    return model


# The rows


def look_at_data(options, config, model_dir, num_processes):
    """The Data of a run."""
    plain_text = options.stage == "pt"
    limit = min(options.block_size if plain_text else options.cutoff_len, config.context_length)
    batch_size = options.per_device_train_batch_size
    longest = (batch_size * padded(limit, options), batch_size * limit)
    try:
        find_sources(options.dataset or options.train_dir, options.dataset_dir, plain_text)
    except UserError as error:
        return Data(f"assumed, {limit:,} tokens in every row, as the rows are not here ({error})",
                    longest)
    if any((model_dir / name).is_file() for name in FILES[:2]):
        tokenizer, origin = Tokenizer.load(model_dir), "counted by the tokenizer"
        template = None if plain_text else get_template(
            options.template, tokenizer, options.default_system)
    else:
        tokenizer = template = BytesAsTokens()
        origin = f"estimated, a token for {BYTES_PER_TOKEN} bytes, as there is no tokenizer"
    batches, _ = load_data(options, tokenizer, template, config, print)
    if plain_text:
        return Data(origin, longest, batches.num_examples, batches.num_examples * limit)
    examples, note = stand_ins(batches, limit)
    return dealt_out(examples, origin + note, batches, options, num_processes)


class BytesAsTokens:
    """Stands for tokenizer and template where there is none: ids of the right number, about."""

    bos_token_id = eos_token_id = None
    add_bos_token = False

    def encode(self, text, tools=None):
        """As Tokenizer.encode for str, as Template.encode for messages: only the length counts."""
        if isinstance(text, str):
            return [0] * -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
        ids, supervised = [], []
        for message in text:
            new = self.encode(str(message.get("content") or "") + str(message.get("input") or ""))
            ids += new
            supervised += [message["role"] == "assistant"] * len(new)
        return ids, supervised


def stand_ins(batches, limit):
    """(rows without content, as Examples whose ids and supervised are ranges; a note).

    Of many rows a part, spread over all. Lengths are encoded, or estimated from a row's bytes.
    """
    sizes = batches.rows.sizes()
    part = spread(len(sizes), DEALT_ROWS)
    chosen = part[spread(len(part), ENCODED_ROWS)]
    found = {row: encoded(batches.rows, batches.encode, [row])[0] for row in chosen}
    known = [example for examples in found.values() for example in examples]
    num_tokens = sum(len(one.ids) for one in known)
    per_byte = num_tokens / sizes[chosen].sum()
    share = sum(int(one.supervised.sum()) for one in known) / max(1, num_tokens)
    made = [Example(range(len(one.ids)), range(int(one.supervised.sum())), one.lengths)
            for one in known]
    for row in np.setdiff1d(part, chosen):
        length = min(limit, max(2, round(sizes[row] * per_byte)))
        made.append(Example(range(length), range(round(length * share))))
    note = f"; {len(chosen):,} of {len(sizes):,} rows, the others by their size"
    return made, note if len(chosen) < len(sizes) else ""


def spread(count, most):
    """At most so many numbers below `count`, at equal distances."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def dealt_out(examples, origin, batches, options, num_processes):
    """The Data of rows of these lengths, dealt out by batching.py as in training."""
    if not examples:
        raise UserError("no row has anything to learn")
    dealer = batching.Batches(examples, lambda rows: (rows, EncodeReport()), options.seed,
                              total_bytes=batches.example_bytes * len(examples))
    batch_size = options.per_device_train_batch_size
    rows_per_step = batch_size * options.gradient_accumulation_steps * num_processes
    computed, largest = 0, (0, 0)
    for rows in dealer.steps(rows_per_step, 0, dealer.steps_per_epoch(rows_per_step)):
        for rank in range(num_processes):
            for some in batching.micro_batches(rows, batch_size, rank, num_processes):
                size = shape_of(some, options), sum(len(one.supervised) for one in some)
                computed, largest = computed + size[0], max(largest, size)
    num_tokens = sum(len(one.ids) for one in examples)
    whole = batches.num_examples / len(spread(batches.num_examples, DEALT_ROWS))
    return Data(origin, largest, batches.num_examples, round(num_tokens * whole),
                1 - num_tokens / computed)


def shape_of(rows, options):
    """Tokens of a micro-batch, with what it is padded by."""
    texts = [length for one in rows for length in one.lengths or [len(one.ids)]] or [1]
    return sum(texts) if options.packing else len(texts) * padded(max(texts), options)


def padded(length, options):
    """The length of a row in a batch of which it is the longest."""
    if options.packing:
        return length
    multiple = batching.COMPILED_PAD_MULTIPLE if options.compile else batching.PAD_MULTIPLE
    return -(-length // multiple) * multiple


# What is told


def tell_model(options, model, dtype, device, num_processes):
    """Parameters, and how they are trained."""
    trained = memory.trained_numbers(model)
    how = "in full" if options.finetuning_type == "full" else "by LoRA"
    base = f", base in {options.quantization_bit} bits" if options.quantization_bit else ""
    print(f"model       {count_parameters(model):,} parameters, of which {trained:,} are trained "
          f"{how}{base}, {str(dtype).removeprefix('torch.')} on {num_processes} x {device}")


def tell_data(options, data, num_processes):
    """Rows, tokens, padding and steps; returns the number of steps, None if it is not known."""
    each, accumulated = options.per_device_train_batch_size, options.gradient_accumulation_steps
    rows_per_step = each * accumulated * num_processes
    print(f"lengths     {data.origin}")
    told = f"{rows_per_step:,} rows each ({each} x {accumulated} x {num_processes} processes)"
    if data.num_examples is None:
        print(f"steps       {options.max_steps or 'not known: give --max_steps'}, {told}")
        return options.max_steps
    steps_per_epoch = math.ceil(data.num_examples / rows_per_step)
    num_steps = options.max_steps or math.ceil(steps_per_epoch * options.num_train_epochs)
    print(f"an epoch    {data.num_examples:,} rows, {data.num_tokens:,} tokens, "
          f"{data.padding:.1%} padding besides")
    print(f"steps       {steps_per_epoch:,} an epoch, {num_steps:,} in all, {told}")
    return num_steps


def tell_memory(options, moments, step):
    """The parts of the memory: the most of each, and what they are when their sum is largest."""
    peak = max(moments, key=lambda moment: moment.total)
    print("memory of each process, GB   at most   at the peak")
    for part in memory.PARTS:
        most = max(moment.parts[part] for moment in moments)
        print(f"  {part:<24} {most / 1e9:10,.2f} {peak.parts[part] / 1e9:13,.2f}")
    print(f"  {'together':<24} {'':10} {peak.total / 1e9:13,.2f}   at {peak.name}, with "
          f"{step.num_tokens:,} tokens in the largest micro-batch")
    available = memory_of_device(options, step.device)
    if available is None:
        print("fits        not known: give --device_memory, such as 80GB")
        return
    share = peak.total / available
    verdict = "yes" if share <= COMFORTABLE else "just about, or not" if share <= 1 else "NO"
    print(f"fits        {verdict}: {share:.0%} of {available / 1e9:,.1f} GB")


def memory_of_device(options, device):
    """Bytes of --device_memory, or of the device that is here; None where neither is known."""
    if options.device_memory:
        return parse_size(options.device_memory)
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None


def tell_time(options, model, data, num_steps, num_processes):
    """Operations of the whole run, and the time at a stated speed."""
    if num_steps is None or data.num_tokens is None:
        return
    steps_per_epoch = data.num_examples / (
        options.per_device_train_batch_size * options.gradient_accumulation_steps * num_processes)
    epochs = num_steps / math.ceil(steps_per_epoch)
    tokens = data.num_tokens * epochs
    length = data.num_tokens / data.num_examples
    operations = tokens / (1 - data.padding) * operations_per_token(
        model, length, options.gradient_checkpointing)
    if options.tokens_per_second:
        seconds = tokens / options.tokens_per_second
        speed = f"{options.tokens_per_second:,g} tokens"
    elif options.device_tflops:
        seconds = operations / (options.device_tflops * 1e12 * num_processes)
        speed = f"{num_processes} x {options.device_tflops:,g} x 10^12 operations"
    print(f"work        {tokens:,.0f} tokens, {operations:.3g} operations")
    if options.tokens_per_second or options.device_tflops:
        print(f"time        {duration(seconds)} at {speed} a second")
    else:
        print("time        not known: give --tokens_per_second, or --device_tflops")


def operations_per_token(model, length, checkpointing):
    """Multiplications and additions to train on a token: 6 a trained weight, 4 a frozen one.

    Two go forward, two back to the layer's input, two to the weight's own gradient; two more are
    forward again with checkpointing. In attention, both of whose factors have a gradient, a token
    meets half of its row on average.
    """
    config = model.config
    embedding = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    matrices = 2 * (count_parameters(model) - embedding)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    looked_up = embedding * model.model.embed_tokens.weight.requires_grad
    forward = matrices + attention
    return (forward * (2 if checkpointing else 1) + matrices + 2 * attention
            + 2 * (memory.trained_numbers(model) - looked_up))


def duration(seconds):
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 96 * 3600 else f"{seconds / 86400:,.1f} days"
