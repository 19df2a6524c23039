"""Tokens per second of greedy generation, against transformers' generate and llama.cpp.

    python bench/generate.py --model_name_or_path SmolLM2 --dtype bfloat16 --llama_cpp
    python bench/generate.py --model_name_or_path SmolLM2.Q4_1.gguf --dtype bfloat16 --llama_cpp
    python bench/generate.py --shape tinyllama --num_layers 2
    python bench/generate.py --shape llama3-8b --device cuda --dtype bfloat16 --batch_size 1 \
        --compile

With a shape instead of a folder, the weights are random. minisft loads the model as chat.py does.
The sides take turns; a ratio is the median over the turns. --compile compiles both at batch size 1:
minisft as in chat.py --compile, transformers with its static cache, which it compiles on a GPU.
--llama_cpp adds llama.cpp with the same weights: the file itself, or an export as F16, or as Q8_0
for --quantization_bit 8. transformers takes no part with a GGUF file or quantised weights.

At batch size 1 memory bandwidth is the limit, because every token reads all weights and the cache.
The share of the bandwidth (measured by a copy) is printed, and the time to the first token of a
conversation's next turn, with its history in the cache and without.
"""

import argparse
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.limits import bandwidth, seconds_of  # noqa: E402
from bench.llama_cpp_side import LlamaCpp  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from bench.shapes import SHAPES, write_checkpoint  # noqa: E402
from minisft.checkpoints.gguf_export import export_model  # noqa: E402
from minisft.checkpoints.hub import resolve  # noqa: E402
from minisft.checkpoints.inference import load_for_inference  # noqa: E402
from minisft.generation.compiled import CompiledDecoder  # noqa: E402
from minisft.generation.generate import Sampling, generate, stream  # noqa: E402
from minisft.model.cache import KeyValueCache  # noqa: E402
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
    prompts = random_prompts(model.config.vocab_size, batch_size, options)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, greedy=True)
    cache = decoder.new_cache() if decoder else None
    static_cache = None
    if decoder and reference is not None:
        # One for all calls: compiled kernels are recorded for the addresses of its tensors.
        from transformers import StaticCache

        length = options.prompt_length + options.max_new_tokens
        static_cache = StaticCache(config=reference.config, max_cache_len=length)

    def ours() -> list[list[int]]:
        """The answers of minisft."""
        if decoder is None or cache is None:
            return generate(model, prompts.tolist(), sampling)
        cache.truncate(0)
        return [list(stream(decoder, prompts[0].tolist(), sampling, cache=cache))]

    def theirs() -> list[list[int]]:
        """The answers of transformers."""
        settings = {}
        if static_cache is not None:
            static_cache.reset()
            settings["past_key_values"] = static_cache
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


def random_prompts(vocab_size: int, batch_size: int, options: Namespace) -> torch.Tensor:
    """Ids (batch_size, prompt_length)."""
    generator, shape = torch.Generator().manual_seed(0), (batch_size, options.prompt_length)
    return torch.randint(3, vocab_size, shape, generator=generator)


def compare(
    sides: Mapping[str, Side], num_tokens: int, repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """(tokens per second of each side, its time as a multiple of the first side's).

    Both are medians over the turns. num_tokens: new tokens of a call.
    """
    for side in sides.values():
        side()  # the warm-up
    turns = [
        {name: seconds_of(side, device) for name, side in sides.items()} for _ in range(repeats)
    ]
    first = next(iter(sides))
    speeds = {name: num_tokens / statistics.median(turn[name] for turn in turns) for name in sides}
    ratios = {name: statistics.median(turn[name] / turn[first] for turn in turns) for name in sides}
    return speeds, ratios


def bytes_per_step(model: CausalLM, num_positions: int, batch_size: int = 1) -> int:
    """Bytes that a decoding step reads: the weights once, and the cache of each row.

    An embedding that is not the output matrix counts as nothing: a step reads a few rows of it.
    """
    config = model.config
    weights = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if config.tie_word_embeddings or not name.startswith("model.embed_tokens.")
    )
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_positions
    return weights + batch_size * 2 * keys * model.model.norm.weight.element_size()


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
    parser.add_argument("--model_name_or_path", help="folder of a checkpoint, or GGUF file")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--num_layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_length", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8))
    parser.add_argument("--llama_cpp", action="store_true", help="compare with llama.cpp, too")
    parser.add_argument("--compile", action="store_true", help="compile both at batch size 1")
    parser.add_argument("--max_length", type=int, default=1024, help="size of the compiled cache")
    parser.add_argument("--history", type=int, default=400, help="tokens of the earlier turns")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    add_results_option(parser)
    return parser.parse_args(arguments)


