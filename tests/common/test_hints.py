"""What the errors about unknown words, wrong values and files of the wrong kind say to do."""

import dataclasses
import json
import re

import numpy as np
import pytest
from test_neighbours import COMPARE, MMLU, MODEL, NEEDED, PARSERS, SCORE

from minisft.checkpoints.hub import model_or_base, resolve
from minisft.common.errors import UserError
from minisft.data.formats import parse_conversation, parse_text
from minisft.data.records import open_records
from minisft.data.row_values import BadRow
from minisft.data.sources import find_sources
from minisft.selection.score_files import parse_line
from minisft.text.template_choice import NAMES, template_text

GIVEN = {
    "train": NEEDED,
    "score": SCORE,
    "select": ["--dataset", "d", "--scores", "s.jsonl", "--strategy", "ifd", "--output", "o.json"],
    "export": [*MODEL, "--output_dir", "o"],
    "chat": MODEL,
}


def parse(script, words):
    """The options of a script with these words."""
    return PARSERS[script]([*GIVEN[script], *words.split()])


@pytest.mark.parametrize(
    ("script", "words", "hint"),
    [
        ("chat", "-m x -p hi", r"-m .did you mean --model_name_or_path.*-p .*--prompt"),
        ("chat", "-c 4096", "--max_length"),
        ("chat", "--num_ctx 4096", "--max_length"),
        ("chat", "-n 40 --temp -1", "-n .*--max_new_tokens.*--temp .*--temperature"),
        ("chat", "-ngl 99", "-ngl .the model is on one device: see --device"),
        ("chat", "--n-gpu-layers 0", "one device"),
        ("chat", "--threads 4", "OMP_NUM_THREADS"),
        ("chat", "--min_p 0.1", "--top_p"),
        ("train", "--load_in_4bit", "--load_in_4bit .use --quantization_bit 4"),
        ("train", "--bits 4", "--quantization_bit"),
        ("train", "--val_split 0.1", "--validation_split"),
        ("train", "--modelName x", "--model_name_or_path"),
        ("train", "--learningrate 1", "--learning_rate"),
        ("train", "--torch_compile", "--compile"),
        ("train", "--scheduler cosine", "--lr_scheduler_type"),
        ("train", "--eos_token x", "the chat template says how an answer ends"),
        ("train", "--wandb_project x", "WANDB_PROJECT"),
        ("train", "--tokenizer_name x", "the tokenizer is that of --model_name_or_path"),
        ("train", "--num_gpus 2", "torchrun --nproc_per_node N train.py"),
        ("train", "--qlora", "--qlora .see --help"),
        ("train", "--dpo", "did you mean --stage dpo"),
        ("export", "--q4_k_m", "did you mean --quantization q4_k_m"),
        ("export", "--gguf", "did you mean --format gguf"),
        ("export", "--bits 4", "--format gguf --quantization q4_k_m"),
        ("select", "--top_k 9", "did you mean --sample_number"),
        ("select", "--eval_strategy steps", "belongs to train.py"),
        ("select", "--save_strategy best", "in train.py: use --eval_steps"),
        ("score", "--batch_size 8", "use --batch_tokens: it counts tokens, not rows"),
    ],
)
def test_flags_of_other_programs(script, words, hint):
    with pytest.raises(UserError, match=f"no such flag: .*{hint}"):
        parse(script, words)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train", "--use_liger_kernel True --length_column_name n --padding_free False"),
        ("train", "--use_flash_attention_2 --mask_prompt --num_gpus 1 --streaming True"),
        ("train", "--load_in_4bit False --shuffle_dataset True --device_map auto"),
        ("chat", "-i -cnv"),
        ("chat", "--interactive True"),
        ("export", "--merge --load_in_8bit no"),
    ],
)
def test_flags_of_other_programs_that_ask_for_the_usual(script, words, capsys):
    parse(script, words)
    flags = re.findall(r"-+[a-z]\w*", words)
    assert capsys.readouterr().err == f"no effect in minisft: {', '.join(flags)}\n"


