"""Tokens a second of greedy generation, against transformers' generate, both in one process.

    python bench/generate.py --model_name_or_path stories260K --batch_size 1 8
    python bench/generate.py --shape tinyllama --num_layers 2
    python bench/generate.py --shape llama3-8b --device cuda --dtype bfloat16 --batch_size 1 \
        --compile

With a shape instead of a folder the weights are random. The two sides take turns; the ratio is the
median over the turns. --compile: both compiled at batch size 1, ours as by chat.py --compile,
transformers by its static cache, which it compiles for on a GPU. At batch size 1 every token reads
all weights and the cache once, so memory bandwidth is the limit: the share of it that was reached
is printed too (bandwidth measured by a copy), and how long the next turn of a conversation takes
with its history in the cache and without.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.limits import bandwidth, seconds_of  # noqa: E402
from bench.shapes import SHAPES, parameters_of, write_checkpoint  # noqa: E402
from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.generation.compiled import CompiledDecoder  # noqa: E402
from minisft.generation.generate import Sampling, generate, stream  # noqa: E402
from minisft.model.cache import KeyValueCache  # noqa: E402


def both_sides(model, reference, batch_size, options, device, decoder):
    """Two functions that answer the same random prompts greedily: minisft's and transformers'.

    decoder: a CompiledDecoder for a single prompt, or None. Each returns the new tokens.
    """
    count = options.max_new_tokens
    prompts = torch.randint(
        3,
        model.config.vocab_size,
        (batch_size, options.prompt_length),
        generator=torch.Generator().manual_seed(0),
    )
    mask, sampling = torch.ones_like(prompts), Sampling(max_new_tokens=count, greedy=True)

    cache = decoder and decoder.new_cache()
    static = {"cache_implementation": "static"} if decoder else {}

    def ours():
        if not decoder:
            return generate(model, prompts.tolist(), sampling, set())
        cache.truncate(0)
        return [list(stream(decoder, prompts[0].tolist(), sampling, set(), cache))]

    def theirs():
        return reference.generate(
            prompts.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=count,
            **static,
        )[:, prompts.shape[1] :].tolist()

    return ours, theirs


def compare(model, reference, batch_size, options, device, decoder):
    """Median tokens a second of both sides, the median ratio of their turns, same tokens or not."""
    ours, theirs = both_sides(model, reference, batch_size, options, device, decoder)
    same = ours() == theirs()  # also the warm-up
    turns = [(seconds_of(ours, device), seconds_of(theirs, device)) for _ in range(options.repeats)]
    written = options.max_new_tokens * batch_size
    speeds = [written / statistics.median(side) for side in zip(*turns, strict=True)]
    return *speeds, statistics.median(b / a for a, b in turns), same


def bytes_per_step(config, positions, dtype, batch_size=1):
    """What writing one token in every row reads: the weights once, and each row's cache."""
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions
    return (parameters_of(config)[0] + batch_size * cache) * dtype.itemsize


def next_turn(model, options, device):
    """Seconds to the first token of a second turn: with the history cached, and computed anew."""
    history, turn = [5] * options.history, [7] * 16
    one = Sampling(max_new_tokens=1, greedy=True)
    with torch.inference_mode():
        cache = KeyValueCache(model.config)
        model(torch.tensor([history], device=device), cache=cache)

        def cached():
            cache.truncate(len(history))
            list(stream(model, history + turn, one, set(), cache))

        cached()
        return (
            statistics.median(seconds_of(cached, device) for _ in range(5)),
            statistics.median(
                seconds_of(lambda: list(stream(model, history + turn, one, set())), device)
                for _ in range(5)
            ),
        )


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="folder of a checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_length", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="at batch size 1")
    parser.add_argument("--max_length", type=int, default=1024, help="of the compiled cache")
    parser.add_argument("--history", type=int, default=400, help="tokens of the earlier turns")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


def main():
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options = parse_options()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = options.model_name_or_path or folder
        if not options.model_name_or_path:
            write_checkpoint(folder, options.shape, options.num_layers)
        model = load_model(source, dtype, device)
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
        reference.generation_config.eos_token_id = None  # ours has no end either
        print(
            f"{source if options.model_name_or_path else options.shape}, {device}, "
            f"{options.dtype}, {torch.get_num_threads()} threads, {options.max_new_tokens} new "
            "tokens"
        )
        for batch_size in options.batch_size:
            decoder = None
            if options.compile and batch_size == 1:
                decoder = CompiledDecoder(model, options.max_length)
            ours, theirs, ratio, same = compare(
                model, reference, batch_size, options, device, decoder
            )
            print(
                f"batch {batch_size:3}: minisft {ours:9,.1f} tokens/s, transformers "
                f"{theirs:9,.1f}, ratio {ratio:.2f}, "
                f"{'the same' if same else 'different'} tokens"
                f"{', both compiled' if decoder else ''}"
            )
            if batch_size == 1:
                positions = options.prompt_length + options.max_new_tokens // 2  # in the middle
                if decoder:
                    positions = options.max_length
                read = bytes_per_step(model.config, positions, dtype) * ours
                print(
                    f"           reads {read / 1e9:.1f} GB/s of weights and cache, "
                    f"{read / bandwidth(device):.0%} of the memory bandwidth"
                )
        with_cache, without = next_turn(model, options, device)
        print(
            f"next turn after {options.history} tokens: first token in {with_cache * 1e3:.1f} ms "
            f"with the history cached, {without * 1e3:.1f} ms without"
        )


if __name__ == "__main__":
    main()
