"""The keys of LLaMA-Factory's recipes, and the flags of transformers and trl, as minisft's flags.

    options, refused = translate({"val_size": 0.1, "deepspeed": "ds_z3.json"}, flags)
    options                                         # {"validation_split": 0.1}
    refused                                         # {"deepspeed": "use --parallel fsdp"}

Most keys have the name of our flag. The others are renamed, or request the default behaviour, or
are refused with a reason. Keys that the recipe leaves out keep the defaults of minisft.
"""

import re
from collections.abc import Collection
from typing import Any

# LLaMA-Factory's key -> our flag with the same meaning.
RENAMED = {
    "adapter_name_or_path": "adapter",
    "additional_target": "modules_to_save",
    "infer_dtype": "dtype",
    "neat_packing": "packing",
    "pref_beta": "dpo_beta",
    "pref_ftx": "dpo_ftx",
    "add_special_tokens": "new_special_tokens",
    "torch_compile": "compile",
    "val_size": "validation_split",
}
# Keys that change nothing here, whatever their value: minisft runs no code of a checkpoint, encodes
# rows while it trains, and batches rows of similar length.
WITHOUT_EFFECT = set(
    "trust_remote_code overwrite_cache preprocessing_num_workers preprocessing_batch_size "
    "ddp_timeout ddp_find_unused_parameters use_fast_tokenizer low_cpu_mem_usage flash_attn "
    "print_param_status data_shared_file_system group_by_length remove_unused_columns log_level "
    "logging_first_step include_num_input_tokens_seen dataloader_pin_memory "
    "include_effective_tokens_per_second use_reentrant_gc do_eval "
    "attn_implementation bf16_full_eval fp16_full_eval dataset_num_proc "
    "ddp_backend ddp_bucket_cap_mb eval_accumulation_steps eval_do_concat_batches "
    "full_determinism gradient_checkpointing_kwargs label_names local_rank "
    "log_on_each_node logging_nan_inf_filter overwrite_hub_revision pad_token "
    "pad_to_multiple_of save_on_each_node skip_memory_metrics tf32 use_cpu_offload "
    "use_legacy_prediction_loop "
    "enable_liger_kernel use_unsloth_gc upcast_layernorm".split()
)
# Values that minisft supports. For a key that is not a flag, they request the default behaviour.
VALUES: dict[str, tuple[Any, ...]] = {
    "do_train": (True,),
    "assistant_only_loss": (True,),
    "bias": ("none",),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True,),
    "completion_only_loss": (True,),
    "dataset_text_field": ("text",),
    "dataloader_drop_last": (False,),
    "double_quantization": (True,),
    "eval_on_start": (False,),
    "finetuning_type": ("lora", "full"),
    "ignore_pad_token_for_loss": (True,),
    "infer_backend": ("huggingface", "hf"),
    "lora_bias": ("none",),
    "lora_task_type": ("CAUSAL_LM",),
    "logging_strategy": ("steps",),
    "greater_is_better": (False,),
    "loss_type": ("sigmoid", "nll"),
    "metric_for_best_model": ("loss", "eval_loss"),
    "mix_strategy": ("concat",),
    "model_revision": ("main",),
    "optim": (
        *("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"),
        *("adamw_8bit", "adamw_bnb_8bit"),
    ),
    "pref_loss": ("sigmoid",),
    "quantization_method": ("bnb", "bitsandbytes"),
    "quantization_type": ("nf4",),
    "save_safetensors": (True,),
    "save_strategy": ("steps",),
    "stage": ("sft", "pt", "rm", "dpo"),
    "task_type": ("CAUSAL_LM",),
    "use_bnb_nested_quant": (True,),
    "use_peft": (True,),
}
# Strategies of transformers, which say the same as our numbers of steps.
STRATEGIES = ("eval_strategy", "evaluation_strategy", "save_strategy")
# Keys for which false or 0 is a request like any other.
NEVER_OFF = VALUES.keys() | {"pref_beta", "data_seed"}
TEXT_ONLY = "minisft trains on text"
ADAMW_ONLY = "minisft trains with AdamW"
LORA_ONLY = "minisft has LoRA, rsLoRA and QLoRA"
NO_BIASES = "LoRA trains no biases here"
NESTED = "NF4 quantises its scales here"
# Why minisft does not have a key. A key that ends in * matches every key with this prefix.
REASONS = {
    "apollo_*": ADAMW_ONLY,
    "asft_alpha": "minisft has cross-entropy",
    "audio_*": TEXT_ONLY,
    "assistant_only_loss": "minisft always learns the answers only; --stage pt learns every token",
    "auto_find_batch_size": "use --per_device_train_batch_size; --dry_run says if it fits",
    "badam_*": ADAMW_ONLY,
    "bias": NO_BIASES,
    "bnb_4bit_compute_dtype": "use --dtype",
    "bnb_4bit_quant_type": "4 bits are NF4 here",
    "bnb_4bit_use_double_quant": NESTED,
    "completion_only_loss": "minisft always learns the answers only; --stage pt learns every token",
    "data_seed": "--seed orders the rows",
    "dataloader_drop_last": "every row is used",
    "dataset_kwargs": "the chat template prepares the rows; --stage pt reads plain text",
    "dataset_text_field": "name the columns in dataset_info.json, see docs/data.md",
    "disable_tqdm": "only a terminal has a bar: redirect standard error",
    "eval_on_start": "use --eval_steps; eval.py compare measures the base",
    "greater_is_better": "the best evaluation is that with the lowest loss",
    "hub_*": "minisft uploads nothing",
    "ignore_pad_token_for_loss": "padding is never learned",
    "label_smoothing_factor": "minisft has cross-entropy",
    "logging_dir": "all logs go to --output_dir",
    "logging_strategy": "use --logging_steps",
    "lora_bias": NO_BIASES,
    "lora_task_type": "--stage says what is trained",
    "loss_type": "minisft has cross-entropy, and sigmoid for DPO",
    "metric_for_best_model": "the best evaluation is that with the lowest loss",
    "save_safetensors": "minisft writes safetensors",
    "task_type": "--stage says what is trained",
    "neftune_noise_alpha": "minisft adds no noise to embeddings",
    "no_cuda": "use --device cpu",
    "use_bnb_nested_quant": NESTED,
    "use_cpu": "use --device cpu",
    "use_peft": "use --finetuning_type lora or full",
    "cache_dir": "set the environment variable HF_HOME",
    "compute_accuracy": "use --eval_exact_match",
    "crop_to_patches": TEXT_ONLY,
    "deepspeed": "use --parallel fsdp",
    "disable_shuffling": "rows are always shuffled",
    "do_predict": "use eval.py compare",
    "do_train": "train.py always trains",
    "double_quantization": NESTED,
    "early_stopping_steps": "use --early_stopping_patience",
    "finetuning_type": "minisft has lora and full",
    "eaft_alpha": "minisft has cross-entropy",
    "eval_strategy": "minisft has steps, epoch and no; see --eval_steps",
    "export_hub_model_id": "minisft uploads nothing",
    "export_legacy_format": "minisft writes safetensors",
    "export_*": "see export.py --help",  # after those with a reason of their own
    "fp8*": "use --bf16",
    "freeze_extra_modules": LORA_ONLY,
    "freeze_language_model": TEXT_ONLY,
    "freeze_multi_modal_projector": TEXT_ONLY,
    "freeze_trainable_*": LORA_ONLY,
    "freeze_vision_tower": TEXT_ONLY,
    "fsdp*": "use --parallel fsdp",
    "galore_*": ADAMW_ONLY,
    "hf_hub_token": "set the environment variable HF_TOKEN",
    "ignore_data_skip": "a run that is resumed goes on with the next rows",
    "image_*": TEXT_ONLY,
    "infer_backend": "minisft runs the model itself",
    "interleave_probs": "minisft joins data sets; see --mix",
    "kt_*": "minisft has no ktransformers",
    "kto_*": "minisft has sft, pt, rm and dpo",
    "loraplus_*": LORA_ONLY,
    "master_addr": "give it to torchrun",
    "master_port": "give it to torchrun",
    "media_dir": TEXT_ONLY,
    "mix_strategy": "minisft joins data sets; see --mix",
    "mixture_of_depths": "minisft trains the architecture of the checkpoint",
    "model_revision": "download that revision and give its folder",
    "oft_*": LORA_ONLY,
    "optim": ADAMW_ONLY,
    "pissa_*": LORA_ONLY,
    "pref_loss": "minisft has sigmoid, the loss of DPO",
    "ppo_*": "minisft has sft, pt, rm and dpo",
    "predict_with_generate": "use --eval_exact_match, or eval.py compare",
    "preserve_thinking": "the chat template decides",
    "quantization_method": "minisft has NF4 and int8, as bitsandbytes",
    "quantization_type": "4 bits are NF4 here",
    "ray_*": "use torchrun",
    "ref_model*": "the reference is the model before training",
    "reward_model*": "minisft has sft, pt, rm and dpo",
    "rope_scaling": "write it into config.json",
    "push_to_hub": "minisft uploads nothing",
    "save_only_model": "checkpoints hold the optimizer too, to resume from",
    "save_strategy": "use --save_steps N, or epoch; a large N saves only the result",
    "shift_attn": "minisft has the attention of the checkpoint",
    "simpo_*": "minisft has sigmoid, the loss of DPO",
    "stage": "minisft has sft, pt, rm and dpo",
    "streaming": "rows stay on the disk anyway",
    "swanlab_*": "set SwanLab's environment variables, such as SWANLAB_PROJECT",
    "tokenized_path": "rows are encoded during training",
    "tool_format": "the chat template decides",
    "train_on_prompt": "the model learns the answers; --stage pt learns every token",
    "use_adam_mini": ADAMW_ONLY,
    "use_apollo": ADAMW_ONLY,
    "use_audio_in_video": TEXT_ONLY,
    "use_badam": ADAMW_ONLY,
    "use_asft_loss": "minisft has cross-entropy",
    "use_dft_loss": "minisft has cross-entropy",
    "use_dora": LORA_ONLY,
    "use_eaft_loss": "minisft has cross-entropy",
    "use_galore": ADAMW_ONLY,
    "use_kt": "minisft has no ktransformers",
    "use_llama_pro": LORA_ONLY,
    "use_muon": ADAMW_ONLY,
    "use_unsloth": "minisft runs the model itself",
    "video_*": TEXT_ONLY,
}
# LLaMA-Factory's template -> ours, and the system prompt of theirs.
TEMPLATES = {
    "empty": ("plain", None),
    "qwen": ("chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": ("chatml", None),
    "zephyr": ("zephyr", "You are Zephyr, a helpful assistant."),
}


def translate(
    recipe: dict[str, Any], flags: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """({flag: value}, {key: why minisft does not have it}).

    flags: the names of the script's flags. Keys that are neither a flag nor LLaMA-Factory's stay.
    """
    options: dict[str, Any] = {}
    refused: dict[str, str] = {}
    key_of: dict[str, str] = {}  # {flag: the key that set it}
    recipe = dict(recipe)
    set_steps(recipe)
    for key, value in recipe.items():
        name = RENAMED.get(key, key)
        is_known_value = value in VALUES.get(key, ())
        reason = _reason(key, flags)
        if key in WITHOUT_EFFECT or is_known_value and key not in flags:
            continue
        is_off = key not in NEVER_OFF and value in (False, "", "none", 0)
        if (name != key or reason) and (is_off or value is None):
            continue  # a feature that is off changes nothing
        if reason and not is_known_value:
            shown = f"{key}: {value}" if key in VALUES else key
            refused[shown] = reason
        else:
            flag = name if name in flags else key
            if flag in options and options[flag] != value:
                refused[key] = f"{key_of[flag]} gives another value for the same option"
            options[flag], key_of[flag] = value, key
    _set_data(options)
    if "disable_gradient_checkpointing" in options:
        is_on = not options.pop("disable_gradient_checkpointing")
        if options.setdefault("gradient_checkpointing", is_on) != is_on:
            refused["disable_gradient_checkpointing"] = "gradient_checkpointing says the opposite"
    if options.pop("use_swanlab", False):
        others = options.get("report_to") or []
        others = others if isinstance(others, list) else [others]
        options["report_to"] = [name for name in others if name != "none"] + ["swanlab"]
    return options, refused


def read_value(text: str) -> Any:
    """The value of a flag on the command line, as YAML reads it; a flag without a value is on."""
    names = {"": True, "true": True, "false": False, "no": False, "none": None, "null": None}
    if text.lower() in names:
        return names[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _reason(key: str, flags: Collection[str]) -> str | None:
    """Why minisft does not have this key; None if it may have it.

    flags: the names of the script's flags. Most reasons name flags of train.py.
    """
    for name, reason in REASONS.items():
        if name == "export_*" and "max_shard_size" in flags:
            continue  # export.py itself has them, under other names
        if key == name or name.endswith("*") and key.startswith(name[:-1]):
            named = set(re.findall(r"--(\w+)", reason)) - {"help"}
            return reason if named <= set(flags) else f"in train.py: {reason}"
    return None


def set_steps(recipe: dict[str, Any]) -> None:
    """Translate strategies, and step counts that mean "none", to our flags. In place.

    A strategy that minisft does not have stays.
    """
    if "evaluation_strategy" in recipe:  # its name before transformers 4.46
        recipe.setdefault("eval_strategy", recipe.pop("evaluation_strategy"))
    if recipe.get("max_steps") == -1:
        del recipe["max_steps"]
    if recipe.get("warmup_steps") == 0 and "warmup_ratio" in recipe:
        del recipe["warmup_steps"]
    if recipe.get("save_strategy") == "epoch":
        recipe["save_steps"] = recipe.pop("save_strategy")
    strategy = recipe.get("eval_strategy")
    if strategy == "epoch":
        recipe["eval_steps"] = "epoch"
    elif strategy == "steps":
        recipe.setdefault("eval_steps", recipe.get("logging_steps", 500))
    elif strategy in (False, "no"):  # YAML reads `no` as False
        recipe.pop("eval_steps", None)
    if strategy in ("epoch", "steps", False, "no", None):
        recipe.pop("eval_strategy", None)


def _set_data(options: dict[str, Any]) -> None:
    """Templates get our names; plain text has blocks and no template. In place."""
    if options.get("stage") == "pt":
        options.pop("template", None)
        if "cutoff_len" in options and "block_size" not in options:
            options["block_size"] = options.pop("cutoff_len")
    template = options.get("template")
    if template in TEMPLATES:
        options["template"], system = TEMPLATES[template]
        if system:
            options.setdefault("default_system", system)
