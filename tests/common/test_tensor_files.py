"""Safetensors and shard indexes: read as the library reads them; hostile files are refused."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import CONFIG
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minisft.checkpoints.folders import load_model, save_model
from minisft.common.errors import UserError
from minisft.common.tensor_files import DTYPES, INDEX, read_header, tensor_files
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM


def test_every_type_and_shape_as_the_library_reads_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        for shape in ((), (0,), (3,), (2, 5), (1, 2, 3), (4, 0, 2)):
            numbers = torch.randint(0, 2, shape, generator=generator).to(dtype)
            tensors[f"{dtype} {list(shape)} 中文"] = numbers
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt", "any": "text"})
    found = {
        name: stored.read() for name, stored in read_header(tmp_path / "all.safetensors").items()
    }
    theirs = load_file(tmp_path / "all.safetensors")
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_real_checkpoints(shared_data):
    path = shared_data / "models" / "stories260K" / "model.safetensors"
    theirs = load_file(path)
    assert all(
        torch.equal(stored.read(), theirs[name]) for name, stored in read_header(path).items()
    )


def entry(start, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
REPEATED = (
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
)
# The header of a file with 16 bytes of data, and the error about it.
HOSTILE = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 16, shape=(3,))}, "b overlaps with"),
    "the same place twice": (
        {"a": entry(0, 16, shape=(4,)), "b": entry(0, 16, shape=(4,))},
        "overlaps with",
    ),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16, shape=(1,))}, "b leaves a gap"),
    "late start": ({"b": entry(8, 16)}, "b leaves a gap"),
    "beyond the end": (
        {"a": entry(0, 8), "b": entry(8, 1 << 40, shape=((1 << 38) - 2,))},
        "the file at",
    ),
    "bytes left over": ({"a": entry(0, 8)}, "its tensors end at byte"),
    "negative offset": ({"a": entry(-8, 0), "b": entry(0, 16, shape=(4,))}, "data_offsets -8"),
    "end before start": ({"a": entry(8, 0), "b": entry(0, 16, shape=(4,))}, "data_offsets 8, 0"),
    "offsets that are no numbers": ({"a": entry("0", True)}, "data_offsets '0'"),
    "one offset": ({"a": {**entry(0, 8), "data_offsets": [0]}}, "no dtype, shape and data_offsets"),
    "size is not shape x type": ({"a": entry(0, 16, shape=(3,))}, "a takes 16 bytes, but F32"),
    "huge shape": ({"a": entry(0, 16, shape=(1 << 40, 1 << 40))}, "of shape"),
    "shape that wraps round": ({"a": entry(0, 16, shape=(1 << 63, 2))}, "has the shape"),
    "negative shape": ({"a": entry(0, 16, shape=(-2, -2))}, "has the shape"),
    "fractional shape": ({"a": entry(0, 16, shape=(4.0,))}, "has the shape"),
    "shape without end": ({"a": entry(0, 16, shape=(1,) * 10**5 + (4,))}, "has the shape"),
    "unknown type": ({"a": entry(0, 16, "F8_E5M9", (16,))}, "of type 'F8_E5M9'; supported are F64"),
    "type that is no text": ({"a": entry(0, 16, ["F32"], (4,))}, r"of type \['F32'\]"),
    "no entry": ({"a": 16}, "a has no dtype, shape and data_offsets"),
    "no object": ([], "the header does not begin with {"),
    "no JSON": ('{"a": ', "Expecting value"),
    "not UTF-8": (b'{"\xff": 1}', "can't decode byte"),
    "nested without end": ('{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "recursion"),
    "a name twice": (REPEATED, "a is in the header twice"),
    "metadata that is no text": ({"__metadata__": {"x": [1]}, **GOOD}, "__metadata__"),
    "metadata that is no object": ({"__metadata__": 5, **GOOD}, "damaged"),
}


def safetensors_bytes(header, data=bytes(16)):
    header = header if isinstance(header, str | bytes) else json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name, tmp_path):
    header, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header))
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 2100
    if name != "shape without end":  # the library accepts it
        with pytest.raises(SafetensorError), safe_open(path, framework="pt") as file:
            file.keys()


def test_a_header_with_a_million_names_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("json.loads", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes("{" + '"a":1,' * 10**6 + '"b":1}'))
    with pytest.raises(UserError, match="lists more than 100,000 tensors"):
        read_header(path)


def test_a_correct_file_is_accepted(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({**GOOD, "__metadata__": {"format": "pt"}}))
    assert list(read_header(path)) == ["a", "b"] and len(load_file(path)) == 2


WHOLE = safetensors_bytes(GOOD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x10\0", "in a file of 2"),
        (WHOLE[:8], "in a file of 8"),
        (WHOLE[:40], "in a file of 40"),
        (WHOLE[:-1], "the file at"),
        (WHOLE + b"x", "the file at"),
        (b"\xff" * 8 + WHOLE[8:], "a header of 18,446,744,073,709,551,615 bytes"),
        ((10**8 + 1).to_bytes(8, "little") + WHOLE[8:], "a header of 100,000,001 bytes"),
    ],
)
def test_cut_off_and_oversized(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(path)


def test_a_header_too_long_in_a_file_that_has_it(tmp_path):
    """A sparse file: its length is checked before the header is read."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(10**9)
    with pytest.raises(UserError, match="100,000,001 bytes in a file of 1,000,000,000"):
        read_header(path)


