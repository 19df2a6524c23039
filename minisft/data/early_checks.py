"""Checks of names that need no torch, which takes seconds to load.

options = check_places(options)         # UserError: there is no such model, adapter or data set
"""

from argparse import Namespace

from minisft.common.model_names import check_place
from minisft.data.sources import MissingData, find_sources


def check_places(options: Namespace) -> Namespace:
    """The same options. UserError if a model, an adapter or a data set cannot exist.

    What may be on the hub is left to those who download it.
    """
    values = vars(options)
    for flag in ("model_name_or_path", "adapter"):
        if values.get(flag):
            check_place(values[flag])
    plain_text = values.get("stage") == "pt"
    for flag in ("dataset", "eval_dataset"):
        try:
            if values.get(flag):
                find_sources(values[flag], values["dataset_dir"], plain_text, True, offline=True)
        except MissingData as error:
            is_on_hub = error.__cause__ is not None
            if not is_on_hub and not values.get("dry_run"):  # which plans without the rows
                raise
    return options
