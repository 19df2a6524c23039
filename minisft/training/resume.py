"""Save a run and continue it exactly: same weights, optimizer, step, random numbers and log.

save_checkpoint(run)                                # every rank; runs/demo/checkpoint-40
saved = load_saved_run(options, batches, say)       # None if there is nothing to resume
restore(run, saved)

The tour explains it: docs/tour/09_resume.md.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.folders import save_model
from minisft.checkpoints.new_folder import NotSaved
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.outputs import recorded_options, save_options
from minisft.common.reserved_space import ReservedSpace
from minisft.common.words import counted
from minisft.data.batching import Batches
from minisft.data.dataset import Rows
from minisft.text.tokenizer_files import FILES, has_tokenizer
from minisft.training import checkpoint, fsdp
from minisft.training.build import trained_parameters
from minisft.training.identity import IDENTITY, MEASURED, SILENT, is_finished_run
from minisft.training.low_memory_adamw import moment_bytes
from minisft.training.new_result import read_record, remove_record
from minisft.training.reference import LogProbs, saved_log_probs
from minisft.training.reports import RUN_IDS
from minisft.training.run import Best, Run, count_rows_per_step

# Bytes of about 20 small files, in blocks of their own; of a tensor's entries in file headers and
# in the optimizer state; of a row's log-probabilities; of a rank's random state.
SMALL_FILES, TENSOR_ENTRIES, ROW_ENTRY, RANDOM_STATE = 2**17, 2**12, 2**7, 2**13
# Folder in the checkpoint of a sharded model: the optimizer state, written by all ranks.
OPTIMIZER = "optimizer"


@dataclass
class SavedRun:
    """A checkpoint of a run: its folder, and the content of trainer_state.pt."""

    path: Path
    state: dict[str, Any]

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step. A resumed run keeps it, whatever its number of ranks."""
        return self.state["rows_per_step"]

    @property
    def reference_log_probs(self) -> LogProbs:
        """The results of --precompute_reference; empty without it."""
        return self.state["reference"]


def can_resume(options: Namespace) -> bool:
    """True if --resume_from_checkpoint continues the run in --output_dir.

    UserError if it holds a result but no checkpoint: the run would start again and overwrite it.
    """
    which, output_dir = options.resume_from_checkpoint, Path(options.output_dir)
    if not which:
        return False
    if which != "auto":  # from another run, or before the end of a finished one: it overwrites
        if not Path(which).is_dir():
            checkpoint.find_checkpoint(output_dir, which, print)  # says so
        is_same_run = Path(which).resolve().parent == output_dir.resolve()
        return is_same_run and not read_record(output_dir)
    has_other_result = has_tokenizer(output_dir) and not is_finished_run(options)
    if has_other_result and not any(output_dir.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir {output_dir} holds a finished run without a checkpoint to resume from. "
            "Choose another folder, or add --overwrite_output_dir to start again."
        )
    return (output_dir / "options.toml").exists()


# Save


def save_last_checkpoint(run: Run) -> None:
    """Save the state at the end of a run, unless it is saved already. Every rank calls it.

    On a full disk the result, which is smaller, may still fit.
    """
    run.reserve.release()
    path = Path(run.options.output_dir) / f"checkpoint-{run.progress.step}"
    if not processes.broadcast_from_rank0(path.is_dir):
        save_if_room(run)


def save_if_room(run: Run) -> None:
    """Save a checkpoint; on a full disk, one process goes on without. Every rank calls it."""
    try:
        save_checkpoint(run)
    except NotSaved as error:
        if processes.world_size() > 1:  # the other ranks wait for this one
            raise
        step = run.progress.step
        run.progress.say(f"no checkpoint of step {step}: {error.__cause__}; the run goes on")


