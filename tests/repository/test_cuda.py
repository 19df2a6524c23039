"""On a GPU: the same numbers as on the CPU, up to rounding. Skipped without a GPU.

GPU time is short, so the whole file takes less than 90 seconds: training runs in this process,
where CUDA is initialised once, and tests that compile come last.
"""

import copy
import json
import threading
from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import CONFIG, as_flags, command
from safetensors.torch import load_file

import train
from minisft.common.metric_lines import read_metrics
from minisft.data.batching import collate, pack
from minisft.data.encoding import Example
from minisft.generation.compiled import CompiledDecoder
from minisft.generation.generate import Sampling, generate, stream
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.loss import next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


ALIBI = {"model_type": "baichuan", "num_key_value_heads": None}


@pytest.fixture(params=[{}, ALIBI], ids=["llama", "alibi"])
def models(request):
    """The same random model on the CPU and on the GPU, both in float32."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG | request.param))
    model.initialize()
    add_lora(model, LoraConfig(rank=4))
    torch.backends.cuda.matmul.allow_tf32 = False
    return model, copy.deepcopy(model).cuda()


def batch(device):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG["vocab_size"], (3, 40), generator=generator)
    return tokens.to(device), (torch.arange(40) > 10).expand(3, 40).to(device)


def test_loss_and_gradients(models):
    results = []
    for model in models:
        device = next(model.parameters()).device
        loss, _ = next_token_loss(model, *batch(device))
        loss.backward()
        grads = {
            name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None
        }
        results.append((loss.item(), grads))
    (cpu_loss, cpu_grads), (gpu_loss, gpu_grads) = results
    assert abs(cpu_loss - gpu_loss) < 1e-4 * cpu_loss
    for name, grad in cpu_grads.items():
        torch.testing.assert_close(gpu_grads[name], grad, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast_is_close(models):
    _, model = models
    exact, _ = next_token_loss(model, *batch("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = next_token_loss(model, *batch("cuda"))
    assert abs(exact - rounded) < 0.02 * exact


def test_generates_the_same(models):
    prompts = [[1, 5, 9], [1, 7, 8, 9, 10, 11], [1]]
    sampling = Sampling(max_new_tokens=20, greedy=True)
    cpu, gpu = (generate(model.eval(), prompts, sampling, {2}) for model in models)
    assert cpu == gpu


RUN = as_flags(
    template="plain",
    per_device_train_batch_size=2,
    learning_rate=5e-3,
    logging_steps=1,
    max_steps=8,
    device="cuda",
    dataloader_num_workers=0,
)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_resumes_exactly(checkpoint, rows_file, here, tmp_path):
    """Dropout's random state on the GPU is saved too. A new process resumes, with workers."""
    flags = [
        "--model_name_or_path",
        checkpoint,
        "--dataset",
        rows_file,
        *RUN,
        "--lora_dropout",
        0.2,
    ]
    here(train, *flags, "--output_dir", tmp_path / "whole")
    flags += ["--output_dir", tmp_path / "parts", "--save_steps", 3]
    here(train, *flags)
    done = command(
        *flags,
        "--dataloader_num_workers",
        2,
        "--resume_from_checkpoint",
        tmp_path / "parts/checkpoint-3",
        "--overwrite_output_dir",
    )
    assert done.returncode == 0, done.stderr
    parts = adapter(tmp_path / "parts")
    for name, value in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def losses_of(here, *flags, output_dir):
    """Train in this process -> the loss of every step."""
    here(train, *flags, *RUN, "--output_dir", output_dir)
    return [row["loss"] for row in read_metrics(output_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--packing"],
        ["--gradient_checkpointing"],
        ["--bf16"],
        ["--fp16"],
        ["--quantization_bit", 4],
        ["--quantization_bit", 8],
        ["--finetuning_type", "full"],
        ["--finetuning_type", "full", "--optim", "adamw_8bit", "--pure_bf16"],
    ],
)
def test_every_way_to_train_learns(extra, checkpoint, rows_file, here, tmp_path):
    losses = losses_of(
        here,
        "--model_name_or_path",
        checkpoint,
        "--dataset",
        rows_file,
        *extra,
        output_dir=tmp_path / "out",
    )
    assert losses[-1] < losses[0]


