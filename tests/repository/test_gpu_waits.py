"""How often the CPU waits for a GPU: never in an optimizer step, once a token, once a scored batch.

A wait leaves the GPU without work until the CPU has prepared more. No GPU is needed, see
pretend_gpu.py. It also counts the kernels that the CPU launches.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CONFIG
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from pretend_gpu import CUDA, PretendGpu
from run_builder import new_run, training_options
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from minisft.common.errors import UserError
from minisft.data.batching import collate
from minisft.data.encoding import Example
from minisft.generation.generate import generate, generate_steps
from minisft.generation.sampling import Sampling
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.loss import next_token_loss
from minisft.model.quantized import QuantizedLinear
from minisft.model.reward import RewardModel
from minisft.selection.ifd import IfdScorer
from minisft.selection.passes import Pass
from minisft.selection.reward_scores import RewardScorer
from minisft.training.low_memory_adamw import LowMemoryAdamW
from minisft.training.metrics import Progress
from minisft.training.objective import NextToken
from minisft.training.preference import DirectPreference, Reward
from minisft.training.reference import FrozenReference


def new_model(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, **fields}))
    model.initialize()
    return model.to(dtype)


def new_reward_model():
    torch.manual_seed(0)
    return RewardModel(ModelConfig.from_dict(CONFIG))


def rows(count, num_texts=1):
    """Rows of 6 to 30 tokens; the second half of every text is supervised."""
    generator = np.random.default_rng(0)
    examples = []
    for number in range(count):
        lengths = [6 + 5 * (number % 4) + text for text in range(num_texts)]
        supervised = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
        ids = generator.integers(3, 128, sum(lengths))
        examples.append(Example(ids, supervised, lengths if num_texts > 1 else None))
    return examples


def quantize(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantizedLinear.from_weight(module.weight, 4))


MISTRAL = {"model_type": "mistral", "sliding_window": 4}
WAYS = {
    "lora": {},
    "full": {"finetuning_type": "full"},
    "qlora": {"quantization_bit": 4},
    "packed": {"packing": True, "bf16": True},
    "packed, window": {"packing": True, "bf16": True},
    "packed, float32": {"packing": True},
    "checkpointed": {"gradient_checkpointing": True, "lora_dropout": 0.1},
    "8-bit": {"finetuning_type": "full", "optim": "adamw_8bit", "pure_bf16": True},
    "dpo": {"stage": "dpo", "dpo_ftx": 0.5},
    "rm": {"stage": "rm"},
}


def kernels_of_a_layer(kernels_of):
    """The operations on the GPU that a second decoder layer adds, as a Counter."""
    counts = kernels_of(2)
    counts.subtract(kernels_of(1))
    return counts


# docs/benchmarks.md states these numbers.
KERNELS = {"lora": 244, "full": 169, "qlora": 370, "checkpointed": 337}


@pytest.mark.parametrize("way", KERNELS)
def test_a_layer_takes_no_more_kernels_than_the_docs_say(way, tmp_path):
    def kernels_of(num_layers):
        flags = {**WAYS[way], "bf16": True, "packing": True}
        options = training_options(output_dir=tmp_path, per_device_train_batch_size=3, **flags)
        is_full = options.finetuning_type == "full"
        dtype = torch.float32 if is_full else torch.bfloat16
        model = new_model(dtype, num_hidden_layers=num_layers)
        if options.quantization_bit:
            quantize(model)
        if not is_full:
            add_lora(model, LoraConfig(rank=2))
        with PretendGpu() as gpu:
            run = new_run(options, gpu.move(model), objective=NextToken(model), device=CUDA)
            for _ in range(2):  # the first allocates moments
                gpu.kernels.clear()
                train.train_step(run, [run.collate(rows(3))])
            return Counter(gpu.kernels)

    counts = kernels_of_a_layer(kernels_of)
    assert 0.9 * KERNELS[way] < sum(counts.values()) <= KERNELS[way], counts


def test_a_layer_takes_fewer_kernels_than_transformers_and_peft():
    """Forward and backward of a padded batch, the same for both."""
    batch = collate(rows(3))

    def ours(num_layers):
        model = new_model(torch.bfloat16, num_hidden_layers=num_layers)
        add_lora(model, LoraConfig(rank=2))
        with PretendGpu() as gpu:
            gpu.move(model.train())
            tensors = [value.to(CUDA) if torch.is_tensor(value) else value for value in batch]
            next_token_loss(model, *tensors)[0].backward()
            return Counter(gpu.kernels)

    def theirs(num_layers):
        config = LlamaConfig(**{**CONFIG, "num_hidden_layers": num_layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model, PeftConfig(r=2, target_modules="all-linear"))
        with PretendGpu() as gpu:
            gpu.move(model.train())
            tokens = batch[0].to(CUDA)
            model(tokens, attention_mask=tokens != 0, labels=tokens)[0].backward()
            return Counter(gpu.kernels)

    counts = [sum(kernels_of_a_layer(side).values()) for side in (ours, theirs)]
    assert counts[0] < counts[1] < 1.2 * counts[0], counts


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_step_never_waits(way, tmp_path, monkeypatch):
    """Two micro-batches and a second step, which has moments. The loss is the CPU's."""
    flags = WAYS[way]
    options = training_options(output_dir=tmp_path, per_device_train_batch_size=3, **flags)
    losses = []
    # Without CUDA there are no random numbers on it.
    monkeypatch.setattr(LowMemoryAdamW, "_generator", lambda *_: torch.Generator())
    for on_gpu in (False, True):
        dtype = torch.bfloat16 if options.bf16 or options.pure_bf16 else torch.float32
        model = new_model(dtype, **(MISTRAL if "window" in way else {}))
        if options.stage == "rm":
            model = new_reward_model()
        if options.quantization_bit:
            quantize(model)
        if options.finetuning_type == "lora":
            add_lora(model, LoraConfig(rank=2, dropout=options.lora_dropout))
        reference = FrozenReference(model) if options.stage == "dpo" else None
        with PretendGpu() as gpu:
            if on_gpu:
                gpu.move(nn.ModuleList([model, reference.model] if reference else [model]))
            objective = NextToken(model)
            if reference:
                objective = DirectPreference(model, reference, sft_weight=options.dpo_ftx)
            if options.stage == "rm":
                objective = Reward(model)
            run = new_run(options, model, objective=objective, device=CUDA if on_gpu else "cpu")
            gpu.waits.clear()  # what comes before the first step may wait
            examples = rows(6, num_texts=2 if options.stage in ("dpo", "rm") else 1)
            for _ in range(2):
                batches = [run.collate(part) for part in (examples[:3], examples[3:])]
                result = train.train_step(run, batches)
                run.progress.add(result.sums, result.count, 1)
                run.progress.add_gradient(result.grad_norm, result.failed)
            assert gpu.waits == [], way
            losses.append(float(result.sums["loss"]))
            assert bool(gpu.waits) == on_gpu  # this did wait: the test would see it
    if not options.lora_dropout:
        assert losses[1] == pytest.approx(losses[0], rel=2e-2 if options.bf16 else 1e-4)


