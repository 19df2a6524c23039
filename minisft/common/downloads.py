"""Download files from the Hugging Face hub into its local cache.

HF_ENDPOINT is the address of the hub or of a mirror.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError, first_line

CARD = "README.md"


@dataclass
class Repository:
    """The files of a data set on the hub, by name, and what its card says.

    is_complete: the hub has listed them, not a cache, which may have a part of them.
    """

    names: list[str]
    card: dict[str, Any]
    is_complete: bool


def download(
    repo_id: str, patterns: Sequence[str], repo_type: str = "model", offline: bool = False
) -> Path:
    """The local folder with the files of a repository that match the patterns.

    repo_type: "model" or "dataset". offline: take them from the cache. UserError if that fails.
    """
    from huggingface_hub import snapshot_download  # slow to import, as in the functions below

    try:
        folder = snapshot_download(
            repo_id,
            repo_type=repo_type,
            allow_patterns=list(patterns),
            local_files_only=offline,
        )
    except Exception as error:  # the libraries below raise many types
        raise _failure(repo_id, error, offline) from error
    return Path(folder)


def _failure(repo_id: str, error: Exception, offline: bool) -> UserError:
    """The error for a download that failed: where from, and what could help."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if offline or constants.HF_HUB_OFFLINE:
        cause = "" if offline else ", and HF_HUB_OFFLINE is set"
        return UserError(f"download of {repo_id} failed (it is not in the cache{cause})")
    reason = first_line(error).rstrip(".")
    if isinstance(error, GatedRepoError):
        reason = "accept its terms on its page, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository; a private one needs HF_TOKEN"
    return UserError(
        f"download of {repo_id} from {constants.ENDPOINT} failed ({reason}; HF_ENDPOINT names "
        "another address, such as a mirror)"
    )


def read_card(folder: Path) -> dict[str, Any]:
    """What the card in a folder says; {} if there is none, or none that can be read."""
    path = folder / CARD
    if not path.is_file() or not path.read_bytes().lstrip().startswith(b"---"):
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # text between two lines, which is no card
        return {}


def dataset_repository(repo_id: str, offline: bool = False) -> Repository:
    """The files and the card of a data set on the hub, or if it cannot be reached, of its cache.

    UserError if there is no such data set.
    """
    from huggingface_hub import HfApi

    try:
        if offline:
            raise FileNotFoundError
        info = HfApi().dataset_info(repo_id)
    except Exception as error:
        try:
            folder = download(repo_id, [CARD], "dataset", offline=True)
        except UserError:
            raise _failure(repo_id, error, offline) from error
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        return Repository(names, read_card(folder), is_complete=False)
    names = sorted(file.rfilename for file in info.siblings or [])
    card = info.card_data.to_dict() if info.card_data else {}
    return Repository(names, card, is_complete=True)