@pytest.mark.parametrize(
    "name",
    [
        "transformers.TrainingArguments",
        "trl.SFTConfig",
        "trl.DPOConfig",
        "trl.RewardConfig",
        "trl.ModelConfig",
        "trl.ScriptArguments",
    ],
)
def test_every_field_of_transformers_and_trl_is_known(name):
    """Each has a flag of ours, a hint or a reason, or changes nothing."""
    module, cls = name.split(".")
    fields = dataclasses.fields(getattr(pytest.importorskip(module), cls))
    unknown = []
    for field in fields:
        try:
            parse("train", f"--{field.name} zzz")
        except UserError as error:
            if str(error) == f"no such flag: --{field.name} (see --help)":
                unknown.append(field.name)
    assert unknown == [] and len(fields) > 5


@pytest.mark.parametrize(
    ("script", "words", "advice"),
    [
        ("train", "--finetuning_type QLoRA", "--finetuning_type lora --quantization_bit 4"),
        ("train", "--finetuning_type freeze", "minisft has LoRA, rsLoRA and QLoRA"),
        ("train", "--stage kto", "minisft has sft, pt, rm and dpo"),
        ("train", "--stage pretrain", "use --stage pt"),
        ("train", "--dtype int4", "use --quantization_bit 4"),
        ("train", "--quantization_bit True", "give 4 .NF4. or 8 .int8."),
        ("train", "--bf16 --fp16 --save_steps 0", "whole number"),
        ("train", "--warmup_steps 0.1", "use --warmup_ratio 0.1"),
        ("train", "--warmup_ratio 10", "use --warmup_steps 10"),
        ("train", "--validation_split 10%", "as a fraction this is 0.1"),
        ("export", "--format safetensors", "use --format hf"),
        ("export", "--quantization q5_k_m", "use q5_1 or q6_k"),
        ("select", "--sample_rate 20", "0.2 is 20 %, and --sample_number 20 chooses 20 rows"),
        ("select", "--sample_rate 5%", "as a fraction this is 0.05"),
        ("select", "--sample_number 0.1", "use --sample_rate 0.1"),
    ],
)
def test_wrong_values(script, words, advice):
    with pytest.raises(UserError, match=advice):
        parse(script, words)


def test_values_that_quantise_nothing():
    for text, bits in (("none", None), ("16", None), ("4", 4), ("8", 8)):
        assert parse("train", f"--quantization_bit {text}").quantization_bit == bits


def test_numbers_are_shown_as_they_were_given():
    for text, value in (("200", 200), ("0.1", 0.1)):
        given = parse("train", f"--validation_split {text}").validation_split
        assert given == value and str(given) == text


def test_a_strategy_without_rows_to_evaluate():
    with pytest.raises(UserError, match=r"by --eval_strategy\) needs --eval_dataset"):
        parse("train", "--evaluation_strategy steps")


@pytest.mark.parametrize(
    ("script", "words", "advice"),
    [
        ("train", "recipe.yaml", "use --config recipe.yaml"),
        ("train", "--dataset d recipe.toml", "use --config recipe.toml"),
        ("train", "rows.jsonl", "use --dataset rows.jsonl"),
        ("train", "Qwen/Qwen3-0.6B", "use --model_name_or_path Qwen/Qwen3-0.6B"),
        ("train", "dpo", "use --stage dpo"),
        ("chat", "x.gguf", "use --model_name_or_path x.gguf"),
        ("chat", "prompts.txt", "use --file prompts.txt"),
        ("chat", "ADAPTER", "use --adapter .*lora"),
        ("chat", "hello", "flags begin with --"),
    ],
)
def test_words_without_a_flag(script, words, advice, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"unexpected argument .*: {advice}.* .see --help"):
        PARSERS[script](words.replace("ADAPTER", str(adapter)).split())


def test_a_script_without_flags_shows_an_example():
    for script, words in (("train", []), ("score", []), ("select", [])):
        with pytest.raises(UserError) as caught:
            PARSERS[script](words)
        message = str(caught.value)
        assert f", as in: python {script}.py --" in message and ";" not in message
        required, example = message.split(", as in: ")
        assert all(flag in example for flag in re.findall(r"--\w+", required))
        command = re.search(r"\.py (.*) \(see --help\)", example)[1]
        PARSERS[script](command.split())
    with pytest.raises(UserError, match="must be given; an adapter, given with --adapter"):
        PARSERS["export"]([])


