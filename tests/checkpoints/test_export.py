"""export.py: transformers and peft compute the logits of the trained model from its folders."""

import json

import peft
import pytest
import torch
import transformers
from conftest import command
from safetensors.torch import load_file, save_file

from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.reward_models import load_reward_model
from minisft.model.lora import LoraConfig, add_lora
from minisft.text.template_choice import get_template, trained_template
from minisft.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "the cat?"}]
TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A random adapter for `checkpoint` that has trained the output matrix too."""
    model = load_model(checkpoint)
    config = LoraConfig(rank=4, alpha=8, modules_to_save=("lm_head",))
    add_lora(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter", config, checkpoint)
    return tmp_path / "adapter"


@torch.no_grad()
def adapted_logits(checkpoint, adapter):
    model = load_model(checkpoint)
    load_adapter(model, adapter)
    return model.logits(model(TOKENS))


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_merged_in_transformers(shard, checkpoint, adapter, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    out = tmp_path / "merged"
    done = command(
        model_name_or_path=checkpoint,
        adapter=adapter,
        format="hf",
        max_shard_size=shard,
        output_dir=out,
        script="export.py",
    )
    assert done.returncode == 0, done.stderr
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard == "40KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(TOKENS).logits, adapted_logits(checkpoint, adapter), rtol=1e-5, atol=1e-5
        )
    assert theirs.generation_config.eos_token_id == [2, 3]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert theirs("the cat sat").input_ids == ours("the cat sat").input_ids


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_the_template_of_the_training_is_written(format, checkpoint, adapter, tmp_path):
    """chat.py and other programs prompt the model as in training, not as its base."""
    (checkpoint / "options.toml").write_text('template = "zephyr"\n')
    (adapter / "options.toml").write_text(
        'template = "alpaca"\ndefault_system = "简洁"\nseed = 3\n', encoding="utf-8"
    )
    for words, expected in ((["--adapter", adapter], ("alpaca", "简洁")), ([], ("zephyr", None))):
        if format == "peft" and not words:
            continue
        out = tmp_path / f"out{len(words)}"
        done = command(
            "--model_name_or_path",
            checkpoint,
            *words,
            "--format",
            format,
            "--output_dir",
            out,
            script="export.py",
        )
        assert done.returncode == 0, done.stderr
        assert not (out / "options.toml").exists()  # the run's options are in the model card
        card = (out / "README.md").read_text(encoding="utf-8")
        assert f"| template | {expected[0]} |" in card
        # An adapter is used with the tokenizer of its base.
        tokenizer = Tokenizer.load(checkpoint if format == "peft" else out)
        ours = trained_template("auto", tokenizer, out)
        expected_text = get_template(expected[0], Tokenizer.load(checkpoint), expected[1]).text
        assert ours.text == expected_text
        # Other programs read it from the tokenizer's files.
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        ours = get_template(expected[0], Tokenizer.load(checkpoint), expected[1])
        assert theirs.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False
        ) == ours.encode_prompt(QUESTION)
        if format == "hf":  # config.json's, and the end of the template's answers
            stops = transformers.GenerationConfig.from_pretrained(out).eos_token_id
            assert stops == [2, 1]


def test_template_flags(checkpoint, adapter, tmp_path):
    """The flags replace those of the training, and the exported folder can be exported again."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Thoughts.' if enable_thinking else mood }}{% endif %}"
    )
    (adapter / "options.toml").write_text('template = "alpaca"\nenable_thinking = true\n')
    words = ["--template", path, "--default_system", "Be kind.", "--enable_thinking", "false"]
    words += ["--template_kwargs", '{"mood": "Gladly."}']
    out, again = tmp_path / "out", tmp_path / "again"
    for arguments in (
        ("--model_name_or_path", checkpoint, "--adapter", adapter, "--output_dir", out, *words),
        ("--model_name_or_path", out, "--output_dir", again),
    ):
        done = command(*arguments, script="export.py")
        assert done.returncode == 0, done.stderr
    path.unlink()
    ours = get_template("auto", Tokenizer.load(out))
    text = ours.render(QUESTION, add_generation_prompt=True)
    assert text == "system: Be kind.</s>user: the cat?</s>Gladly."
    for folder in (out, again):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False
        ) == ours.encode_prompt(QUESTION)
    assert Tokenizer.load(again).chat_template == ours.text
    for folder in (out, again):
        assert (
            trained_template("auto", Tokenizer.load(folder), folder).render(
                QUESTION, add_generation_prompt=True
            )
            == text
        )


def test_dtype_of_the_merged_model(checkpoint, adapter, tmp_path):
    for flag, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        out = tmp_path / flag
        done = command(
            model_name_or_path=checkpoint,
            adapter=adapter,
            dtype=flag,
            output_dir=out,
            script="export.py",
        )
        assert done.returncode == 0, done.stderr
        tensors = load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == flag
        model = load_model(checkpoint)
        load_adapter(model, adapter)
        layer = model.model.layers[1].mlp.down_proj
        merged = layer.base_layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], merged.to(dtype))


