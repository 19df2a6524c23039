"""Show the metrics of a run in TensorBoard, Weights & Biases, SwanLab or Trackio: --report_to.

    reports = Reports(options)
    reports.start(step=0)                                       # on rank 0
    reports.log({"step": 10, "loss": 0.5, "eval_loss": 0.7})    # train/loss, eval/loss
    reports.finish()

Scalars have their names in transformers. A service that fails is reported once and dropped;
training continues. A resumed run continues the run of the service, whose id is in reports.json.
"""

import json
import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minisft.common.errors import UserError, first_line
from minisft.common.json_files import read_json
from minisft.common.option_types import split_names
from minisft.common.outputs import atomic_write, despite_full_disk

# The default name of a project. WANDB_PROJECT, SWANLAB_PROJECT and TRACKIO_PROJECT give another.
PROJECT = "minisft"
# The ids of the runs at their services, a file in --output_dir.
RUN_IDS = "reports.json"


class Service(Protocol):
    """A run at a service."""

    run_id: str | None  # to continue the run later

    def __init__(self, options: Namespace, step: int, run_id: str | None) -> None:
        """Open a run, or continue the run `run_id`. step: the last step before it."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send the scalars of a step."""

    def finish(self, files: list[str]) -> None:
        """Send the paths of the result and end the run."""


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard."""

    def __init__(self, options: Namespace, step: int, run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = None
        # A viewer drops what an earlier run has logged after this step.
        folder = Path(options.output_dir) / "tensorboard"
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.writer.add_text("args", as_code(vars(options)), step + 1)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the scalars of a step to the disk."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, files: list[str]) -> None:
        """Write the paths of the result."""
        self.writer.add_text("final_files", as_code(files))
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb. Its settings are environment variables, such as WANDB_MODE=offline."""

    def __init__(self, options: Namespace, step: int, run_id: str | None) -> None:
        wandb: Any = import_module("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=options.run_name or options.output_dir,
            dir=options.output_dir,
            id=run_id,
            resume="allow",
            config=vars(options),
            allow_val_change=True,  # options may change in a resumed run
        )
        self.run_id = self.run.id
        # Its own count of steps never goes back, as a resumed run may.
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send the scalars of a step."""
        self.run.log(dict(scalars))

    def finish(self, files: list[str]) -> None:
        """Send the paths of the result and end the run."""
        self.run.summary["final_files"] = files
        self.run.finish()


class SwanLab:
    """A run of SwanLab. Its settings are environment variables, such as SWANLAB_MODE=offline."""

    def __init__(self, options: Namespace, step: int, run_id: str | None) -> None:
        swanlab: Any = import_module("swanlab")
        self.run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            name=options.run_name or options.output_dir,
            log_dir=str(Path(options.output_dir) / "swanlab"),
            id=run_id,
            resume="allow",
            config=vars(options),
        )
        self.run_id = self.run.id

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send the scalars of a step."""
        self.run.log(dict(scalars), step=step)

    def finish(self, files: list[str]) -> None:
        """Send the paths of the result and end the run."""
        self.run.config.update({"final_files": files})
        self.run.finish()


class Trackio:
    """A run of Trackio, in the database of this machine, or where TRACKIO_SPACE_ID says."""

    def __init__(self, options: Namespace, step: int, run_id: str | None) -> None:
        trackio: Any = import_module("trackio")
        self.run = trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_id or options.run_name or options.output_dir,
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config=vars(options),
            resume="allow" if run_id else "never",
            embed=False,
        )
        self.run_id, self.step = self.run.name, step

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send the scalars of a step."""
        self.step = step
        self.run.log(dict(scalars), step=step)

    def finish(self, files: list[str]) -> None:
        """Send the paths of the result and end the run."""
        # Trackio stores the configuration at the first step only.
        self.run.log({"final_files": ", ".join(files)}, step=self.step)
        self.run.finish()


# {name of the package, as in --report_to: its class}
SERVICES: dict[str, type[Service]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


def service_names(text: str) -> str:
    """The argparse type of --report_to: names of SERVICES, separated by commas, or none."""
    names = split_names(text)
    for name in names:
        if name not in (*SERVICES, "none"):
            raise ArgumentTypeError(
                f"'{name}' is not one of {', '.join(SERVICES)}, or none (several with commas)"
            )
    if "none" in names and len(names) > 1:
        raise ArgumentTypeError(f"'{text}': none excludes the others")
    return ",".join(dict.fromkeys(names))


def chosen_services(options: Namespace) -> list[str]:
    """The names in --report_to. UserError if a package is missing."""
    names = [name for name in options.report_to.split(",") if name != "none"]
    for name in names:
        if not find_spec(name):
            raise UserError(f"--report_to {name} needs a package: pip install {name}")
    return names


class Reports:
    """The services of --report_to. Does nothing before `start`, which only rank 0 calls."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.services: dict[str, Service] = {}

    def start(self, step: int) -> None:
        """Open a run at each service. step: the last step of the checkpoint; 0 for a new run."""
        ids_path = Path(self.options.output_dir) / RUN_IDS
        run_ids = read_json(ids_path, missing={}) if step else {}
        for name in chosen_services(self.options):
            with self._survive(name):
                self.services[name] = SERVICES[name](self.options, step, run_ids.get(name))
        if self.services:
            run_ids |= {name: service.run_id for name, service in self.services.items()}
            with atomic_write(ids_path) as file:
                json.dump(run_ids, file)

    def log(self, values: Mapping[str, float]) -> None:
        """Send a line of metrics.jsonl. values: with "step"."""
        step = int(values["step"])
        scalars = {scalar_name(name): value for name, value in values.items() if name != "step"}
        scalars["train/global_step"] = step
        for name, service in list(self.services.items()):
            with self._survive(name):
                service.log(scalars, step)

    def finish(self) -> None:
        """Send the paths of the files in --output_dir and end the runs."""
        folder = Path(self.options.output_dir)
        files = [str(path) for path in sorted(folder.glob("*")) if path.is_file()]
        for name, service in list(self.services.items()):
            with self._survive(name):
                service.finish(files)
        self.services = {}

    @contextmanager
    def _survive(self, name: str) -> Generator[None, None, None]:
        """Drop a service if it fails. Training continues whatever the service raises."""
        try:
            yield
        except Exception as error:
            self.services.pop(name, None)
            with despite_full_disk():
                print(
                    f"--report_to {name}: {first_line(error)}; training continues without it",
                    flush=True,
                )


def scalar_name(name: str) -> str:
    """The name in transformers: eval_loss -> eval/loss, learning_rate -> train/learning_rate."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return f"train/{'num_input_tokens_seen' if name == 'tokens' else name}"


def as_code(value: Any) -> str:
    """A value as JSON, for a page that shows Markdown."""
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"
