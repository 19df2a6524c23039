"""Download files from the Hugging Face hub into its local cache."""

from collections.abc import Sequence
from pathlib import Path

from minisft.common.errors import UserError, first_line


def download(repo_id: str, patterns: Sequence[str], repo_type: str = "model") -> Path:
    """The local folder with the files of a repository that match the patterns.

    repo_type: "model" or "dataset". UserError if the download fails.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, repo_type=repo_type, allow_patterns=list(patterns)))
    except Exception as error:  # the libraries below raise many types
        raise UserError(f"download of {repo_id} failed ({first_line(error)})") from error
