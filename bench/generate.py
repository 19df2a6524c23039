"""Tokens per second of greedy generation, against transformers' generate, both in one process.

    python bench/generate.py --model_name_or_path stories260K --batch_size 1 8
    python bench/generate.py --shape tinyllama --num_layers 2
    python bench/generate.py --shape llama3-8b --device cuda --dtype bfloat16 --batch_size 1 \
        --compile

With a shape instead of a folder, the weights are random. The sides take turns; the ratio is the
median over the turns. --compile compiles both at batch size 1: minisft as in chat.py --compile,
transformers with its static cache, which it compiles on a GPU.

At batch size 1 memory bandwidth is the limit, because every token reads all weights and the cache.
The share of the bandwidth (measured by a copy) is printed, and the time to the first token of a
conversation's next turn, with its history in the cache and without.
"""

import argparse
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.limits import bandwidth, seconds_of  # noqa: E402
from bench.shapes import SHAPES, count_parameters, write_checkpoint  # noqa: E402
from minisft.checkpoints.folders import load_model  # noqa: E402
from minisft.generation.compiled import CompiledDecoder  # noqa: E402
from minisft.generation.generate import Sampling, generate, stream  # noqa: E402
from minisft.model.cache import KeyValueCache  # noqa: E402
from minisft.model.config import ModelConfig  # noqa: E402
from minisft.model.decoder import CausalLM  # noqa: E402

Side = Callable[[], list[list[int]]]


def both_sides(
    model: CausalLM,
    reference: Any,
    batch_size: int,
    options: Namespace,
    device: torch.device,
    decoder: CompiledDecoder | None,
) -> tuple[Side, Side]:
    """Two functions that return the greedy answers to the same random prompts: ours and theirs.

    reference: transformers' model. decoder: for a single prompt, or None.
    """
    generator, shape = torch.Generator().manual_seed(0), (batch_size, options.prompt_length)
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, greedy=True)
    settings = {"cache_implementation": "static"} if decoder else {}
    cache = decoder.new_cache() if decoder else None

    def ours() -> list[list[int]]:
        """The answers of minisft."""
        if decoder is None or cache is None:
            return generate(model, prompts.tolist(), sampling)
        cache.truncate(0)
        return [list(stream(decoder, prompts[0].tolist(), sampling, cache=cache))]

    def theirs() -> list[list[int]]:
        """The answers of transformers."""
        answers = reference.generate(
            prompts.to(device),
            attention_mask=torch.ones_like(prompts).to(device),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=options.max_new_tokens,
            **settings,
        )
        return answers[:, prompts.shape[1] :].tolist()

    return ours, theirs


def compare(
    ours: Side, theirs: Side, num_tokens: int, repeats: int, device: torch.device
) -> tuple[float, float, float, bool]:
    """(tokens per second of minisft, of transformers, ratio, True if the answers are equal).

    All are medians over the turns. num_tokens: new tokens of a call.
    """
    is_equal = ours() == theirs()  # also the warm-up
    turns = [(seconds_of(ours, device), seconds_of(theirs, device)) for _ in range(repeats)]
    ours_median, theirs_median = (statistics.median(side) for side in zip(*turns, strict=True))
    ratio = statistics.median(their_time / our_time for our_time, their_time in turns)
    return num_tokens / ours_median, num_tokens / theirs_median, ratio, is_equal


def bytes_per_step(
    config: ModelConfig, num_positions: int, dtype: torch.dtype, batch_size: int = 1
) -> int:
    """Bytes that a decoding step reads: the weights once, and the cache of each row."""
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_positions
    return (count_parameters(config)[0] + batch_size * 2 * keys) * dtype.itemsize


def next_turn(model: CausalLM, history_length: int, device: torch.device) -> tuple[float, float]:
    """Seconds to the first token of a second turn: with its history cached, and without."""
    history, turn = [5] * history_length, [7] * 16
    one_token = Sampling(max_new_tokens=1, greedy=True)
    cache = KeyValueCache(model.config)

    def cached() -> None:
        """Answer with the history in the cache."""
        cache.truncate(len(history))
        list(stream(model, history + turn, one_token, cache=cache))

    def uncached() -> None:
        """Answer without a cache."""
        list(stream(model, history + turn, one_token))

    with torch.inference_mode():
        model(torch.tensor([history], device=device), cache=cache)
        cached()
        with_cache = statistics.median(seconds_of(cached, device) for _ in range(5))
        without = statistics.median(seconds_of(uncached, device) for _ in range(5))
    return with_cache, without


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="folder of a checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_length", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="compile both at batch size 1")
    parser.add_argument("--max_length", type=int, default=1024, help="size of the compiled cache")
    parser.add_argument("--history", type=int, default=400, help="tokens of the earlier turns")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


def main() -> None:
    """Compare both sides at each batch size."""
    options = parse_options()
    # Imported here, because gpu_stages.py also uses this module without a peer.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = options.model_name_or_path or folder
        if not options.model_name_or_path:
            write_checkpoint(folder, options.shape, options.num_layers)
        model = load_model(source, dtype, device)
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    # Mapped files stay readable after the folder is removed.
    reference.generation_config.eos_token_id = None  # as for ours, no token ends an answer
    print(
        f"{options.model_name_or_path or options.shape}, {device}, {options.dtype}, "
        f"{torch.get_num_threads()} threads, {options.max_new_tokens} new tokens"
    )
    for batch_size in options.batch_size:
        decoder = None
        if options.compile and batch_size == 1:
            decoder = CompiledDecoder(model, options.max_length)
        sides = both_sides(model, reference, batch_size, options, device, decoder)
        num_tokens = options.max_new_tokens * batch_size
        ours, theirs, ratio, is_equal = compare(*sides, num_tokens, options.repeats, device)
        print(
            f"batch {batch_size:3}: minisft {ours:9,.1f} tokens/s, transformers "
            f"{theirs:9,.1f}, ratio {ratio:.2f}, "
            f"{'the same' if is_equal else 'different'} tokens"
            f"{', both compiled' if decoder else ''}"
        )
        if batch_size == 1:
            num_positions = options.prompt_length + options.max_new_tokens // 2  # on average
            if decoder:
                num_positions = options.max_length
            read = bytes_per_step(model.config, num_positions, dtype) * ours
            print(
                f"           reads {read / 1e9:.1f} GB/s of weights and cache, "
                f"{read / bandwidth(device):.0%} of the memory bandwidth"
            )
    with_cache, without = next_turn(model, options.history, device)
    print(
        f"next turn after {options.history} tokens: first token in {with_cache * 1e3:.1f} ms "
        f"with the history cached, {without * 1e3:.1f} ms without"
    )


if __name__ == "__main__":
    main()
