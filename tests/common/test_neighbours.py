"""Flags of transformers, trl and LLaMA-Factory, hints for each script, commands in help texts."""

import ast
import re
import shlex
from collections import Counter

import pytest
from conftest import ROOT

from minisft.chat import options as chat_options
from minisft.checkpoints import export_options
from minisft.common.errors import UserError
from minisft.evaluation import options as eval_options
from minisft.selection import score_options, select_options
from minisft.training.options import parse_options as train_options

MODEL = ["--model_name_or_path", "m"]
NEEDED = [*MODEL, "--dataset", "d", "--output_dir", "o"]
PARSERS = {
    "train": train_options,
    "score": score_options.parse_options,
    "select": select_options.parse_options,
    "eval": lambda words: eval_options.parse_options("", words)[1],
    "export": export_options.parse_options,
    "chat": chat_options.parse_options,
}


def test_flags_of_other_programs_that_ask_for_the_usual_are_accepted(capsys):
    words = "--do_train --remove_unused_columns False --ddp_timeout 180"
    options = train_options([*NEEDED, *words.split()])
    assert options.optim == "adamw"
    assert capsys.readouterr().err == (
        "no effect in minisft: --do_train, --remove_unused_columns, --ddp_timeout\n"
    )


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--eval_strategy epoch", ("epoch", 500)),
        ("--evaluation_strategy steps --eval_steps 50", (50, 500)),
        ("--eval_strategy steps", (500, 500)),
        ("--eval-strategy=steps --logging_steps 7", (7, 500)),
        ("--eval_strategy no --eval_steps 50", (None, 500)),
        ("--save_strategy epoch --eval_strategy no", (None, "epoch")),
        ("--save_strategy steps --save_steps 9", (None, 9)),
    ],
)
def test_strategies_of_transformers_are_numbers_of_steps(words, steps):
    options = train_options([*NEEDED, "--validation_split", "0.1", *words.split()])
    assert (options.eval_steps, options.save_steps) == steps


