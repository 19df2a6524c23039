"""Adapters of every form that peft writes: its logits, merged exports, and further training."""

import json

import peft
import pytest
import torch
import transformers
from conftest import CONFIG, command
from safetensors.torch import load_file, save_file

from minisft.checkpoints.adapter_forms import read_adapter, refuse_untrainable, vocabulary_size
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.gguf_export import export_model
from minisft.checkpoints.gguf_lora import export_adapter
from minisft.common.errors import UserError
from minisft.common.tensor_files import ADAPTER_WEIGHTS
from minisft.generation.assistant import Assistant
from minisft.gguf.reader import read_gguf
from minisft.gguf.unpack import unpack
from minisft.model.config import ModelConfig
from minisft.model.lora import merge_lora
from minisft.model.quantized import QuantizedLinear

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
BOTH = ["embed_tokens", "lm_head"]
# name: (base is tied, tokens of the resized base, arguments of LoraConfig, of save_pretrained)
FORMS = {
    "new tokens, both saved": (False, 303, {"modules_to_save": BOTH}, {}),
    "new tokens, both saved, tied": (True, 303, {"modules_to_save": BOTH}, {}),
    "resized": (False, 303, {}, {}),
    "resized, tied": (True, 303, {}, {}),
    "smaller": (False, 290, {}, {}),
    "embeddings stored": (False, None, {}, {"save_embedding_layers": True}),
    "embeddings stored, tied": (True, None, {}, {"save_embedding_layers": True}),
    "output matrix": (False, None, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "output matrix, tied": (True, None, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "tokens": (False, None, {"trainable_token_indices": [3, 7]}, {}),
    "tokens, tied": (True, None, {"trainable_token_indices": [3, 7]}, {}),
    "tokens of both": (
        False,
        None,
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1]}},
        {},
    ),
    "new tokens by index, tied": (True, 303, {"trainable_token_indices": [300, 301, 302]}, {}),
    "alpha_pattern": (
        False,
        None,
        {
            "alpha_pattern": {"q_proj": 64, r"layers\.1\.self_attn\.v_proj": 3},
            "rank_pattern": {"v_proj": 2},
        },
        {},
    ),
    "alpha_pattern, rslora": (
        False,
        None,
        {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
        {},
    ),
    "tokens by index, lm_head, tied": (
        True,
        None,
        {"trainable_token_indices": [3, 5], "target_modules": ["q_proj", "lm_head"]},
        {},
    ),
    "dora": (False, None, {"use_dora": True, "target_modules": "all-linear"}, {}),
    "dora, tied, tokens": (True, None, {"use_dora": True, "trainable_token_indices": [5]}, {}),
    "all norms": (False, None, {"modules_to_save": ["norm"]}, {}),
    "full names, tied": (
        True,
        None,
        {"modules_to_save": ["model.norm", "model.embed_tokens", "layers.1.input_layernorm"]},
        {},
    ),
    "tied weights kept tied": (
        True,
        None,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
}
UNTRAINABLE = {name for name in FORMS if name.startswith(("tokens", "new tokens by", "dora"))}
UNTRAINABLE.add("tied weights kept tied")


@pytest.fixture
def peft_adapter(tmp_path, tiny_tokenizer_dir):
    """Write a base and an adapter of a form with peft; returns their folders and peft's logits."""

    def write(is_tied=False, num_tokens=None, settings=None, saving=None, **config):
        torch.manual_seed(0)
        config = {**CONFIG, "vocab_size": 300, "tie_word_embeddings": is_tied, **config}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
        model.save_pretrained(tmp_path / "base")
        for path in tiny_tokenizer_dir.iterdir():
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32
        )
        if num_tokens:
            model.resize_token_embeddings(num_tokens)
        settings = {"target_modules": ["q_proj", "v_proj"], **(settings or {})}
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
        )
        with torch.no_grad():
            before = model(TOKENS).logits if not num_tokens else None
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            tokens = TOKENS.clamp(max=(num_tokens or 300) - 1)
            tokens[0, :2] = (num_tokens or 300) - 1  # a new token, if there are any
            expected = model.eval()(tokens).logits
        assert before is None or (expected - before).abs().max() > 0.05
        model.save_pretrained(tmp_path / "adapter", **(saving or {}))
        return tmp_path / "base", tmp_path / "adapter", tokens, expected

    return write


@torch.no_grad()
def logits(model, tokens):
    return model.logits(model(tokens))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_loaded_merged_and_exported(name, peft_adapter, tmp_path):
    """The logits are peft's: loaded, merged for transformers, and as a GGUF file."""
    base, adapter, tokens, expected = peft_adapter(*FORMS[name])
    model = load_model(base)
    load_adapter(model, adapter)
    assert_same(logits(model, tokens), expected)
    assert model.config.vocab_size == expected.shape[-1]
    assert vocabulary_size(ModelConfig.load(base), adapter) == expected.shape[-1]
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_same(theirs(tokens).logits, expected)
    if FORMS[name][1] != 290:  # llama.cpp needs a row for every token of the tokenizer
        export_model(base, tmp_path / "merged.gguf", "f32", adapter, template="chatml")
        assert_same(logits(load_model(unpack(tmp_path / "merged.gguf")), tokens), expected)


