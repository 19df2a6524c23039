"""GGUF export: llama.cpp computes the same from the file as we do from the checkpoint."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from conftest import as_flags, command
from gguf_models import FAMILIES, LLAMA3, SMALL, STRETCHED, VOCAB, prompts, save
from llama_cpp import Server

from minisft.checkpoints import adapters, folders, gguf_export
from minisft.checkpoints.gguf_export import export_model
from minisft.checkpoints.gguf_lora import export_adapter
from minisft.checkpoints.hub import resolve, resolve_adapter
from minisft.common.command_line import QUANTIZATIONS
from minisft.common.errors import UserError
from minisft.generation.sampling import penalize
from minisft.gguf import writer
from minisft.gguf.compatibility import check_architecture
from minisft.gguf.tensor_types import tensor_type
from minisft.model.config import ModelConfig
from minisft.model.lora import LoraConfig, LoRALinear, add_lora
from minisft.text.template_choice import CHAT_TEMPLATE, get_template
from minisft.text.tokenizer import Tokenizer

STOPS = [1, 2, 3, 6]  # EOS, config.json's eos_token_id, and two that llama.cpp knows by name


@pytest.fixture
def checkpoint(tmp_path, tiny_tokenizer_dir):
    return save(tmp_path / "checkpoint", tiny_tokenizer_dir, {})


@torch.no_grad()
def our_log_probabilities(folder, ids, adapter=None):
    model = folders.load_model(folder)
    if adapter is not None:
        adapters.load_adapter(model, adapter)
    hidden = model(torch.tensor([ids]))[0, -1]
    return torch.log_softmax(model.logits(hidden), dim=-1).numpy()


@torch.no_grad()
def our_greedy(folder, ids, length, penalty=1.0):
    model, ids = folders.load_model(folder), list(ids)
    for _ in range(length):
        logits = model.logits(model(torch.tensor([ids]))[0, -1])
        logits = penalize(logits, torch.isin(torch.arange(VOCAB), torch.tensor(ids)), penalty)
        logits[STOPS] = -torch.inf  # llama.cpp ignores stop tokens here, and omits them
        ids.append(int(logits.argmax()))
    return ids[-length:]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family, tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, FAMILIES[family])
    export_model(folder, tmp_path / "model.gguf", "f32")
    with Server(tmp_path / "model.gguf") as server:
        for ids in prompts():
            theirs = server.log_probabilities(ids, VOCAB)
            np.testing.assert_allclose(theirs, our_log_probabilities(folder, ids), atol=1e-4)
        assert server.greedy(prompts()[1], 40) == our_greedy(folder, prompts()[1], 40)


@pytest.mark.parametrize("family", ["baichuan2, 7B", "baichuan2, 13B"])
def test_baichuan_at_long_positions_and_with_an_adapter(family, tmp_path, tiny_tokenizer_dir):
    """W_pack is three tensors of the file, in the model and in the adapter."""
    folder, lora = save(tmp_path / "model", tiny_tokenizer_dir, FAMILIES[family]), tmp_path / "lora"
    model = folders.load_model(folder)
    add_lora(model, config := LoraConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.05)
    adapters.save_adapter(model, lora, config, folder)
    export_model(folder, tmp_path / "base.gguf", "f32")
    export_model(folder, tmp_path / "merged.gguf", "f32", lora)
    export_adapter(folder, lora, tmp_path / "lora.gguf", "f32")
    ids = torch.randint(8, VOCAB, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = our_log_probabilities(folder, ids, lora)
    assert np.abs(expected - our_log_probabilities(folder, ids)).max() > 0.1
    with Server(tmp_path / "merged.gguf", context=1024) as server:
        np.testing.assert_allclose(server.log_probabilities(ids, VOCAB), expected, atol=2e-4)
    with Server(tmp_path / "base.gguf", context=1024, lora=tmp_path / "lora.gguf") as server:
        theirs = server.log_probabilities(ids[:40], VOCAB)
    np.testing.assert_allclose(theirs, our_log_probabilities(folder, ids[:40], lora), atol=2e-4)


def test_baichuan_with_other_numbers_of_layers(tmp_path, tiny_tokenizer_dir):
    for fields in ({"num_hidden_layers": 40, "max_position_embeddings": None}, {}):
        folder = save(tmp_path / "model", tiny_tokenizer_dir, FAMILIES["baichuan2, 7B"] | fields)
        config = ModelConfig.load(folder)
        check_architecture(config)
        with pytest.raises(UserError, match="12 layers"):
            check_architecture(replace(config, num_hidden_layers=12))


def test_without_interleaving_llama_cpp_computes_something_else(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "is_interleaved", lambda name, architecture: False)
    export_model(checkpoint, tmp_path / "model.gguf", "f32")
    ids = prompts()[1]
    with Server(tmp_path / "model.gguf") as server:
        difference = server.log_probabilities(ids, VOCAB) - our_log_probabilities(checkpoint, ids)
    assert np.abs(difference).max() > 1


def test_greedy_text_of_a_published_model(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    export_model(folder, tmp_path / "model.gguf", "f32")
    published = json.loads((folder / "greedy_256_ids.json").read_text())
    ids, vocab_size = published[:100], Tokenizer.load(folder).vocab_size
    with Server(tmp_path / "model.gguf", context=512) as server:
        assert server.greedy(published[:1], 256) == published[1:]
        np.testing.assert_allclose(
            server.log_probabilities(ids, vocab_size), our_log_probabilities(folder, ids), atol=1e-4
        )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_type_runs(quantization, tmp_path, tiny_tokenizer_dir):
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, wide)
    export_model(folder, tmp_path / "model.gguf", quantization)
    limit = {"f32": 1e-4, "f16": 0.02, "bf16": 0.15, "q8_0": 0.15, "q6_k": 0.25}.get(
        quantization, 1.5
    )
    ids = prompts()[1]
    with Server(tmp_path / "model.gguf") as server:
        difference = server.log_probabilities(ids, VOCAB) - our_log_probabilities(folder, ids)
    assert np.abs(difference).max() < limit


def read(path):
    """({key: value}, {name: (type, float32 numbers)}), read by the gguf package."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type))
        for one in reader.tensors
    }
    return fields, tensors


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A random adapter for `checkpoint`; one module has another rank."""
    model = folders.load_model(checkpoint)
    config = LoraConfig(rank=4, alpha=6, use_rslora=True)
    add_lora(model, config)
    attention = model.model.layers[1].self_attn
    attention.q_proj = LoRALinear(attention.q_proj.base_layer, replace(config, rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapters.save_adapter(model, tmp_path / "adapter", config, checkpoint)
    return tmp_path / "adapter"


def test_adapter_merged_and_as_lora(checkpoint, adapter, tmp_path):
    export_model(checkpoint, tmp_path / "merged.gguf", "f32", adapter)
    export_model(checkpoint, tmp_path / "base.gguf", "f32")
    export_adapter(checkpoint, adapter, tmp_path / "lora.gguf", "f32")
    ids = prompts()[1]
    expected = our_log_probabilities(checkpoint, ids, adapter)
    assert np.abs(expected - our_log_probabilities(checkpoint, ids)).max() > 0.5
    with Server(tmp_path / "merged.gguf") as server:
        np.testing.assert_allclose(server.log_probabilities(ids, VOCAB), expected, atol=1e-4)
    with Server(tmp_path / "base.gguf", lora=tmp_path / "lora.gguf") as server:
        np.testing.assert_allclose(server.log_probabilities(ids, VOCAB), expected, atol=1e-4)


def test_lora_alpha_of_zero(checkpoint, adapter, tmp_path):
    """It turns off every module that alpha_pattern does not name, in llama.cpp, too."""
    path = adapter / "adapter_config.json"
    content = {"lora_alpha": 0, "alpha_pattern": {"q_proj": 60}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    export_model(checkpoint, tmp_path / "base.gguf", "f32")
    export_adapter(checkpoint, adapter, tmp_path / "lora.gguf", "f32")
    ids = prompts()[1]
    expected = our_log_probabilities(checkpoint, ids, adapter)
    assert np.abs(expected - our_log_probabilities(checkpoint, ids)).max() > 0.5
    with Server(tmp_path / "base.gguf", lora=tmp_path / "lora.gguf") as server:
        np.testing.assert_allclose(server.log_probabilities(ids, VOCAB), expected, atol=1e-4)


def test_adapter_that_trained_a_tied_embedding(tmp_path, tiny_tokenizer_dir):
    """The output matrix keeps the old values, so the two are no longer tied."""
    folder = save(tmp_path / "model", tiny_tokenizer_dir, {"tie_word_embeddings": True})
    model = folders.load_model(folder)
    config = LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("embed_tokens",))
    add_lora(model, config)
    model.model.embed_tokens.weight.data += torch.randn_like(model.model.embed_tokens.weight)
    adapters.save_adapter(model, tmp_path / "adapter", config, folder)
    export_model(folder, tmp_path / "model.gguf", "f32", tmp_path / "adapter")
    ids = prompts()[1]
    with Server(tmp_path / "model.gguf") as server:
        np.testing.assert_allclose(
            server.log_probabilities(ids, VOCAB),
            our_log_probabilities(folder, ids, tmp_path / "adapter"),
            atol=1e-4,
        )
    with pytest.raises(UserError, match="embed_tokens"):
        export_adapter(folder, tmp_path / "adapter", tmp_path / "lora.gguf", "f32")


def test_piece_size_does_not_change_the_file(checkpoint, adapter, tmp_path, monkeypatch):
    export_model(checkpoint, tmp_path / "whole.gguf", "q8_0", adapter)
    monkeypatch.setattr(writer, "PIECE_SIZE", 1500)  # less than two heads of q_proj
    export_model(checkpoint, tmp_path / "pieces.gguf", "q8_0", adapter)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_which_tensor_gets_which_type():
    """The choices of llama-quantize for 9 layers (build of llama-cpp-python 0.3.36)."""
    config = ModelConfig.from_dict({**SMALL, "num_hidden_layers": 9})

    def types(quantization, name, width=256):
        return [
            tensor_type(f"blk.{layer}.{name}.weight", (8, width), quantization, config).name
            for layer in range(9)
        ]

    finer = ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K"]
    assert types("q4_k_m", "attn_v") == types("q4_k_m", "ffn_down") == finer
    assert types("q4_k_m", "attn_q") == ["Q4_K"] * 9
    config.num_hidden_layers = 80
    assert types("q4_k_m", "ffn_down") == ["Q6_K"] * 9
    assert tensor_type("blk.10.ffn_down.weight", (8, 256), "q4_k_m", config).name == "Q4_K"
    assert tensor_type("blk.10.attn_v.weight", (8, 256), "q4_k_m", config).name == "Q6_K"
    config.num_hidden_layers = 9
    assert types("q4_k_m", "attn_q", width=96) == ["Q5_0"] * 9
    assert types("q6_k", "ffn_up", width=96) == ["Q8_0"] * 9
    assert types("q4_0", "ffn_up", width=100) == ["F16"] * 9
    for quantization, output in (("q4_0", "Q6_K"), ("q8_0", "Q8_0"), ("f16", "F16")):
        assert tensor_type("output.weight", (8, 256), quantization, config).name == output
    assert tensor_type("token_embd.weight", (8, 256), "q4_0", config).name == "Q4_0"
    config.tie_word_embeddings = True
    assert tensor_type("token_embd.weight", (8, 256), "q4_0", config).name == "Q6_K"
    assert tensor_type("token_embd.weight", (8, 96), "q4_0", config).name == "Q8_0"
    assert tensor_type("output_norm.weight", (256,), "q4_0", config).name == "F32"


def types_of(path):
    """{key: GGUF types of the value}."""
    return {
        name: [type.name for type in field.types]
        for name, field in gguf.GGUFReader(path).fields.items()
    }


METHODS = {
    "general.sampling.temp": "sampling_temp",
    "general.sampling.top_k": "sampling_top_k",
    "attention.layer_norm_rms_epsilon": "layer_norm_rms_eps",
    "tokenizer.ggml.tokens": "token_list",
    "tokenizer.ggml.token_type": "token_types",
    "tokenizer.ggml.merges": "token_merges",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.model": "tokenizer_model",
    "tokenizer.ggml.pre": "tokenizer_pre",
    "rope.dimension_count": "rope_dimension_count",
    "rope.freq_base": "rope_freq_base",
}


def types_by_the_package(path, fields):
    """types_of a file whose fields are written by the gguf package's own methods."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if "GGUF" not in name and name != "general.architecture":
            key = name.removeprefix("llama.")
            getattr(writer, "add_" + METHODS.get(key, key.rpartition(".")[2]))(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return types_of(path)


def test_metadata(checkpoint, tmp_path):
    """The fields and values of llama.cpp's own converter (llama-cpp-python 0.3.36).

    Intended differences: we always write key_length, value_length, add_space_prefix,
    padding_token_id and a placeholder for BOS, and our own fields. We do not write
    add_eos_token and add_sep_token, which are false. The name is the folder's, not in title case.
    Control tokens of SentencePiece keep the types and scores of its model.
    """
    (checkpoint / "generation_config.json").write_text('{"temperature": 1, "top_k": 20}')
    export_model(checkpoint, tmp_path / "model.gguf", "q8_0", name="My model")
    fields, _ = read(tmp_path / "model.gguf")
    types = types_of(tmp_path / "model.gguf")
    del types["minisft.stop_token_ids"]
    assert fields.pop("minisft.stop_token_ids") == [2]
    lists = {
        f"tokenizer.ggml.{name}": fields.pop(f"tokenizer.ggml.{name}")
        for name in ("tokens", "token_type", "merges")
    }
    vocabulary = {name.rpartition(".")[2]: content for name, content in lists.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "My model",
        "general.size_label": "100K",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 20,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": VOCAB,
        "llama.rope.dimension_count": 16,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {name: value for name, value in fields.items() if "GGUF" not in name} == expected
    assert types == types_by_the_package(tmp_path / "theirs.gguf", {**fields, **lists})
    tokenizer = Tokenizer.load(checkpoint)
    assert vocabulary["tokens"][: tokenizer.vocab_size] == [
        tokenizer.token_text(id) for id in range(tokenizer.vocab_size)
    ]
    assert len(vocabulary["tokens"]) == VOCAB
    assert vocabulary["token_type"][:8] == [3] * 7 + [1]


def export(*words):
    return command(*words, script="export.py")


def test_command(checkpoint, adapter, tmp_path):
    path = tmp_path / "new folder" / "model.gguf"
    words = ["--model_name_or_path", checkpoint, "--adapter", adapter, "--output", path]
    done = export(*words, "--format", "gguf", "--quantization", "q8_0")
    assert done.returncode == 0, done.stderr
    assert "8.58 bits per weight, 21 tensors (16 Q8_0, 5 F32)" in done.stdout
    assert "instead of" not in done.stdout
    fields, _ = read(path)
    assert fields["general.name"] == "checkpoint + adapter"
    assert [one.name for one in path.parent.iterdir()] == ["model.gguf"]
    done = export(*words, "--format", "gguf", "--quantization", "q4_k_m", "--overwrite")
    types = [type for type, _ in read(path)[1].values()]
    for type, wanted in (("Q5_0", "Q4_K"), ("Q8_0", "Q6_K")):
        assert f"{type} instead of {wanted} in {types.count(type)} tensor" in done.stdout
    assert "more bits than q4_k_m" in done.stdout and "blocks of 256" in done.stdout
    done = export(*words, "--format", "gguf-lora", "--overwrite")
    assert done.returncode == 0, done.stderr
    fields, tensors = read(path)
    assert fields["adapter.type"] == "lora" and len(tensors) == 2 * 2 * 7


def test_the_base_of_a_lora_file_gets_the_template_of_the_training(checkpoint, adapter, tmp_path):
    """llama.cpp takes the template from the base's file; the note says how to write that."""
    lora, base, merged = (tmp_path / f"{name}.gguf" for name in ("lora", "base", "merged"))
    assert export_adapter(checkpoint, adapter, lora, "f32").notes == []
    with pytest.raises(UserError, match="lora.gguf: this is a LoRA adapter for llama.cpp"):
        resolve(lora)
    with pytest.raises(UserError, match="lora.gguf is a GGUF file.* the adapter's folder"):
        resolve_adapter(lora)
    tokenizer = Tokenizer.load(checkpoint)
    (adapter / CHAT_TEMPLATE).write_text(get_template("alpaca", tokenizer).text)
    (adapter / "options.toml").write_text('template = "alpaca"\n')
    [note] = export_adapter(checkpoint, adapter, lora, "f32").notes
    words = note.partition("export.py ")[2].replace("BASE.gguf", str(base)).split()
    export_model(checkpoint, merged, "f32", adapter)
    done = export(*words)
    assert done.returncode == 0, done.stderr
    templates = [read(path)[0]["tokenizer.chat_template"] for path in (base, merged)]
    assert templates[0] == templates[1] and "### Response:" in templates[0]
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    assert export_adapter(checkpoint, adapter, lora, "f32").notes == []  # needs no tokenizer


def test_mistakes_leave_no_file(checkpoint, adapter, tmp_path):
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"precious")
    out = tmp_path / "out.gguf"
    for words, message in (
        (["--format", "gguf"], "needs --output"),
        (["--format", "gguf", "--output", out, "--output_dir", "x"], "does not use --output_dir"),
        (["--format", "gguf", "--output", out, "--dtype", "float16"], "--quantization sets"),
        (["--format", "hf", "--output_dir", "x", "--quantization", "q8_0"], "--quantization"),
        (["--format", "hf", "--output_dir", "x", "--overwrite"], "needs --overwrite_output_dir"),
        (["--format", "gguf-lora", "--output", out], "needs --adapter"),
        (
            as_flags(format="gguf-lora", output=out, adapter=adapter, template="alpaca"),
            "does not use --template",
        ),
        (["--format", "gguf", "--output", taken, "--overwrite"], "is not a GGUF file"),
        (["--format", "gguf", "--output", taken], "exists"),
        (["--format", "gguf", "--output", tmp_path], "is a folder"),
        (["--format", "gguf", "--output", taken / "x.gguf"], str(taken)),
        (["--format", "gguf", "--output", out, "--template", "lama2"], "unknown template"),
    ):
        done = export("--model_name_or_path", checkpoint, *words)
        assert done.returncode == 2 and message in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1
    assert taken.read_bytes() == b"precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "checkpoint", "taken.gguf"]


def test_models_that_llama_cpp_cannot_run_or_runs_differently(tmp_path, tiny_tokenizer_dir):
    for content, message in (
        ({"model_type": "qwen2", "head_dim": 32}, "head_dim 32"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention biases"),
        ({"model_type": "smollm3", "mlp_bias": True}, "MLP biases"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layers"),
        ({"rope_scaling": {"rope_type": "yarn", "truncate": False, **STRETCHED}}, "truncate"),
        ({"model_type": "qwen3", "rope_scaling": LLAMA3}, "llama3"),
    ):
        folder = save(tmp_path / message, tiny_tokenizer_dir, content)
        with pytest.raises(UserError, match=message):
            export_model(folder, tmp_path / "model.gguf", "f16")
    folder = save(
        tmp_path / "windowed",
        tiny_tokenizer_dir,
        {
            "model_type": "mistral",
            "sliding_window": 100,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        },
    )
    notes = export_model(folder, tmp_path / "model.gguf", "f16").notes
    assert "beyond 100 tokens" in " ".join(notes) and "dynamic" in " ".join(notes)


def test_llama_cpp_needs_flags_for_the_bounds_of_yarn(tmp_path, tiny_tokenizer_dir):
    bounds = {"beta_fast": 4.0, "beta_slow": 2.0}
    content = {"rope_scaling": {"rope_type": "yarn", **STRETCHED, **bounds}}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, content)
    [note] = export_model(folder, tmp_path / "model.gguf", "f32").notes
    assert note.endswith("--yarn-beta-fast 4.0 --yarn-beta-slow 2.0")
    *_, ids = prompts()
    flags = {f"yarn_{name}": value for name, value in bounds.items()}
    with Server(tmp_path / "model.gguf", **flags) as server:
        theirs = server.log_probabilities(ids, VOCAB)
    np.testing.assert_allclose(our_log_probabilities(folder, ids), theirs, atol=1e-3)
    with Server(tmp_path / "model.gguf") as server:
        theirs = server.log_probabilities(ids, VOCAB)
    assert np.abs(our_log_probabilities(folder, ids) - theirs).max() > 1


def test_llama_cpp_penalises_repetitions_in_the_whole_text(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    export_model(checkpoint, tmp_path / "model.gguf", "f32")
    *_, ids = prompts()  # more than 64
    with Server(tmp_path / "model.gguf") as server:
        assert server.greedy(ids, 40) == our_greedy(checkpoint, ids, 40, 1.5)
