"""GGUF files as checkpoints: the exact weights, llama.cpp's numbers, and all scripts."""

import csv
import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import command
from gguf_models import FAMILIES, STRETCHED, VOCAB, prompts, save
from llama_cpp import Server

import eval as eval_script
import score
from minisft.checkpoints import folders, gguf_export, hub
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.gguf import writer
from minisft.gguf.reader import read_gguf
from minisft.gguf.unpack_config import config_fields
from minisft.gguf.unpack_tokenizer import tokenizer_files
from minisft.model.config import ModelConfig
from minisft.text.tokenizer import Tokenizer

DERIVED = (
    "original",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "model_type",
    "max_window_layers",
    "attention_bias",
)


@pytest.fixture
def exported(tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, {"rope_theta": 20000.0})
    export_model(folder, tmp_path / "model.gguf", "f32")
    return tmp_path / "model.gguf"


def opened(path):
    return hub.resolve(str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path, tiny_tokenizer_dir):
    folder = save(tmp_path / "model", tiny_tokenizer_dir, FAMILIES[family])
    export_model(folder, tmp_path / "model.gguf", "f32")
    back = opened(tmp_path / "model.gguf")
    ours, theirs = (dict(folders.load_model(one).named_parameters()) for one in (folder, back))
    assert ours.keys() == theirs.keys()
    if ModelConfig.load(folder).norm_head:  # the file holds the rows as they count
        ours["lm_head.weight"] = torch.nn.functional.normalize(ours["lm_head.weight"])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.tensor([prompts()[2]])
    with torch.no_grad():
        one, other = (folders.load_model(each)(tokens) for each in (folder, back))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # so the rotary order is right
    tokenizers = [Tokenizer.load(one) for one in (folder, back)]
    for text in ("the Cat sat on the MAT", " hat</s>  <|im_end|>\n12345 3.14", "你好 é 👩‍👧"):
        assert len({tuple(one.encode(text)) for one in tokenizers}) == 1
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "add_bos_token", "special_ids"):
        assert getattr(tokenizers[0], name) == getattr(tokenizers[1], name)


def test_rows_of_a_part_of_a_head(tmp_path, tiny_tokenizer_dir):
    """The ranks of a sharded model read such rows. A head has 12 here, in another order."""
    settings = {"hidden_size": 48, "num_attention_heads": 4, "attention_bias": True}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, settings)
    export_model(folder, tmp_path / "model.gguf", "f32")
    stored = folders.stored_tensors(opened(tmp_path / "model.gguf"))
    for kind in ("weight", "bias"):
        for name in ("q_proj", "k_proj", "o_proj"):
            tensor = stored[f"model.layers.0.self_attn.{name}.{kind}"]
            for begin, end in ((0, 7), (7, 14), (12, 24), (14, 21), (5, 5)):
                assert torch.equal(tensor.read(begin, end), tensor.read()[begin:end])


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q5_1", "q4_k_m"])
def test_quantised_files_read_as_llama_cpp_reads_them(quantization, tmp_path, tiny_tokenizer_dir):
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, wide)
    export_model(folder, tmp_path / "model.gguf", quantization)
    check_against_llama_cpp(tmp_path / "model.gguf")


def check_against_llama_cpp(path, limit=0.15):
    """Log-probabilities. llama.cpp rounds the activations too; we do not."""
    model, ids = folders.load_model(opened(path), torch.float32), prompts()[1]
    with torch.no_grad():
        ours = torch.log_softmax(model.logits(model(torch.tensor([ids]))[0, -1]), -1).numpy()
    with Server(path) as server:
        theirs = server.log_probabilities(ids, VOCAB)
    assert np.abs(ours - theirs).max() < limit


SMALL_SCALES = {"IQ1_M": 0x97FF, "TQ2_0": 0x9FFF, "IQ4_XS": 0x87FF}  # bits that float16 may have


