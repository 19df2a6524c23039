"""What bench/gpu.py measures: each function yields lines, dicts that go to the results as they are.

    for line in training(Bench(dry_run=True, limits={}), "tinyllama", "lora"):
        print(line["name"], line["figure"], line["unit"], line["ratio"])

A line has a name and either a figure with its unit, or "failed" or "skipped" with the reason.
"peer", "peer_name" and "ratio" (above 1: minisft is faster) are there where the peer ran, "share"
and "limit" where the limit is known. Both sides compute with the same weights, held once.
"""

import gc
import json
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from bench import generate, score, train
from bench.limits import bandwidth, forget_peak, matrix_speed, seconds_of
from bench.shapes import logit_difference, random_model, transformers_twin
from minisft.data import dataset
from minisft.generation.compiled import CompiledDecoder
from minisft.model.lora import LoraConfig, add_lora
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training.operations import forward_operations, training_operations

ROOT = Path(__file__).resolve().parent.parent
# Operations and bytes a second that these cards reached elsewhere: much less is a card in trouble.
EXPECTED = {"H100": (790e12, 3.3e12), "H200": (790e12, 4.3e12)}
MATMUL, COPY = "matrix product", "memory copy"
# rows, length: of a step, 4,096 tokens in all. steps: of an epoch; there are two, and the second is
# measured. capacity: of a compiled cache. few_layers: where two sides compile, so that there is
# time for both. scored, reference: rows that minisft and the reference way score.
SIZES = {
    "tinyllama": "tinyllama",
    "llama3-8b": "llama3-8b",
    "rows": 16,
    "length": 256,
    "steps": 6,
    "new_tokens": 64,
    "capacity": 1024,
    "few_layers": 8,
    "scored": 1024,
    "reference": 32,
    "batch_tokens": 32768,
    "workers": 4,
    "repeats": 3,
    "matrix": 8192,
}
DRY_SIZES = {
    "tinyllama": "tiny",
    "llama3-8b": "tiny",
    "rows": 2,
    "length": 32,
    "steps": 1,
    "new_tokens": 4,
    "capacity": 32,
    "few_layers": 1,
    "scored": 12,
    "reference": 2,
    "batch_tokens": 2048,
    "workers": 1,
    "repeats": 1,
    "matrix": 256,
}


class Bench:
    """What a stage is given: the device, the sizes and the limits measured before it."""

    def __init__(self, dry_run, limits):
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype, self.limits = torch.bfloat16, limits
        self.sizes = DRY_SIZES if dry_run else SIZES

    def share(self, per_second, limit):
        """{"share", "limit"} of a line, or nothing where the limit was not measured."""
        if not self.limits.get(limit):
            return {}
        return {"share": per_second / self.limits[limit], "limit": limit}


def attempt(function):
    """(function(), None), or (None, why it failed): what fails costs one line, not the stage."""
    try:
        return function(), None
    except Exception as error:
        traceback.print_exc()  # into the log
        return None, f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    finally:
        gc.collect()


def beside(name, figure, unit, peer_name, peer, why_not, **more):
    """A line with its peer; where that failed, with the reason."""
    if peer is None:
        return {
            "name": name,
            "figure": figure,
            "unit": unit,
            "note": f"{peer_name}: {why_not}",
            **more,
        }
    return {
        "name": name,
        "figure": figure,
        "unit": unit,
        "peer_name": peer_name,
        "peer": peer,
        "ratio": figure / peer,
        **more,
    }