def test_float32_keeps_weights_with_more_digits_than_the_embedding(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, checkpoint / "model.safetensors")
    words = {"model_name_or_path": checkpoint, "output_dir": tmp_path / "out", "dtype": "float32"}
    done = command(**words, script="export.py")
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[other], tensors[other]) for other in tensors.keys() - {name})


def test_peft_format(checkpoint, adapter, tmp_path):
    done = command(
        model_name_or_path=checkpoint,
        adapter=adapter,
        format="peft",
        output_dir=tmp_path / "out",
        script="export.py",
    )
    assert done.returncode == 0, done.stderr
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(TOKENS).logits, adapted_logits(checkpoint, adapter), rtol=0, atol=1e-6
        )


@pytest.fixture(params=[False, True], ids=["plain", "tied"])
def judge(request, checkpoint, tmp_path):
    """A random adapter that makes a reward model of `checkpoint`."""
    if request.param:
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, checkpoint / "model.safetensors")
        path = checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    model, config = load_reward_model(checkpoint), LoraConfig(rank=4, modules_to_save=("score",))
    add_lora(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "judge", config, checkpoint)
    (tmp_path / "judge/options.toml").write_text('template = "alpaca"\nstage = "rm"\n')
    return tmp_path / "judge"


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_a_reward_model_in_transformers(format, checkpoint, judge, tmp_path):
    """The merged model scores as peft's, also with padding in a batch."""
    kind, out = transformers.AutoModelForSequenceClassification, tmp_path / "out"
    texts = [row[:length].tolist() for row, length in zip(TOKENS + 7, (40, 13), strict=True)]
    texts = [[min(id, 299) for id in text] for text in texts]
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(checkpoint, num_labels=1), judge)
    theirs = theirs.merge_and_unload()
    done = command(
        model_name_or_path=checkpoint,
        adapter=judge,
        format=format,
        output_dir=out,
        script="export.py",
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = [theirs(torch.tensor([text])).logits.item() for text in texts]
        if format == "hf":
            model, told = kind.from_pretrained(out, output_loading_info=True)
            assert type(model).__name__ == "LlamaForSequenceClassification"
            assert not any(told.values()), told
            padding = [model.config.pad_token_id] * 27
            found = model(torch.tensor([texts[0], texts[1] + padding])).logits[:, 0].tolist()
            card = (out / "README.md").read_text()
            assert "| template | alpaca |" in card and "text-classification" in card
            ours = load_reward_model(out)
            rewards = [ours.rewards(ours(torch.tensor([text])))[0, -1].item() for text in texts]
            assert rewards == pytest.approx(expected, abs=1e-5)
        else:
            model = kind.from_pretrained(checkpoint, num_labels=1)
            model = peft.PeftModel.from_pretrained(model, out)
            found = [model(torch.tensor([text])).logits.item() for text in texts]
    assert found == pytest.approx(expected, abs=1e-5) and abs(expected[0] - expected[1]) > 0.01
    place = [out] if format == "hf" else [checkpoint, "--adapter", out]
    done = command(
        "--model_name_or_path",
        *place,
        "--format",
        "gguf",
        "--output",
        tmp_path / "no.gguf",
        script="export.py",
    )
    assert done.returncode == 2 and "it is a reward model" in done.stderr
    assert done.stderr.count("\n") == 1


@torch.no_grad()
def test_a_reward_model_from_peft(checkpoint, judge, tmp_path):
    """peft and trl list "classifier" among modules_to_save, though the model has none."""
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=1
    )
    theirs = peft.PeftModel.from_pretrained(theirs, judge)
    theirs.save_pretrained(tmp_path / "theirs")
    content = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert set(content["modules_to_save"]) == {"classifier", "score"}
    ours = load_reward_model(checkpoint)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(
        ours.rewards(ours(TOKENS[:1]))[:, -1], theirs(TOKENS[:1]).logits[:, 0], rtol=1e-5, atol=1e-5
    )


def test_mistakes_write_nothing(checkpoint, adapter, tmp_path):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    for words, message in (
        (["--output_dir", checkpoint], "is an input"),
        (["--output_dir", adapter, "--overwrite_output_dir"], "is an input"),
        (["--output_dir", tmp_path / "out", "--max_shard_size", "big"], "not a size"),
        (["--output_dir", tmp_path / "out", "--adapter", checkpoint], "adapter_config.json"),
        (["--output_dir", tmp_path / "out", "--template", "lama2"], "unknown template"),
        (
            ["--output_dir", tmp_path / "out", "--format", "peft", "--max_shard_size", "1GB"],
            "does not use --max_shard_size",
        ),
    ):
        done = command(
            "--model_name_or_path", checkpoint, "--adapter", adapter, *words, script="export.py"
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = command(
        model_name_or_path=checkpoint,
        format="peft",
        output_dir=tmp_path / "out",
        script="export.py",
    )
    assert done.returncode == 2 and "--adapter" in done.stderr
    assert before == {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert not (tmp_path / "out").exists()
