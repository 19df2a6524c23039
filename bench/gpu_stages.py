"""The stages of bench/gpu.py. Each yields lines for the results; see bench/gpu_lines.py.

    for line in training(Bench(dry_run=True, limits={}), "tinyllama", "lora"):
        print(line["name"], line["figure"], line["unit"], line["ratio"])

Both sides compute with the same tensors.
"""

import json
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import generate, score, train
from bench.gpu_lines import COPY, MATMUL, PEAK, Bench, Line, attempt, line_with_peer
from bench.gpu_waits import waits_of_a_step
from bench.limits import bandwidth, forget_peak, matrix_speed, seconds_of
from bench.measure import ROOT, flags
from bench.peer_trainer import EncodedRow, train_with_trainer
from bench.shapes import logit_difference, random_model, transformers_twin
from minisft.data.dataset import open_rows
from minisft.generation.compiled import CompiledDecoder
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.parameters import count_parameters
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training.operations import training_operations

# Operations and bytes per second that healthy cards reach. That of the H100 follows from its data
# sheet: an H200 reaches nine tenths of its bandwidth.
EXPECTED = {"H100": (790e12, 3.0e12), "H200": (790e12, 4.3e12)}
PEAK_SPEED = 989e12  # of both in bfloat16, by their data sheet
ALPACA_ROWS = 52_000


def limits(bench: Bench) -> Iterator[Line]:
    """The speed of a large matrix product, and the bandwidth of a copy."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    expected = next((speeds for card, speeds in EXPECTED.items() if card in name), (None, None))
    measures = {
        MATMUL: lambda: matrix_speed(bench.device, bench.dtype, bench.sizes["matrix"]),
        COPY: lambda: bandwidth(bench.device),
    }
    for line_name, unit, scale, usual in (
        (MATMUL, "TFLOP/s", 1e12, expected[0]),
        (COPY, "GB/s", 1e9, expected[1]),
    ):
        speed = measures[line_name]()
        peer, reason = usual and usual / scale, "not known for this device"
        line = line_with_peer(line_name, speed / scale, unit, "usual", peer, reason)
        yield {**line, "per_second": speed, "device": name}
    if expected[0]:
        line = {"name": PEAK, "figure": PEAK_SPEED / 1e12, "unit": "TFLOP/s"}
        yield {**line, "per_second": PEAK_SPEED}


def training(bench: Bench, size: str, finetuning_type: str) -> Iterator[Line]:
    """Padded and packed, LoRA also compiled, against transformers' Trainer (with peft)."""
    shape, length = bench.sizes[size], bench.sizes["length"]
    is_full, rows = finetuning_type == "full", training_rows(bench, shape)
    # On both sides trained weights are float32, frozen weights and products bfloat16.
    model = random_model(shape, None, torch.float32 if is_full else bench.dtype, bench.device)
    with tempfile.TemporaryDirectory() as folder:

        def side_options(side: str, **more: Any) -> Namespace:
            """The options of bench/train.py for a side."""
            words = flags(
                side=side,
                folder=folder,
                batch_size=bench.sizes["rows"],
                dtype="bfloat16",
                device=bench.device.type,
                finetuning_type=finetuning_type,
                **more,
            )
            return train.parse_options(words)

        checked: dict[str, Any] = {}
        peers, reason = {}, None
        for attention in peer_attentions(bench):
            arguments = side_options("best"), model, shape, rows, attention, checked
            peer, reason = attempt(partial(train_peer, *arguments))
            peers |= {attention: peer} if peer else {}
        attention = max(peers, key=lambda name: peers[name][0], default="")
        peer_speed, peer_peak, _ = peers.get(attention, (None, None, None))
        peer_name = "Trainer" if is_full else "Trainer + peft"
        peer_name += f" ({attention})" if attention else ""
        peak_share = share_of_peak(bench, model, is_full)
        lora_config = None
        if is_full:
            model.requires_grad_(True)
        else:
            lora_config = LoraConfig()
            add_lora(model, lora_config)
        per_token = training_operations(model, length)
        variants = {"padded": side_options("minisft"), "packed": side_options("packed")}
        if not is_full:
            variants["packed, compiled"] = side_options("packed", compile=True)
        for variant, options in variants.items():
            name = f"{size} {finetuning_type}, {variant}"
            began = time.monotonic()
            result, failure = attempt(partial(train_ours, options, model, lora_config, rows))
            if result is None:
                yield {"name": name, "failed": failure}
                continue
            speed, peak, padding = result
            more = peak_share(speed)
            if variant == "packed":
                arguments = side_options("packed"), model, lora_config, rows
                more["waits"], more["waits_failed"] = attempt(partial(waits_of_a_step, *arguments))
            yield line_with_peer(
                name,
                speed,
                "tokens/s",
                peer_name,
                peer_speed,
                reason,
                peak_gib=peak / 2**30,
                peer_peak_gib=peer_peak and peer_peak / 2**30,
                padding=padding,
                difference=checked.get("difference"),
                took=time.monotonic() - began,
                **more,
                **bench.share(speed * per_token, MATMUL),
            )


