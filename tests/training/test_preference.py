"""Stages rm and dpo against trl's trainers, transformers and peft; through the scripts."""

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from conftest import CONFIG, as_flags, command
from run_builder import new_run, training_options
from safetensors.torch import load_file

import score
import train
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.reward_models import choose_padding, load_reward_model
from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.data import batching, encoding
from minisft.data.build_batches import first_examples
from minisft.data.encode_report import EncodeReport
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.lora_tools import frozen_copy
from minisft.model.reward import RewardModel
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training import preference, reference
from minisft.training.build import load_trainable
from minisft.training.data import load_data
from minisft.training.objective import mean_metrics
from minisft.training.reference import FrozenReference

STEPS, ROWS_PER_STEP = 8, 6
PAD = 0  # no row of these tests has it


def ragged_rows(count, answers=2, seed=0):
    """Rows of random tokens: a prompt, and `answers` answers, of all lengths."""
    generator, examples = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, texts = generator.integers(3, 120, generator.integers(1, 15)), []
        for _ in range(answers):
            answer = generator.integers(3, 120, generator.integers(2, 20))
            texts.append(
                encoding.Example(
                    np.append(prompt, answer).astype(np.int32),
                    np.arange(len(prompt) + len(answer)) >= len(prompt),
                )
            )
        examples.append(
            encoding.Example(
                np.concatenate([text.ids for text in texts]),
                np.concatenate([text.supervised for text in texts]),
                [len(text.ids) for text in texts],
            )
        )
    return examples


def already_encoded(examples):
    return batching.Batches(examples, lambda chosen: (chosen, EncodeReport()))


def metrics_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl")


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


def parsed(base, *flags):
    return train.parse_options(
        [
            str(word)
            for word in (
                "--model_name_or_path",
                base,
                "--dataset",
                "-",
                "--output_dir",
                base.parent,
                "--dtype",
                "float32",
                "--logging_steps",
                1,
                *flags,
            )
        ]
    )


# Against trl


class OnOurBatches:
    """A mix-in for trl's trainers: each step gets the rows of our loop."""

    batches = None

    def get_train_dataloader(self):
        return self.batches


class TheirDPO(OnOurBatches, trl.DPOTrainer):
    pass


class TheirReward(OnOurBatches, trl.RewardTrainer):
    pass


def their_rows(examples):
    """Examples as trl's collators take them."""
    rows = []
    for example in examples:
        chosen, rejected = example.texts()
        prompt = int((~chosen.supervised).sum())
        rows.append(
            {
                "prompt_ids": chosen.ids[:prompt].tolist(),
                "chosen_ids": chosen.ids[prompt:].tolist(),
                "rejected_ids": rejected.ids[prompt:].tolist(),
            }
        )
    return rows


