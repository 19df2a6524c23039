"""Find the flag that a misspelt name, or the name used by another tool, stands for.

    nearest_flag("max_seq_length", ["cutoff_len", "seed"])     # "cutoff_len"

No flag has a second name. The error for another tool's name suggests ours.
"""

import difflib
from collections.abc import Collection

# Our flag -> its names in transformers, trl, peft, LLaMA-Factory, Axolotl, llama.cpp and others.
OTHER_NAMES = {
    "model_name_or_path": "model model_name model_path model_dir base_model pretrained",
    "adapter": "adapter_name_or_path adapter_path adapter_dir lora lora_path lora_weights "
    "peft_model checkpoint_dir",
    "dataset": "data data_path data_files dataset_name dataset_path train_file train_data",
    "eval_dataset": "validation_file eval_file eval_data val_data",
    "validation_split": "val_size val_set_size test_size validation_split_percentage",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length sequence_len",
    "cutoff_len": "max_length max_seq_length max_seq_len model_max_length sequence_len",
    "default_system": "system system_prompt",
    "template": "chat_template prompt_template conv_template",
    "lora_rank": "lora_r r lora_dim",
    "lora_target": "target_modules lora_target_modules lora_modules",
    "modules_to_save": "additional_target lora_modules_to_save",
    "new_special_tokens": "add_special_tokens additional_special_tokens special_tokens",
    "add_tokens": "new_tokens",
    "resize_vocab": "resize_token_embeddings",
    "quantization_bit": "load_in_4bit load_in_8bit",
    "dpo_beta": "pref_beta beta",
    "dpo_ftx": "pref_ftx",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "learning_rate": "lr",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping",
    "batch_tokens": "batch_size per_device_eval_batch_size max_num_batched_tokens",
    "batch_size": "per_device_eval_batch_size eval_batch_size",
    "eval_steps": "eval_interval",
    "resume_from_checkpoint": "resume",
    "dataloader_num_workers": "preprocessing_num_workers num_proc num_workers",
    "dtype": "torch_dtype precision",
    "output_dir": "output out_dir export_dir save_path save_dir",
    "output": "outfile out_file output_file output_path",
    "quantization": "outtype quantize quant export_quantization_bit",
    "device": "export_device",
    "max_shard_size": "export_size shard_size",
    "max_new_tokens": "max_tokens n_predict max_gen_len",
    "repetition_penalty": "repeat_penalty",
    "server_name": "host listen",
    "server_port": "port",
    "num_fewshot": "n_shot nshot ntrain num_few_shot",
    "data_dir": "task_dir",
}


def own_name(name: str, names: Collection[str]) -> str | None:
    """`name` if it is among `names`, else the one of them for which it is another name."""
    if name in names:
        return name
    others = (ours for ours in names if name in OTHER_NAMES.get(ours, "").split())
    return next(others, None)


def nearest_flag(name: str, flags: Collection[str]) -> str | None:
    """The flag among `flags` that `name` stands for; None if no flag is near enough."""
    if ours := own_name(name, flags):
        return ours
    # A wrong guess is worse than none, so the names must be nearly the same.
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    return near[0] if near else None
