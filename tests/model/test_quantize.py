"""quantized.py against bitsandbytes: the same bytes, numbers and gradients."""

import csv
import json
import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from conftest import as_flags, command
from safetensors.torch import load_file

import eval as evaluation
import export
import score
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.common.metric_lines import read_metrics
from minisft.model.lora import LoraConfig, add_lora, merge_lora
from minisft.model.loss import next_token_loss
from minisft.model.quantized import (
    NF4_LEVELS,
    QuantizedLinear,
    dequantize_nf4,
    dequantize_rows,
    dynamic_levels,
    in_blocks,
    nf4_pairs,
    quantize_nf4,
    quantize_rows,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 128), (256, 2048), (7, 96), (100, 64), (9, 15)]


def weight_of(shape, dtype):
    torch.manual_seed(shape[0])
    return (torch.randn(shape) * 0.02).to(dtype)


def test_levels_are_the_published_ones():
    assert torch.equal(torch.tensor(NF4_LEVELS), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map())


def reference(packed, state, shape, dtype):
    """The weight that bitsandbytes' packed bytes and state encode: codebook x absmax of the block.

    Written out, because functional.dequantize_4bit depends on the processor. In bitsandbytes 0.50
    the AVX-512 kernel takes absmax[row * (width // 64) + column // 64]; blocks run on over the ends
    of rows, so absmax[(row * width + column) // 64] is right, as its other kernels have it. The two
    agree where the width is a multiple of 64, and not for a weight of (7, 96).
    """
    indices = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()
    absmax = state.state2.code[state.absmax.int()]
    absmax = absmax * state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(absmax)]
    absmax = (absmax + state.offset).repeat_interleave(state.blocksize)[: shape.numel()]
    return (state.code[indices.int()][: shape.numel()] * absmax).view(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_and_values_equal_bitsandbytes(shape, dtype):
    weight = weight_of(shape, dtype)
    packed, scales, nested_scales, mean = quantize_nf4(weight)
    theirs, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(nested_scales, state.state2.absmax) and mean == state.offset
    their_scales = state.absmax.flatten()
    # With their scales the values are theirs bit for bit.
    tables = nf4_pairs(), dynamic_levels()
    values = dequantize_nf4(packed, their_scales, nested_scales, mean, *tables, weight.shape, dtype)
    expected = reference(theirs, state, weight.shape, dtype)
    assert torch.equal(values, expected)
    if shape[1] % 64 == 0:  # where their kernel is right on every processor
        torch.testing.assert_close(functional.dequantize_4bit(theirs, state), expected)
    # A scale differs only where two levels are as near to the step of their look-up table, which
    # has 2**16 entries between -1 and 1.
    largest = in_blocks(weight.float().flatten(), 64).abs().amax(1) - mean
    scaled = largest / nested_scales.repeat_interleave(256)[: len(largest)]
    levels = dynamic_levels()
    ours, others = ((levels[one.int()] - scaled).abs() for one in (scales, their_scales))
    assert (ours <= others).all() and (others - ours).max() < 2**-15
    assert (scales != their_scales).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_bitsandbytes(dtype):
    weight = weight_of((64, 128), dtype)
    steps, largest = quantize_rows(weight)
    their_steps, their_largest, _ = functional.int8_vectorwise_quant(weight.half())
    if dtype == torch.float16:  # the only type that bitsandbytes supports
        assert torch.equal(steps, their_steps)
        torch.testing.assert_close(largest, their_largest.float())
    error = (dequantize_rows(steps, largest, torch.float32) - weight.float()).abs()
    assert (error <= largest[:, None] / 127 * 0.501).all()


def test_layer_equals_linear4bit():
    weight, bias = weight_of((48, 128), torch.float32), torch.randn(48)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 48, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    theirs.bias.data = bias.clone()
    theirs = theirs.to("cpu")
    ours = QuantizedLinear.from_weight(weight, 4, bias)
    results = []
    for layer in (ours, theirs):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        (y * torch.arange(48)).sum().backward()
        results.append((y, x.grad))
    for ours_result, their_result in zip(*results, strict=True):
        torch.testing.assert_close(ours_result, their_result, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_backward_pass_keeps_no_dequantised_weight(bits):
    layer = QuantizedLinear.from_weight(weight_of((64, 128), torch.float32), bits)
    x = torch.randn(3, 128, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert not kept
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 128))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_a_state_dict(bits):
    layer = QuantizedLinear.from_weight(torch.zeros(4, 70), bits)
    assert torch.equal(layer.weight, torch.zeros(4, 70))
    other = QuantizedLinear(70, 4, bits)
    filled = QuantizedLinear.from_weight(weight_of((4, 70), torch.float32), bits)
    other.load_state_dict(filled.state_dict())
    assert torch.equal(other.weight, filled.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_model_computes_with_the_dequantised_weights(bits, checkpoint, tmp_path):
    """Loss, gradients and merged model equal those of a plain model with the dequantised weights.

    The embedding and the output matrix are not quantised.
    """
    quantized, plain = load_model(checkpoint, quantization_bit=bits), load_model(checkpoint)
    names = [
        name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)
    ]
    assert len(names) == 7 * quantized.config.num_hidden_layers
    for name in names:
        plain.get_submodule(name).weight.data = quantized.get_submodule(name).weight
    tokens = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    supervised = torch.ones_like(tokens, dtype=torch.bool)
    results = []
    for model in (quantized, plain):
        torch.manual_seed(3)
        add_lora(model, LoraConfig(rank=4))
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        loss, _ = next_token_loss(model, tokens, supervised)
        loss.backward()
        gradients = [one.grad for one in model.parameters() if one.requires_grad]
        merge_lora(model)
        results.append((loss, gradients, model(tokens)))
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    (loss, gradients, merged), (expected, expected_gradients, expected_merged) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, expected_merged, rtol=1e-4, atol=1e-5)