def save_checkpoint(run: Run) -> None:
    """Write `checkpoint-STEP` with the state of all ranks. Every rank calls it."""
    is_sharded = run.options.parallel == "fsdp"
    state = {
        "identity": _identity(run.options, run.schedule.num_rows),
        "num_bytes": run.num_bytes,
        "options": vars(run.options),
        "rows_per_step": run.schedule.rows_per_step,
        "best": asdict(run.best),
        "progress": run.progress.state(),
        "scaler": run.precision.scaler.state_dict(),
        "reference": saved_log_probs(run.objective),
        "optimizer": None if is_sharded else run.optimizer.state_dict(),
        "random": processes.all_gather(_random_state(run.device)),
    }
    folder = run.options.output_dir
    keep, best = run.options.save_total_limit, run.best.step
    with (
        run.reserve.released(),
        checkpoint.new_checkpoint(folder, run.progress.step, keep, best) as folder,
    ):
        if run.lora_config:
            save_adapter(run.model, folder, run.lora_config, run.options.model_name_or_path)
        else:
            save_model(run.model, folder)
        if is_sharded:
            # If rank 0 failed above, it has removed the folder. Do not create it again.
            processes.barrier()
            fsdp.save_moments(run.model, run.optimizer, folder / OPTIMIZER)
        if processes.rank() == 0:
            if run.tokenizer:  # chat.py and others read a checkpoint as an adapter or a model
                run.tokenizer.save(folder)
            checkpoint.save_state(state, folder)


def _identity(options: Namespace, num_rows: int) -> dict[str, Any]:
    return {"num_rows": num_rows, **{name: getattr(options, name) for name in IDENTITY}}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that training draws from on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


# Resume


def template_date(options: Namespace) -> str | None:
    """The date that the chat template sees: the date of the resumed run, or now for a new run.

    None with --stage pt, which has no template.
    """
    if options.stage == "pt":
        return None

    def find() -> str:
        """The date for all ranks, read on rank 0."""
        which = options.resume_from_checkpoint
        if options.template_date or not which:
            return options.template_date or datetime.now().isoformat(timespec="seconds")
        run_dir = Path(options.output_dir if which == "auto" else which)
        recorded = recorded_options(run_dir) or recorded_options(run_dir.parent)
        return recorded.get("template_date") or datetime.now().isoformat(timespec="seconds")

    return processes.broadcast_from_rank0(find)


def load_saved_run(
    options: Namespace, batches: Batches, say: Callable[[str], None]
) -> SavedRun | None:
    """The checkpoint that --resume_from_checkpoint names; None for a new run. Every rank calls it.

    UserError if options that cannot change have changed; other changes are reported.
    """
    which = options.resume_from_checkpoint
    if not which:
        return None
    path = processes.broadcast_from_rank0(
        lambda: checkpoint.find_checkpoint(options.output_dir, which, say)
    )
    if path is None:
        say("no checkpoint to resume from: starting a new run")
        return None
    say(f"resuming from {path}")
    state = checkpoint.load_state(path)
    for name, value in _identity(options, batches.num_examples).items():
        before = state["identity"].get(name, value)  # checkpoints may be older than an option
        if before != value:
            raise UserError(
                f"{path} is from a run with {name} {before}, not {value}. Give "
                "the same value, or start a new run in another folder."
            )
    for name, value in vars(options).items():
        before = state["options"].get(name)
        if name not in SILENT and before != value:
            say(f"--{name} is {value} from here on; it was {before}")
    if state["rows_per_step"] != count_rows_per_step(options, processes.world_size()):
        say(
            f"every step still has {state['rows_per_step']} rows, whatever the batch size, "
            "accumulation and number of processes are now"
        )
    num_bytes = count_bytes(batches)
    if state["num_bytes"] != num_bytes:
        say(
            f"the training rows have changed since the checkpoint ({num_bytes:,} bytes instead of "
            f"{state['num_bytes']:,}); from here on the new ones are used"
        )
    return SavedRun(path, state)


def count_bytes(batches: Batches) -> int:
    """Size of the training rows in their files. It shows whether they have changed."""
    return int(batches.rows.sizes().sum()) if isinstance(batches.rows, Rows) else 0


