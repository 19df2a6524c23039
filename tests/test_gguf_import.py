"""Reading GGUF back: bit for bit, with llama.cpp's ids; hostile files are refused at once."""

import csv
import json
import random
import shutil
import struct
import sys
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import command
from llama_cpp import Server
from test_gguf_export import FAMILIES, VOCAB, prompts, save

import eval as eval_script
import score
from minisft import gguf_import, weights
from minisft.config import ModelConfig
from minisft.gguf_export import export_model
from minisft.gguf_file import read_gguf
from minisft.gguf_mapping import config_fields
from minisft.options import UserError
from minisft.tokenizer import Tokenizer

DERIVED = ("original", "initializer_range", "bos_token_id", "eos_token_id", "model_type",
           "max_window_layers", "attention_bias")


@pytest.fixture
def exported(tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, {"rope_theta": 20000.0})
    export_model(folder, tmp_path / "model.gguf", "f32")
    return tmp_path / "model.gguf"


def opened(path):
    return weights.resolve(str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, FAMILIES[family])
    export_model(folder, tmp_path / "model.gguf", "f32")
    back = opened(tmp_path / "model.gguf")
    ours, theirs = (dict(weights.load_model(one).named_parameters()) for one in (folder, back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.tensor([prompts()[2]])
    with torch.no_grad():
        one, other = (weights.load_model(each)(tokens) for each in (folder, back))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # the rotation comes through too
    tokenizers = [Tokenizer.load(one) for one in (folder, back)]
    for text in ("the Cat sat on the MAT", " hat</s>  <|im_end|>\n12345 3.14", "你好 é 👩‍👧"):
        assert len({tuple(one.encode(text)) for one in tokenizers}) == 1
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "add_bos_token", "special_ids"):
        assert getattr(tokenizers[0], name) == getattr(tokenizers[1], name)


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q5_1", "q4_k_m"])
def test_quantised_files_read_as_llama_cpp_reads_them(quantization, tmp_path, tiny_tokenizer_dir):
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, wide)
    export_model(folder, tmp_path / "model.gguf", quantization)
    model, ids = weights.load_model(opened(tmp_path / "model.gguf")), prompts()[1]
    with torch.no_grad():
        ours = torch.log_softmax(model.logits(model(torch.tensor([ids]))[0, -1]), -1).numpy()
    with Server(tmp_path / "model.gguf") as server:
        theirs = server.log_probabilities(ids, VOCAB)
    # llama.cpp rounds the activations as well, we do not.
    assert np.abs(ours - theirs).max() < 0.15


