"""The state of a training run, from its options or from a checkpoint.

    run = Run(options, model, lora_config, num_rows=1000, dtype=torch.float32, device=device)
    run.save_checkpoint()                                  # runs/demo/checkpoint-STEP
    run = Run(..., checkpoint="runs/demo/checkpoint-40")   # goes on exactly from there

The steps themselves are in `train.py`. `build_objective` is given the run when all is checked, and
the model is still the one that training began with.
"""

import math
from functools import partial
from pathlib import Path

import torch

from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import save_model
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.data import batching
from minisft.training.checkpoint import (
    load_state,
    random_state,
    restore_weights,
    save,
    set_random_state,
)
from minisft.training.metrics import Progress
from minisft.training.objective import NextToken
from minisft.training.optimizer import build_optimizer, load_optimizer
from minisft.training.options import count_steps

# What a resumed run must have in common with the one before: the rows and what they train.
IDENTITY = (
    "seed",
    "stage",
    "template",
    "default_system",
    "cutoff_len",
    "block_size",
    "max_samples",
    "validation_split",
    "finetuning_type",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "use_rslora",
    "modules_to_save",
    "quantization_bit",
)
# Folder of what AdamW keeps for a sharded model, in a checkpoint.
MOMENTS = "optimizer"
# May be otherwise in a resumed run, and nobody needs to be told.
OF_THE_CALL = {
    "config",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "output_dir",
    "show_samples",
    "plot_loss",
}


