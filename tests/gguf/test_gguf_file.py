"""Damaged, hostile and unknown GGUF files: one line of error, before memory is allocated."""

import random
import struct
import tracemalloc
from dataclasses import replace

import gguf
import pytest
from conftest import command
from gguf_models import save

from minisft.checkpoints import folders, hub
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.gguf import unpack
from minisft.gguf.reader import read_gguf
from minisft.model.decoder import CausalLM
from minisft.text.tokenizer import Tokenizer


@pytest.fixture
def exported(tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, {})
    export_model(folder, tmp_path / "model.gguf", "f32")
    return tmp_path / "model.gguf"


def opened(path):
    return hub.resolve(str(path))


def damaged(path, data, position=0):
    """A copy of a file with other bytes at a position."""
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    target = path.with_name("damaged.gguf")
    target.write_bytes(content)
    return target


def test_large_counts_take_no_memory(exported):
    huge = struct.pack("<Q", 2**62)
    first_key = 4 + 4 + 8 + 8
    kinds = {
        "tensors": damaged(exported, huge, 8).read_bytes(),
        "fields": damaged(exported, huge, 16).read_bytes(),
        "key": damaged(exported, huge, first_key).read_bytes(),
    }
    content = exported.read_bytes()
    for name in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        place = content.index(name) + len(name) + 4 + 4
        kinds[name] = damaged(exported, struct.pack("<Q", 2**40), place).read_bytes()
    place = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4 + 8
    kinds["token"] = damaged(exported, huge, place).read_bytes()
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    kinds["shape"] = damaged(exported, huge, place + 4).read_bytes()
    kinds["offset"] = damaged(exported, huge, place + 4 + 8 + 8 + 4).read_bytes()
    for name, data in kinds.items():
        target = exported.with_name("hostile.gguf")
        target.write_bytes(data)
        tracemalloc.start()
        string = "a string of 4,611,686,018,427,387,904 bytes"
        message = {
            "shape": "has the shape|bytes at offset",
            "offset": "bytes at offset",
            "token": string,
            "key": string,
        }.get(name, "announces [0-9,]+ entries")
        with pytest.raises(UserError, match=f"hostile.gguf: damaged.*{message}"):
            opened(target)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content), name
        tracemalloc.stop()


