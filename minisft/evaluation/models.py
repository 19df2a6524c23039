"""The models that a command line names: `NAME=DIR`, or with a LoRA adapter `NAME=DIR+ADAPTER`.

`NAME=ADAPTER` is enough if the adapter names its base.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minisft.checkpoints import hub
from minisft.common import tensor_files
from minisft.common.errors import UserError


class NamedModel(NamedTuple):
    """A model to compare."""

    name: str
    path: str
    adapter: str | None


def parse_models(texts: Iterable[str]) -> list[NamedModel]:
    """The models of --models. UserError if one does not exist, or a name occurs twice."""
    models = [parse_model(text) for text in texts]
    if len({model.name for model in models}) < len(models):
        raise UserError("--models: two models have the same name. Name each one differently.")
    for model in models:
        check_model(model.path, model.adapter)
    return models


def paths_of(models: Iterable[NamedModel]) -> list[str | None]:
    """The paths of the models and of their adapters."""
    return [path for model in models for path in (model.path, model.adapter)]


def parse_model(text: str) -> NamedModel:
    """Parse `NAME=DIR` or `NAME=DIR+ADAPTER`."""
    name, _, place = text.partition("=")
    path, adapter = split_adapter(place)
    is_valid = name[:1].isalnum() and all(
        character.isalnum() or character in "-_." for character in name
    )
    if not is_valid or not path:
        raise UserError(
            f"--models {text}: write NAME=DIR or NAME=DIR+ADAPTER. A name has letters, digits, "
            "'-', '_' and '.', and begins with a letter or digit."
        )
    return NamedModel(name, path, adapter)


def split_adapter(place: str) -> tuple[str, str | None]:
    """`DIR`, `DIR+ADAPTER` or `ADAPTER` -> (model, adapter). A folder may have a + in its name."""
    if (Path(place).expanduser() / tensor_files.ADAPTER_CONFIG).is_file():
        return hub.base_model(place), place
    if Path(place).exists():
        return place, None
    path, _, adapter = place.partition("+")
    return path, adapter or None


def check_model(path: str, adapter: str | None) -> None:
    """UserError if the model or the adapter does not exist."""
    hub.resolve(hub.model_or_base(path, adapter))
    if adapter:
        hub.resolve(adapter, tensor_files.ADAPTER_CONFIG)
