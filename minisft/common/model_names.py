"""The name of a model or an adapter: a folder, a file, or OWNER/NAME on the Hugging Face hub."""

from pathlib import Path

from minisft.common.errors import UserError


def may_be_on_hub(name: str) -> bool:
    """True for OWNER/NAME, which is a relative path as well."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def check_place(name: str) -> None:
    """UserError for a name that is neither on this machine nor OWNER/NAME."""
    if not Path(name).expanduser().exists() and not may_be_on_hub(name):
        hint = "" if "/" in name else ", and models on the hub are called OWNER/NAME"
        raise UserError(f"{name}: no such folder{hint}")