def test_strategies_and_recipes(tmp_path):
    """The command line wins over a recipe, also under the names of transformers."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("eval_steps = 30\nsave_steps = 40\nvalidation_split = 0.1\n")
    for strategy, steps in (("no", None), ("steps", 30), ("epoch", "epoch")):
        words = ["--config", str(recipe), "--eval_strategy", strategy]
        options = train_options([*NEEDED, *words])
        assert (options.eval_steps, options.save_steps) == (steps, 40)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--eval_strategy best", "steps, epoch and no; see --eval_steps"),
        ("--evaluation_strategy", "steps, epoch and no; see --eval_steps"),
        ("--save_strategy no", "--save_steps 1000000 saves only the result"),
        ("--save_strategy best", "use --eval_steps N --load_best_model_at_end"),
        ("--save_strategy hourly", "use --save_steps N, or epoch"),
        ("--dataset_text_field content", "name the columns in dataset_info.json"),
        ("--disable_tqdm True", "only a terminal has a bar"),
        ("--auto_find_batch_size", "use --per_device_train_batch_size"),
        ("--logging_dir x", "all logs go to --output_dir"),
        ("--ignore_pad_token_for_loss False", "padding is never learned"),
        ("--data_seed 0", "--seed orders the rows"),
        ("--label_smoothing_factor 0.1", "cross-entropy"),
        ("--neftune_noise_alpha 5", "adds no noise"),
        ("--no_cuda", "use --device cpu"),
        ("--ignore_data_skip True", "goes on with the next rows"),
        ("--lora_bias all", "LoRA trains no biases"),
        ("--use_swanlab", "use --report_to swanlab"),
        ("--disable_gradient_checkpointing False", "use --gradient_checkpointing"),
        ("--export_dir x", "see export.py --help"),
    ],
)
def test_values_that_ask_for_something_else_get_a_reason(words, reason):
    with pytest.raises(UserError, match=f"no such flag: {words.split()[0]} \\(.*{reason}"):
        train_options([*NEEDED, *words.split()])


def test_values_that_change_nothing_are_accepted(capsys):
    words = (
        "--dataset_text_field text --disable_tqdm False --auto_find_batch_size False --data_seed "
        "none --lora_bias none --label_smoothing_factor 0.0 --neftune_noise_alpha None --no_cuda "
        "False --ignore_data_skip False --use_swanlab false --disable_gradient_checkpointing True"
    )
    train_options([*NEEDED, *words.split()])
    flags = [word for word in words.split() if word.startswith("--")]
    assert capsys.readouterr().err == f"no effect in minisft: {', '.join(flags)}\n"


SCORE = [*MODEL, "--dataset", "d", "--output", "s.jsonl"]
COMPARE = ["compare", "--dataset", "d", "--output_dir", "o"]
MMLU = ["mmlu", *MODEL, "--data_dir", "d", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("script", "words", "hint"),
    [
        ("score", [*SCORE, "--batch_size=8"], "--batch_size .use --batch_tokens: it counts tokens"),
        ("score", [*SCORE, "--no_cuda"], "--no_cuda .use --device cpu"),
        ("eval", [*COMPARE, *MODEL], "--model_name_or_path .use --models NAME=MODEL."),
        ("eval", [*COMPARE, "--adapter", "a"], "--adapter .use --models NAME=MODEL.ADAPTER."),
        ("eval", [*COMPARE, "--lora", "a"], "--lora .use --models NAME=MODEL.ADAPTER."),
        ("eval", [*COMPARE, "--do_sample"], "--do_sample .use --temperature above 0"),
        ("eval", [*MMLU, "--task", "mmlu_test"], "--task .the first word .*: eval.py mmlu"),
        ("eval", [*MMLU, "--lang", "zh"], "--lang .the questions and prompts of mmlu"),
        ("chat", [*MODEL, "--do_sample", "False"], "--do_sample .use --greedy"),
        ("chat", [*MODEL, "--stream", "False"], "--stream .*--file"),
        ("chat", [*MODEL, "--prompt", "What", "now?"], "'now.' after --prompt What: .*quotes"),
        ("chat", [*MODEL, "--deepspeed", "d"], "--deepspeed .in train.py: use --parallel fsdp"),
        ("export", [*MODEL, "--export_dir", "e"], "--export_dir .did you mean --output_dir"),
        ("export", [*MODEL, "--export_size", "5"], "--export_size .did you mean --max_shard_size"),
    ],
)
def test_hints_for_each_script(script, words, hint):
    with pytest.raises(UserError, match=hint):
        PARSERS[script](words)


def test_values_that_change_nothing_in_a_script(tmp_path, capsys):
    models = ["--models", "a=b"]
    assert PARSERS["eval"]([*COMPARE, *models, "--do_sample", "False"]).models == ["a=b"]
    PARSERS["eval"]([*MMLU, "--lang", "en"])
    PARSERS["score"]([*SCORE, "--optim=adamw_torch"])
    PARSERS["chat"]([*MODEL, "--do_sample", "True", "--stream"])
    PARSERS["export"]([*MODEL, "--output_dir", "o", "--export_legacy_format", "False"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('do_sample = true\nmodel_name_or_path = "m"\n')
    assert PARSERS["chat"](["--config", str(recipe)]).model_name_or_path == "m"
    with pytest.raises(
        UserError, match="no such option: do_sample .use --temperature above 0., mo"
    ):
        PARSERS["eval"]([*COMPARE, *models, "--config", str(recipe)])


def test_choices_in_any_case():
    words = [*MODEL, "--format", "GGUF", "--output", "o.gguf", "--quantization", "Q4_K_M"]
    options = PARSERS["export"](words)
    assert (options.format, options.quantization) == ("gguf", "q4_k_m")
    assert train_options([*NEEDED, "--finetuning_type", "LoRA"]).finetuning_type == "lora"
    for name, dtype in (("BF16", "bfloat16"), ("fp16", "float16"), ("Float32", "float32")):
        assert train_options([*NEEDED, "--dtype", name]).dtype == dtype


def test_files_and_folders_of_an_export():
    with pytest.raises(UserError, match="needs --output: a file.*Give --output o.gguf instead"):
        PARSERS["export"]([*MODEL, "--format", "gguf", "--output_dir", "o"])
    with pytest.raises(UserError, match="needs --output_dir: a folder.*--format gguf"):
        PARSERS["export"]([*MODEL, "--output", "o.gguf"])


def test_resuming_as_transformers_says_it():
    for words, which in (
        (["--resume_from_checkpoint"], "auto"),
        (["--resume_from_checkpoint", "True"], "auto"),
        (["--resume_from_checkpoint", "False"], None),
        (["--resume_from_checkpoint=None"], None),
        (["--resume_from_checkpoint", "runs/True"], "runs/True"),
    ):
        assert train_options([*NEEDED, *words]).resume_from_checkpoint == which


def texts_of(path):
    """A page; or the strings of a Python file, without f-strings, which have parts of commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [text]
    nodes = list(ast.walk(ast.parse(text)))
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and node not in parts]
    return [node.value for node in constants if isinstance(node.value, str)]


def commands_in(path):
    """The commands of our scripts in the texts of a file, up to a pipe: [(script, words), ...]."""
    for text in texts_of(path):
        joined = re.sub(r"\\\n\s*", " ", text)
        command = r"python (\w+)\.py ((?:\w+ )?--[^<|`#\n]*)"
        for script, words in re.findall(command, joined):
            if script in PARSERS and not re.search(r"\.\.\.|--help", words):
                yield script, shlex.split(words)


def test_every_command_that_we_write_can_be_given(tmp_path, monkeypatch):
    """The examples of --help, the epilogues, the docstrings, README.md and docs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    for name, equals in (("runs/a/options.toml", " = "), ("qwen3_lora_sft.yaml", ": ")):
        lines = [f'{key}{equals}"{value}"\n' for key, value in needed.items()]
        (tmp_path / name).write_text("".join(lines))
    code = [*ROOT.glob("*.py"), *(ROOT / "minisft").rglob("*.py")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md")]
    for paths, least in ((code, 4), (pages, 3)):
        commands = [command for path in paths for command in commands_in(path)]
        for script, words in commands:
            PARSERS[script](words)
        count = Counter(script for script, _ in commands)
        assert min(count[script] for script in PARSERS) >= least, count
