"""--resume: check whether a run may continue in a folder, and clear the folder for a new run."""

from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.hashes import model_files
from minisft.common.json_files import read_json, write_json
from minisft.common.outputs import FULL_DISK, check_output_dir, recorded_options, save_options
from minisft.common.script import advice_after_ctrl_c

MODELS = "models.json"  # in the output folder: a fingerprint of the models
# Options on which the predictions of a benchmark depend.
CHOICE_OPTIONS = (
    "model_name_or_path",
    "adapter",
    "dtype",
    "bf16",
    "fp16",
    "quantization_bit",
    "data_dir",
    "split",
    "num_fewshot",
    "template",
    "template_kwargs",
    "enable_thinking",
    "max_length",
    "max_samples",
    "n_times",
    "seed",
)
# Options on which the answers of compared models depend.
ANSWER_OPTIONS = (
    "models",
    "dtype",
    "bf16",
    "fp16",
    "quantization_bit",
    "template",
    "template_kwargs",
    "enable_thinking",
    "dataset",
    "max_samples",
    "replace",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
)


def check_output(options: Namespace, inputs: Sequence[str | None], names: Sequence[str]) -> Path:
    """The folder to write to. UserError if it is an input, or not empty without --resume.

    names: of options. UserError if --resume would mix the results of runs that differ in them.
    """
    may_exist = options.overwrite_output_dir or options.resume
    hint = ""
    if not may_exist and is_of(options, names):
        hint = "continue with --resume, which keeps its answers"
    output_dir = check_output_dir(options.output_dir, may_exist, *inputs, hint=hint)
    recorded = recorded_options(options.output_dir) if options.resume else {}
    for name in names if recorded else ():
        if recorded.get(name) != getattr(options, name):
            raise UserError(
                f"--resume: {options.output_dir} is from a run with {name} {recorded.get(name)}, "
                f"not {getattr(options, name)}. Use the same options, or another --output_dir."
            )
    content = {"model_files": model_files(inputs)}
    if recorded and read_json(output_dir / MODELS, missing={}) != content:
        raise UserError(
            f"--resume: the files of a model have changed since the run in {options.output_dir}. "
            "Choose another --output_dir, or start again with --overwrite_output_dir."
        )
    return output_dir


def is_of(options: Namespace, names: Sequence[str]) -> bool:
    """True if --output_dir holds a run that --resume continues with these options."""
    recorded = recorded_options(options.output_dir)
    return bool(recorded) and all(recorded.get(name) == getattr(options, name) for name in names)


def start_output_dir(
    options: Namespace, output_dir: Path, inputs: Sequence[str | None], results: Sequence[str]
) -> None:
    """Create the folder, and record the options and the files of the models.

    inputs: the models and adapters. results: patterns of files. Without --resume, those of an
    earlier run are removed, because they could be mistaken for results of this run.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        for pattern in results:
            for path in output_dir.glob(pattern):
                path.unlink()
    write_json({"model_files": model_files(inputs)}, output_dir / MODELS)
    save_options(options, output_dir / "options.toml")


@contextmanager
def saying_how_to_go_on(options: Namespace, names: Sequence[str]) -> Generator[None, None, None]:
    """Say how to go on after Ctrl-C, and after a full disk. names: as in check_output."""

    def advice() -> str:
        """The way after Ctrl-C, once the folder belongs to this run."""
        command = "the same command" + " with --resume" * (not options.resume)
        way = f"what is finished is in {options.output_dir}; {command} continues from there"
        return way if is_of(options, names) else ""

    try:
        with advice_after_ctrl_c(advice):
            yield
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in FULL_DISK:
            raise
        raise UserError(f"{error}. Make room; the same command with --resume continues.") from error
