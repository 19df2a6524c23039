"""Why minisft does not have a flag of another program, or one of its values. Tables only.

REASONS["use_muon"]                             # "minisft trains with AdamW"
WRONG_VALUES["finetuning_type"]["qlora"]        # "QLoRA is --finetuning_type lora ..."
"""

LORA_ONLY = "minisft has LoRA, rsLoRA and QLoRA"
STAGES = "minisft has sft, pt, rm and dpo"
# Reason -> the flags. One that ends in * stands for every flag with this prefix.
FLAGS_BY_REASON = {
    "use torchrun and --parallel": "accelerator_config parallelism_config",
    "use --gradient_checkpointing": "activation_checkpointing_kwargs activation_offloading",
    "give the folder of the adapter itself": "adapter_folder",
    "every adapted layer has --lora_rank and --lora_alpha": "alpha_pattern rank_pattern",
    "minisft trains with AdamW": "apollo_* badam_* galore_* optim optim_target_modules "
    "use_adam_mini use_apollo use_badam use_galore use_muon",
    "minisft has cross-entropy": "asft_alpha eaft_alpha label_smoothing_factor use_asft_loss "
    "use_dft_loss use_eaft_loss",
    "minisft always learns the answers only; --stage pt learns every token": "assistant_only_loss "
    "completion_only_loss mask_prompt train_on_inputs train_on_prompt",
    "minisft trains on text": "audio_* crop_to_patches freeze_language_model "
    "freeze_multi_modal_projector freeze_vision_tower image_* media_dir use_audio_in_video "
    "video_*",
    "use --per_device_train_batch_size; --dry_run says if it fits": "auto_find_batch_size",
    "the loss is the mean over all tokens of a step": "average_tokens_across_devices",
    "LoRA trains no biases here": "bias lora_bias",
    "use --dtype": "bnb_4bit_compute_dtype",
    "4 bits are NF4 here": "bnb_4bit_quant_type quantization_type",
    "NF4 quantises its scales here": "bnb_4bit_use_double_quant double_quantization "
    "use_bnb_nested_quant",
    "set the environment variable HF_HOME": "cache_dir",
    "minisft has the pairwise loss of reward models": "center_rewards_coefficient",
    "use --eval_exact_match": "compute_accuracy",
    "merge the first one: export.py --format hf": "create_new_adapter",
    "--seed orders the rows": "data_seed",
    "every row is used": "dataloader_drop_last",
    "write it into the name: OWNER/NAME/SUBSET": "dataset_config",
    "the chat template prepares the rows; --stage pt reads plain text": "dataset_kwargs",
    "use --eval_dataset OWNER/NAME:SPLIT": "dataset_test_split",
    "name the columns in dataset_info.json, see docs/data.md": "dataset_text_field",
    "write it into the name: OWNER/NAME:SPLIT": "dataset_train_split",
    "use --parallel fsdp": "deepspeed fsdp*",
    "use --device": "device_map",
    "use --lora_dropout": "disable_dropout",
    "rows are always shuffled": "disable_shuffling shuffle shuffle_dataset train_sampling_strategy",
    "only a terminal has a bar: redirect standard error": "disable_tqdm",
    "use eval.py compare": "do_predict",
    "train.py always trains": "do_train",
    "use --early_stopping_patience": "early_stopping_steps",
    "use --save_steps": "enable_jit_checkpoint",
    "the chat template says how an answer ends": "eos_token",
    "use --eval_steps": "eval_delay",
    "minisft takes the most probable token, or samples": "eval_num_beams",
    "train a file at a time, or run eval.py compare on each": "eval_on_each_dataset",
    "use --eval_steps; eval.py compare measures the base": "eval_on_start",
    "minisft has steps, epoch and no; see --eval_steps": "eval_strategy",
    "name the layers to adapt in --lora_target": "exclude_modules",
    "see export.py --help": "export_*",
    "minisft uploads nothing": "export_hub_model_id hub_* push_to_hub",
    "minisft writes safetensors": "export_legacy_format save_safetensors",
    "minisft has sigmoid, the loss of DPO": "f_divergence_type ld_alpha pref_bco_weight pref_loss "
    "simpo_* use_weighting",
    "minisft has lora and full": "finetuning_type",
    "use --bf16": "fp8*",
    LORA_ONLY: "freeze_extra_modules freeze_trainable_* loftq_config "
    "loraplus_* module_dropout oft_* peft_type pissa_* use_dora use_llama_pro",
    "minisft has --temperature, --top_k, --top_p and --repetition_penalty": "frequency_penalty "
    "min_p presence_penalty repeat_last_n typical_p",
    "the model is on one device: see --device": "gpu_layers n_gpu_layers ngl tensor_parallel_size",
    "the best evaluation is that with the lowest loss": "greater_is_better metric_for_best_model",
    "set the environment variable HF_TOKEN": "hf_hub_token",
    "a run that is resumed goes on with the next rows": "ignore_data_skip",
    "padding is never learned": "ignore_pad_token_for_loss",
    "minisft runs the model itself": "infer_backend use_unsloth",
    "LoRA begins with a random A and zeros in B": "init_lora_weights",
    "the rows of new tokens start at the mean": "init_special_tokens",
    "minisft joins data sets; see --mix": "interleave_probs mix_strategy",
    "minisft has no ktransformers": "kt_* use_kt",
    STAGES: "kto_* ppo_* reward_model* stage",
    "--lora_target names the kinds of layer; all layers of a kind are adapted": "layers_pattern "
    "layers_to_transform num_layers",
    "use --quantization_bit 4": "load_in_4bit",
    "use --quantization_bit 8": "load_in_8bit",
    "all logs go to --output_dir": "logging_dir",
    "use --logging_steps": "logging_strategy",
    "LoRA adapts linear layers here": "lora_target_parameters",
    "--stage says what is trained": "lora_task_type task_type",
    "minisft has cross-entropy, and sigmoid for DPO": "loss_type",
    "--dpo_ftx weighs an added SFT loss": "loss_weights",
    "give it to torchrun": "master_addr master_port nnodes node_rank",
    "minisft trains the architecture of the checkpoint": "mixture_of_depths",
    "use --dtype and --quantization_bit": "model_init_kwargs",
    "download that revision and give its folder": "model_revision revision",
    "download the model and give its folder": "ms_hub_token om_hub_token",
    "set the environment variable OMP_NUM_THREADS": "n_threads num_threads t threads",
    "minisft adds no noise to embeddings": "neftune_noise_alpha",
    "use --new_special_tokens": "new_special_tokens_config",
    "use --device cpu": "no_cuda use_cpu",
    "start several processes with torchrun --nproc_per_node N train.py": "nproc_per_node num_gpus",
    "use --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay": "optim_args",
    "--packing puts the rows of a micro-batch in one sequence": "packing_strategy",
    "use --eval_exact_match, or eval.py compare": "predict_with_generate",
    "the chat template decides": "preserve_thinking tool_format",
    "set the service's environment variable, such as WANDB_PROJECT": "project",
    "minisft has NF4 and int8, as bitsandbytes": "quantization_method",
    "use torchrun": "ray_*",
    "the reference is the model before training": "ref_model* sync_ref_model",
    "write it into config.json": "rope_scaling",
    "checkpoints hold the optimizer too, to resume from": "save_only_model",
    "use --save_steps N, or epoch; a large N saves only the result": "save_strategy",
    "minisft has the attention of the checkpoint": "shift_attn",
    "minisft writes control tokens only where the template has them": "split_special_tokens",
    "set SwanLab's environment variables, such as SWANLAB_PROJECT": "swanlab_*",
    "rows are encoded during training": "tokenized_path",
    "the tokenizer is that of --model_name_or_path": "tokenizer_name* tokenizer_path",
    "use --compile": "torch_compile_*",
    "set Trackio's environment variables, such as TRACKIO_PROJECT": "trackio_*",
    "--cutoff_len truncates the end of a row": "truncation_mode",
    "use --finetuning_type lora or full": "use_lora use_peft",
    "set W&B's environment variables, such as WANDB_PROJECT": "wandb_*",
}
REASONS = {flag: reason for reason, flags in FLAGS_BY_REASON.items() for flag in flags.split()}
# Values that minisft does not have, in lower case, of its own flags and of VALUES -> what to do.
WRONG_VALUES: dict[str, dict[str, str]] = {
    "dtype": {
        **dict.fromkeys(("int4", "nf4", "4bit", "q4"), "use --quantization_bit 4"),
        **dict.fromkeys(("int8", "8bit", "q8"), "use --quantization_bit 8"),
        "float64": "the widest type is float32",
    },
    "finetuning_type": {
        "qlora": "QLoRA is --finetuning_type lora --quantization_bit 4",
        **dict.fromkeys(("freeze", "oft", "dora", "pissa", "badam", "galore"), LORA_ONLY),
        "none": "give lora or full",
    },
    "format": {
        **dict.fromkeys(("safetensors", "merged", "huggingface"), "use --format hf"),
        **dict.fromkeys(("lora", "adapter"), "use --format peft, or gguf-lora for llama.cpp"),
        **dict.fromkeys(("gptq", "awq", "ggml", "onnx"), "use --format gguf or hf"),
    },
    "mode": {
        "ppl": "--mode ifd writes the losses that select.py --strategy mid_ppl reads",
        "embeddings": "use --mode embed",
    },
    "parallel": {
        **dict.fromkeys(("deepspeed", "zero3", "zero2", "fsdp2"), "use --parallel fsdp"),
        **dict.fromkeys(("none", "dp"), "without torchrun there is one process; leave it out"),
    },
    "quantization": {
        "int8": "use q8_0",
        **dict.fromkeys(("int4", "q4", "nf4", "4", "q4_k", "q4_k_s"), "use q4_k_m"),
        **dict.fromkeys(("q5_k", "q5_k_m", "q5_k_s"), "use q5_1 or q6_k"),
        **dict.fromkeys(("q8", "8"), "use q8_0"),
        **dict.fromkeys(("q2_k", "q3_k_m", "iq4_xs", "iq2_xs"), "use q4_0 or q4_k_m"),
    },
    "save_strategy": {
        **dict.fromkeys(("no", "false"), "--save_steps 1000000 saves only the result"),
        "best": "use --eval_steps N --load_best_model_at_end, which keeps the best checkpoint",
    },
    "stage": {
        **dict.fromkeys(("kto", "ppo", "grpo", "orpo", "simpo", "rloo"), STAGES),
        **dict.fromkeys(("pretrain", "pretraining", "cpt"), "use --stage pt"),
        **dict.fromkeys(("reward", "reward_model"), "use --stage rm"),
        "instruct": "use --stage sft",
    },
}