def new_model():
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    model.initialize(torch.Generator().manual_seed(0))
    return model


def test_nothing_is_read_before_all_is_checked(tmp_path):
    """A tensor of a terabyte in a sparse file: its shape is refused from the header."""
    save_model(new_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    content, (header_length,) = path.read_bytes(), np.fromfile(path, np.uint64, 1)
    header = json.loads(content[8 : 8 + int(header_length)])
    last = max(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"][1],
    )
    width = header[last]["shape"][1:]
    start = header[last]["data_offsets"][0]
    header[last]["shape"] = [2**40 // 4 // int(np.prod(width)), *width]
    header[last]["data_offsets"] = [start, start + 2**40]
    with open(path, "wb") as file:
        file.write(safetensors_bytes(header, b""))
        file.truncate(file.tell() + start + 2**40)
    tracemalloc.start()
    with pytest.raises(UserError, match="config.json says"):
        load_model(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


def test_a_file_truncated_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    stored = read_header(path)["b"]
    path.write_bytes(WHOLE[:-4])
    with pytest.raises(UserError, match="was truncated"):
        stored.read()


# Indexes


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in several shards, and its index."""
    save_model(new_model(), tmp_path, max_shard_size=20_000)
    return tmp_path, json.loads((tmp_path / INDEX).read_text())


def refused(folder, index):
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError) as caught:
        tensor_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "lost.safetensors",
        "..",
        "",
        ".",
        "a/../b",
        "x" * 5000,
        "nul\0",
        7,
        None,
        ["a"],
    ],
)
def test_an_index_names_only_files_beside_it(shard, sharded):
    folder, index = sharded
    outside = folder.parent / "model.safetensors"
    outside.write_bytes(WHOLE)
    index["weight_map"]["model.norm.weight"] = shard
    assert "is not a file in" in refused(folder, index)
    outside.unlink()


def test_indexes_that_do_not_fit_their_shards(sharded):
    folder, index = sharded
    weight_map = index["weight_map"]
    shards = sorted(set(weight_map.values()))
    extra = {**weight_map, "model.extra.weight": shards[0]}
    assert "not in any shard: model.extra.weight" in refused(folder, {"weight_map": extra})
    name = next(name for name, shard in weight_map.items() if shard == shards[0])
    moved = {**weight_map, name: shards[1]}
    assert f"not in the shard it names: {name}" in refused(folder, {"weight_map": moved})
    for broken in ("[]", "{", '{"weight_map": {}}', '{"weight_map": []}', "null", ""):
        assert INDEX in refused(folder, broken)
    save_file({name: torch.zeros(1)}, folder / "again.safetensors")
    twice = {**weight_map, "model.norm.weight": "again.safetensors"}
    assert f"tensor {name} is in again.safetensors and {shards[0]}" in refused(
        folder, {"weight_map": twice}
    )


def test_many_missing_tensors_are_counted(sharded):
    folder, index = sharded
    index["weight_map"] |= {
        f"extra.{number}": index["weight_map"]["lm_head.weight"] for number in range(9)
    }
    assert "extra.0, extra.1, extra.2, extra.3, extra.4 and 4 more" in refused(folder, index)


def test_links_are_followed(sharded, tmp_path):
    """As the hub's cache has it, every file of a snapshot is a link to a blob elsewhere."""
    folder, _ = sharded
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.glob("*.*"):
        os.symlink(path, snapshot / path.name)
    assert tensor_files(snapshot).keys() == tensor_files(folder).keys()
    load_model(snapshot)
