"""Checkpoints as other programs write them: tied twice or once, quantised, or Git LFS pointers."""

import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import CONFIG, command

from minisft.checkpoints.folders import load_model, save_model, stored_dtype
from minisft.common.errors import UserError
from minisft.gguf.unpack import unpack

TOKENS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def transformers_model(folder, **changes):
    """A random Llama of transformers, also saved in the folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**CONFIG, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model):
    return model.logits(model(TOKENS))


@torch.no_grad()
def their_logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(TOKENS).logits


@pytest.fixture
def merged_dir(tmp_path, tiny_tokenizer_dir):
    """A tied model whose output matrix peft has trained and merged; config.json still says tied."""
    base = transformers_model(tmp_path / "base", tie_word_embeddings=True, vocab_size=300)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in tiny_tokenizer_dir.iterdir():
        (tmp_path / "merged" / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "merged/config.json"
    content = json.loads(path.read_text())
    # This version of peft corrects the entry. The versions that wrote most merged models do not.
    path.write_text(json.dumps({**content, "tie_word_embeddings": True}))
    return tmp_path / "merged"


def test_a_tied_config_over_two_matrices_is_loaded_untied(merged_dir, tmp_path):
    model = load_model(merged_dir)
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), their_logits(merged_dir), rtol=0, atol=1e-5)
    save_model(model, tmp_path / "copy")
    assert not json.loads((tmp_path / "copy/config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(logits(load_model(tmp_path / "copy")), logits(model))


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_exports_keep_both_matrices(format, merged_dir, tmp_path):
    words = ["--model_name_or_path", merged_dir, "--format", format]
    output = tmp_path / ("out" if format == "hf" else "out.gguf")
    words += ["--output_dir", output] if format == "hf" else ["--output", output]
    words += [] if format == "hf" else ["--quantization", "f32"]
    done = command(*words, script="export.py")
    assert done.returncode == 0, done.stderr
    folder = output if format == "hf" else unpack(output)
    torch.testing.assert_close(
        logits(load_model(folder)), their_logits(merged_dir), rtol=0, atol=1e-5
    )
    if format == "hf":
        assert torch.equal(their_logits(output), their_logits(merged_dir))


def test_training_starts_from_both_matrices(merged_dir, rows_file, tmp_path):
    """The first loss is that of the untied model, and the result keeps both matrices."""
    done = command(
        *("--model_name_or_path", merged_dir, "--dataset", rows_file, "--template", "alpaca"),
        *("--finetuning_type", "full", "--learning_rate", 1e-9, "--max_steps", 1),
        *("--output_dir", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")), their_logits(merged_dir), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_checkpoint_under_either_name(kept, tmp_path):
    expected = transformers_model(tmp_path, tie_word_embeddings=True)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    matrix = tensors.pop("model.embed_tokens.weight").bfloat16()
    tensors |= {"lm_head.weight": matrix, "model.embed_tokens.weight": matrix.clone()}
    if kept != "both":
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.shape != matrix.shape or name == kept
        }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert stored_dtype(tmp_path) == torch.bfloat16
    model = load_model(tmp_path, torch.float32)
    assert model.config.tie_word_embeddings and not hasattr(model, "lm_head")
    expected.model.embed_tokens.weight.data = matrix.float()
    expected.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), expected(TOKENS).logits, rtol=0, atol=1e-5)


def test_save_model_of_safetensors(tmp_path):
    """safetensors writes a shared tensor once, under the first of its names: lm_head.weight."""
    theirs = transformers_model(tmp_path, tie_word_embeddings=True)
    (tmp_path / "model.safetensors").unlink()
    safetensors.torch.save_model(theirs, str(tmp_path / "model.safetensors"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" not in file.keys()  # noqa: SIM118 (not a dict)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits(load_model(tmp_path)), expected, rtol=0, atol=1e-5)


def rewrite(folder, change):
    """Change the tensors and config.json of a checkpoint: `change(tensors, config)`."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_old_rotary_tensors_are_redundant_and_others_are_named(tmp_path):
    transformers_model(tmp_path)
    expected = logits(load_model(tmp_path))

    def old_llama(tensors, config):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(tmp_path, old_llama)
    assert torch.equal(logits(load_model(tmp_path)), expected)

    def unknown(tensors, config):
        tensors["model.layers.0.self_attn.rotary_emb_scale.weight"] = torch.ones(4)

    rewrite(tmp_path, unknown)
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.0\.self_attn\.rotary_emb_sc"):
        load_model(tmp_path)


def mlx(tensors, config):
    config["quantization"] = {"group_size": 64, "bits": 4}
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = torch.zeros(64, 4, dtype=torch.uint32)
    tensors[f"{name}.scales"], tensors[f"{name}.biases"] = torch.ones(64, 1), torch.ones(64, 1)


def fp8(tensors, config):
    config["quantization_config"] = {"quant_method": "fp8"}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


def bitsandbytes(tensors, config):
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(1024, 1, dtype=torch.uint8)
    tensors[f"{name}.absmax"] = torch.ones(32)


def gptq(tensors, config):
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"] = torch.zeros(4, 64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mlx, "type U32: packed weights, as MLX writes them"),
        (fp8, "type F8_E4M3: 8-bit floating point"),
        (bitsandbytes, r"quant_method bitsandbytes in config.json; .*up_proj.weight.absmax"),
        (gptq, r"quant_method gptq in config.json; .*up_proj.qweight"),
    ],
)
def test_quantised_checkpoints_ask_for_the_original_weights(change, message, tmp_path):
    transformers_model(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "Use the original weights" in str(caught.value)
    assert "download" not in str(caught.value)


def test_a_left_over_quantization_config_over_plain_weights(tmp_path):
    """Programs that dequantise a model often leave the entry in config.json."""
    transformers_model(tmp_path)
    expected = logits(load_model(tmp_path))

    def change(tensors, config):
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    rewrite(tmp_path, change)
    model = load_model(tmp_path)
    assert torch.equal(logits(model), expected)
    save_model(model, tmp_path / "copy")
    assert "quantization_config" not in json.loads((tmp_path / "copy/config.json").read_text())
