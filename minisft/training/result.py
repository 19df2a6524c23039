"""The result of a run: an adapter or a model folder that chat.py, eval.py and export.py read."""

from pathlib import Path
from typing import Any

import torch

from minisft.checkpoints.adapters import save_adapter
from minisft.checkpoints.code_files import copy_code_files
from minisft.checkpoints.folders import (
    generation_eos,
    save_generation_config,
    save_model,
    stored_dtype,
)
from minisft.checkpoints.model_card import write_model_card
from minisft.common import processes
from minisft.common.devices import dtype_name, resolve_dtype
from minisft.common.errors import UserError
from minisft.common.model_flags import dtype_option
from minisft.text.chat_template import ChatTemplate
from minisft.text.saved_form import saved_text
from minisft.text.tokenizer import Tokenizer
from minisft.training import checkpoint, resume
from minisft.training.identity import result_record
from minisft.training.metrics import plot_loss
from minisft.training.new_result import new_result
from minisft.training.run import Run
from minisft.training.summary import run_summary


def save_result(
    run: Run, model_dir: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
    """Write the adapter or model to --output_dir, and plot the loss if asked. Every rank calls it.

    A checkpoint comes first: a run that cannot write its result, or is killed, continues from it,
    and so does a finished run with more steps. model_dir: folder of the base model. UserError if
    there is no room on the disk.
    """
    options, say = run.options, processes.print_rank0
    output_dir = Path(options.output_dir)
    resume.save_last_checkpoint(run)
    step = run.progress.step
    if options.load_best_model_at_end and run.best.step:
        step = load_best(run)
    with new_result(output_dir, result_record(options, run.progress.step)) as folder:
        if run.lora_config:
            save_adapter(run.model, folder, run.lora_config, options.model_name_or_path)
        else:
            save_full_model(run, model_dir, folder, template)
        if processes.rank() == 0:
            tokenizer.save(folder, saved_text(template) if template else None)
            copy_code_files(model_dir, folder)
            write_model_card(
                output_dir,
                used_options(run),
                options.model_name_or_path,
                [row for row in run.progress.rows() if row["step"] <= step],
                is_adapter=bool(run.lora_config),
                written_to=folder,
                context_length=run.model.config.context_length,
            )
    if options.save_total_limit == 0 and processes.rank() == 0:
        checkpoint.remove_others(output_dir, None, 0)
    run.progress.finish_log()
    say(f"saved to {output_dir}")
    say(run_summary(run))
    if options.plot_loss and processes.rank() == 0:
        try:
            say(f"drew {plot_loss(output_dir)}")
        except ImportError:
            say(
                "--plot_loss needs matplotlib (requirements/plot.txt); the numbers are in "
                f"{output_dir / 'metrics.jsonl'}"
            )
        except UserError as error:  # the disk is full; the result is saved
            say(f"no plot: {error}")


def used_options(run: Run) -> dict[str, Any]:
    """The options, with what --dtype auto has become, and the rows of a step."""
    dtype = dtype_name(resolve_dtype(dtype_option(run.options), run.device))
    return vars(run.options) | {"dtype": dtype, "rows_per_step": run.schedule.rows_per_step}


def load_best(run: Run) -> int:
    """Go back to the weights with the lowest evaluation loss. Returns the step of the weights."""
    best = Path(run.options.output_dir) / f"checkpoint-{run.best.step}"
    if fault := processes.broadcast_from_rank0(lambda: checkpoint.damage(best)):
        processes.print_rank0(f"{best}: {fault}; saving the last weights instead of the best")
        return run.progress.step
    checkpoint.restore_weights(run.model, best)
    processes.print_rank0(f"loaded the weights of {best}, evaluation loss {run.best.loss:.4f}")
    assert run.best.step is not None
    return run.best.step


def save_full_model(
    run: Run, model_dir: Path, output_dir: Path, template: ChatTemplate | None
) -> None:
    """Write the model in the type of its base, with the tokens that end its answers."""
    config = run.model.config
    if run.options.train_from_scratch:
        dtype = getattr(torch, config.dtype)
    else:
        dtype = stored_dtype(model_dir)
    save_model(run.model, output_dir, dtype)
    if processes.rank() == 0:
        stop_ids = generation_eos(model_dir, config)
        if template:
            stop_ids = template.stop_token_ids(stop_ids)
        save_generation_config(model_dir, output_dir, config, stop_ids)