def restore(run: Run, saved: SavedRun) -> None:
    """Continue `run` from a checkpoint. Call it last: it also restores the random generators."""
    path, state = saved.path, saved.state
    if state["progress"]["step"] > run.schedule.total_steps:
        raise UserError(
            f"{path} is at step {state['progress']['step']}, but this run ends at step "
            f"{run.schedule.total_steps}. Raise --max_steps or --num_train_epochs, or resume from "
            "an earlier checkpoint."
        )
    checkpoint.restore_weights(run.model, path)
    _restore_optimizer(run, state["optimizer"], path)
    if state["scaler"]:  # empty unless the run was in float16
        run.precision.scaler.load_state_dict(state["scaler"])
    run.best = _best_so_far(run, saved)
    run.progress.restore(state["progress"])
    _restore_random_state(state["random"], run.device)


def _best_so_far(run: Run, saved: SavedRun) -> Best:
    """The best evaluation so far, if the run can restore it and its loss can be compared."""
    before, now = saved.state["options"], vars(run.options)
    is_same_folder = saved.path.parent.resolve() == Path(run.options.output_dir).resolve()
    is_same_measure = all(before.get(name) == now[name] for name in MEASURED)
    # The rows that --validation_split holds out are as new as those that are left to train on.
    is_same_split = not run.options.validation_split or saved.state["num_bytes"] == run.num_bytes
    keeps = is_same_folder and is_same_measure and is_same_split
    return Best(**saved.state["best"]) if keeps else Best()


def _restore_optimizer(run: Run, state: dict[str, Any] | None, path: Path) -> None:
    """state: AdamW's state_dict; None if the run that saved it was sharded."""
    if state is None:
        fsdp.load_moments(run.model, run.optimizer, path / OPTIMIZER)
    elif run.options.parallel == "fsdp":
        fsdp.shard_moments(run.optimizer, state)
    else:
        # Learning rate, decay and betas are those of the options, which may have changed.
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({**state, "param_groups": groups})


def _restore_random_state(states: list[dict[str, torch.Tensor]], device: torch.device) -> None:
    """states: one for each rank of the run that saved them."""
    if len(states) != processes.world_size():
        processes.print_rank0(
            f"{counted(processes.world_size(), 'process', 'processes')} instead of {len(states)}: "
            "dropout draws new random numbers"
        )
        return
    state = states[processes.rank()]
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def claim_output_dir(run: Run, saved: SavedRun | None) -> None:
    """Create --output_dir, record the options, and remove checkpoints and logs of other runs.

    Takes the disk space that the run will need. Call it last, when no check can fail any more.
    UserError if there is too little room.
    """
    if processes.rank() == 0:
        output_dir = Path(run.options.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        run.reserve = ReservedSpace(output_dir, output_bytes(run))
        run.reserve.take()
        remove_record(output_dir)
        checkpoint.remove_others(output_dir, saved.path if saved else None, run.progress.step)
        if not (saved and saved.path.parent.resolve() == output_dir.resolve()):
            for name in (run.progress.path.name, RUN_IDS):  # of the run that was here before
                (output_dir / name).unlink(missing_ok=True)
        save_options(run.options, output_dir / "options.toml")


def output_bytes(run: Run) -> int:
    """The bytes of the result and a checkpoint: weights, moments of AdamW, small files."""
    trained = trained_parameters(run.model)
    tensors = trained if run.lora_config else list(run.model.state_dict().values())
    # The result may be in float32, whatever the type of the weights in training.
    weights = sum(tensor.numel() * (tensor.element_size() + 4) for tensor in tensors)
    eight_bit = run.options.optim == "adamw_8bit"
    moments = sum(moment_bytes(parameter, eight_bit) for parameter in trained)
    paths = [run.tokenizer.model_dir / name for name in FILES] if run.tokenizer else []
    files = sum(path.stat().st_size for path in paths if path.is_file())
    entries = TENSOR_ENTRIES * len(tensors) + RANDOM_STATE * processes.world_size()
    entries += ROW_ENTRY * len(saved_log_probs(run.objective))
    return weights + moments + 2 * files + entries + SMALL_FILES