def load(options: Namespace, source: str, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model as chat.py loads it."""
    bits = options.quantization_bit
    return load_for_inference(source, None, dtype, device, bits, compiles=options.compile)


def load_transformers(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in transformers."""
    # Imported here, because gpu_stages.py also uses this module without a peer.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    # Mapped files stay readable after the folder is removed.
    reference.generation_config.eos_token_id = None  # as for ours, no token ends an answer
    return reference


def llama_cpp_file(options: Namespace, source: str, folder: str) -> str:
    """A GGUF file with the weights of the model: the given one, or an export."""
    if is_gguf(options):
        return options.model_name_or_path
    path = str(Path(folder) / "model.gguf")
    export_model(source, path, export_type(options))
    return path


def export_type(options: Namespace) -> str:
    """The number type of llama.cpp's file, for a model that is not a file of its own."""
    return "q8_0" if options.quantization_bit else "f16"


def main() -> None:
    """Compare the sides at each batch size."""
    options = parse_options()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = options.model_name_or_path or folder
        if not options.model_name_or_path:
            write_checkpoint(folder, options.shape, options.num_layers)
        source = str(resolve(source))
        model, reference = load(options, source, device, dtype), None
        if not is_gguf(options) and not options.quantization_bit:
            reference = load_transformers(source, device, dtype)
        name = options.model_name_or_path or options.shape
        bits = f" in {options.quantization_bit} bits" if options.quantization_bit else ""
        print(
            f"{Path(name).name}, {device}, {options.dtype}{bits}, {torch.get_num_threads()} "
            f"threads, {options.max_new_tokens} new tokens"
        )
        gguf_path = llama_cpp_file(options, source, folder) if options.llama_cpp else None
        for batch_size in options.batch_size:
            compare_batch(options, model, reference, gguf_path, batch_size)
    with_cache, without = next_turn(model, options.history, device)
    print(
        f"next turn after {options.history} tokens: first token in {with_cache * 1e3:.1f} ms "
        f"with the history cached, {without * 1e3:.1f} ms without"
    )


def compare_batch(
    options: Namespace, model: CausalLM, reference: Any, gguf_path: str | None, batch_size: int
) -> None:
    """Print the speeds at a batch size. reference: transformers' model, or None."""
    device = torch.device(options.device)
    decoder = None
    if options.compile and batch_size == 1:
        decoder = CompiledDecoder(model, options.max_length)
    ours, theirs = both_sides(model, reference, batch_size, options, device, decoder)
    sides = {"minisft": ours}
    if reference is not None:
        sides["transformers"] = theirs
    with ExitStack() as stack:
        if gguf_path is not None:
            prompts = random_prompts(model.config.vocab_size, batch_size, options).tolist()
            threads = torch.get_num_threads()
            llama_cpp = stack.enter_context(LlamaCpp(gguf_path, threads, batch_size))
            sides["llama.cpp"] = lambda: llama_cpp.answers(prompts, options.max_new_tokens)
        num_tokens = options.max_new_tokens * batch_size
        speeds, ratios = compare(sides, num_tokens, options.repeats, device)
    columns = [
        f"{name} {speeds[name]:,.1f} tokens/s" + (f" (ratio {ratios[name]:.2f})" if index else "")
        for index, name in enumerate(sides)
    ]
    print(f"batch {batch_size:3}: {', '.join(columns)}{', both compiled' if decoder else ''}")
    share = {}
    if reference is not None:
        print(f"           {'the same' if ours() == theirs() else 'different'} tokens")
    if batch_size == 1:
        num_positions = options.prompt_length + options.max_new_tokens // 2  # on average
        if decoder and device.type != "cpu":  # it reads the whole cache
            num_positions = options.max_length
        read = bytes_per_step(model, num_positions) * speeds["minisft"]
        share = {"share": read / bandwidth(device), "limit": "memory copy"}
        print(
            f"           reads {read / 1e9:.1f} GB/s of weights and cache, "
            f"{share['share']:.0%} of the memory bandwidth"
        )
    name = f"decoding, {weights_name(options)}, batch {batch_size}{', compiled' * bool(decoder)}"
    for peer in list(sides)[1:]:
        more = {"peer_name": peer, "peer": speeds[peer], "ratio": ratios[peer], **share}
        if peer == "llama.cpp" and not is_gguf(options):
            more["peer_name"] += f", {export_type(options)}"
        title = f"{name}, next to {peer}" if len(sides) > 2 else name
        add_figure(options.results, title, speeds["minisft"], "tokens/s", **more)
    if len(sides) == 1:
        add_figure(options.results, name, speeds["minisft"], "tokens/s", **share)


def is_gguf(options: Namespace) -> bool:
    """True if the model is a GGUF file."""
    return (options.model_name_or_path or "").endswith(".gguf")


def weights_name(options: Namespace) -> str:
    """How the weights are stored, in words."""
    if is_gguf(options):
        return Path(options.model_name_or_path).stem
    return f"{options.quantization_bit} bits" if options.quantization_bit else options.dtype


if __name__ == "__main__":
    main()