def their_log(stage, model, reference, options, examples, tokenizer_dir, loss):
    """The log of trl's trainer for every step on the rows of our steps."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_dir / "tokenizer.json"), pad_token="<s>", eos_token="</s>"
    )
    assert tokenizer.pad_token_id == PAD
    accumulation, size = options.gradient_accumulation_steps, options.per_device_train_batch_size
    shared = dict(
        output_dir=f"{options.output_dir}/theirs",
        max_steps=STEPS,
        logging_steps=1,
        report_to=[],
        gradient_accumulation_steps=accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        weight_decay=0.0,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
    )
    if stage == "dpo":
        some = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
        trainer = TheirDPO(
            model,
            reference,
            trl.DPOConfig(**shared, **loss),
            train_dataset=some,
            processing_class=tokenizer,
        )
    else:
        some = datasets.Dataset.from_list([{"chosen_ids": [5], "rejected_ids": [6]}])
        trainer = TheirReward(
            model, trl.RewardConfig(**shared), train_dataset=some, processing_class=tokenizer
        )
    batches = []
    for step in already_encoded(examples).steps(ROWS_PER_STEP, 0, STEPS):
        for micro in batching.micro_batches(step, size):
            rows = their_rows(micro)
            if stage == "rm":
                rows = [
                    {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
                    for row in rows
                ]
            batches.append(trainer.data_collator(rows))
    trainer.batches = batches
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def start_of(stage, options, base, work):
    """(our model, its LoraConfig, transformers' and peft's model with the same weights)."""
    ours, lora_config = load_trainable(options, base, torch.float32, torch.device("cpu"))
    kind, more = transformers.AutoModelForCausalLM, {}
    if stage == "rm":
        kind, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    if lora_config:
        save_adapter(ours, work / "start", lora_config, base)
        theirs = kind.from_pretrained(base, dtype=torch.float32, **more)
        return (
            ours,
            lora_config,
            peft.PeftModel.from_pretrained(theirs, work / "start", is_trainable=True),
        )
    save_model(ours, work / "start")
    return ours, None, kind.from_pretrained(work / "start", dtype=torch.float32)


CASES = {  # our flags, trl's arguments
    "dpo lora, accumulation": (["--per_device_train_batch_size", 2], {}),
    "dpo full, precomputed": (
        as_flags(
            finetuning_type="full",
            per_device_train_batch_size=3,
            precompute_reference=True,
            dpo_beta=0.3,
        ),
        {"beta": 0.3},
    ),
    # On a batch of one, the sorted loss is that of the pair, as label smoothing is defined here.
    "dpo lora, smoothing": (
        ["--per_device_train_batch_size", 1, "--dpo_label_smoothing", 0.2],
        {"loss_type": ["aot"], "label_smoothing": 0.2},
    ),
    # A mean over the tokens of a batch, which here is the whole step.
    "dpo full, SFT term": (
        ["--finetuning_type", "full", "--per_device_train_batch_size", 6, "--dpo_ftx", 0.5],
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    "rm lora, accumulation": (["--per_device_train_batch_size", 2], {}),
    "rm full": (["--finetuning_type", "full", "--per_device_train_batch_size", 3], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_trl(case, base, tiny_tokenizer_dir, tmp_path):
    """Losses, accuracies, margins, rewards, gradient norms and final weights of eight steps."""
    flags, loss = CASES[case]
    stage, size = case[:3].strip(), int(flags[flags.index("--per_device_train_batch_size") + 1])
    options = parsed(
        base,
        "--stage",
        stage,
        "--max_steps",
        STEPS,
        "--learning_rate",
        5e-3,
        "--warmup_steps",
        2,
        "--gradient_accumulation_steps",
        ROWS_PER_STEP // size,
        *flags,
    )
    examples = ragged_rows(STEPS * ROWS_PER_STEP)
    ours, lora_config, theirs = start_of(stage, options, base, tmp_path)
    their_reference = None if lora_config else copy.deepcopy(theirs)
    expected = their_log(
        stage, theirs, their_reference, options, examples, tiny_tokenizer_dir, loss
    )

    batches, autocast = already_encoded(examples), torch.autocast("cpu", enabled=False)
    objective = train.build_objective(options, ours, batches, None, autocast)
    run = new_run(options, ours, lora_config, len(examples), objective)
    train.train(run, batches)
    names = {"loss": "loss", "grad_norm": "grad_norm", "accuracy": "accuracy", "margin": "margin"}
    if stage == "dpo":
        names |= {
            "accuracy": "rewards/accuracies",
            "margin": "rewards/margins",
            "reward_chosen": "rewards/chosen",
            "reward_rejected": "rewards/rejected",
        }
    found = metrics_of(tmp_path)
    assert len(found) == len(expected) == STEPS
    for name, theirs_name in names.items():
        tolerance = {"rtol": 1e-3} if name == "grad_norm" else {"rtol": 0, "atol": 1e-4}
        np.testing.assert_allclose(
            [row[name] for row in found],
            [row[theirs_name] for row in expected],
            err_msg=name,
            **tolerance,
        )
    assert len({row["loss"] for row in found}) >= STEPS - 1  # the rate of the first step is 0
    final = {
        name.replace(".default", "")
        .replace(".modules_to_save", "")
        .removeprefix("base_model.model."): value
        for name, value in theirs.state_dict().items()
    }
    trained = {name: value for name, value in ours.named_parameters() if value.requires_grad}
    assert ("score.weight" in trained) == (stage == "rm")
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, final[name], rtol=0, atol=2e-4)


# The loss


# The angles of a text longer than 8 tokens depend on its length.
STRETCHED = {
    **CONFIG,
    "max_position_embeddings": 8,
    "rope_scaling": {"rope_type": "dynamic", "factor": 8.0},
}


def new_objective(config=CONFIG, **settings):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(config))
    model.initialize()
    objective = preference.DirectPreference(model, FrozenReference(model), **settings)
    with torch.no_grad():  # like a model after some training
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return objective


def new_reward_objective(config=CONFIG):
    torch.manual_seed(0)
    model = RewardModel(ModelConfig.from_dict(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return preference.Reward(model)


def step_of(objective, examples, batch_size):
    """(figures, gradients) of one step in micro-batches."""
    batches = [
        objective.collate(examples[start : start + batch_size])
        for start in range(0, len(examples), batch_size)
    ]
    count, means = objective.count(batches), {}
    for batch in batches:
        sums = objective.sums(objective.model, batch)
        (sums["loss"] / count).backward()
        means = {name: means.get(name, 0) + value.item() / count for name, value in sums.items()}
    return means, [parameter.grad for parameter in objective.model.parameters()]


@pytest.mark.parametrize(
    "new",
    [
        lambda: new_objective(sft_weight=0.7, label_smoothing=0.1),
        lambda: new_objective(STRETCHED),
        new_reward_objective,
        lambda: new_reward_objective(STRETCHED),
    ],
)
def test_the_split_changes_nothing(new):
    """Rows of two and of three answers, 8 x 1, 3 x 3 and 1 x 8; the evaluation agrees."""
    examples = ragged_rows(5) + ragged_rows(3, answers=3, seed=1)
    expected, gradients = step_of(new(), examples, 8)
    for batch_size in (3, 1):
        figures, others = step_of(new(), examples, batch_size)
        assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    objective = new()
    evaluated = mean_metrics(objective, examples, 3, objective.collate, torch.device("cpu"))
    assert evaluated == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_several_answers_are_all_their_pairs():
    """A row of three weighs as much as one of two, and is the mean over best, middle and worst."""
    objective = new_reward_objective()
    three, two = ragged_rows(1, answers=3), ragged_rows(1, seed=1)
    figures, _ = step_of(objective, three + two, 2)
    rewards = []
    for text in three[0].texts() + two[0].texts():
        tokens = torch.from_numpy(text.ids.astype(np.int64))[None]
        rewards.append(objective.model.rewards(objective.model(tokens)[0, -1]).item())
    losses = [
        -math.log(1 / (1 + math.exp(rewards[worse] - rewards[better])))
        for better, worse in ((0, 1), (0, 2), (1, 2), (3, 4))
    ]
    assert figures["loss"] == pytest.approx((sum(losses[:3]) / 3 + losses[3]) / 2, rel=1e-5)


def test_logits_of_answers_only_and_in_chunks(monkeypatch):
    from minisft.model import loss

    monkeypatch.setattr(loss, "chunk_size", lambda vocab_size: 16)
    examples, held = ragged_rows(6), []
    objective = new_objective()
    logits = objective.model.logits
    objective.model.logits = lambda hidden: held.append(len(hidden)) or logits(hidden)
    batch = objective.collate(examples)
    objective.sums(objective.model, batch)
    assert sum(held) == sum(int(example.supervised.sum()) for example in examples)
    assert max(held) <= 16


def test_at_the_start_model_and_reference_agree_in_half_precision():
    """The model still has a gradient: the reference leaves no weights in autocast's cache."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    objective = preference.DirectPreference(model, FrozenReference(model))
    batch = objective.collate(ragged_rows(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.sums(model, batch)
    found["loss"].backward()
    assert found["margin"] == 0 and found["loss"].item() == pytest.approx(4 * math.log(2), 1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_rows_give_exactly_zero():
    for objective in (new_objective(sft_weight=1.0), new_reward_objective()):
        objective.count([objective.collate(ragged_rows(3))])
        found = objective.sums(objective.model, objective.collate([]))
        found["loss"].backward()
        assert all(value == 0 for value in found.values())
        assert all(
            parameter.grad is not None and not parameter.grad.any()
            for parameter in objective.model.parameters()
        )


def test_the_reference_shares_what_is_not_trained():
    """With LoRA nothing is copied and a new adapter is off; a trained adapter is copied."""
    model = new_objective().model
    plain = model.logits(model(torch.arange(3, 20)[None]))
    add_lora(model, LoraConfig(rank=2, modules_to_save=("lm_head",)))
    reference = frozen_copy(model)
    assert not any("lora" in name for name, _ in reference.named_parameters())
    own = {one.data_ptr() for one in model.parameters()}
    copied = [name for name, one in reference.named_parameters() if one.data_ptr() not in own]
    assert copied == ["lm_head.weight"]
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        assert torch.equal(reference.logits(reference(torch.arange(3, 20)[None])), plain)
        reference, plain = frozen_copy(model), model.logits(model(torch.arange(3, 20)[None]))


# Through the scripts


@pytest.fixture
def pairs_file(tmp_path):
    """24 ragged rows, every third with three answers."""
    path = tmp_path / "pairs.jsonl"
    with open(path, "w") as file:
        for number in range(24):
            good, bad = f"yes {number}" * (1 + number % 5), "the cat sat " * (1 + 7 * number % 4)
            row = {
                "instruction": f"Say {number}.",
                "input": "",
                "history": [["Hi", "Ho"]],
                "output": [good, bad, "no"][: 3 if number % 3 == 0 else 2],
            }
            file.write(json.dumps(row) + "\n")
    return path


def words_of(checkpoint, pairs_file, output, *more):
    return [
        *as_flags(
            model_name_or_path=checkpoint,
            dataset=pairs_file,
            template="plain",
            dtype="float32",
            dataloader_num_workers=0,
            learning_rate=2e-3,
            logging_steps=1,
            per_device_train_batch_size=4,
            output_dir=output,
        ),
        *more,
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage", "dpo", "--finetuning_type", "full"],
        ["--stage", "dpo", "--precompute_reference", "--modules_to_save", "lm_head"],
        as_flags(stage="rm", lora_dropout=0.2, quantization_bit=8, gradient_checkpointing=True),
    ],
)
def test_resume_is_exact(flags, checkpoint, pairs_file, tmp_path, here, monkeypatch):
    """The reference is the initial model of the first run, not the model of the checkpoint."""
    flags = [*flags, "--max_steps", 6, "--save_steps", 3]
    here(train, *words_of(checkpoint, pairs_file, tmp_path / "whole", *flags))
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    for name in ("metrics.jsonl", "options.toml"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    monkeypatch.setattr(reference, "compute_log_probs", None)  # nor is it computed again
    said = here(
        train,
        *words_of(
            checkpoint, pairs_file, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "auto"
        ),
    )
    assert ("rows, 24 of them from the checkpoint" in said) == ("--precompute_reference" in flags)
    logs = [
        [{**row, "tokens_per_second": 0} for row in metrics_of(tmp_path / run)]
        for run in ("whole", "resumed")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    name = "model.safetensors" if "full" in flags else "adapter_model.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_reference_precomputed_or_computed_in_each_step(checkpoint, pairs_file, tmp_path, here):
    """--precompute_reference, --quantization_bit and --gradient_checkpointing: equal losses."""
    logs = []
    for number, more in enumerate(([], ["--precompute_reference"], ["--gradient_checkpointing"])):
        said = here(
            train,
            *words_of(
                checkpoint,
                pairs_file,
                tmp_path / str(number),
                "--stage",
                "dpo",
                "--max_steps",
                4,
                "--quantization_bit",
                4,
                "--validation_split",
                4,
                *more,
            ),
        )
        assert ("log-probabilities of 24 rows" in said) == (number == 1)
        logs.append(
            [row.get("loss", row.get("eval_loss")) for row in metrics_of(tmp_path / str(number))]
        )
    np.testing.assert_allclose(logs[1:], [logs[0]] * 2, rtol=1e-5)


def test_a_resumed_run_computes_only_what_is_new(
    checkpoint, pairs_file, tmp_path, here, monkeypatch
):
    """It computes only new evaluation rows, with the initial model. A refused run computes none."""
    words = words_of(
        checkpoint,
        pairs_file,
        tmp_path / "out",
        "--stage",
        "dpo",
        "--max_steps",
        2,
        "--save_steps",
        1,
        "--precompute_reference",
    )
    here(train, *words)
    (tmp_path / "held_out.jsonl").write_text(
        "\n".join(line.replace("Say", "Tell") for line in pairs_file.read_text().splitlines()[:3])
    )
    words += [
        "--resume_from_checkpoint",
        tmp_path / "out/checkpoint-1",
        "--eval_dataset",
        tmp_path / "held_out.jsonl",
    ]
    said = here(train, *words, "--output_dir", tmp_path / "known")
    assert "27 rows, 24 of them from the checkpoint" in said
    words.remove("--precompute_reference")
    here(train, *words, "--output_dir", tmp_path / "along")
    known, along = (metrics_of(tmp_path / name) for name in ("known", "along"))
    assert known[-1]["eval_loss"] == pytest.approx(along[-1]["eval_loss"], rel=1e-5)
    monkeypatch.setattr(reference, "compute_log_probs", None)
    with pytest.raises(UserError, match="seed 42, not 7"):
        here(train, *words, "--output_dir", tmp_path / "no", "--precompute_reference", "--seed", 7)


def test_accuracy_rises_on_held_out_rows(checkpoint, pairs_file, tmp_path, here):
    """The log has the evaluations. An adapter can be trained further."""
    for stage in ("dpo", "rm"):
        said = here(
            train,
            *words_of(
                checkpoint,
                pairs_file,
                tmp_path / stage,
                "--stage",
                stage,
                "--max_steps",
                30,
                "--learning_rate",
                1e-2,
                "--dpo_beta",
                0.2,
            )[: None if stage == "dpo" else -2],
            "--validation_split",
            6,
        )
        log = metrics_of(tmp_path / stage)
        assert log[-1]["eval_accuracy"] > 0.8 and log[-2]["loss"] < 0.3
        assert "evaluation loss" in said and "accuracy" in said and "perplexity" not in said
        here(
            train,
            *words_of(
                checkpoint,
                pairs_file,
                tmp_path / f"{stage}2",
                "--stage",
                stage,
                "--adapter",
                tmp_path / stage,
                "--max_steps",
                1,
            ),
        )
        (again,) = metrics_of(tmp_path / f"{stage}2")
        # dpo: the adapter that training starts from is the new reference.
        assert (
            again["loss"] == pytest.approx(math.log(2), 1e-4)
            if stage == "dpo"
            else (again["loss"] < 0.3)
        )


def test_early_stopping_and_samples(checkpoint, pairs_file, tmp_path, here):
    said = here(
        train,
        *words_of(
            checkpoint,
            pairs_file,
            tmp_path / "out",
            "--stage",
            "dpo",
            "--max_steps",
            40,
            "--learning_rate",
            0.5,
            "--validation_split",
            6,
            "--eval_steps",
            1,
            "--show_samples",
            1,
            "--early_stopping_patience",
            2,
            "--load_best_model_at_end",
        ),
    )
    assert "the last 2 evaluations were no better" in said and "loaded the weights of" in said
    assert metrics_of(tmp_path / "out")[-1]["step"] < 40
    shown = re.findall(r"\[\[(?! and )(.*?)\]\]", said, re.DOTALL)
    assert shown == ["yes 1yes 1</s>", "the cat sat " * 4 + "</s>"]  # row 0 is held out
    places = re.findall(r"\(sample 1, answer (\d of \d), the best first: ", said)
    assert places == ["1 of 2", "2 of 2"]


def test_skip_bad_rows(checkpoint, pairs_file, tmp_path, here):
    with open(pairs_file, "a") as file:
        file.write(json.dumps({"instruction": "a", "output": ["b"]}) + "\n")
    words = words_of(checkpoint, pairs_file, tmp_path / "out", "--stage", "rm", "--max_steps", 1)
    with pytest.raises(UserError, match=r"pairs.jsonl, row 25 \(line 25\): .*--skip_bad_rows"):
        here(train, *words)
    assert "1 broken row left out" in here(train, *words, "--skip_bad_rows")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dpo_beta", "0.2"], "--dpo_beta belongs to --stage dpo"),
        (
            ["--stage", "rm", "--precompute_reference"],
            "--precompute_reference belongs to --stage dpo",
        ),
        (["--stage", "dpo", "--packing"], "--packing contradicts --stage dpo"),
        (["--stage", "rm", "--packing"], "--packing contradicts --stage rm"),
        (
            ["--stage", "dpo", "--finetuning_type", "full", "--train_from_scratch"],
            "contradicts --st",
        ),
        (
            ["--stage", "dpo", "--eval_exact_match", "--validation_split", "3"],
            "belongs to --stage sft",
        ),
        (["--stage", "dpo", "--block_size", "9"], "--block_size belongs to --stage pt"),
        (["--stage", "pt", "--template", "alpaca"], "--template belongs to conversations"),
        (["--stage", "dpo", "--dpo_label_smoothing", "0.5"], "must be below 0.5"),
        (["--stage", "dpo", "--dpo_beta", "0"], "--dpo_beta"),
    ],
)
def test_contradictions(flags, message, base):
    with pytest.raises(UserError, match=message):
        parsed(base, *flags)


# Reward models


def their_rewards(folder, base, texts):
    """The rewards of transformers (and peft) for token ids, as one padded batch and one by one."""
    kind = transformers.AutoModelForSequenceClassification
    if (folder / "adapter_config.json").exists():
        model = kind.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, folder)
    else:
        model = kind.from_pretrained(folder, dtype=torch.float32)
        assert type(model).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        single = [model.eval()(torch.tensor([ids])).logits.item() for ids in texts]
        if (pad := model.config.pad_token_id) is not None:
            width = max(map(len, texts))
            padded = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts])
            assert model(padded).logits[:, 0].tolist() == pytest.approx(single, abs=1e-5)
    return single