def share_of_peak(bench: Bench, model: CausalLM, is_full: bool) -> Callable[[float], Line]:
    """Tokens per second -> {"share_of_peak", "counted"}; empty if the card is not known.

    Counted as others do: 4 or 6 operations for each of the N parameters of the model, embedding
    included, attention and the adapter not.
    """
    factor, num_parameters = 6 if is_full else 4, count_parameters(model)

    def share(speed: float) -> Line:
        """The share at this speed."""
        if PEAK not in bench.limits:
            return {}
        counted = speed * factor * num_parameters
        return {"share_of_peak": counted / bench.limits[PEAK], "counted": f"{factor}N"}

    return share


def low_memory_training(bench: Bench, size: str) -> Iterator[Line]:
    """In full with six bytes a parameter: weights, gradients in bfloat16, moments in 8 bits."""
    shape, began = bench.sizes[size], time.monotonic()
    model = random_model(shape, None, bench.dtype, bench.device).requires_grad_(True)
    per_token = training_operations(model, bench.sizes["length"])
    with tempfile.TemporaryDirectory() as folder:
        words = flags(
            side="packed",
            folder=folder,
            batch_size=bench.sizes["rows"],
            dtype="bfloat16",
            device=bench.device.type,
            finetuning_type="full",
            optim="adamw_8bit",
            pure_bf16=True,
        )
        rows = training_rows(bench, shape)
        speed, peak, padding = train_ours(train.parse_options(words), model, None, rows)
    yield line_with_peer(
        f"{size} full, adamw_8bit, pure_bf16, packed",
        speed,
        "tokens/s",
        "Trainer",
        None,
        "not measured; it has no stochastic rounding",
        peak_gib=peak / 2**30,
        padding=padding,
        took=time.monotonic() - began,
        **bench.share(speed * per_token, MATMUL),
    )


def training_rows(bench: Bench, shape: str) -> list[EncodedRow]:
    """Rows of random tokens. Those of a step have similar lengths, as after sorting."""
    length, num_rows = bench.sizes["length"], bench.sizes["rows"] * bench.sizes["steps"]
    lengths = np.linspace(0.88 * length, 1.12 * length, num_rows).astype(int)
    return train.synthetic_rows(shape, lengths.tolist())


def peer_attentions(bench: Bench) -> list[str]:
    """transformers' kinds of attention: the faster one counts."""
    try:
        from transformers.utils import is_flash_attn_2_available
    except ImportError:  # a line will say so
        return ["sdpa"]
    has_flash = bench.device.type == "cuda" and is_flash_attn_2_available()
    return ["sdpa", "flash_attention_2"] if has_flash else ["sdpa"]


def train_peer(
    options: Namespace,
    model: CausalLM,
    shape: str,
    rows: list[EncodedRow],
    attention: str,
    checked: dict[str, Any],
) -> tuple[float, int, float]:
    """(tokens per second, peak memory, padding) of the peer, after a check of its logits.

    checked: receives the difference of the logits.
    """
    forget_peak(torch.device(options.device))
    is_full = options.finetuning_type == "full"
    twin = transformers_twin(model, shape)
    checked["difference"] = logit_difference(model, twin)
    # Over many layers, the rounding errors of bfloat16 add up to a few hundredths.
    if not checked["difference"] < (1e-3 if is_full else 0.1):
        raise ValueError(f"the logits differ: {checked}")
    twin.set_attn_implementation(attention)
    twin.requires_grad_(is_full)
    return train.second_epoch(train_with_trainer(options, twin, rows))


def train_ours(
    options: Namespace,
    model: CausalLM,
    lora_config: LoraConfig | None,
    rows: list[EncodedRow],
) -> tuple[float, int, float]:
    """(tokens per second, peak memory, padding) of minisft."""
    forget_peak(torch.device(options.device))
    return train.second_epoch(train.train_minisft(options, model, lora_config, rows))


def tokens_per_second(bench: Bench, generate_tokens: generate.Side, num_tokens: int) -> float:
    """The median speed of a function that generates tokens; its first call is the warm-up."""
    generate_tokens()
    return num_tokens / statistics.median(
        seconds_of(generate_tokens, bench.device) for _ in range(bench.sizes["repeats"])
    )