def limits(bench):
    """The speed of a large matrix product and the bandwidth of a copy."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    expected = next((one for card, one in EXPECTED.items() if card in name), (None, None))
    for line, measure, unit, scale, usual in (
        (
            MATMUL,
            lambda: matrix_speed(bench.device, bench.dtype, bench.sizes["matrix"]),
            "TFLOP/s",
            1e12,
            expected[0],
        ),
        (COPY, lambda: bandwidth(bench.device), "GB/s", 1e9, expected[1]),
    ):
        speed = measure()
        usual = usual and usual / scale
        yield {
            **beside(line, speed / scale, unit, "usual", usual, "not known for this device"),
            "per_second": speed,
            "device": name,
        }


def training(bench, size, finetuning_type):
    """Padded and packed, LoRA also compiled, next to transformers' Trainer (with peft)."""
    shape, rows = bench.sizes[size], bench.sizes["rows"]
    is_full, length = finetuning_type == "full", bench.sizes["length"]
    # The rows of a step are of similar length, as after sorting; all in all 4,096 tokens a step.
    lengths = np.linspace(0.88 * length, 1.12 * length, rows * bench.sizes["steps"]).astype(int)
    data = train.synthetic_rows(shape, lengths.tolist())
    # Trained weights are float32 on both sides, frozen ones bfloat16; products are in bfloat16.
    model = random_model(shape, None, torch.float32 if is_full else bench.dtype, bench.device)

    def options_of(side, *flags):
        options = train.parse_options(
            [
                "--side",
                side,
                "--folder",
                folder,
                "--batch_size",
                str(rows),
                "--dtype",
                "bfloat16",
                "--device",
                bench.device.type,
                "--finetuning_type",
                finetuning_type,
                *flags,
            ]
        )
        forget_peak(bench.device)
        return options

    def trainer():
        twin = transformers_twin(model, shape)
        checked["attention"] = twin.config._attn_implementation
        checked["difference"] = logit_difference(model, twin)
        # Many layers of bfloat16 round to a few hundredths.
        if not checked["difference"] < (1e-3 if is_full else 0.1):
            raise ValueError(f"computes something else: {checked}")
        options = options_of("best")
        twin.requires_grad_(is_full)
        return train.second_epoch(train.train_with_trainer(options, twin, data))

    def ours(*arguments):
        options = options_of(*arguments)
        return train.second_epoch(train.train_minisft(options, model, lora_config, data))

    with tempfile.TemporaryDirectory() as folder:
        checked = {}
        peer, why_not = attempt(trainer)
        peer_speed, peer_peak, _ = peer or (None, None, None)
        peer_name = "Trainer" if is_full else "Trainer + peft"
        peer_name += f" ({checked['attention']})" if checked else ""
        lora_config = None
        if is_full:
            model.requires_grad_(True)
        else:
            lora_config = LoraConfig()
            add_lora(model, lora_config)
        per_token = training_operations(model, length)
        variants = {"padded": ["minisft"], "packed": ["packed"]}
        if not is_full:
            variants["packed, compiled"] = ["packed", "--compile"]
        for variant, arguments in variants.items():
            name = f"{size} {finetuning_type}, {variant}"
            began = time.monotonic()
            found, failed = attempt(lambda: ours(*arguments))  # noqa: B023
            if found is None:
                yield {"name": name, "failed": failed}
                continue
            speed, peak, padding = found
            yield beside(
                name,
                speed,
                "tokens/s",
                peer_name,
                peer_speed,
                why_not,
                peak_gib=peak / 2**30,
                peer_peak_gib=peer_peak and peer_peak / 2**30,
                padding=padding,
                difference=checked.get("difference"),
                took=time.monotonic() - began,
                **bench.share(speed * per_token, MATMUL),
            )


def writing_speed(bench, function, written):
    """Tokens a second of a function that writes so many; its first call prepares kernels."""
    function()
    return written / statistics.median(
        seconds_of(function, bench.device) for _ in range(bench.sizes["repeats"])
    )


def decoding(bench, size):
    """Greedy tokens a second at batch 1 and 8, next to transformers."""
    shape = bench.sizes[size]
    model = random_model(shape, None, bench.dtype, bench.device)
    twin, why_not = attempt(lambda: transformers_twin(model, shape))
    for batch_size in (1, 8):
        name = f"{size} decoding, batch {batch_size}"
        yield from written_tokens(bench, name, model, twin, why_not, batch_size)