def test_counts_in_a_sparse_file_take_no_memory(tmp_path):
    """Such a file has any size, so a count can be smaller than the file and still be huge."""
    path = tmp_path / "sparse.gguf"
    for field in (
        struct.pack("<IQ", 8, 2**30),
        struct.pack("<IIQ", 9, 0, 2**30),
        struct.pack("<IIQ", 9, 8, 2**27),
    ):
        with open(path, "wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + field)
            file.truncate(2**32)
        tracemalloc.start()
        with pytest.raises(UserError, match="announces"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    "words",
    [
        ["chat.py", "--model_name_or_path", "FILE", "--prompt", "hi"],
        ["score.py", "--model_name_or_path", "FILE", "--dataset", "ROWS", "--output", "OUT.jsonl"],
        [
            "eval.py",
            "compare",
            "--models",
            "one=FILE",
            "two=FILE",
            "--dataset",
            "ROWS",
            "--output_dir",
            "OUT",
        ],
        ["export.py", "--model_name_or_path", "FILE", "--output_dir", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_scripts_refuse_a_truncated_file(words, exported, rows_file, tmp_path):
    path = tmp_path / "sha256-70c2f9ff"  # Ollama names its files like this
    path.write_bytes(exported.read_bytes()[:-1000])
    there = sorted(tmp_path.iterdir())
    for name, place in (("FILE", path), ("ROWS", rows_file), ("OUT", tmp_path / "out")):
        words = [word.replace(name, str(place)) for word in words]
    done = command(*words[1:], script=words[0])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "sha256-70c2f9ff: damaged" in done.stderr
    assert sorted(tmp_path.iterdir()) == there


def test_truncated_and_garbled_files(exported):
    content = exported.read_bytes()
    head = content.index(b"output_norm.weight") + 60
    generator = random.Random(0)
    for length in [*range(0, head, 97), head, len(content) - 1]:
        target = exported.with_name("short.gguf")
        target.write_bytes(content[:length])
        with pytest.raises(UserError, match="short.gguf"):
            opened(target)
    survivors = 0
    for _ in range(150):
        place = generator.randrange(head)
        target = damaged(exported, generator.randbytes(generator.choice([1, 2, 8])), place)
        try:
            folder = opened(target)
            Tokenizer.load(folder)
            folders.load_model(folder)
            survivors += 1  # the changed byte was in the text of a token, for example
        except UserError:
            pass
    assert survivors < 120


def test_any_value_of_any_field(exported, monkeypatch):
    """The file can be used, or it is refused with a UserError."""
    file, refused = read_gguf(exported), 0
    for name in [
        *file.metadata,
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.add_space_prefix",
    ]:
        for value in (-1, 2**40, float("nan"), float("inf"), True, "", "x", [], ["x"], [1]):
            changed = replace(file, metadata={**file.metadata, name: value})
            monkeypatch.setattr(unpack, "read_gguf", lambda path, changed=changed: changed)
            try:
                folder = opened(exported)
                Tokenizer.load(folder)
                folders.open_model(folder, CausalLM)
            except UserError:
                refused += 1
    assert refused > 100


def test_overlapping_tensors(exported):
    """A small file could use the same bytes for a thousand tensors, each of which takes memory."""
    name = b"output_norm.weight"
    place = exported.read_bytes().index(name) + len(name) + 4 + 8 + 4
    with pytest.raises(UserError, match="the tensors '.+' and '.+' overlap"):
        opened(damaged(exported, struct.pack("<Q", 0), place))


def test_a_part_of_a_split_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of the 3 parts of a model.*--merge"):
        opened(tmp_path / "model-00001-of-00003.gguf")


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "default", ""])
def test_unsupported_pre_tokenizers(name, exported, monkeypatch):
    file = read_gguf(exported)
    changed = replace(file, metadata={**file.metadata, "tokenizer.ggml.pre": name})
    monkeypatch.setattr(unpack, "read_gguf", lambda path: changed)
    with pytest.raises(UserError, match=f"model.gguf: the pre-tokenizer '{name}' is not supported"):
        opened(exported)


def test_invalid_types_of_tokens(exported):
    name = b"tokenizer.ggml.token_type"
    place = exported.read_bytes().index(name) + len(name) + 4 + 4 + 8 + 20 * 4
    for kind in (-5, 77):
        with pytest.raises(UserError, match=f"token_type: {kind} is not a type"):
            opened(damaged(exported, struct.pack("<i", kind), place))


def test_unsupported_models_tokenizers_and_types(exported):
    content = exported.read_bytes()
    for old, new, message in (
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0falco", "falco"),
        (b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-3", "gpt-3"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", "ffn_xx"),
        (
            b"output_norm.weight" + struct.pack("<IQI", 1, 64, 0),  # 31 was Q4_0_4_4
            b"output_norm.weight" + struct.pack("<IQI", 1, 64, 31),
            "'output_norm.weight' has the unknown type 31",
        ),
        (
            b"output_norm.weight" + struct.pack("<IQI", 1, 64, 0),
            b"output_norm.weight" + struct.pack("<IQI", 1, 64, 26),
            "'output_norm.weight' has the type I32, which cannot be read",
        ),
    ):
        assert content.count(old) == 1
        target = damaged(exported, new, content.index(old))
        with pytest.raises(UserError, match=message):
            folders.load_model(opened(target))
    exported.with_name("plain.bin").write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match="is a file"):
        hub.resolve(str(exported.with_name("plain.bin")))
