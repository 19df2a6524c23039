"""Git LFS pointers: the small text files that `git clone` leaves where large files belong.

version https://git-lfs.github.com/spec/v1
oid sha256:4cac19be64...
size 988097824
"""

from pathlib import Path

from minisft.common.errors import UserError

FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str | Path) -> None:
    """UserError if the file is a pointer. Files that cannot be read are left to the caller."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(FIRST_LINE)) == FIRST_LINE
    except OSError:
        return
    if is_pointer:
        raise UserError(
            f"{path}: this is a Git LFS pointer, not the file itself. Run `git lfs pull` in the "
            "cloned repository to download the file (install git-lfs first if git has no such "
            "command)."
        )