def test_a_failed_step_is_found_before_anything_is_written(tmp_path):
    with PretendGpu():
        progress = Progress(9, tmp_path / "metrics.jsonl", CUDA)
        for norm in (1.0, float("nan"), 1.0):
            progress.add({"loss": 1.0}, 1, 1)
            norm = torch.tensor(norm, device=CUDA)
            progress.add_gradient(norm, ~norm.isfinite())
        with pytest.raises(UserError, match="^step 2: the gradient norm is nan. No later step"):
            progress.state()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(5, greedy=True), Sampling(5, seed=1, repetition_penalty=1.2)],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [9]]], ids=["one", "padded"])
def test_decoding_waits_once_a_token(prompts, sampling):
    expected = generate(new_model(), prompts, sampling)
    with PretendGpu() as gpu:
        model, answers, waits = gpu.move(new_model()), [], []
        for step in generate_steps(model, prompts, sampling, ()):
            answers.append(step.tokens)
            waits.append(len(gpu.waits))
    assert [list(row) for row in zip(*answers, strict=True)] == expected
    assert np.diff([0, *waits]).tolist() == [2, 1, 1, 1, 1], gpu.waits  # the first checks logits


class Template:
    """All that a scorer needs of a template to compute."""

    name = "-"

    def encode_marker(self):
        return [1]


@pytest.mark.parametrize("pooling", ["mean", "weighted"])
def test_scoring_waits_once_a_batch(pooling):
    scorer = IfdScorer(Template(), parts=("ifd", "embed"), pooling=pooling)
    prefix = np.arange(3, 23)  # shared by all rows
    passes = [
        Pass(np.append(prefix, row.ids), np.append(prefix < 0, row.supervised), 20, 24)
        for row in rows(4)
    ]
    expected = scorer.compute(new_model(), passes)
    with PretendGpu() as gpu:
        results = scorer.compute(gpu.move(new_model()), passes)
    assert len(gpu.waits) == 1, gpu.waits
    for result, other in zip(results, expected, strict=True):
        assert result.answer_loss == pytest.approx(other.answer_loss, rel=1e-5)
        assert result.prompt_loss == pytest.approx(other.prompt_loss, rel=1e-5)
        np.testing.assert_allclose(result.embedding, other.embedding, rtol=1e-4, atol=1e-5)


def test_rewards_wait_once_a_batch():
    scorer = RewardScorer(Template())
    passes = [Pass(row.ids, row.supervised) for row in rows(4)]
    expected = scorer.compute(new_reward_model(), passes)
    with PretendGpu() as gpu:
        model = gpu.move(new_reward_model())
        assert scorer.compute(model, passes) == pytest.approx(expected, rel=1e-4)
    assert len(gpu.waits) == 1, gpu.waits
