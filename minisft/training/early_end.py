"""A run that ends early: save what can be saved, and say how to go on.

with going_on_later(run):
    train(run, ...)
say(how_to_continue(run))           # after an interruption, once the checkpoint is saved
"""

import shlex
import traceback
from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from minisft.common import processes
from minisft.common.errors import UserError, first_line, is_out_of_memory
from minisft.common.script import advice_after_ctrl_c
from minisft.data.workers import WorkerKilled
from minisft.training.checkpoint import find_checkpoints
from minisft.training.data import BrokenRow
from minisft.training.new_result import read_record
from minisft.training.resume import save_checkpoint
from minisft.training.run import Run


@contextmanager
def going_on_later(run: Run) -> Generator[None, None, None]:
    """If training stops for lack of rows or memory, save a checkpoint of the steps before.

    After Ctrl-C, which saves nothing, name the last checkpoint.
    """
    first_step = run.progress.step
    # An update without enough memory may have changed some weights and not others.
    update = {"has_begun": False}
    run.optimizer.register_step_pre_hook(lambda *_: update.update(has_begun=True))
    run.optimizer.register_step_post_hook(lambda *_: update.update(has_begun=False))
    try:
        with advice_after_ctrl_c(lambda: last_checkpoint_note(run.options.output_dir)):
            yield
    except (BrokenRow, WorkerKilled) as error:
        is_row = isinstance(error, BrokenRow)  # all ranks read it; only one misses its worker
        if run.progress.step == first_step or not (is_row or processes.world_size() == 1):
            raise
        save_checkpoint(run)
        raise UserError(
            f"{str(error).removesuffix('.')}. Saved at step {run.progress.step}: "
            f"{'repair the row, then ' if is_row else ''}continue with "
            "--resume_from_checkpoint auto."
        ) from error
    except (RuntimeError, MemoryError) as error:
        is_lost = run.progress.step == first_step or update["has_begun"]
        if not is_out_of_memory(error) or is_lost or processes.world_size() > 1:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the step
        save_checkpoint(run)
        raise UserError(
            f"out of memory ({first_line(error)}). Saved at step {run.progress.step}: continue "
            "with --resume_from_checkpoint auto and a smaller --per_device_train_batch_size or, if "
            "it was the evaluation, --per_device_eval_batch_size. A step keeps its rows."
        ) from error


def how_to_continue(run: Run) -> str:
    """The message after an interruption: the step, and the command that continues."""
    return (
        f"stopped and saved at step {run.progress.step}; continue with\n"
        f"  {continue_command(run.options.output_dir)}"
    )


def last_checkpoint_note(output_dir: str) -> str:
    """The message after an interruption that saved nothing."""
    checkpoints = find_checkpoints(Path(output_dir))
    if not checkpoints:
        return "stopped without a checkpoint: --overwrite_output_dir starts again"
    _, newest = checkpoints[0]
    return (
        f"stopped without saving; the last checkpoint is {newest}. Continue from it with\n"
        f"  {continue_command(output_dir)}"
    )


def continue_command(output_dir: str) -> str:
    """The command that continues the run in a folder."""
    record = shlex.quote(str(Path(output_dir) / "options.toml"))
    return f"{processes.launch_command()} train.py --config {record} --resume_from_checkpoint auto"


def unfinished_run_hint(options: Namespace) -> str:
    """What to do with an --output_dir that holds an interrupted run; "" for any other folder."""
    output_dir = Path(options.output_dir)
    is_run = (output_dir / "options.toml").is_file() and find_checkpoints(output_dir)
    if options.overwrite_output_dir or options.resume_from_checkpoint or not is_run:
        return ""
    if read_record(output_dir):  # it has finished
        return ""
    return "continue the interrupted run in it with --resume_from_checkpoint auto"
