"""Find the flag that a misspelt name, or the name used by another tool, stands for.

    nearest_flag("max_seq_length", ["cutoff_len", "seed"])     # "cutoff_len"

No flag has a second name. The error for another tool's name suggests ours.
"""

import difflib
from collections.abc import Collection

from minisft.common.other_programs import RENAMED

# Our flag -> its names in transformers, trl, peft, LLaMA-Factory, Axolotl, llama.cpp and others.
OTHER_NAMES = {
    "model_name_or_path": "model model_name model_path model_dir base_model pretrained hf_repo "
    "model_id m",
    "adapter": "adapter_name_or_path adapter_path adapter_dir lora lora_path lora_weights "
    "peft_model checkpoint_dir resume_adapter_file",
    "dataset": "data data_path data_files dataset_name dataset_path train_file train_data "
    "train_dataset",
    "eval_dataset": "validation_file eval_file eval_data val_data validation_dataset val_dataset",
    "validation_split": "val_size val_set_size test_size val_split eval_split test_split val_ratio "
    "eval_ratio eval_size validation_ratio validation_split_percentage",
    "max_samples": "limit max_train_samples num_samples",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length sequence_len ctx_size "
    "num_ctx n_ctx context_length context_size max_model_len c",
    "cutoff_len": "max_length max_seq_length max_seq_len model_max_length sequence_len",
    "default_system": "system system_prompt system_message sys",
    "identity": "system_prompt_file system_file",
    "template": "chat_template prompt_template conv_template chat_template_file "
    "apply_chat_template",
    "lora_rank": "lora_r r lora_dim",
    "lora_target": "target_modules lora_target_modules lora_modules",
    "modules_to_save": "additional_target lora_modules_to_save",
    "new_special_tokens": "add_special_tokens additional_special_tokens special_tokens",
    "add_tokens": "new_tokens",
    "resize_vocab": "resize_token_embeddings",
    "quantization_bit": "bits quant_bits quantization_bits",
    "dpo_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "precompute_reference": "precompute_ref",
    "packing": "sample_packing pack",
    "finetuning_type": "fine_tune_type finetune_type train_type tuner_type",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "max_steps": "iters max_iters train_steps total_steps num_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler lr_scheduler scheduler_type lr_schedule",
    "optim": "optimizer",
    "gradient_checkpointing": "grad_checkpoint",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping",
    "batch_tokens": "batch_size per_device_eval_batch_size max_num_batched_tokens",
    "batch_size": "per_device_eval_batch_size eval_batch_size",
    "logging_steps": "steps_per_report log_interval log_every",
    "eval_steps": "eval_interval steps_per_eval eval_every",
    "save_steps": "save_interval save_every checkpoint_every",
    "overwrite_output_dir": "overwrite force",
    "overwrite": "overwrite_output_dir force",
    "run_name": "wandb_run_name wandb_name swanlab_run_name",
    "resume_from_checkpoint": "resume",
    "dataloader_num_workers": "preprocessing_num_workers num_proc num_workers",
    "dtype": "torch_dtype precision",
    "output_dir": "output out_dir export_dir save_path save_dir o",
    "output": "outfile out_file output_file output_path o",
    "quantization": "outtype quantize quant qtype export_quantization_bit",
    "device": "export_device",
    "max_shard_size": "export_size shard_size",
    "max_new_tokens": "max_tokens n_predict num_predict predict max_gen_len max_gen_toks "
    "max_completion_tokens n",
    "temperature": "temp",
    "prompt": "message query question input p",
    "file": "f prompt_file input_file",
    "repetition_penalty": "repeat_penalty",
    "seed": "random_seed random_state s",
    "sample_number": "top_k top_n num_samples n_samples sample_size budget k n",
    "sample_rate": "sample_ratio ratio fraction top_ratio percentage rate",
    "server_name": "host listen",
    "server_port": "port",
    "num_fewshot": "n_shot nshot ntrain num_few_shot",
    "data_dir": "task_dir",
}


def own_name(name: str, names: Collection[str]) -> str | None:
    """`name` if it is among `names`, else the one of them for which it is another name."""
    if name in names:
        return name
    plain = _plain(name)
    for ours in names:
        others = OTHER_NAMES.get(ours, "").split()
        others += [other for other, renamed in RENAMED.items() if renamed == ours]
        if plain in map(_plain, (ours, *others)):
            return ours
    return None


def _plain(name: str) -> str:
    """The name without what people leave out: `modelName` and `model_name` are `modelname`."""
    return name.replace("_", "").lower()


def nearest_flag(name: str, flags: Collection[str]) -> str | None:
    """The flag among `flags` that `name` stands for; None if no flag is near enough."""
    if ours := own_name(name, flags):
        return ours
    # A wrong guess is worse than none, so the names must be nearly the same.
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    return near[0] if near else None