@pytest.mark.parametrize(
    "type", ["Q2_K", "Q3_K", "Q5_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", *SMALL_SCALES]
)
def test_types_that_only_others_write(type, tmp_path, tiny_tokenizer_dir, monkeypatch):
    """Random blocks with small numbers: we read the same as llama.cpp."""
    mask = SMALL_SCALES.get(type, 0x8FFF)
    type = gguf.GGMLQuantizationType[type]
    generator, (block, block_bytes) = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[type]

    def arbitrary(rows):
        size = (len(rows), rows.shape[1] // block * block_bytes // 2)
        halves = generator.integers(0, 2**16, size, dtype=np.uint16) & mask
        return halves.view(np.uint8)

    monkeypatch.setitem(writer.K_QUANTS, type, arbitrary)
    monkeypatch.setattr(
        gguf_export,
        "tensor_type",
        lambda name, *others: (
            type if ".ffn_up." in name or ".attn_q." in name else gguf.GGMLQuantizationType.F32
        ),
    )
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, wide)
    export_model(folder, tmp_path / "model.gguf", "f32")
    check_against_llama_cpp(tmp_path / "model.gguf", 0.1)


def test_a_file_can_be_exported_again(exported, tmp_path):
    done = command(
        "--model_name_or_path", exported, "--output_dir", tmp_path / "again", script="export.py"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        folders.load_model(one).state_dict() for one in (tmp_path / "model", tmp_path / "again")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    export_model(opened(exported), tmp_path / "again.gguf", "f32", name="model")
    assert (tmp_path / "again.gguf").read_bytes() == exported.read_bytes()


def test_chat_on_a_gguf_file(tiny_chat_model_dir, tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    words = ["--prompt", "the cat", "--greedy", "--max_new_tokens", "12"]
    answers = [
        command("--model_name_or_path", model, *words, script="chat.py")
        for model in (tiny_chat_model_dir, tmp_path / "model.gguf")
    ]
    assert answers[1].returncode == 0, answers[1].stderr
    assert answers[0].stdout == answers[1].stdout != ""


def test_transformers_reads_what_is_unpacked(exported, shared_data, tmp_path):
    """With the tokenizer files of a GGUF file, transformers produces our ids."""
    export_model(shared_data / "models" / "stories260K", tmp_path / "stories.gguf", "f16")
    for path in (exported, tmp_path / "stories.gguf"):
        folder = opened(path)
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("the cat", "Two  spaces.\n\nOnce upon", "12345 3.14 你好 é 👩‍👧\ttab"):
            assert theirs(text).input_ids == [ours.bos_token_id, *ours.encode(text)], text
        assert theirs.eos_token_id == ours.eos_token_id


def test_a_template_for_conversations_with_tools(exported):
    metadata = read_gguf(exported).metadata
    texts = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    files = tokenizer_files(metadata | texts, len(metadata["tokenizer.ggml.tokens"]))
    expected = "{% if tools %}\ntools{% else %}\nplain{% endif %}"
    assert files["tokenizer_config.json"]["chat_template"] == expected


@pytest.fixture
def run_script(monkeypatch):
    """run_script(module, model, *words): run a script with `model` for --model_name_or_path.

    A GGUF file is run as a user would, a folder in this process, which is faster.
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


def near(rows):
    """A table to compare with: it equals one with the same fields, numbers up to rounding."""
    return [pytest.approx(row, rel=1e-5) for row in rows]


def as_numbers(row):
    """A row of a CSV file, its columns A to D as numbers."""
    return {name: float(value) if name in "ABCD" else value for name, value in row.items()}


def test_eval_gives_the_same_for_file_and_folder(run_script, tiny_chat_model_dir, tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    benchmark, rows = tmp_path / "ceval", []
    for split, count in (("dev", 2), ("val", 7)):
        (benchmark / split).mkdir(parents=True)
        lines = [f"{n},Who {n}?,the cat,the rat,a hat,it,B" for n in range(count)]
        (benchmark / split / f"law_{split}.csv").write_text(
            "\n".join(["id,question,A,B,C,D,answer", *lines]) + "\n"
        )
    (benchmark / "subject_mapping.json").write_text('{"law": {"name": "法学", "category": "X"}}')
    for number, model in enumerate((tiny_chat_model_dir, tmp_path / "model.gguf")):
        run_script(
            eval_script,
            model,
            "ceval",
            "--data_dir",
            benchmark,
            "--num_fewshot",
            2,
            "--template",
            "auto",
            "--output_dir",
            tmp_path / str(number),
        )
        with open(tmp_path / str(number) / "ceval-val" / "law.csv", encoding="utf-8") as file:
            rows.append([as_numbers(row) for row in csv.DictReader(file)])
    of_folder, of_file = rows
    assert len(of_folder) == 7 and of_file == near(of_folder)


def test_score_gives_the_same_for_file_and_folder(
    run_script, tiny_chat_model_dir, rows_file, tmp_path
):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    for number, model in enumerate((tiny_chat_model_dir, tmp_path / "model.gguf")):
        run_script(
            score,
            model,
            "--dataset",
            rows_file,
            "--mode",
            "all",
            "--template",
            "auto",
            "--dataloader_num_workers",
            0,
            "--output",
            tmp_path / f"{number}.jsonl",
        )
    of_folder, of_file = (
        [json.loads(line) for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()]
        for number in (0, 1)
    )
    assert len(of_folder) == 24 and of_file == near(of_folder)
    embeddings = [np.load(tmp_path / f"{number}.embeddings.npy") for number in (0, 1)]
    np.testing.assert_allclose(*embeddings, rtol=1e-5, atol=1e-6)


def test_compare_gives_the_same_for_file_and_folder(tiny_chat_model_dir, rows_file, tmp_path):
    export_model(tiny_chat_model_dir, tmp_path / "model.gguf", "f32")
    done = command(
        "compare",
        "--models",
        f"folder={tiny_chat_model_dir}",
        f"file={tmp_path / 'model.gguf'}",
        "--dataset",
        rows_file,
        "--max_samples",
        3,
        "--max_new_tokens",
        8,
        "--dtype",
        "float32",
        "--temperature",
        0,
        "--output_dir",
        tmp_path / "out",
        script="eval.py",
    )
    assert done.returncode == 0, done.stderr
    folder, file = (
        json.loads((tmp_path / "out" / "answers" / f"{name}.json").read_text())
        for name in ("folder", "file")
    )
    assert folder["answers"] == file["answers"]
    np.testing.assert_allclose(folder["losses"], file["losses"], rtol=1e-5)


def test_a_file_is_recognised_by_its_first_bytes(exported):
    for name in ("sha256-70c2f9ff", "MODEL.GGUF"):
        path = shutil.copyfile(exported, exported.with_name(name))
        folders.load_model(opened(path))
    with pytest.raises(UserError, match="no config.json.*give the file: .*model.gguf"):
        opened(exported.parent)


def test_linear_scaling_in_older_files(exported):
    file = read_gguf(exported)
    for added, factor in (
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scale_linear": 1.0}, None),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
    ):
        scaling = config_fields({**file.metadata, **added}, file.tensors)["rope_scaling"]
        assert (
            scaling
            and (scaling["rope_type"], scaling["factor"]) == ("linear", factor)
            or (scaling is factor is None)
        )


def test_round_trip_of_the_config(tmp_path, tiny_tokenizer_dir):
    for index, content in enumerate(FAMILIES.values()):
        folder = save(tmp_path / str(index), tiny_tokenizer_dir, content)
        export_model(folder, tmp_path / "model.gguf", "q8_0")
        ours, theirs = (
            vars(ModelConfig.load(one)) for one in (folder, opened(tmp_path / "model.gguf"))
        )
        for name in ours.keys() - set(DERIVED) - {"rope_scaling"}:
            assert ours[name] == pytest.approx(theirs[name]), name
        assert (ours["rope_scaling"] is None) == (theirs["rope_scaling"] is None)
        assert read_gguf(tmp_path / "model.gguf").metadata["general.file_type"] == 7


def test_yarn_with_a_factor_of_1_keeps_its_temperature(tmp_path, tiny_tokenizer_dir):
    yarn = {"rope_type": "yarn", **STRETCHED, "factor": 1.0, "attention_factor": 1.2}
    folder = save(tmp_path / "model", tiny_tokenizer_dir, {"rope_scaling": yarn})
    export_model(folder, tmp_path / "model.gguf", "f32")
    scaling = ModelConfig.load(opened(tmp_path / "model.gguf")).rope_scaling
    assert scaling["attention_factor"] == pytest.approx(1.2)
    check_against_llama_cpp(tmp_path / "model.gguf", 0.01)
