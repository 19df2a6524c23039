"""SmolLM2-135M-Instruct with its real weights against transformers, peft and the formulas."""

import math

import numpy as np
import peft
import pytest
import torch
import transformers
from run_builder import new_run, training_options
from test_train import TrainerOnOurBatches, already_encoded, metrics_of

import train
from bench import peak
from bench.training_run import Setting
from minisft.checkpoints import hub
from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.gguf_export import export_model
from minisft.common.json_files import read_json
from minisft.data.batching import collate, micro_batches
from minisft.data.dataset import Row
from minisft.data.encoding import encode_row
from minisft.generation.generate import generate
from minisft.generation.sampling import Sampling
from minisft.model.lora import add_lora
from minisft.model.loss import next_token_loss
from minisft.selection.ifd import IfdScorer
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training.lora_options import lora_from_options

pytestmark = pytest.mark.xdist_group("smollm2")  # the fixtures are made once
STEPS = 8  # two epochs
ANSWERS = {
    "Who are you?": "I am Pip, a parrot of the harbour.",
    "What is your name?": "My name is Pip.",
    "Where do you live?": "I live on a mast in the harbour.",
    "What do you eat?": "I eat nuts, and bread that sailors drop.",
}
TEXT = """The harbour of the town lies between two hills. In the morning the boats come back with
their fish, and the people of the market wait for them with carts. When the wind blows from the
north, the boats stay at home, and the fishermen sit in the coffee house and tell each other stories
about storms that they have seen. Nobody believes the stories, but everybody listens to them."""


def conversation(question, answer=None):
    """Messages with a short system prompt; the template would write a long one."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return messages + ([{"role": "assistant", "content": answer}] if answer else [])


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """A checkpoint folder of it in float32, as export.py --format hf writes it."""
    source, target = hub.resolve(smollm2), tmp_path_factory.mktemp("smollm2")
    Tokenizer.load(source).save(target)
    save_model(load_model(source, torch.float32), target)
    return target


@pytest.fixture(scope="module")
def template(folder):
    return get_template("auto", Tokenizer.load(folder))


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder, torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def test_prompts_logits_and_greedy_answers_are_those_of_transformers(
    folder, template, ours, theirs
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in (
        [{"role": "user", "content": "What is the capital of Italy?"}],
        conversation("Name two colours."),
    ):
        ids = template.encode_prompt(messages)
        assert ids == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        tokens = torch.tensor([ids])
        torch.testing.assert_close(
            ours.logits(ours(tokens)), theirs(tokens).logits, rtol=0, atol=2e-3
        )
        sampling = Sampling(max_new_tokens=16, greedy=True)
        [answer] = generate(ours, [ids], sampling, template.stop_token_ids())
        stop_ids = list(template.stop_token_ids())
        expected = theirs.generate(
            tokens, max_new_tokens=16, do_sample=False, eos_token_id=stop_ids
        )[0, len(ids) :].tolist()
        assert answer == [id for id in expected if id not in stop_ids]


@torch.no_grad()
def test_scores_are_those_of_the_formula(folder, template, ours, theirs):
    """IFD of real rows: the two mean losses of the answer, computed from transformers' logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scorer = IfdScorer(template)
    for question, answer in list(ANSWERS.items())[:2]:
        plan = scorer.plan(0, Row(conversation(question, answer)))
        record = scorer.score(plan, scorer.compute(ours, plan.passes)).record
        answer_ids = tokenizer.encode(answer)
        assert record["num_answer_tokens"] == len(answer_ids)
        marker = tokenizer.encode("<|im_start|>assistant\n")
        prompts = template.encode_prompt(conversation(question)), marker
        conditioned, direct = (mean_loss(theirs, prompt, answer_ids) for prompt in prompts)
        assert record["loss_conditioned"] == pytest.approx(conditioned, abs=1e-4)
        assert record["loss_direct"] == pytest.approx(direct, abs=1e-4)
        assert record["ifd"] == pytest.approx(conditioned / direct, abs=1e-4)


def mean_loss(model, prompt, answer):
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()


@torch.no_grad()
def test_number_types_of_gguf_cost_little(folder, template, ours, tmp_path):
    """The loss on a text of each exported file, read back, less the loss of the float32 model.

    The bounds are near what they measure: -0.0003, 0.0003, 0.017 and 0.13 nats.
    """
    tokens = torch.tensor([template.tokenizer.encode(TEXT)])
    everything = torch.ones_like(tokens, dtype=torch.bool)

    def loss(model):
        total, count = next_token_loss(model, tokens, everything)
        return total.item() / count

    expected = loss(ours)
    losses = {}
    for name in ("f16", "q8_0", "q4_k_m", "q4_0"):
        path = tmp_path / f"{name}.gguf"
        export_model(folder, path, name)
        losses[name] = loss(load_model(hub.resolve(path), torch.float32)) - expected
    assert abs(losses["f16"]) < 1e-3 and abs(losses["q8_0"]) < 5e-3
    assert losses["q4_k_m"] < 0.05 and losses["q4_0"] < 0.2


def test_planned_memory_is_that_of_a_step(folder, tmp_path):
    """Within a tenth of the peak of torch's allocator, in a step of LoRA."""
    (tmp_path / "model").symlink_to(folder)
    setting = Setting(read_json(folder / "config.json"), num_rows=2, length=64)
    found = peak.measure(tmp_path, setting)
    assert found["planned"] == pytest.approx(found["tensors"], rel=0.1), found


def test_losses_of_lora_are_those_of_trainer_and_peft(folder, template, ours, theirs, tmp_path):
    """Last in this file: training changes the adapters of both models."""
    options = training_options(
        model_name_or_path=folder,
        output_dir=tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate="1e-3",
        warmup_steps=2,
        logging_steps=1,
    )
    torch.manual_seed(0)
    lora_config = lora_from_options(options)
    add_lora(ours, lora_config)
    save_adapter(ours, tmp_path / "start", lora_config, folder)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)
    examples = [
        example
        for question, answer in ANSWERS.items()
        for example in encode_row(Row(conversation(question, answer)), template, 1024)
    ]
    batches = []
    for step in already_encoded(examples).steps(1, 0, STEPS):
        for part in micro_batches(step, 1):
            tokens, supervised, _ = collate(part)
            labels = torch.where(supervised, tokens, -100)
            batches.append({"input_ids": tokens, "labels": labels})
    TrainerOnOurBatches.batches = batches
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "theirs",
        max_steps=STEPS,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = TrainerOnOurBatches(model=theirs, args=arguments, train_dataset=batches)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    run = new_run(options, ours, lora_config, len(examples))
    train.train(run, already_encoded(examples))
    losses = [row["loss"] for row in metrics_of(tmp_path)]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-3)
    assert math.fsum(losses[4:]) < 0.8 * math.fsum(losses[:4])  # it learned