def test_training_in_four_bits_by_command_line(checkpoint, rows_file, tmp_path):
    """QLoRA learns, and a resumed run ends with the adapter of an uninterrupted run."""
    flags = as_flags(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        quantization_bit=4,
        learning_rate="5e-3",
        logging_steps=1,
        save_steps=3,
        lora_dropout="0.1",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, more in ((whole, ["--max_steps", 6]), (parts, ["--max_steps", 6])):
        done = command(*flags, *more, "--output_dir", folder)
        assert done.returncode == 0, done.stderr
    (parts / "adapter_model.safetensors").unlink()
    done = command(
        *flags, max_steps=6, output_dir=parts, resume_from_checkpoint=parts / "checkpoint-3"
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [row["loss"] for row in read_metrics(whole / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        quantization_bit=4,
        finetuning_type="full",
        output_dir=tmp_path / "no",
    )
    assert done.returncode == 2 and "--quantization_bit belongs to" in done.stderr


@pytest.fixture
def trained(tiny_chat_model_dir, tmp_path):
    """An adapter on some layers, from a run in 4 bits."""
    torch.manual_seed(5)
    model, config = (
        load_model(tiny_chat_model_dir),
        LoraConfig(rank=4, target_modules=("q_proj", "up_proj")),
    )
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, tmp_path / "trained", config, tiny_chat_model_dir)
    (tmp_path / "trained/options.toml").write_text('quantization_bit = 4\ntemplate = "chatml"\n')
    return tmp_path / "trained"


def call(monkeypatch, script, *words):
    """Run the main of a script in this process, which has loaded torch already."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    script.main()


@pytest.fixture
def merged(tiny_chat_model_dir, trained, tmp_path, monkeypatch):
    """The adapter added to the dequantised base, as a plain checkpoint."""
    call(
        monkeypatch,
        export,
        "--model_name_or_path",
        tiny_chat_model_dir,
        "--adapter",
        trained,
        "--quantization_bit",
        4,
        "--output_dir",
        tmp_path / "merged",
    )
    return tmp_path / "merged"


def test_export_merges_into_the_base_that_was_trained_on(
    tiny_chat_model_dir, trained, merged, tmp_path, monkeypatch, capsys
):
    adapted = load_model(tiny_chat_model_dir, quantization_bit=4)
    load_adapter(adapted, trained)
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_model(merged)(tokens), adapted(tokens), rtol=1e-4, atol=1e-5)
    assert "note" not in capsys.readouterr().out
    words = ("--model_name_or_path", tiny_chat_model_dir, "--adapter", trained)
    call(monkeypatch, export, *words, "--output_dir", tmp_path / "full")
    assert "with --quantization_bit 4 both are the same" in capsys.readouterr().out
    full = load_model(tiny_chat_model_dir)
    load_adapter(full, trained)
    torch.testing.assert_close(
        load_model(tmp_path / "full")(tokens), full(tokens), rtol=1e-4, atol=1e-5
    )
    assert (full(tokens) - adapted(tokens)).abs().max() > 0.1
    done = command(
        *words, format="gguf", quantization_bit=4, output=tmp_path / "x.gguf", script="export.py"
    )
    assert done.returncode == 2 and "--quantization_bit; merge by --format hf" in done.stderr


def test_chat_score_and_eval_in_four_bits(
    tiny_chat_model_dir, trained, merged, rows_file, tmp_path, monkeypatch
):
    """A base in 4 bits with its adapter, and the merged model: the same answers and scores."""
    models = {
        "quantized": [tiny_chat_model_dir, "--adapter", trained, "--quantization_bit", 4],
        "merged": [merged],
    }
    (tmp_path / "ceval/val").mkdir(parents=True)
    with open(tmp_path / "ceval/val/law_val.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["id", "question", "A", "B", "C", "D", "answer"],
                [0, "the cat?", "sat", "mat", "hat", "rat", "B"],
            ]
        )
    (tmp_path / "ceval/subject_mapping.json").write_text(
        '{"law": {"name": "法学", "category": "Humanities"}}'
    )
    found = {}
    for name, model in models.items():
        common = ["--model_name_or_path", *model, "--dtype", "float32", "--device", "cpu"]
        done = command(
            *common, "--greedy", "--max_new_tokens", 12, "--prompt", "the cat", script="chat.py"
        )
        assert done.returncode == 0, done.stderr
        call(
            monkeypatch,
            score,
            *common,
            "--dataset",
            rows_file,
            "--dataloader_num_workers",
            0,
            "--output",
            tmp_path / f"{name}.jsonl",
        )
        call(
            monkeypatch,
            evaluation,
            "ceval",
            *common,
            "--data_dir",
            tmp_path / "ceval",
            "--num_fewshot",
            0,
            "--output_dir",
            tmp_path / f"eval-{name}",
        )
        scores = [
            json.loads(line)["ifd"]
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        with open(tmp_path / f"eval-{name}/ceval-val/law.csv", encoding="utf-8") as file:
            letters = [float(row[letter]) for row in csv.DictReader(file) for letter in "ABCD"]
        protocol = json.loads((tmp_path / f"eval-{name}/summary.json").read_text())["protocol"]
        assert ("linear layers in 4 bits" in protocol) == (name == "quantized")
        found[name] = done.stdout, scores, letters
    (answer, scores, letters), (expected, plain_scores, plain_letters) = found.values()
    assert answer == expected
    assert scores == pytest.approx(plain_scores, rel=1e-4)
    assert letters == pytest.approx(plain_letters, rel=1e-4)