def compiled_decoding(bench, size, num_layers=None):
    """minisft's compiled step alone at batch 1, which is all that --compile compiles."""
    model = random_model(bench.sizes[size], num_layers, bench.dtype, bench.device)
    name = f"{size} decoding, batch 1, compiled"
    yield from written_tokens(bench, name, model, None, "not compiled here", 1, is_compiled=True)


def compiled_decoding_of_few_layers(bench, size):
    """Next to transformers with its static cache, for which it compiles on a GPU."""
    shape, num_layers = bench.sizes[size], bench.sizes["few_layers"]
    model = random_model(shape, num_layers, bench.dtype, bench.device)
    twin, why_not = attempt(lambda: transformers_twin(model, shape))
    name = f"{size}, {num_layers} layers, decoding, batch 1, compiled"
    yield from written_tokens(bench, name, model, twin, why_not, 1, is_compiled=True)


def written_tokens(bench, name, model, twin, why_not, batch_size, is_compiled=False):
    """The line of one batch size; where both sides compile, a first one before the peer does."""
    options = generate.parse_options(["--max_new_tokens", str(bench.sizes["new_tokens"])])
    began, capacity = time.monotonic(), bench.sizes["capacity"]
    decoder = CompiledDecoder(model, capacity) if is_compiled else None
    ours, theirs = generate.both_sides(model, twin, batch_size, options, bench.device, decoder)
    written = batch_size * options.max_new_tokens
    speed = writing_speed(bench, ours, written)
    middle = options.prompt_length + options.max_new_tokens // 2
    read = generate.bytes_per_step(
        model.config, capacity if decoder else middle, bench.dtype, batch_size
    )
    more = {"took": time.monotonic() - began, **bench.share(speed / batch_size * read, COPY)}
    peer_name, peer = "generate, static cache" if decoder else "generate", None
    if twin and decoder:
        yield beside(name, speed, "tokens/s", peer_name, None, "to follow", **more)
    if twin:
        peer, why_not = attempt(lambda: writing_speed(bench, theirs, written))
    yield beside(name, speed, "tokens/s", peer_name, peer, why_not, **more)


def scoring(bench, size):
    """IFD of rows a second, next to the reference way, which scores fewer of them."""
    shape, sizes = bench.sizes[size], bench.sizes
    model = random_model(shape, None, bench.dtype, bench.device)
    options = score.parse_options(
        [
            "--num_rows",
            str(sizes["scored"]),
            "--reference_rows",
            str(sizes["reference"]),
            "--batch_tokens",
            str(sizes["batch_tokens"]),
            "--workers",
            str(sizes["workers"]),
            "--rounds",
            "1",
        ]
    )
    texts = [
        row["instruction"] + " " + row["input"]
        for row in json.loads((ROOT / "examples/data/train.json").read_text(encoding="utf-8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(
            json.dumps(
                [
                    {
                        "instruction": " ".join(texts[number : number + 4]),
                        "output": " ".join(texts[number + 4 : number + 12]),
                    }
                    for number in range(sizes["scored"])
                ]
            ),
            encoding="utf-8",
        )
        result = score.compare(
            options,
            model,
            transformers_twin(model, shape),
            dataset.open_rows(str(path), skipped=[]),
            get_template("alpaca", Tokenizer.load(ROOT / "examples/base")),
        )
    ours, theirs = (
        statistics.median(one[0] for one in result["speeds"][side]) for side in ("ours", "theirs")
    )
    per_row = result["tokens"] * forward_operations(model, result["tokens"] / 2)
    yield beside(
        f"{size} scoring",
        ours,
        "rows/s",
        "reference way",
        theirs,
        None,
        tokens_per_row=result["tokens"],
        difference=result["difference"],
        **bench.share(ours * per_row, MATMUL),
    )