def decoding(bench: Bench, size: str) -> Iterator[Line]:
    """Greedy tokens per second at batch size 1, 8 and 32, against transformers."""
    shape = bench.sizes[size]
    model = random_model(shape, None, bench.dtype, bench.device)
    twin, reason = attempt(lambda: transformers_twin(model, shape))
    for batch_size in (1, 8, 32):
        name = f"{size} decoding, batch {batch_size}"
        yield from decoding_lines(bench, name, model, twin, reason, batch_size)


def compiled_decoding(bench: Bench, size: str, num_layers: int | None = None) -> Iterator[Line]:
    """minisft's compiled step at batch size 1, without a peer."""
    model = random_model(bench.sizes[size], num_layers, bench.dtype, bench.device)
    name, reason = f"{size} decoding, batch 1, compiled", "not compiled here"
    yield from decoding_lines(bench, name, model, None, reason, 1, is_compiled=True)


def compiled_decoding_of_few_layers(bench: Bench, size: str) -> Iterator[Line]:
    """Against transformers with its static cache, which it compiles on a GPU."""
    shape, num_layers = bench.sizes[size], bench.sizes["few_layers"]
    model = random_model(shape, num_layers, bench.dtype, bench.device)
    twin, reason = attempt(lambda: transformers_twin(model, shape))
    name = f"{size}, {num_layers} layers, decoding, batch 1, compiled"
    yield from decoding_lines(bench, name, model, twin, reason, 1, is_compiled=True)


def decoding_lines(
    bench: Bench,
    name: str,
    model: CausalLM,
    twin: Any,
    reason: str | None,
    batch_size: int,
    is_compiled: bool = False,
) -> Iterator[Line]:
    """The line of a batch size. If both sides compile, a line without the peer comes first."""
    options = generate.parse_options(["--max_new_tokens", str(bench.sizes["new_tokens"])])
    began, capacity = time.monotonic(), bench.sizes["capacity"]
    decoder = CompiledDecoder(model, capacity) if is_compiled else None
    ours, theirs = generate.both_sides(model, twin, batch_size, options, bench.device, decoder)
    num_tokens = batch_size * options.max_new_tokens
    speed = tokens_per_second(bench, ours, num_tokens)
    # The cache is read at its full capacity if compiled, else up to the current token.
    average = options.prompt_length + options.max_new_tokens // 2
    num_positions = capacity if decoder else average
    read = generate.bytes_per_step(model, num_positions, batch_size)
    more = {"took": time.monotonic() - began, **bench.share(speed / batch_size * read, COPY)}
    peer_name, peer = "generate, static cache" if decoder else "generate", None
    if twin and decoder:
        yield line_with_peer(name, speed, "tokens/s", peer_name, None, "to follow", **more)
    if twin:
        peer, reason = attempt(lambda: tokens_per_second(bench, theirs, num_tokens))
    yield line_with_peer(name, speed, "tokens/s", peer_name, peer, reason, **more)


def scoring(bench: Bench, size: str) -> Iterator[Line]:
    """Rows per second of IFD, against the usual way, which scores fewer rows."""
    shape, sizes = bench.sizes[size], bench.sizes
    model = random_model(shape, None, bench.dtype, bench.device)
    words = flags(
        reference_rows=sizes["reference"],
        batch_tokens=sizes["batch_tokens"],
        workers=sizes["workers"],
        rounds=1,
        warm_up_rows=sizes["scored"][size] // 8,
    )
    source = json.loads((ROOT / "examples/data/train.json").read_text(encoding="utf-8"))
    texts = [f"{row['instruction']} {row['input']}" for row in source]
    draw = random.Random(0).choices
    rows = [
        {"instruction": " ".join(draw(texts, k=4)), "output": " ".join(draw(texts, k=8))}
        for _ in range(sizes["scored"][size])
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        compare = partial(
            score.compare,
            score.parse_options(words),
            model,
            rows=open_rows(str(path), skipped=[]),
            template=get_template("alpaca", Tokenizer.load(ROOT / "examples/base")),
        )
        result, reason = attempt(lambda: compare(theirs=transformers_twin(model, shape)))
        result = result or compare(theirs=None)
    [ours], theirs = ([speed[0] for speed in result.speeds[side]] for side in ("ours", "theirs"))
    yield line_with_peer(
        f"{size} scoring",
        ours,
        "rows/s",
        "reference way",
        theirs[0] if theirs else None,
        reason,
        tokens_per_row=result.tokens_per_row,
        minutes_of_alpaca=ALPACA_ROWS / ours / 60,
        difference=result.difference,
        **bench.share(ours * score.operations_per_row(model, result), MATMUL),
    )