@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_a_reward_model_scores_a_file(finetuning_type, checkpoint, pairs_file, tmp_path, here):
    """As transformers and peft score what was saved; select.py chooses by it."""
    here(
        train,
        *words_of(
            checkpoint,
            pairs_file,
            tmp_path / "rm",
            "--stage",
            "rm",
            "--max_steps",
            4,
            "--learning_rate",
            1e-2,
            "--finetuning_type",
            finetuning_type,
        ),
    )
    rows = [
        {"instruction": f"Say {number}.", "output": "the cat " * (1 + number % 7)}
        for number in range(20)
    ]
    rows[3]["output"] *= 100
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    place = ["--model_name_or_path", tmp_path / "rm"]
    if finetuning_type == "lora":
        place = ["--model_name_or_path", checkpoint, "--adapter", tmp_path / "rm"]
    shared = ["--dataset", tmp_path / "rows.json", "--output", tmp_path / "s.jsonl"]
    said = here(score, *place, *shared, mode="reward", dtype="float32", dataloader_num_workers=0)
    assert "template plain" in said and "not scored 1: longer than cutoff_len (now " in said
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(20)) and lines[3]["reward"] is None
    template = get_template("plain", Tokenizer.load(checkpoint))
    texts = [
        template.encode(
            [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        )[0].ids
        for row in rows
        if len(row["output"]) < 100
    ]
    expected = their_rewards(tmp_path / "rm", checkpoint, texts)
    found = [line["reward"] for line in lines if line["reason"] is None]
    assert found == pytest.approx(expected, abs=1e-5) and max(found) - min(found) > 1e-2

    for flags, message in (
        ([*place, *shared, "--mode", "ifd"], "reward model|another kind of scores"),
        (
            ["--model_name_or_path", checkpoint, *shared, "--mode", "reward"],
            "is not a reward model",
        ),
    ):
        with pytest.raises(UserError, match=message):
            here(score, *flags)
    with pytest.raises(UserError, match="it is a reward model"):
        load_adapter(load_model(place[1]), tmp_path / "rm")  # as chat.py and the others do
    done = command(
        *shared[:2],
        scores=tmp_path / "s.jsonl",
        strategy="reward",
        sample_number=5,
        output=tmp_path / "best.json",
        script="select.py",
    )
    assert done.returncode == 0, done.stderr
    best = sorted(sorted(range(20), key=lambda row: -(lines[row]["reward"] or -99))[:5])
    assert json.loads((tmp_path / "best.json").read_text()) == [rows[row] for row in best]
    done = command(
        *shared[:2],
        scores=tmp_path / "s.jsonl",
        strategy="ifd",
        sample_number=5,
        output=tmp_path / "more.json",
        script="select.py",
    )
    assert done.returncode == 2 and "has no ifd: score.py --mode ifd computes it" in done.stderr


def test_a_reward_model_is_trained_further(checkpoint, pairs_file, tmp_path, here):
    """A folder with a head keeps it; in half precision the loss stays finite."""
    words = ["--stage", "rm", "--finetuning_type", "full", "--max_steps", 2]
    here(train, *words_of(checkpoint, pairs_file, tmp_path / "first", *words))
    head = load_reward_model(tmp_path / "first").score.weight
    assert torch.equal(head, load_file(tmp_path / "first/model.safetensors")["score.weight"])
    here(
        train,
        *words_of(
            tmp_path / "first",
            pairs_file,
            tmp_path / "second",
            *words,
            "--learning_rate",
            1e-9,
            "--dtype",
            "bfloat16",
        ),
    )
    torch.testing.assert_close(load_reward_model(tmp_path / "second").score.weight, head)
    assert np.isfinite([row["loss"] for row in metrics_of(tmp_path / "second")]).all()
    with pytest.raises(UserError, match="it is a reward model"):
        load_model(tmp_path / "first")


def test_the_reference_has_no_dropout():
    """Also if it has an adapter with dropout and was copied in training mode."""
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    add_lora(model, LoraConfig(dropout=0.5))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    reference, tokens = frozen_copy(model.train()), torch.arange(3, 20)[None]
    assert torch.equal(reference(tokens), reference(tokens))
    assert not torch.equal(model(tokens), model(tokens))


def test_a_reward_model_is_not_padded_with_what_ends_conversations():
    """Otherwise transformers would take a token before the end for the last one."""
    for ends, padding in (({7}, 1), ({2}, 7), ({1, 7}, None)):
        model = RewardModel(ModelConfig.from_dict({**CONFIG, "bos_token_id": 1, "pad_token_id": 7}))
        choose_padding(model, SimpleNamespace(bos_token_id=1), ends)
        assert model.config.original["pad_token_id"] == padding


def loaded(checkpoint, answers, stage, *flags):
    """(the Examples of rows with these lists of answers, the log before training)."""
    path, said = checkpoint / "rows.json", []
    path.write_text(json.dumps([{"instruction": "Hi", "output": one} for one in answers]))
    options = training_options(*flags, model_name_or_path=checkpoint, dataset=path, stage=stage)
    tokenizer = Tokenizer.load(checkpoint)
    batches, _ = load_data(
        options,
        tokenizer,
        get_template("plain", tokenizer),
        ModelConfig.load(checkpoint),
        said.append,
    )
    return first_examples(batches, 99), said


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_equal_answers_are_left_out(stage, checkpoint):
    """The log counts them; a repeated answer counts once, at its first rank."""
    answers = [["yes", "no"], ["yes", "yes"], ["a", "b", "a"], ["a", "b", "b", "c"], ["no"] * 3]
    examples, said = loaded(checkpoint, answers, stage)
    expected, nothing = loaded(checkpoint, [["yes", "no"], ["a", "b"], ["a", "b", "c"]], stage)
    assert [one.lengths for one in examples] == [one.lengths for one in expected]
    for one, other in zip(examples, expected, strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(
            one.supervised, other.supervised
        )
    assert (
        said
        == [
            "a sample of 5 rows: 2 of 5 rows left out: their answers are the same",
            "3 of 5 rows have something to learn; epochs, steps and progress count these",
        ]
        and nothing == []
    )
    with pytest.raises(UserError, match="no training row is usable: 2 of 2 rows left out: their"):
        loaded(checkpoint, [["yes", "yes"], ["no", "no"]], stage)


def test_answers_that_the_limit_makes_equal(checkpoint):
    """If a pair differs only after the limit, --stage dpo would see one text twice."""
    answers = [["yes " * 60 + "so", "yes " * 60 + "no"], ["yes", "no"]]
    examples, said = loaded(checkpoint, answers, "dpo", "--cutoff_len", "40")
    assert len(examples) == 1 and said[0].startswith(
        "a sample of 2 rows at --cutoff_len 40: 1 of 2 rows (50%) truncated"
    )
    assert said[0].endswith("; 1 of 2 rows left out: their answers are the same")


@pytest.mark.parametrize(
    ("stage", "kept", "told"),
    [("dpo", 2, "1 of 2 rows (50%) truncated"), ("rm", 1, "1 of 2 rows left out: longer")],
)
def test_only_a_reward_needs_whole_conversations(stage, kept, told, checkpoint):
    """The beginning of a truncated answer can be learned, but it is not the answer that was judged.

    The log counts these rows before training.
    """
    examples, said = loaded(
        checkpoint, [["yes", "no"], ["yes " * 60, "no"]], stage, "--cutoff_len", "40"
    )
    assert len(examples) == kept
    assert told in said[0] and "at --cutoff_len 40: " in said[0]
