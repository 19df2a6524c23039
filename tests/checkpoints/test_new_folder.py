"""Results are written aside: the old files or the new ones, never a mixture that looks complete."""

import os

import pytest
from full_disk import file_size_limit

import export
from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.new_folder import new_folder
from minisft.common.errors import UserError
from minisft.common.outputs import check_output_dir
from minisft.model.lora import LoraConfig, add_lora

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/a.jinja")


def write(folder, text):
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("number", range(1, len(NAMES) + 2))
def test_every_point_of_a_move(number, tmp_path, monkeypatch):
    """Whatever fails: a folder with its marker holds the files of one result."""
    out, replace, moved = tmp_path / "out", os.replace, []
    write(out, "old")
    (out / "adapter_config.json").write_text("old")  # of another kind of result
    (out / "generation_config.json").write_text("old")
    (out / "notes.txt").write_text("somebody else's")

    def fails(source, target):
        moved.append(target)
        if len(moved) == number:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    try:
        with new_folder(out, "config.json", "Make room.") as folder:
            write(folder, "new")
        is_done = True
    except UserError as error:
        is_done = False
        assert str(error).startswith(f"{out}: the result is not saved: ")
        assert str(error).endswith(". Make room.")
    left = contents(out)
    assert left.pop("notes.txt") == b"somebody else's"
    assert not any("partial" in name for name in left)
    assert ("config.json" in left) == is_done == (number > len(NAMES))
    assert not is_done or left == dict.fromkeys(NAMES, b"new")


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_an_export_to_a_full_disk(format, checkpoint, tmp_path, here):
    """An earlier export stays as it is, and a new folder does not appear."""
    model, config = load_model(checkpoint), LoraConfig(rank=32, alpha=8)
    add_lora(model, config)
    save_adapter(model, tmp_path / "adapter", config, checkpoint)
    words = ["--model_name_or_path", checkpoint, "--adapter", tmp_path / "adapter"]
    words += ["--format", format, "--overwrite_output_dir", "--output_dir"]
    here(export, *words, tmp_path / "old")
    before = contents(tmp_path / "old")
    assert {"tokenizer.json", "README.md"} <= before.keys()
    for limit in (100, 20_000):  # in the first file, and in the weights
        for name in ("old", "new"):
            with file_size_limit(limit), pytest.raises(UserError) as error:
                here(export, *words, tmp_path / name)
            assert f"{name}: the result is not saved: " in str(error.value)
            assert str(error.value).count("could not be written") == 1
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_what_a_kill_leaves_is_no_content(tmp_path):
    """The same command starts again, without --overwrite_output_dir."""
    (tmp_path / "out/result.partial").mkdir(parents=True)
    assert check_output_dir(tmp_path / "out", overwrite=False) == tmp_path / "out"
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        check_output_dir(tmp_path / "out", overwrite=False)
