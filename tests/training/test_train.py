"""The training loop against transformers' Trainer with peft, and through the command line."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import CONFIG, as_flags, command
from run_builder import new_run, training_options
from safetensors.torch import load_file, save_file

import train
from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.common.metric_lines import read_metrics
from minisft.data import batching, encoding
from minisft.data.encode_report import EncodeReport
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.training.build import load_trainable

STEPS, BATCH_SIZE, ACCUMULATION = 30, 3, 2


def learnable_examples(count=190):
    """Ragged rows in which every learned token is the one before it plus one."""
    generator, examples = np.random.default_rng(0), []
    for _ in range(count):
        length, start = generator.integers(6, 40), generator.integers(0, 64)
        ids = (start + np.arange(length)).astype(np.int32)
        examples.append(encoding.Example(ids, np.arange(length) >= generator.integers(1, length)))
    return examples


def already_encoded(examples):
    return batching.Batches(examples, lambda chosen: (chosen, EncodeReport()))


def metrics_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl")


class TrainerOnOurBatches(transformers.Trainer):
    batches = None

    def get_train_dataloader(self):
        return self.batches


def trainer_losses(model, options, examples, work):
    """Losses of transformers' Trainer on exactly the batches that our loop forms."""
    batches = []
    for step in already_encoded(examples).steps(BATCH_SIZE * ACCUMULATION, 0, STEPS):
        for micro in batching.micro_batches(step, BATCH_SIZE):
            tokens, supervised, _ = batching.collate(micro)
            labels = torch.where(supervised, tokens, -100)
            batches.append({"input_ids": tokens, "labels": labels})
    arguments = transformers.TrainingArguments(
        output_dir=work / "theirs",
        max_steps=STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        max_grad_norm=options.max_grad_norm,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    TrainerOnOurBatches.batches = batches
    trainer = TrainerOnOurBatches(model=model, args=arguments, train_dataset=batches)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return (
        [entry["loss"] for entry in logged],
        [entry["grad_norm"] for entry in logged],
        [entry["learning_rate"] for entry in logged],
    )


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_losses_equal_trainer(finetuning_type, tmp_path):
    torch.manual_seed(0)
    base = CausalLM(ModelConfig.from_dict(CONFIG))
    base.initialize()
    save_model(base, tmp_path / "base")
    options = training_options(
        model_name_or_path=tmp_path / "base",
        output_dir=tmp_path,
        finetuning_type=finetuning_type,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate="5e-3",
        weight_decay="0.1",
        warmup_steps="3",
        logging_steps="1",
    )
    examples = learnable_examples()
    ours, lora_config = load_trainable(
        options, tmp_path / "base", torch.float32, torch.device("cpu")
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    if lora_config:
        save_adapter(ours, tmp_path / "start", lora_config, tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)

    losses, norms, rates = trainer_losses(theirs, options, examples, tmp_path)
    run = new_run(options, ours, lora_config, len(examples))
    train.train(run, already_encoded(examples))
    metrics = metrics_of(tmp_path)

    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in metrics], losses, rtol=0, atol=1e-4)
    np.testing.assert_allclose([row["grad_norm"] for row in metrics], norms, rtol=1e-3)
    np.testing.assert_allclose([row["learning_rate"] for row in metrics], rates, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.5  # it learned, so the comparison saw real updates
    final = {
        name.replace(".default", "").removeprefix("base_model.model."): value
        for name, value in theirs.state_dict().items()
    }
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, final[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_step_without_rows_changes_nothing(optim, tmp_path):
    """Rows of which nothing is learned are left out, at times all rows of a step."""
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    options = training_options(
        finetuning_type="full", output_dir=tmp_path, optim=optim, weight_decay="0.1"
    )
    run = new_run(options, model)
    rows = learnable_examples(4)
    before = None
    for examples in (rows, []):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        result = train.train_step(run, [run.collate(examples)])
    assert result.count == 0 and all(map(torch.equal, before, model.parameters()))
    run.progress.add(result.sums, result.count, num_tokens=0)
    run.progress.start()
    run.progress.record(epoch=0.1, learning_rate=1e-4)
    assert metrics_of(tmp_path)[0]["loss"] is None
    train.train_step(run, [run.collate(rows)])
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("switches", [[], ["--packing"]])
def test_dynamic_angles_do_not_depend_on_the_batch(switches, tmp_path):
    """The loss of rows within and beyond the trained context, in one micro-batch or alone."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    config = {**CONFIG, "max_position_embeddings": 16, "rope_scaling": scaling}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))
    theirs.save_pretrained(tmp_path)
    run = new_run(
        training_options("--finetuning_type", "full", *switches),
        load_model(tmp_path).requires_grad_(True),
    )
    examples = learnable_examples(6)
    batch = run.collate(examples)
    loss = run.objective.sums(run.wrapped, batch)["loss"] / run.objective.count([batch])
    sums = []
    for example in examples:
        ids, learned = torch.from_numpy(example.ids)[None].long(), example.supervised
        labels = torch.where(torch.from_numpy(learned), ids, -100)
        # A copy, because dynamic angles stay those of the longest text that a model has seen.
        mean = copy.deepcopy(theirs)(input_ids=ids, labels=labels).loss.item()
        sums.append(mean * learned[1:].sum())
    expected = sum(sums) / sum(example.supervised[1:].sum() for example in examples)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_compiled_layers_compute_the_same(tmp_path):
    """--compile pads to other lengths and fuses operations; the losses stay the same."""
    losses = []
    for switches in ([], ["--compile"]):
        torch.manual_seed(0)
        options = training_options(
            *switches,
            finetuning_type="full",
            output_dir=tmp_path,
            max_steps="4",
            learning_rate="5e-3",
            logging_steps="1",
        )
        model = CausalLM(ModelConfig.from_dict(CONFIG))
        model.initialize()
        examples = learnable_examples(32)  # whole batches only, so one shape to compile
        run = new_run(options, model, num_rows=len(examples))
        train.train(run, already_encoded(examples))
        compiled = [layer for layer in model.model.layers if layer._compiled_call_impl]
        assert len(compiled) == (len(model.model.layers) if switches else 0)
        losses.append([row["loss"] for row in metrics_of(tmp_path)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


def test_command_line_run(checkpoint, rows_file, tmp_path):
    """LoRA by command line, from a recipe, twice: equal files; then full."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'template = "alpaca"\nnum_train_epochs = 2\nlearning_rate = 0.005\n'
        "logging_steps = 2\neval_steps = 3\n"
    )
    shared = [
        "--config",
        recipe,
        "--model-name-or-path",
        checkpoint,
        "--dataset",
        rows_file,
        "--validation_split",
        6,
    ]
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        done = command(*shared, "--lora_dropout", 0.1, "--output_dir", output)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in outputs[0].iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "options.toml",
        "tokenizer.json",
    }
    weights = [(output / "adapter_model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]
    metrics = metrics_of(outputs[0])
    logged = [row for row in metrics if "loss" in row]
    assert set(logged[0]) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
    }
    evaluated = [row for row in metrics if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [3, 6]
    assert evaluated[0]["eval_perplexity"] == pytest.approx(np.exp(evaluated[0]["eval_loss"]), 1e-4)
    assert "lora_dropout = 0.1" in (outputs[0] / "options.toml").read_text()

    done = command(*shared, "--output_dir", tmp_path / "full", "--finetuning_type", "full")
    assert done.returncode == 0, done.stderr
    tuned = load_model(tmp_path / "full")
    assert not torch.equal(
        tuned.model.embed_tokens.weight, load_model(checkpoint).model.embed_tokens.weight
    )
    for output in (outputs[0], tmp_path / "full"):  # programs that load it prompt it as in training
        assert "### Response:" in (output / "chat_template.jinja").read_text()
    stops = json.loads((tmp_path / "full" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, 1]

    again = command("--config", outputs[0] / "options.toml", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == weights[0]


def test_data_by_name_by_folder_and_mixed(checkpoint, rows_file, tmp_path):
    """The same rows by every way of naming them, one with workers and one without."""
    folder, info = tmp_path / "rows", tmp_path / "info"
    for path in (folder, info):
        path.mkdir()
    (folder / "a.json").write_bytes(rows_file.read_bytes())
    (info / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "../rows/a.json"}}))
    shared = as_flags(
        model_name_or_path=checkpoint,
        template="plain",
        max_steps=6,
        mix=f"{rows_file}:0.25",
        cutoff_len=12,
    )
    first = command(
        *shared,
        dataset="mine",
        dataset_dir=info,
        eval_dataset="mine",
        dataloader_num_workers=2,
        output_dir=tmp_path / "first",
    )
    assert first.returncode == 0, first.stderr
    assert f"mixed in 8 rows of {rows_file} to 24" in first.stdout and "32 rows" in first.stdout
    assert "truncated, " in first.stdout and "--cutoff_len " in first.stdout
    assert "rows have something to learn" in first.stdout and "epoch 1: " in first.stdout
    second = command(
        *shared,
        train_dir=folder,
        valid_dir=folder,
        dataloader_num_workers=0,
        output_dir=tmp_path / "second",
    )
    assert second.returncode == 0, second.stderr
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recipe_of_a_run_repeats_it(checkpoint, rows_file, tmp_path):
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output_dir=tmp_path / "first",
        max_steps=2,
    )
    assert done.returncode == 0, done.stderr
    again = command(
        "--config", tmp_path / "first" / "options.toml", "--output_dir", tmp_path / "second"
    )
    assert again.returncode == 0, again.stderr
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pretraining(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 50)
    done = command(
        model_name_or_path=checkpoint,
        stage="pt",
        dataset=text,
        block_size=32,
        train_from_scratch=True,
        finetuning_type="full",
        learning_rate=3e-3,
        output_dir=tmp_path / "out",
        logging_steps=1,
        num_train_epochs=15,
    )
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in metrics_of(tmp_path / "out") if "loss" in row]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, checkpoint, rows_file, tmp_path):
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output_dir=tmp_path / "out",
        max_steps=12,
        dtype=dtype,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=1,
    )
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in metrics_of(tmp_path / "out") if "loss" in row]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_a_non_finite_gradient_ends_the_run_and_nothing_is_saved(checkpoint, rows_file, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output_dir=tmp_path / "out",
    )
    assert done.returncode == 2
    assert "gradient" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lora_rnk", "4"], "--lora_rank"),
        (["--template", "nonsense"], "alpaca"),
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--lora_target", "wq"], "q_proj"),
        (["--dataset", "nowhere.json"], "nowhere.json"),
        (["--train_dir", "."], "--train_dir"),
        (["--mix", "rows.json"], "FILE:RATIO"),
        (["--valid_dir", ".", "--validation_split", "3"], "--validation_split"),
        (["--cutoff_len", "3"], "--cutoff_len"),
        (["--bf16", "--dtype", "float16"], "--bf16"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--eval_steps", "5"], "--eval_steps"),
        (["--max_grad_norm", "-1"], "--max_grad_norm"),
        (["--seed", "-1"], "--seed"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--stage", "pt", "--default_system", "x"], "--default_system"),
        (["--lr_end", "1e-5"], "--lr_end"),
        (["--finetuning_type", "full", "--modules_to_save", "lm_head"], "--modules_to_save"),
        (["--model_name_or_path", "/nowhere"], "/nowhere"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_get_one_line(extra, message, checkpoint, rows_file, tmp_path):
    done = command(
        *as_flags(
            model_name_or_path=checkpoint,
            dataset=rows_file,
            template="plain",
            output_dir=tmp_path / "out",
        ),
        *extra,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_output_folder_is_not_overwritten(checkpoint, rows_file, tmp_path):
    keep = tmp_path / "out" / "precious.txt"
    keep.parent.mkdir()
    keep.write_text("data")
    shared = as_flags(
        model_name_or_path=checkpoint, dataset=rows_file, template="plain", max_steps=1
    )
    done = command(*shared, "--output_dir", keep.parent)
    assert done.returncode == 2 and "--overwrite_output_dir" in done.stderr
    assert list(keep.parent.iterdir()) == [keep]
    assert command(*shared, "--output_dir", keep.parent, "--overwrite_output_dir").returncode == 0
    done = command(*shared, "--output_dir", checkpoint, "--overwrite_output_dir")
    assert done.returncode == 2 and "is an input" in done.stderr


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_any_number_of_processes_trains_as_one(finetuning_type, checkpoint, tmp_path):
    """1, 2 and 3 processes on ragged rows with a short last step: equal losses and weights."""
    rows = [
        {"instruction": "go", "output": "the cat sat " * (1 + 7 * number % 11)}
        for number in range(20)
    ]
    path = tmp_path / "ragged.json"
    path.write_text(json.dumps(rows))
    shared = as_flags(
        model_name_or_path=checkpoint,
        dataset=path,
        template="plain",
        finetuning_type=finetuning_type,
        learning_rate=1e-3,
        logging_steps=1,
        num_train_epochs=2,
        validation_split=4,
        dataloader_num_workers=0,
    )
    for processes, batch_size, accumulation in ((1, 6, 1), (2, 1, 3), (3, 2, 1)):
        done = command(
            *shared,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            output_dir=tmp_path / str(processes),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == 1 and "Warning" not in done.stderr
    name = "adapter_model.safetensors" if finetuning_type == "lora" else "model.safetensors"
    metrics, weights = metrics_of(tmp_path / "1"), load_file(tmp_path / "1" / name)
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 7))
    for other in (tmp_path / "2", tmp_path / "3"):
        for first, second in zip(metrics, metrics_of(other), strict=True):
            for figure in set(first) - {"tokens_per_second"}:
                assert first[figure] == pytest.approx(second[figure], rel=1e-4)
        for key, value in load_file(other / name).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)


def test_no_picture_without_matplotlib(checkpoint, rows_file, tmp_path, monkeypatch):
    """--plot_loss then names the missing package and the file with the numbers."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        max_steps=2,
        plot_loss=True,
        output_dir=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "matplotlib" in done.stdout and "metrics.jsonl" in done.stdout
    assert metrics_of(tmp_path / "out")


def test_picture(checkpoint, rows_file, tmp_path):
    done = command(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        max_steps=2,
        plot_loss=True,
        output_dir=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_float16_overflow_skips_the_step(tmp_path):
    """While the loss scale adapts, an overflow changes no weight and does not end the run."""
    options = training_options(output_dir=tmp_path, finetuning_type="full")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize()
    run = new_run(options, model, num_rows=4, dtype=torch.float16)
    run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = model.model.norm.weight.clone()
    batch = batching.collate(learnable_examples(2))
    result = train.train_step(run, [batch])
    assert not result.grad_norm.isfinite() and not result.failed
    assert torch.equal(model.model.norm.weight, before)
    assert run.precision.scaler.get_scale() < 2.0**60


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_packing_by_command_line(checkpoint, rows_file, tmp_path, stage):
    """Packed conversations lose only padding; packed texts no longer see the previous text."""
    data, losses = rows_file, []
    if stage == "pt":
        data = tmp_path / "text.txt"
        data.write_text("once upon a time\nthere was a cat\nit sat\n" * 40, encoding="utf-8")
    flags = (
        ["--template", "plain"]
        if stage == "sft"
        else ["--block_size", 32, "--finetuning_type", "full"]
    )
    for switch in ((), ("--packing",)):
        done = command(
            "--model_name_or_path",
            checkpoint,
            "--dataset",
            data,
            "--stage",
            stage,
            *flags,
            "--max_steps",
            3,
            "--logging_steps",
            1,
            "--learning_rate",
            "1e-3",
            "--output_dir",
            tmp_path / f"out{len(switch)}",
            *switch,
        )
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in metrics_of(tmp_path / f"out{len(switch)}")])
    if stage == "sft":
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    else:
        assert losses[0] != losses[1]