def test_packed_loss_is_the_padded_one(models):
    _, model = models
    draw = np.random.default_rng(0)
    examples = [
        Example(draw.integers(0, CONFIG["vocab_size"], length), np.arange(length) > 3)
        for length in (9, 30, 17)
    ]
    padded, count = next_token_loss(model, *collate(examples, "cuda"))
    packed, packed_count = next_token_loss(model, *pack(examples, "cuda"))
    assert count == packed_count
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=0)
    with torch.autocast("cuda", torch.bfloat16):  # by the kernel for rows of any lengths
        rounded, _ = next_token_loss(model, *pack(examples, "cuda"))
    rounded.backward()
    assert abs(padded - rounded) < 0.02 * padded
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize(
    "extra",
    [
        ["--stage", "dpo", "--finetuning_type", "full"],
        ["--stage", "dpo", "--bf16"],
        ["--stage", "dpo", "--precompute_reference", "--quantization_bit", 4, "--fp16"],
        ["--stage", "rm", "--bf16"],
        ["--stage", "rm", "--finetuning_type", "full"],
    ],
)
def test_every_way_to_prefer_learns(extra, checkpoint, here, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"prompt": f"Say {number}.", "chosen": f"yes {number}", "rejected": "the cat sat"}
            )
            + "\n"
            for number in range(16)
        )
    )
    losses = losses_of(
        here,
        "--model_name_or_path",
        checkpoint,
        "--dataset",
        path,
        *extra,
        output_dir=tmp_path / "out",
    )
    log = read_metrics(tmp_path / "out/metrics.jsonl")
    assert losses[-1] < losses[0] and log[-1]["accuracy"] > 0.8


def assert_compiled_layers_learn_the_same(here, checkpoint, rows_file, folder, *extra):
    torch._dynamo.reset()  # a process compiles a function only a few times
    flags = ["--model_name_or_path", checkpoint, "--dataset", rows_file, *extra]
    plain = losses_of(here, *flags, output_dir=folder / "plain")
    compiled = losses_of(here, *flags, "--compile", output_dir=folder / "compiled")
    assert plain[-1] < plain[0]
    # AdamW turns small differences into steps of full size, so they grow from step to step.
    np.testing.assert_allclose(compiled, plain, rtol=0.02)


def test_compiled_packed_rows_learn_the_same(here, checkpoint, rows_file, tmp_path):
    """With the kernel for rows of any lengths, which takes bfloat16."""
    assert_compiled_layers_learn_the_same(
        here, checkpoint, rows_file, tmp_path, "--packing", "--bf16"
    )


@pytest.fixture(scope="module")
def decoder():
    """A compiled step for both ways to sample: compiling takes longer than all else here."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    add_lora(model, LoraConfig(rank=4))
    return CompiledDecoder(model.eval(), 64)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(40, greedy=True), Sampling(40, temperature=1.3, seed=4, repetition_penalty=1.1)],
)
def test_a_compiled_step_as_a_graph_generates_the_same(decoder, sampling):
    """Conversations take turns, each with its own cache and graph, also from another thread."""
    model = decoder.model
    caches = [decoder.new_cache() for _ in range(2)]
    prompts, answers = [[1, 5, 9], [1, 7, 8, 9, 10, 11]], []
    expected = generate(model, prompts, sampling, {2}, rows=[0, 0])

    def answer():
        streams = [
            stream(decoder, ids, sampling, {2}, cache)
            for ids, cache in zip(prompts, caches, strict=True)
        ]
        steps = list(zip_longest(*streams))
        answers.append(
            [[one for one in row if one is not None] for row in zip(*steps, strict=True)]
        )
        for cache in caches:
            cache.truncate(2)  # the next turn continues from there

    for _ in range(2):
        answer()
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    assert answers == [expected] * 3 and all(cache in decoder.graphs for cache in caches)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU here")
def test_a_graph_belongs_to_the_gpu_of_the_model(models):
    """That is not always the current GPU: after --device cuda:1, or on a thread of the web page."""
    model, sampling = models[0].eval().to("cuda:1"), Sampling(20, greedy=True)
    expected = generate(model, [[1, 5, 9]], sampling, {2})
    decoder = CompiledDecoder(model, 64)
    for _ in range(2):
        found = list(stream(decoder, [1, 5, 9], sampling, {2}, decoder.new_cache()))
        assert found == expected[0]


def test_compiled_padded_rows_learn_the_same(here, checkpoint, rows_file, tmp_path):
    assert_compiled_layers_learn_the_same(here, checkpoint, rows_file, tmp_path)
