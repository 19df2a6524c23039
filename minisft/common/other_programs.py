"""Flags and values of other programs: transformers, trl, peft, LLaMA-Factory, llama.cpp, mlx-lm.

Tables only. A flag is accepted if its value asks for what minisft does anyway. refusals.py has the
reasons against the others, and flag_names.py our names for flags that have another one elsewhere.
"""

from typing import Any

# The flag of another program -> ours with the same meaning and values.
RENAMED = {
    "adapter_name_or_path": "adapter",
    "additional_target": "modules_to_save",
    "infer_dtype": "dtype",
    "neat_packing": "packing",
    "pref_beta": "dpo_beta",
    "pref_ftx": "dpo_ftx",
    "add_special_tokens": "new_special_tokens",
    "activation_checkpointing": "gradient_checkpointing",
    "chat_template_path": "template",
    "padding_free": "packing",
    "precompute_ref_log_probs": "precompute_reference",
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
    "enable_liger_kernel use_liger_kernel liger_kernel_config use_unsloth_gc upcast_layernorm "
    "upcast_lmhead_output use_v1_kernels use_flash_attn use_flash_attention use_flash_attention_2 "
    "use_sdpa use_cache use_kv_cache length_column_name torch_empty_cache_steps log_level_replica "
    "prediction_loss_only eval_use_gather_object include_for_metrics batch_eval_metrics "
    "restore_callback_states_from_checkpoint dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context ddp_broadcast_buffers "
    "ddp_static_graph router_aux_loss_coef moe_aux_loss_coef precompute_ref_batch_size "
    "f_alpha_divergence_coef discopop_tau bnb_4bit_quant_storage ignore_bias_buffers "
    "inference_mode offload_folder buffer_size quantization_device_map verbose "
    "fan_in_fan_out eval_packing streaming dataset_streaming".split()
)
# Values that minisft supports. For a key that is not a flag, they request the default behaviour.
VALUES: dict[str, tuple[Any, ...]] = {
    "do_train": (True,),
    "assistant_only_loss": (True,),
    "average_tokens_across_devices": (True,),
    "bias": ("none",),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True,),
    "completion_only_loss": (True,),
    "dataset_text_field": ("text",),
    "dataloader_drop_last": (False,),
    "dataset_train_split": ("train",),
    "device_map": ("auto",),
    "disable_dropout": (True,),
    "double_quantization": (True,),
    "eval_on_start": (False,),
    "f_divergence_type": ("reverse_kl",),
    "finetuning_type": ("lora", "full"),
    "ignore_pad_token_for_loss": (True,),
    "init_lora_weights": (True, "default"),
    "init_special_tokens": ("noise_init",),
    "infer_backend": ("huggingface", "hf"),
    "lora_bias": ("none",),
    "lora_task_type": ("CAUSAL_LM",),
    "logging_strategy": ("steps",),
    "mask_prompt": (True,),
    "num_gpus": (1,),
    "nproc_per_node": (1,),
    "greater_is_better": (False,),
    "loss_type": ("sigmoid", "nll"),
    "metric_for_best_model": ("loss", "eval_loss"),
    "mix_strategy": ("concat",),
    "model_revision": ("main",),
    "peft_type": ("LORA", "lora"),
    "optim": (
        *("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"),
        *("adamw_8bit", "adamw_bnb_8bit"),
    ),
    "pref_loss": ("sigmoid",),
    "quantization_method": ("bnb", "bitsandbytes"),
    "quantization_type": ("nf4",),
    "save_safetensors": (True,),
    "save_strategy": ("steps",),
    "shuffle": (True,),
    "shuffle_dataset": (True,),
    "stage": ("sft", "pt", "rm", "dpo"),
    "task_type": ("CAUSAL_LM",),
    "train_on_inputs": (False,),
    "train_sampling_strategy": ("random", "group_by_length"),
    "truncation_mode": ("keep_start",),
    "use_bnb_nested_quant": (True,),
    "use_lora": (True,),
    "use_peft": (True,),
}
# Keys for which false or 0 is a request like any other.
NEVER_OFF = VALUES.keys() | {"pref_beta", "data_seed", "n_gpu_layers", "ngl", "gpu_layers"}