def test_eval_begins_with_what_to_measure():
    with pytest.raises(UserError, match="comes too early.*python eval.py compare --models"):
        PARSERS["eval"]([*MODEL, "--dataset", "d"])
    with pytest.raises(UserError, match="comes too early.*python eval.py ceval --model"):
        PARSERS["eval"]([*MODEL, "--data-dir", "d"])
    with pytest.raises(UserError, match="write spaces between models: --models a=x b=y.1 c=z"):
        PARSERS["eval"]([*COMPARE, "--models", "a=x,b=y.1,c=z"])
    PARSERS["eval"]([*COMPARE, "--models", "a=x,y", "b=z", "--greedy"])
    PARSERS["eval"]([*MMLU, "--lang", "en"])


@pytest.mark.parametrize("name", ["qwen", "empty", "qwen3_nothink"])
def test_templates_of_llama_factory_by_our_names(name):
    """The flags that the hint names are those that a recipe of LLaMA-Factory sets."""
    with pytest.raises(UserError, match=f"LLaMA-Factory's {name} is --template") as caught:
        template_text(name, None)
    words = re.search(r"is (--template \w+)", str(caught.value))[1]
    assert parse("train", words).template in NAMES


def test_other_templates():
    for name in ("llama", "qwen2_vl", "gemma3"):
        with pytest.raises(UserError, match=f"'{name}' .auto takes the checkpoint's own"):
            template_text(name, None)
    with pytest.raises(UserError, match="unknown template 'mine'; choose one of auto"):
        template_text("mine", None)


def test_files_of_the_wrong_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = {f"set{number}": {"file_name": "rows.json"} for number in range(13)}
    (tmp_path / "data").mkdir()
    info = tmp_path / "data" / "dataset_info.json"
    info.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="lists data sets: set0, .*set9 and 3 more. Name some"):
        find_sources("data/dataset_info.json")
    with pytest.raises(UserError, match="--dataset_dir .*info.json is a file. Give .*data/"):
        find_sources("set0", dataset_dir=info)
    (tmp_path / "wiki.txt").write_text("Plain text.\n")
    with pytest.raises(UserError, match="wiki.txt is plain text, which train.py --stage pt reads"):
        open_records("wiki.txt")
    (tmp_path / "rows.jsonl").write_text('{"a": 1},\n{"a": 2},\n')
    with pytest.raises(BadRow, match="line 1 column 9: .*: remove the comma after the row"):
        open_records("rows.jsonl")[0]
    np.save(tmp_path / "s.npy", np.arange(3.0))
    with pytest.raises(UserError, match="not a line of score.py: binary data. Give the .jsonl"):
        parse_line("s.npy", (tmp_path / "s.npy").read_bytes(), 3)
    with pytest.raises(UserError, match="--scores s.embeddings.npy: give the file .* .jsonl"):
        parse("select", "--sample_rate 0.1 --scores s.embeddings.npy")


def test_long_lists_of_columns_end():
    row = {f"column{number}": number for number in range(40)}
    for read in (parse_conversation, parse_text):
        with pytest.raises(BadRow, match="column9 and 30 more"):
            read(row)


def test_a_folder_above_a_model_names_it(tmp_path):
    for name, needed in (("models/b", "config.json"), ("runs/a", "adapter_config.json")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / needed).write_text("{}")
        folder = tmp_path / name
        with pytest.raises(UserError, match=rf"did you mean {folder}\?"):
            resolve(folder.parent, needed)


@pytest.mark.parametrize(
    ("base", "model", "is_other"),
    [
        ("owner/model-1B", "owner/model-1B", False),
        ("owner/model-1B", "/models/model-1b", False),
        ("owner/model-1B", "/cache/models--owner--model-1B/snapshots/3f", False),
        ("owner/model-1B", "other/model-3B", True),
        ("FOLDER/base", "FOLDER/link", False),
        ("FOLDER/base", "FOLDER/tuned", True),
        (None, "other/model-3B", False),
    ],
)
def test_an_adapter_of_another_base(base, model, is_other, tmp_path, capsys):
    for name in ("base", "tuned", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    base, model = (text and text.replace("FOLDER", str(tmp_path)) for text in (base, model))
    config = {"base_model_name_or_path": base}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    assert model_or_base(model, str(tmp_path / "lora")) == model
    note = f"note: {tmp_path / 'lora'} was trained on {base}, and --model_name_or_path is {model}\n"
    assert capsys.readouterr().err == (note if is_other else "")