@pytest.mark.parametrize("name", ["dora, tied, tokens", "resized"])
def test_merged_into_a_type_wider_than_the_base(name, peft_adapter, tmp_path):
    """--dtype float32 on a base in bfloat16: the logits are those of peft in float32."""
    _, num_tokens, *_ = FORMS[name]
    base, adapter, tokens, _ = peft_adapter(*FORMS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    words = ["--model_name_or_path", base, "--adapter", adapter, "--output_dir", tmp_path / "out"]
    done = command(*words, "--dtype", "float32", "--template", "chatml", script="export.py")
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if num_tokens:
        theirs.resize_token_embeddings(num_tokens)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        assert_same(logits(load_model(tmp_path / "out"), tokens), theirs(tokens).logits)


def test_tokens_that_the_base_does_not_have(peft_adapter):
    """The adapter holds rows for them, but not the embedding they belong to."""
    base, adapter, _, _ = peft_adapter(True, 303, {"trainable_token_indices": [300, 302]}, {})
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    whole = ("embed_tokens.weight", "base_layer.weight")
    kept = {name: value for name, value in tensors.items() if not name.endswith(whole)}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    with pytest.raises(UserError, match="the adapter has 303 tokens, the base model 300"):
        load_adapter(load_model(base), adapter)


@pytest.mark.parametrize("name", sorted(set(FORMS) - UNTRAINABLE))
def test_saved_again_for_peft(name, peft_adapter, tmp_path):
    """An adapter that we save again gives the same logits in peft and here."""
    base, adapter, tokens, expected = peft_adapter(*FORMS[name])
    refuse_untrainable(read_adapter(adapter, FORMS[name][0]), "trained")
    model = load_model(base)
    save_adapter(model, tmp_path / "again", load_adapter(model, adapter), base)
    again = load_model(base)
    load_adapter(again, tmp_path / "again")
    assert_same(logits(again, tokens), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if FORMS[name][1]:
        theirs.resize_token_embeddings(FORMS[name][1])
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "again").eval()
    with torch.no_grad():
        assert_same(theirs(tokens).logits, expected)


@pytest.mark.parametrize("name", sorted(UNTRAINABLE))
def test_forms_that_are_only_loaded_and_merged(name, peft_adapter):
    _, adapter, _, _ = peft_adapter(*FORMS[name])
    with pytest.raises(UserError, match=r"cannot be trained. Merge it into its base \(export.py"):
        refuse_untrainable(read_adapter(adapter, FORMS[name][0]), "trained")


def test_lora_bias(peft_adapter, tmp_path):
    """Where the base has biases, as Qwen2 has for q, k and v."""
    base, adapter, tokens, expected = peft_adapter(settings={"lora_bias": True}, model_type="qwen2")
    model = load_model(base)
    load_adapter(model, adapter)
    assert_same(logits(model, tokens), expected)
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_same(theirs(tokens).logits, expected)
    export_model(base, tmp_path / "merged.gguf", "f32", adapter, template="chatml")
    assert_same(logits(load_model(unpack(tmp_path / "merged.gguf")), tokens), expected)
    with pytest.raises(UserError, match="lora_bias cannot be trained"):
        refuse_untrainable(read_adapter(adapter, False), "trained")


def test_lora_bias_on_layers_without_a_bias(peft_adapter):
    base, adapter, _, _ = peft_adapter(settings={"lora_bias": True})
    with pytest.raises(UserError, match="lora_bias on .*q_proj, which has no bias"):
        load_adapter(load_model(base), adapter)


def test_dora_on_a_quantised_base(peft_adapter):
    base, adapter, _, _ = peft_adapter(settings={"use_dora": True})
    model = load_model(base, quantization_bit=8)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(UserError, match="Leave out --quantization_bit"):
        load_adapter(model, adapter)


def test_more_tokens_than_the_base_and_no_embedding(peft_adapter):
    base, adapter, _, _ = peft_adapter(
        num_tokens=303,
        settings={"target_modules": ["lm_head"]},
        saving={"save_embedding_layers": False},
    )
    with pytest.raises(UserError, match=r"303 tokens, the base model 300.*resize_token_emb"):
        load_adapter(load_model(base), adapter)


def test_lora_on_the_embedding_is_refused_with_the_way_out(peft_adapter):
    base, adapter, _, _ = peft_adapter(settings={"target_modules": ["q_proj", "embed_tokens"]})
    with pytest.raises(
        UserError, match="LoRA on embed_tokens is not supported. Merge it with PEFT"
    ):
        load_adapter(load_model(base), adapter)


VARIANTS = {
    "kasa_config": peft.KasaConfig(),
    "velora_config": peft.VeloraConfig(),
    "target_parameters": ["model.layers.0.mlp.gate_proj.weight"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_refused_by_name(name, peft_adapter):
    _, adapter, _, _ = peft_adapter(settings={name: VARIANTS[name]})
    with pytest.raises(UserError, match=f"{name} is not supported. Merge it with PEFT"):
        read_adapter(adapter, False)


@pytest.mark.parametrize("name", FORMS)
def test_gguf_lora(name, peft_adapter, tmp_path):
    """--lora takes factors only: any other change by an adapter is refused.

    llama.cpp also refuses factors of a matrix that the file of a tied base does not have.
    """
    base, adapter, _, _ = peft_adapter(*FORMS[name])
    output = tmp_path / "adapter.gguf"
    is_written = name.startswith(("alpha_pattern", "output matrix", "embeddings stored"))
    if is_written and name != "output matrix, tied":
        export_adapter(base, adapter, output, "f32")
        written = sum(tensor.endswith("lora_a") for tensor in read_gguf(output).tensors)
        assert written == sum("lora_A" in key for key in load_file(adapter / ADAPTER_WEIGHTS))
    else:
        with pytest.raises(UserError, match="--lora"):
            export_adapter(base, adapter, output, "f32")
        assert not output.exists()


@pytest.mark.parametrize("name", ["resized, tied", "alpha_pattern", "full names, tied", "dora"])
def test_training_further(name, peft_adapter, rows_file, tmp_path):
    """A step with a tiny learning rate keeps the logits; DoRA is refused before any output."""
    base, adapter, tokens, expected = peft_adapter(*FORMS[name])
    done = command(
        *("--model_name_or_path", base, "--adapter", adapter, "--dataset", rows_file),
        *("--template", "plain", "--max_steps", 1, "--learning_rate", 1e-9),
        *("--output_dir", tmp_path / "out"),
    )
    if name == "dora":
        assert done.returncode == 2 and "use_dora cannot be trained further" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    model = load_model(base)
    load_adapter(model, tmp_path / "out")
    assert_same(logits(model, tokens), expected)


@pytest.mark.parametrize("name", ["resized, tied", "output matrix, tied", "all norms"])
def test_training_further_in_shards(name, peft_adapter, rows_file, tmp_path):
    """Two ranks read their rows of the base and of the adapter."""
    base, adapter, tokens, expected = peft_adapter(*FORMS[name])
    done = command(
        *("--model_name_or_path", base, "--adapter", adapter, "--dataset", rows_file),
        *("--template", "plain", "--max_steps", 1, "--learning_rate", 1e-9),
        *("--parallel", "fsdp", "--output_dir", tmp_path / "out"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    model = load_model(base)
    load_adapter(model, tmp_path / "out")
    assert_same(logits(model, tokens), expected)


@pytest.mark.parametrize("name", ["dora, tied, tokens", "resized, tied"])
def test_chat_leaves_the_weights_of_a_shared_base(name, peft_adapter):
    """Base and adapter answer side by side from the same tensors, as eval.py compare has them."""
    base, adapter, tokens, expected = peft_adapter(*FORMS[name])
    plain = Assistant(base, template="chatml", device="cpu", dtype="float32")
    before = logits(plain.model, TOKENS)
    adapted = Assistant(
        base, adapter, template="chatml", device="cpu", dtype="float32", base_model=plain.model
    )
    assert_same(logits(adapted.model, tokens), expected)
    assert torch.equal(logits(plain.model, TOKENS), before)


def test_the_tokenizer_of_a_resized_adapter_is_used(peft_adapter, tmp_path):
    """The merged folder has the new tokens."""
    base, adapter, tokens, expected = peft_adapter(*FORMS["resized, tied"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(adapter)
    done = command(
        *("--model_name_or_path", base, "--adapter", adapter, "--template", "chatml"),
        *("--output_dir", tmp_path / "out"),
        script="export.py",
    )
    assert done.returncode == 0, done.stderr
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.convert_tokens_to_ids("<new>") == tokenizer.convert_tokens_to_ids("<new>")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 303
    assert_same(logits(load_model(tmp_path / "out"), tokens), expected)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ({"(a|a)*b": 1}, "so many repetitions may never end"),
        ({".*.*.*.*q_proj": 1}, "so many repetitions may never end"),
        ({"(q_proj": 1}, "missing \\)"),
        ({"(" * 9999 + ")" * 9999: 1}, "alpha_pattern"),
        ({f"q_proj{number}": 1 for number in range(10_001)}, "up to 10,000 names"),
        ({"q_proj": "8"}, "names of modules to numbers"),
    ],
    ids=["repeated group", "many repetitions", "no expression", "deep", "many", "text"],
)
def test_patterns_that_could_keep_us_busy(pattern, message, peft_adapter):
    base, adapter, *_ = peft_adapter(*FORMS["alpha_pattern"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": pattern}))
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(base), adapter)
