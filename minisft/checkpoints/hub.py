"""Find a checkpoint: a folder, a GGUF file, or a model on the hub."""

from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.tensor_files import ADAPTER_WEIGHTS
from minisft.gguf import unpack
from minisft.gguf.reader import is_gguf

HUB_PATTERNS = [
    "*.json",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    "model*.safetensors",
    ADAPTER_WEIGHTS,
]


def resolve(name_or_path, needed="config.json"):
    """The local folder of a checkpoint or adapter; a hub id is downloaded or found in the cache.

    A GGUF file is unpacked into one.
    Raises UserError where there is neither such a folder nor a way to the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            files = sorted(path.glob("*.gguf")) if needed == "config.json" else []
            hint = f"; to read a GGUF file, give the file: {files[0]}" if files else ""
            inner = sorted(path.glob(f"snapshots/*/{needed}"))  # in the cache of the hub
            hint = f"; did you mean {inner[-1].parent}?" if inner else hint
            raise UserError(f"{path}: there is no {needed} in this folder{hint}")
        return path
    if (
        needed == "config.json"
        and path.is_file()
        and (path.suffix.lower() == ".gguf" or is_gguf(path))
    ):
        return unpack.unpack(path)
    if path.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        hint = "" if "/" in name_or_path else ", and models on the hub are called OWNER/NAME"
        raise UserError(f"{name_or_path}: no such folder{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name_or_path}: no such folder here, and not to be had from the hub ({reason}); "
            "download it first and give its folder"
        ) from error