class Run:
    """What a training run consists of: handed from step to step, saved and resumed as one."""

    def __init__(
        self,
        options,
        model,
        lora_config,
        num_rows,
        dtype,
        device,
        checkpoint=None,
        build_objective=None,
        num_bytes=0,
    ):
        state = load_state(checkpoint) if checkpoint else None
        self.options, self.model, self.lora_config = options, model, lora_config
        self.device, self.num_bytes = device, num_bytes
        self._count_steps(num_rows, state)
        self.optimizer = build_optimizer(
            model,
            options.learning_rate,
            options.weight_decay,
            (options.adam_beta1, options.adam_beta2),
            options.adam_epsilon,
        )
        self.is_sharded = options.parallel == "fsdp"  # and then of `dtype` while it computes
        self.autocast = torch.autocast(
            device.type, dtype, enabled=dtype != torch.float32 and not self.is_sharded
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.best = {"step": None, "loss": math.inf, "evaluations_since": 0}
        self.identity = {"num_rows": num_rows}
        self.identity |= {name: getattr(options, name) for name in IDENTITY}
        if state:
            self._check_identity(state["identity"], checkpoint)
            if state["progress"]["step"] > self.total_steps:
                raise UserError(
                    f"{checkpoint} is at step {state['progress']['step']}, beyond the "
                    f"{self.total_steps} of this run: raise --max_steps or "
                    "--num_train_epochs, or go on from an earlier checkpoint"
                )
            self._tell_changes(state)
        # What --precompute_reference has found for the rows: {fingerprint: log-probabilities}.
        self.reference = state["reference"] if state else {}
        # Before the checkpoint's weights: dpo's reference is the model that training began with.
        self.objective = build_objective(self) if build_objective else NextToken(model)
        if state:
            self._restore(state, checkpoint)
        model.model.gradient_checkpointing = options.gradient_checkpointing
        self.collate = batching.pack if options.packing else self.objective.collate
        if options.compile:
            if not options.packing:
                self.collate = partial(self.collate, pad_multiple=batching.COMPILED_PAD_MULTIPLE)
            model.model.compile_layers()
        self.wrapped = model if self.is_sharded else processes.wrap_ddp(model)
        self.progress = Progress(
            self.total_steps,
            Path(options.output_dir) / "metrics.jsonl",
            device,
            state and state["progress"],
        )

    def _count_steps(self, num_rows, state):
        """How many rows are in a step, and how many steps in an epoch, the warm-up, the run."""
        options = self.options
        self.rows_per_step = (
            options.per_device_train_batch_size
            * options.gradient_accumulation_steps
            * processes.world_size()
        )
        if state and self.rows_per_step != state["rows_per_step"]:
            # Kept also with another number of processes: the same rows make up every step.
            self.rows_per_step = state["rows_per_step"]
            processes.print_rank0(
                f"every step still has the same {self.rows_per_step} rows, whatever the "
                "batch size, accumulation and number of processes are now"
            )
        self.steps_per_epoch, self.total_steps = count_steps(options, num_rows, self.rows_per_step)
        self.warmup_steps = options.warmup_steps
        if self.warmup_steps is None:
            self.warmup_steps = math.ceil(self.total_steps * options.warmup_ratio)
        if self.warmup_steps >= self.total_steps:
            processes.print_rank0(
                f"the warm-up takes all {self.total_steps} steps, so the learning rate "
                "never reaches its peak: lower --warmup_steps or --warmup_ratio"
            )

    def _restore(self, state, checkpoint):
        """Take over what training had changed when the checkpoint was saved."""
        restore_weights(self.model, checkpoint)
        self._load_optimizer(state["optimizer"], checkpoint)
        if state["scaler"]:  # empty where the run so far was not in float16
            self.scaler.load_state_dict(state["scaler"])
        if Path(checkpoint).parent.resolve() == Path(self.options.output_dir).resolve():
            self.best = state["best"]
        self._restore_random(state["random"])

    def _check_identity(self, saved, checkpoint):
        for name, value in self.identity.items():
            if saved[name] != value:
                raise UserError(
                    f"{checkpoint} is from a run with {name} {saved[name]}, not "
                    f"{value}; give the same, or start anew in another folder"
                )

    def _tell_changes(self, state):
        before = state["options"]
        for name, value in vars(self.options).items():
            if name not in OF_THE_CALL and before.get(name) != value:
                processes.print_rank0(
                    f"--{name} is {value} from here on; it was {before.get(name)}"
                )
        if state["num_bytes"] != self.num_bytes:
            processes.print_rank0(
                f"the rows have changed since the checkpoint ({self.num_bytes:,} bytes, "
                f"then {state['num_bytes']:,}): from here on they are as they are now"
            )

    def _load_optimizer(self, state, checkpoint):
        """state: None where the run that saved it was sharded, else a state_dict."""
        if state and not self.is_sharded:
            load_optimizer(self.optimizer, state)
            return
        from minisft.training import fsdp

        if state:
            fsdp.cut_moments(self.optimizer, state)
        else:
            fsdp.load_moments(self.model, self.optimizer, Path(checkpoint) / MOMENTS)

    def _restore_random(self, states):
        if len(states) == processes.world_size():
            set_random_state(states[processes.rank()], self.device)
        else:
            processes.print_rank0(
                f"{processes.world_size()} processes instead of {len(states)}: dropout is "
                "drawn anew"
            )

    def save_checkpoint(self):
        """Write the state of all processes to `checkpoint-STEP`. All of them call it."""
        state = {
            "identity": self.identity,
            "num_bytes": self.num_bytes,
            "options": vars(self.options),
            "rows_per_step": self.rows_per_step,
            "best": self.best,
            "progress": self.progress.state(),
            "scaler": self.scaler.state_dict(),
            "reference": self.reference,
            "optimizer": None if self.is_sharded else self.optimizer.state_dict(),
            "random": processes.all_gather(random_state(self.device)),
        }

        def write_weights(folder):
            """What is trained, and the optimizer's state where each process has a part of it."""
            if self.lora_config:
                save_adapter(self.model, folder, self.lora_config, self.options.model_name_or_path)
            else:
                save_model(self.model, folder)
            if self.is_sharded:
                from minisft.training import fsdp

                # If the first has failed, and cleared up, no other may make a folder after it.
                processes.barrier()
                fsdp.save_moments(self.model, self.optimizer, folder / MOMENTS)

        save(
            self.options.output_dir,
            self.progress.step,
            write_weights,
            state,
            self.options.save_total_limit,
            self.best["step"],
        )
