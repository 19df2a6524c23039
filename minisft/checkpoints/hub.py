"""Find a checkpoint: a folder, a GGUF file, or a model on the Hugging Face hub.

model_dir = resolve("Qwen/Qwen2.5-0.5B")
base_model("runs/cherry")                           # "examples/base"
"""

import os
import sys
from pathlib import Path

from minisft.common.downloads import download
from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.model_names import check_place, may_be_on_hub
from minisft.common.tensor_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minisft.common.torchrun import announced_rank
from minisft.gguf.reader import is_gguf
from minisft.gguf.unpack import unpack

CONFIG = "config.json"
HUB_PATTERNS = "*.json *.txt *.jinja *.py tokenizer.model model*.safetensors".split()
HUB_PATTERNS += [ADAPTER_WEIGHTS]


def resolve(name_or_path: str | Path, needed: str = CONFIG, offline: bool = False) -> Path:
    """The local folder of a checkpoint, or of an adapter (needed: adapter_config.json).

    A GGUF file is unpacked into a temporary folder. A hub id is downloaded, unless it is in the
    cache, or `offline`. UserError if there is no such checkpoint.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            raise UserError(f"{path}: there is no {needed} in this folder{_hint(path, needed)}")
        return path
    if path.is_file() and needed == CONFIG and (path.suffix.lower() == ".gguf" or is_gguf(path)):
        return unpack(path)
    if path.is_file() and is_gguf(path):
        raise UserError(
            f"{path} is a GGUF file, which is for llama.cpp. Give the adapter's folder, with "
            f"{needed}."
        )
    if path.exists():
        raise UserError(f"{path} is a file. Give the folder that holds it.")
    return _download(str(name_or_path), offline)


def resolve_adapter(name_or_path: str | Path, offline: bool = False) -> Path:
    """The local folder of an adapter; see resolve."""
    return resolve(name_or_path, ADAPTER_CONFIG, offline)


def model_or_base(
    model_name_or_path: str | None, adapter: str | None, offline: bool = False
) -> str:
    """The model that the flags name; with --adapter alone, the base of the adapter.

    Prints a line if the adapter names another base.
    """
    if not model_name_or_path:
        return base_model(adapter or "", offline)
    if adapter and (note := other_base(model_name_or_path, adapter)) and announced_rank() == 0:
        print(f"note: {note}", file=sys.stderr)
    return model_name_or_path


def other_base(model_name_or_path: str, adapter: str) -> str | None:
    """A note if an adapter on this machine names another base; None if it names this one.

    A model that was moved or downloaded keeps its last name, so only that is compared.
    """
    path = Path(adapter).expanduser() / ADAPTER_CONFIG
    base = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    if not base or not isinstance(base, str):
        return None
    is_same = os.path.realpath(base) == os.path.realpath(Path(model_name_or_path).expanduser())
    # The cache of the hub has folders such as models--Qwen--Qwen2.5-0.5B/snapshots/1234.
    last = base.rstrip("/").rpartition("/")[2].lower()
    if is_same or last in model_name_or_path.lower():
        return None
    return f"{adapter} was trained on {base}, and --model_name_or_path is {model_name_or_path}"


def base_in_any_folder(name_or_path: str | Path) -> str:
    """The name of a base for adapter_config.json: an absolute path, or a hub id."""
    path = Path(name_or_path).expanduser()
    return os.path.abspath(path) if path.exists() else str(name_or_path)


def base_model(adapter: str | Path, offline: bool = False) -> str:
    """The name of the model that an adapter was trained on, from its adapter_config.json.

    A relative path counts from the current folder, and else from that of the adapter. A hub id is
    downloaded, unless `offline`. UserError if the base is not named, or is not there.
    """
    adapter_dir = resolve_adapter(adapter, offline)
    path = adapter_dir / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{path} names no base model. Give it as --model_name_or_path.")
    if Path(name).expanduser().exists():
        return name
    if (adapter_dir / name).exists():
        return str(adapter_dir / name)
    if not may_be_on_hub(name):
        raise UserError(
            f"{path}: there is no base model {name} here. Give it as --model_name_or_path."
        )
    if not offline:
        try:
            resolve(name)
        except UserError as error:  # perhaps a relative path, which looks like a hub id
            raise UserError(
                f"{path} names the base model {name}. {error} Or give --model_name_or_path."
            ) from error
    return name


def _hint(path: Path, needed: str) -> str:
    if needed == CONFIG and (path / ADAPTER_CONFIG).is_file():
        return f". It holds an adapter: give it as --adapter {path}"
    if needed == ADAPTER_CONFIG and (path / CONFIG).is_file():
        return f". It holds a model, not an adapter: give it as --model_name_or_path {path}"
    checkpoints = [
        (int(part.parent.name.removeprefix("checkpoint-")), part.parent)
        for part in path.glob("checkpoint-*/*")
        if part.name in (CONFIG, ADAPTER_CONFIG) and part.parent.name[11:].isdigit()
    ]
    if checkpoints:
        last = max(checkpoints)[1]
        flag = "--adapter" if (last / ADAPTER_CONFIG).is_file() else "--model_name_or_path"
        return f". It holds an unfinished run: {flag} {last} can be used"
    snapshots = sorted(path.glob(f"snapshots/*/{needed}"))  # the layout of the hub's cache
    if snapshots:
        return f"; did you mean {snapshots[-1].parent}?"
    if files := sorted(path.glob("*.gguf")) if needed == CONFIG else []:
        return f"; to read a GGUF file, give the file: {files[0]}"
    below = sorted(file.parent for file in path.glob(f"*/{needed}"))
    return f"; did you mean {' or '.join(map(str, below[:3]))}?" if below else ""


def _download(name: str, offline: bool = False) -> Path:
    check_place(name)
    try:
        return download(name, HUB_PATTERNS, offline=offline)
    except UserError as error:
        raise UserError(
            f"{name}: no such folder, and the {error}. Download it first and give its folder."
        ) from error