def test_what_was_exported_can_be_exported_again(exported, tmp_path):
    done = command("--model_name_or_path", exported, "--output_dir", tmp_path / "again",
                   script="export.py")
    assert done.returncode == 0, done.stderr
    ours, theirs = (weights.load_model(one).state_dict()
                    for one in (tmp_path / "model", tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    export_model(opened(exported), tmp_path / "again.gguf", "f32", name="model")
    assert (tmp_path / "again.gguf").read_bytes() == exported.read_bytes()


def test_chat_on_a_gguf_file(tiny_chat_model_dir, tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    words = ["--prompt", "the cat", "--greedy", "--max_new_tokens", "12"]
    answers = [command("--model_name_or_path", model, *words, script="chat.py")
               for model in (tiny_chat_model_dir, tmp_path / "model.gguf")]
    assert answers[1].returncode == 0, answers[1].stderr
    assert answers[0].stdout == answers[1].stdout != ""


def test_transformers_reads_what_is_unpacked(exported, shared_data, tmp_path):
    """The tokenizer of a folder that export.py --format hf makes of a GGUF file."""
    export_model(shared_data / "models" / "stories260K", tmp_path / "stories.gguf", "f16")
    for path in (exported, tmp_path / "stories.gguf"):
        folder = opened(path)
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("the cat", "Two  spaces.\n\nOnce upon", "12345 3.14 你好 é 👩‍👧\ttab"):
            assert theirs(text).input_ids == [ours.bos_token_id, *ours.encode(text)], text
        assert theirs.eos_token_id == ours.eos_token_id


@pytest.fixture
def run_script(monkeypatch):
    """A function that runs a script: one GGUF file as a user does, a checkpoint here, to be quick.

    run_script(module, model, *words) with `model` for --model_name_or_path.
    """

    def run(module, model, *words):
        words = [*words, "--model_name_or_path", model, "--dtype", "float32"]
        if model.suffix == ".gguf":
            done = command(*words, script=f"{module.__name__}.py")
            assert done.returncode == 0, done.stderr
        else:
            monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
            module.main()

    return run


def same(rows, others):
    """Whether tables have equal fields, numbers up to rounding."""
    assert len(rows) == len(others) > 5
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if name in ("A", "B", "C", "D") or isinstance(value, float):
                assert float(other[name]) == pytest.approx(float(value), rel=1e-5)
            else:
                assert other[name] == value, name


def test_eval_of_a_file_is_that_of_the_checkpoint(run_script, tiny_chat_model_dir, tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    benchmark, rows = tmp_path / "ceval", []
    for split, count in (("dev", 2), ("val", 7)):
        (benchmark / split).mkdir(parents=True)
        lines = [f"{n},Who {n}?,the cat,the rat,a hat,it,B" for n in range(count)]
        (benchmark / split / f"law_{split}.csv").write_text(
            "\n".join(["id,question,A,B,C,D,answer", *lines]) + "\n")
    (benchmark / "subject_mapping.json").write_text('{"law": {"name": "法学", "category": "X"}}')
    for number, model in enumerate((tiny_chat_model_dir, tmp_path / "model.gguf")):
        run_script(eval_script, model, "ceval", "--data_dir", benchmark, "--num_fewshot", 2,
                   "--template", "auto", "--output_dir", tmp_path / str(number))
        with open(tmp_path / str(number) / "ceval-val" / "law.csv", encoding="utf-8") as file:
            rows.append(list(csv.DictReader(file)))
    same(*rows)


def test_score_of_a_file_is_that_of_the_checkpoint(run_script, tiny_chat_model_dir, rows_file,
                                                   tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    for number, model in enumerate((tiny_chat_model_dir, tmp_path / "model.gguf")):
        run_script(score, model, "--dataset", rows_file, "--mode", "all", "--template", "auto",
                   "--dataloader_num_workers", 0, "--output", tmp_path / f"{number}.jsonl")
    same(*([json.loads(line) for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()]
           for number in (0, 1)))
    embeddings = [np.load(tmp_path / f"{number}.embeddings.npy") for number in (0, 1)]
    np.testing.assert_allclose(*embeddings, rtol=1e-5, atol=1e-6)


def test_compared_with_the_checkpoint(tiny_chat_model_dir, rows_file, tmp_path):
    """eval.py compare: the same answers from both."""
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    done = command("compare", "--models", f"folder={tiny_chat_model_dir}",
                   f"file={tmp_path / 'model.gguf'}", "--dataset", rows_file, "--max_samples", 3,
                   "--max_new_tokens", 8, "--dtype", "float32", "--temperature", 0,
                   "--output_dir", tmp_path / "out", script="eval.py")
    assert done.returncode == 0, done.stderr
    folder, file = (json.loads((tmp_path / "out" / "answers" / f"{name}.json").read_text())
                    for name in ("folder", "file"))
    assert folder["answers"] == file["answers"]
    np.testing.assert_allclose(folder["losses"], file["losses"], rtol=1e-5)


def damaged(path, data, position=0):
    """A copy of `path` with other bytes from `position` on."""
    content = bytearray(path.read_bytes())
    content[position:position + len(data)] = data
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
        fault = {"shape": "has the shape|lies at bytes", "offset": "lies at bytes",
                 "token": "a string of 4,611,686,018,427,387,904 bytes begins"}
        with pytest.raises(UserError, match="hostile.gguf: damaged.*"
                           + fault.get(name, "entries follow")):
            opened(target)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content), name
        tracemalloc.stop()


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
            weights.load_model(folder)
            survivors += 1  # a changed token's text, say, is a file like another
        except UserError:
            pass
    assert survivors < 120


def test_fields_of_any_kind(exported, monkeypatch):
    """Whatever stands in a field, the file is opened or refused in a line."""
    file, refused = read_gguf(exported), 0
    for name in [*file.metadata, "llama.rope.scaling.type", "llama.rope.scaling.factor",
                 "tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix"]:
        for value in (-1, 2**40, float("nan"), float("inf"), True, "", "x", [], ["x"], [1]):
            changed = replace(file, metadata={**file.metadata, name: value})
            monkeypatch.setattr(gguf_import, "read_gguf", lambda path, changed=changed: changed)
            try:
                folder = opened(exported)
                Tokenizer.load(folder)
                weights.open_model(folder)
            except UserError:
                refused += 1
    assert refused > 100


def test_tensors_that_share_bytes(exported):
    """A small file could name the same bytes a thousand times, and each would take memory."""
    name = b"output_norm.weight"
    place = exported.read_bytes().index(name) + len(name) + 4 + 8 + 4
    with pytest.raises(UserError, match="'.+' lies on '.+'"):
        opened(damaged(exported, struct.pack("<Q", 0), place))


def test_one_part_of_a_split_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of the 3 parts of a model.*--merge"):
        opened(tmp_path / "model-00001-of-00003.gguf")


def test_a_file_is_known_by_its_beginning(exported):
    for name in ("sha256-70c2f9ff", "MODEL.GGUF"):
        path = shutil.copyfile(exported, exported.with_name(name))
        weights.load_model(opened(path))
    with pytest.raises(UserError, match="no config.json.*give the file: .*model.gguf"):
        opened(exported.parent)


def test_linear_scaling_as_older_files_say_it(exported):
    file = read_gguf(exported)
    for added, factor in (({"llama.rope.scaling.factor": 4.0}, 4.0),
                          ({"llama.rope.scale_linear": 2.0}, 2.0),
                          ({"llama.rope.scale_linear": 1.0}, None),
                          ({"llama.rope.scaling.factor": 4.0,
                            "llama.rope.scaling.type": "none"}, None)):
        scaling = config_fields({**file.metadata, **added}, file.tensors)["rope_scaling"]
        assert scaling and (scaling["rope_type"], scaling["factor"]) == ("linear", factor) or (
            scaling is factor is None)


def test_types_of_tokens_that_are_none(exported):
    name = b"tokenizer.ggml.token_type"
    place = exported.read_bytes().index(name) + len(name) + 4 + 4 + 8 + 20 * 4
    for kind in (-5, 77):
        with pytest.raises(UserError, match=f"token_type: {kind} is no type"):
            opened(damaged(exported, struct.pack("<i", kind), place))


def test_what_minisft_does_not_know(exported):
    content = exported.read_bytes()
    for old, new, message in (
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0falco", "falco"),
        (b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-3", "gpt-3"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", "ffn_xx"),
        (b"output_norm.weight" + struct.pack("<IQI", 1, 64, 0),  # Q4_0_4_4, which is gone
         b"output_norm.weight" + struct.pack("<IQI", 1, 64, 31), "type 31, which is not known"),
    ):
        assert content.count(old) == 1
        target = damaged(exported, new, content.index(old))
        with pytest.raises(UserError, match=message):
            weights.load_model(opened(target))
    exported.with_name("plain.bin").write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match="is a file"):
        weights.resolve(str(exported.with_name("plain.bin")))


def test_the_config_comes_back(tmp_path, tiny_tokenizer_dir):
    for index, content in enumerate(FAMILIES.values()):
        folder = save(tmp_path / str(index), tiny_tokenizer_dir, content)
        export_model(folder, tmp_path / "model.gguf", "q8_0")
        ours, theirs = (vars(ModelConfig.load(one)) for one in (folder, opened(
            tmp_path / "model.gguf")))
        for name in ours.keys() - set(DERIVED) - {"rope_scaling"}:
            assert ours[name] == pytest.approx(theirs[name]), name
        assert (ours["rope_scaling"] is None) == (theirs["rope_scaling"] is None)
        assert read_gguf(tmp_path / "model.gguf").metadata["general.file_type"] == 7
