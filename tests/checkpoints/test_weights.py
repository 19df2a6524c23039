"""Checkpoint folders: sharding, tied weights, number types, memory, and damaged folders."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import CONFIG, ROOT
from safetensors.torch import load_file, save_file

from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import load_model, save_model, stored_dtype
from minisft.checkpoints.hub import resolve
from minisft.common.errors import UserError
from minisft.common.tensor_files import parse_size
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora


def new_model(**changes):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, **changes}))
    model.initialize()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB", "1KB"])
def test_round_trip_and_transformers(tied, shard, tmp_path):
    model = new_model(tie_word_embeddings=tied)
    save_model(model, tmp_path, max_shard_size=parse_size(shard))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "1GB")
    if shard == "20KB":
        assert max(path.stat().st_size for path in files) < 21000
    again = load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value) and torch.equal(theirs[name], value)
    stored = [name for path in files for name in load_file(path)]
    assert len(stored) == len(set(stored)) and ("lm_head.weight" in stored) == (not tied)


def test_shards_written_by_transformers(tmp_path):
    config = transformers.AutoConfig.for_model(**CONFIG)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = load_model(tmp_path).state_dict()
    assert set(ours) == set(theirs.state_dict())
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtype_of_files_and_of_the_model(stored, wanted, tmp_path):
    model = new_model()
    save_model(model, tmp_path, stored)
    weight = load_model(tmp_path, wanted).lm_head.weight
    assert weight.dtype == wanted
    assert torch.equal(weight, model.lm_head.weight.to(stored).to(wanted))
    assert load_model(tmp_path).lm_head.weight.dtype == stored
    assert ModelConfig.load(tmp_path).dtype == str(stored).removeprefix("torch.")


def test_no_file_stays_open(tmp_path):
    """The number of open files does not grow with the number of tensors."""
    save_model(new_model(), tmp_path)
    code = (
        "import resource, sys; from minisft.checkpoints.folders import load_model\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "load_model(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list(new_model().parameters())) > 20


MEASURE = """
import sys, torch
from minisft.checkpoints import folders as weights

def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

model_dir, dtype = sys.argv[1], getattr(torch, sys.argv[2])
before = status("VmRSS")
model = weights.load_model(model_dir, dtype)
for parameter in model.parameters():
    parameter.view(-1).view(torch.uint8)[::4096].sum()  # mapped pages come in when touched
print((status("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_memory_holds_the_weights_once(wanted, tmp_path):
    """Peak memory of loading is at most 1.15 x the weights, with and without conversion."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    }
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict({**CONFIG, **sizes})).bfloat16()
    save_model(model.to_empty(device="cpu"), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(done.stdout) <= 1.15


def damaged(tmp_path, change):
    """The error of loading a checkpoint after `change(weights, config)`."""
    save_model(new_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    return str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    def lose(tensors, config):
        del tensors["model.norm.weight"]

    def add(tensors, config):
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)

    def reshape(tensors, config):
        tensors["model.norm.weight"] = torch.zeros(33)

    def integer(tensors, config):
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)

    def layers(tensors, config):
        config["num_hidden_layers"] = 3

    assert "missing: model.norm.weight" in damaged(tmp_path, lose)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in damaged(tmp_path, add)
    assert "[33]" in damaged(tmp_path, reshape) and "int8" in damaged(tmp_path, integer)
    assert "model.layers.2" in damaged(tmp_path, layers)


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)
    save_model(new_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for broken in (content[:-100], content[:5], b"", b"\xff" * 8 + content[8:], content + b"x"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_model(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled"):
        load_model(tmp_path)


def test_resolve(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="gpt2: no such folder, and models on the hub are"):
        resolve("gpt2")
    snapshot = tmp_path / "models--k--stories/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UserError, match="did you mean .*snapshots/abc"):
        resolve(str(snapshot.parent.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="Download it first"):
        resolve("nobody/no-such-model-here")


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5mb") == 1500000
    assert parse_size("123") == 123
    with pytest.raises(UserError, match="much"):
        parse_size("much")


def test_a_save_removes_the_weights_of_an_earlier_one(tmp_path):
    """Shards over a single file and back, and an adapter over a model."""
    for number, size in enumerate(("1GB", "20KB", "1GB")):
        model = new_model()
        model.model.norm.weight.data.fill_(number)
        save_model(model, tmp_path, max_shard_size=parse_size(size))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        for loaded in (load_model(tmp_path), theirs):
            assert (loaded.model.norm.weight == number).all()
    add_lora(model, LoraConfig())
    save_adapter(model, tmp_path, LoraConfig(), "base")
    assert not list(tmp_path.glob("model*.safetensors"))
    save_model(new_model(), tmp_path)
    assert not list(tmp_path.glob("adapter*"))


def test_stored_dtype_comes_from_the_tensors_not_from_config_json(tmp_path):
    save_model(new_model(), tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    model = new_model()
    model.model.norm.weight.data[3] = -70_000.0
    with pytest.raises(UserError, match=r"model\.norm\.weight .* 65,504"):
        save_model(model, tmp_path, torch.float16)
    save_model(model, tmp_path, torch.bfloat16)
