"""Bad input to the scripts: one clear line, exit status 2, nothing written or lost."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from conftest import as_flags, command
from full_disk import file_size_limit
from safetensors.torch import load_file, save_file

from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.common.script import run_script
from minisft.model.lora import LoraConfig, add_lora

SCRIPTS = {
    "train": as_flags(
        dataset="ROWS", template="plain", max_steps=1, output_dir="OUT", dataloader_num_workers=0
    ),
    "train full": as_flags(
        dataset="ROWS", template="plain", finetuning_type="full", output_dir="OUT"
    ),
    "export": ["--output_dir", "OUT"],
}


@pytest.fixture
def place(checkpoint, rows_file, tmp_path):
    """A folder with checkpoint, rows.json and adapter; the output goes to `out`."""
    model = load_model(checkpoint)
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter", LoraConfig(rank=2), checkpoint)
    return tmp_path


@pytest.fixture
def start(place, monkeypatch, capsys):
    """Run a script in this process, as its last lines do -> (exit status, stdout, stderr)."""

    def started(script, *flags):
        names = {"ROWS": place / "rows.json", "OUT": place / "out", "ADAPTER": place / "adapter"}
        words = ["--model_name_or_path", place / "checkpoint", *SCRIPTS[script], *flags]
        script = script.split()[0]
        words = [str(names.get(word, word)) for word in words]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        capsys.readouterr()
        status = 0
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return started


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(start, place, script, *flags):
    """The one line that a script prints; all files are unchanged."""
    before = everything(place)
    status, said, complaint = start(script, *flags)
    assert status == 2, said + complaint
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert everything(place) == before
    return complaint


# Checkpoints


def config_says(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overlapping(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.norm.weight"]["data_offsets"] = [0, 128]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def hostile_index(folder):
    save_model(load_model(folder), folder, max_shard_size=20_000)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001", 1))


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


DAMAGES = {
    "truncated": (cut_off, "model.safetensors: damaged"),
    "overlapping": (overlapping, "overlaps with the tensor before it"),
    "hostile index": (hostile_index, "'../model-00001-of"),
    "wrong shape": (wrong_shape, "model.norm.weight has shape [31], config.json says [32]"),
    "unknown family": (config_says(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "too many layers": (config_says(num_hidden_layers=7), "missing: model.layers.6."),
    "huge": (config_says(vocab_size=10**12), "vocab_size must be a whole number from 1 to"),
    "no number": (config_says(rms_norm_eps=float("nan")), "rms_norm_eps must be a number"),
    "broken JSON": (
        lambda folder: (folder / "config.json").write_text('{"a": 1,\n "b": }'),
        "line 2 column 7",
    ),
    "no tokenizer": (no_tokenizer, "no tokenizer.json and no tokenizer.model"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json: tokenizers cannot read it",
    ),
}


@pytest.mark.parametrize("script", ["train full", "export"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(name, script, start, place):
    damage, message = DAMAGES[name]
    damage(place / "checkpoint")
    complaint = refused(start, place, script)
    assert message in complaint and str(place / "checkpoint") in complaint


@pytest.mark.parametrize("script", ["train", "export"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", '{"peft_type": "IA3"}', "not a LoRA adapter"),
        (
            "adapter_config.json",
            '{"peft_type": "LORA", "r": "8", "lora_alpha": 1}',
            "the numbers r",
        ),
        ("adapter_model.safetensors", "", "adapter_model.safetensors: not a safetensors file"),
    ],
)
def test_damaged_adapters(name, content, message, script, start, place):
    (place / "adapter" / name).write_text(content)
    assert message in refused(start, place, script, "--adapter", "ADAPTER")


def test_chat(place):
    """chat.py prints the same message."""
    cut_off(place / "checkpoint")
    done = command(
        model_name_or_path=place / "checkpoint", template="plain", prompt="x", script="chat.py"
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "model.safetensors: damaged" in done.stderr


# Rows


GOOD = {"instruction": "Say one.", "output": "one!"}
BAD_ROWS = {
    "no answer": (
        json.dumps([GOOD, {"instruction": "Say two.", "output": ""}]),
        "rows.json, row 2: there is no answer (1 of 2 rows broken",
    ),
    "no answer in JSON lines": (
        json.dumps(GOOD) + '\n\n{"instruction": "x", "output": null}\n',
        "rows.json, row 2 (line 3): there is no answer",
    ),
    "unknown columns": (
        json.dumps([GOOD, {"question": "x", "reply": "y"}]),
        "row 2: no known format has the columns question, reply",
    ),
    "broken line": (
        json.dumps(GOOD) + '\n{"instruction": "x",, }\n',
        "row 2 (line 2): line 2 column 21: not valid JSON",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_broken_rows_are_named_or_counted(name, start, place):
    content, message = BAD_ROWS[name]
    (place / "rows.json").write_text(content)
    complaint = refused(start, place, "train")
    assert message in complaint and "--skip_bad_rows" in complaint
    status, said, _ = start("train", "--skip_bad_rows")
    assert status == 0 and "1 broken row left out, the first: " in said and "1 row; " in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.json: the file is empty"),
        ('[\n{"instruction": "x"\n"output"}]', "rows.json, line 3 column 1: not valid JSON"),
        ("[]", "the file has no rows"),
        ("instruction,output\nx,y", "neither a JSON array nor JSON lines"),
        ('[{"instruction": "x", "output": "\xff"}]'.encode("latin-1"), "line 1: not UTF-8"),
    ],
)
def test_files_without_rows(content, message, start, place):
    content = content if isinstance(content, bytes) else content.encode()
    (place / "rows.json").write_bytes(content)
    assert message in refused(start, place, "train", "--skip_bad_rows")


# Flags and places


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train", ["--seed", 10**20], "--seed: '100000000000000000000' is not a whole number"),
        ("train", ["--lora_rank", 10**15], "out of memory"),
        ("train", ["--dtype", "int8"], "--dtype: 'int8': use --quantization_bit 8"),
        ("train", ["--template", "nonsense"], "unknown template 'nonsense'; choose one of auto"),
        ("train", ["--adapter", "ADAPTER", "--lora_rank", 3], "--lora_rank is fixed by --adapter"),
        ("train", ["--adapter", "ROWS"], "rows.json is a file. Give the folder that holds it"),
        ("train", ["--train_dir", "."], "--train_dir contradicts --dataset"),
        ("train", ["--plot_loss", "maybe"], "'maybe' is neither true nor false"),
        ("train", ["--output_dir", "ROWS"], "rows.json is a file"),
        ("train", ["--output_dir", "ADAPTER"], "is not empty"),
        (
            "train",
            ["--adapter", "ADAPTER", "--output_dir", "ADAPTER", "--overwrite_output_dir"],
            "is an input",
        ),
        ("train", ["--resume_from_checkpoint", "nowhere"], "nowhere: there is no such folder"),
        ("export", ["--device", "cuda:99"], "--device cuda:99: torch sees"),
        ("export", ["--device", "tpu"], "--device tpu: no such device"),
        ("export", ["--bf16", "--fp16"], "--bf16 contradicts --fp16"),
        ("export", ["--max_shard_size", "-5"], "'-5' is not a size"),
        ("export", ["--format", "onnx"], "--format: 'onnx': use --format gguf or hf"),
        ("export", ["--output_dir", "ADAPTER"], "is not empty"),
    ],
)
def test_flags(script, flags, message, start, place):
    assert message in refused(start, place, script, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(start, place):
    complaint = refused(start, place, "train", "--device", "cuda")
    assert "torch sees 0 GPUs. Use --device cpu." in complaint


def test_a_link_to_an_input_is_not_an_output(start, place):
    (place / "link").symlink_to(place / "checkpoint")
    for name in ("link", "adapter/../checkpoint"):
        for script in ("train", "export"):
            complaint = refused(
                start, place, script, "--output_dir", place / name, "--overwrite_output_dir"
            )
            assert "is an input" in complaint


def test_no_room_on_the_disk(start, place, monkeypatch):
    """If it is known before, nothing is written. If a write fails, no partial file stays."""
    usage = shutil.disk_usage(place)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        complaint = refused(start, place, "export")
    assert "the disk has 1.0 KB free" in complaint
    with file_size_limit(20_000):
        status, _, complaint = start("export")
    assert status == 2 and complaint.count("\n") == 1
    assert "model.safetensors: could not be written: " in complaint
    assert not everything(place / "out")
