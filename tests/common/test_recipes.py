"""Recipes in YAML: our keys, and those of LLaMA-Factory's examples/train_lora."""

import builtins
import re

import pytest
from conftest import ROOT

import train
from minisft.common.errors import UserError
from minisft.common.llama_factory import TEMPLATES
from minisft.common.other_programs import RENAMED, VALUES, WITHOUT_EFFECT
from minisft.common.refusals import REASONS, WRONG_VALUES
from minisft.selection import score_options
from minisft.text.template_choice import NAMES
from minisft.training.options import parse_options

# All keys of LLaMA-Factory's recipes for LoRA on text, with values of a small run.
METHOD = """\
### model
model_name_or_path: {model}
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all

### dataset
dataset: {rows}
template: {template}
cutoff_len: 96
max_samples: 9
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 0

### output
output_dir: {output}
logging_steps: 1
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.2
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 2
"""


def write(tmp_path, text, name="recipe.yaml"):
    """The path of a recipe with this text."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def options_of(tmp_path, text, *words):
    """The options of train.py with a recipe of these lines."""
    needed = "model_name_or_path: m\ndataset: d\noutput_dir: o\n"
    return parse_options(["--config", write(tmp_path, needed + text), *words])


def test_a_recipe_of_llama_factory_runs_unchanged(checkpoint, rows_file, tmp_path, here):
    output = tmp_path / "out"
    text = METHOD.format(model=checkpoint, rows=rows_file, output=output, template="qwen3_nothink")
    said = here(train, "--config", write(tmp_path, text))
    assert "7 rows, 2 held out; training" in said
    assert "template: chatml" in said and "bfloat16" in said
    assert (output / "adapter_model.safetensors").exists()
    assert "step 2: evaluation" in said and "step 4: evaluation" in said
    # Everything is recorded under our names, and the record repeats the run.
    recorded = parse_options(["--config", str(output / "options.toml")])
    given = parse_options(["--config", write(tmp_path, text)])
    date = {"template_date": recorded.template_date, "config": str(output / "options.toml")}
    assert {**vars(given), **date, "overwrite_output_dir": False} == {
        **vars(recorded),
        "resume_from_checkpoint": None,
    }


def test_keys_and_values_take_our_names(tmp_path):
    options = options_of(
        tmp_path,
        "stage: dpo\npref_beta: 0.3\npref_ftx: 0.5\npref_loss: sigmoid\nval_size: 0.1\n"
        "adapter_name_or_path: runs/a\nneat_packing: false\noptim: adamw_torch\n"
        "eval_strategy: epoch\nsave_strategy: epoch\nmax_steps: -1\nwarmup_steps: 0\n"
        "warmup_ratio: 0.2\ndisable_gradient_checkpointing: false\nlearning_rate: 5e-6\n",
    )
    assert (options.dpo_beta, options.dpo_ftx, options.validation_split) == (0.3, 0.5, 0.1)
    assert options.adapter == "runs/a" and options.gradient_checkpointing
    assert (options.eval_steps, options.save_steps) == ("epoch", "epoch")
    assert (options.max_steps, options.warmup_steps, options.warmup_ratio) == (None, None, 0.2)
    assert options.learning_rate == 5e-6


def test_the_old_name_of_a_strategy(tmp_path):
    split = "validation_split: 0.1\n"
    assert options_of(tmp_path, split + "evaluation_strategy: epoch\n").eval_steps == "epoch"
    with pytest.raises(UserError, match="eval_strategy .minisft has steps, epoch and no"):
        options_of(tmp_path, split + "evaluation_strategy: best\n")


def test_true_resumes_from_the_newest_checkpoint(tmp_path):
    assert options_of(tmp_path, "resume_from_checkpoint: true\n").resume_from_checkpoint == "auto"
    assert options_of(tmp_path, "resume_from_checkpoint: false\n").resume_from_checkpoint is None


def test_lists_settings_and_services(tmp_path):
    options = options_of(
        tmp_path,
        "lora_target: [q_proj, v_proj]\nadditional_target: embed_tokens\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr: 1e-6\n"
        "eval_strategy: 'no'\neval_steps: 5\nlora-rank: 3\n",
        "--lora_rank",
        "5",
    )
    assert options.lora_target == "q_proj,v_proj" and options.modules_to_save == "embed_tokens"
    assert options.lr_scheduler_kwargs == '{"min_lr": 1e-06}'
    assert options.eval_steps is None and options.lora_rank == 5


def test_plain_text_has_blocks_and_no_template(tmp_path):
    options = options_of(tmp_path, "stage: pt\ntemplate: qwen\ncutoff_len: 77\n")
    assert (options.block_size, options.template) == (77, "auto")


@pytest.mark.parametrize("template", ["qwen", "zephyr", "llama3", "qwen3", "mistral", "alpaca"])
def test_templates_of_llama_factory(tmp_path, template):
    options = options_of(tmp_path, f"template: {template}\n")
    name, system = TEMPLATES.get(template, (template, None))
    assert (options.template, options.default_system) == (name, system)
    assert options.template in NAMES


def test_every_key_without_a_meaning_is_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        options_of(
            tmp_path,
            "stage: kto\ndeepspeed: ds_z3_config.json\nray_num_workers: 4\nlora_rnk: 8\n"
            "image_max_pixels: 262144\nfreeze_vision_tower: true\npref_loss: orpo\n"
            "something: 1\nuse_dora: false\nlearning_rate: 1e-4\n",
        )
    message = str(caught.value).partition("no such option: ")[2]
    assert message == (
        "stage: kto (minisft has sft, pt, rm and dpo), deepspeed (use --parallel fsdp), "
        "ray_num_workers (use torchrun), image_max_pixels, freeze_vision_tower (minisft trains on "
        "text), pref_loss: orpo (minisft has sigmoid, the loss of DPO), lora_rnk (did you mean "
        "lora_rank?), something (see --help)"
    )


def test_false_is_refused_where_it_asks_for_something(tmp_path):
    """Keys that are on in LLaMA-Factory, or that are not switches."""
    with pytest.raises(UserError) as caught:
        options_of(
            tmp_path,
            "quantization_bit: 4\ndouble_quantization: false\ndo_train: false\n"
            "finetuning_type: none\nsave_strategy: no\nuse_dora: false\nval_size: 0\n",
        )
    message = str(caught.value).partition("no such option: ")[2]
    assert re.findall(r"(\w+: \w+) \(", message) == [
        "double_quantization: False",
        "do_train: False",
        "finetuning_type: none",
        "save_strategy: False",
    ]
    with pytest.raises(UserError, match="dpo_beta"):
        options_of(tmp_path, "stage: dpo\npref_beta: 0\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8\ncutoff_len: 9\nlora_rank: 16\n", "yaml, line 6: lora_rank appears twice"),
        ("lora_rank: 8\nlora-rank: 8\n", "yaml: lora_rank appears twice"),
        ("lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2\n", "line 6: min_lr appears twice"),
        ("validation_split: 0.2\nval_size: 0.1\n", "val_size .validation_split gives another"),
        ("val_size: 0.1\nvalidation_split: 0.2\n", "validation_split .val_size gives another"),
        ("neat_packing: true\npacking: false\n", "packing .neat_packing gives another value"),
        (
            "gradient_checkpointing: true\ndisable_gradient_checkpointing: true\n",
            "gradient_checkpointing says the opposite",
        ),
        ("stage: pt\ncutoff_len: 8\nblock_size: 9\n", "cutoff_len"),
    ],
)
def test_keys_that_contradict_each_other(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        options_of(tmp_path, text)


def test_keys_that_agree(tmp_path):
    for services in ("none", "swanlab", "[swanlab]"):
        options = options_of(tmp_path, f"report_to: {services}\nuse_swanlab: true\n")
        assert options.report_to == "swanlab"
    options = options_of(tmp_path, "packing: true\nneat_packing: true\nval_size: 2\n")
    assert options.packing and options.validation_split == 2
    options = options_of(tmp_path, "packing: true\nneat_packing: false\n")
    assert options.packing
    merged = "base: &base {lora_rank: 4}\nlr_scheduler_kwargs: {<<: *base, lora_rank: 5}\n"
    with pytest.raises(
        UserError, match="no such option: base .a recipe has no sections"
    ):  # merging is not twice
        options_of(tmp_path, merged)


def test_a_name_with_two_spellings_in_toml(tmp_path):
    path = write(tmp_path, "lora_rank = 8\nlora-rank = 16\n", "recipe.toml")
    with pytest.raises(UserError, match="recipe.toml: lora_rank appears twice"):
        parse_options(["--config", path])


def test_reasons_name_flags_that_exist():
    """Flags of train.py, of chat.py or of export.py."""
    folders = [ROOT / "minisft" / name for name in ("training", "chat", "checkpoints", "common")]
    code = "".join(path.read_text() for folder in folders for path in folder.glob("*options.py"))
    code += (ROOT / "minisft/common/model_flags.py").read_text() + "--strategy --mode"
    for reason in [*REASONS.values(), *(why for v in WRONG_VALUES.values() for why in v.values())]:
        for flag in set(re.findall(r"--(\w+)", reason)) - {"help", "nproc_per_node"}:
            assert f"--{flag}" in code
    assert not WITHOUT_EFFECT & (REASONS.keys() | RENAMED.keys() | VALUES.keys())
    assert VALUES.keys() <= REASONS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: [", "not valid YAML"),
        ("- lora_rank", "not a recipe"),
        ("lora_rank: many", "many"),
        ("8: 9", "not a recipe"),
        ("learning_rate: .nan", "'nan' is not a number above 0"),
        ("config: other.yaml", "config .only on the command line"),
        ("report_to: mlflow", "'mlflow' is not one of"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_recipes_take_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        parse_options(["--config", write(tmp_path, text)])
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_other_scripts_read_yaml_too(tmp_path):
    recipe = write(
        tmp_path,
        "model_name_or_path: m\nadapter_name_or_path: a\ndataset: d\noutput: s.jsonl\n"
        "trust_remote_code: true\nmax_samples: 3\n",
        "recipe.yml",
    )
    options = score_options.parse_options(["--config", recipe])
    assert options.adapter == "a" and options.max_samples == 3


def test_without_pyyaml_the_file_is_named(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *arguments):
        if name == "yaml":
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs PyYAML \(requirements/yaml.txt\)"):
        options_of(tmp_path, "")
