"""Compressed files, parquet and Arrow as JSON lines in a cache.

    if is_packed("train.parquet"):
        lines = unpack("train.parquet")         # ~/.cache/minisft/train-1f0c....jsonl

Rows are read in random order, which none of these files allows. So they are unpacked once, a few
rows at a time, whatever the size of the file. All ranks and later runs use the unpacked file. It is
made again if the file changes, or if it has lost bytes, and may be deleted when no run uses it. Its
lock holds its size.
"""

import fcntl
import gzip
import hashlib
import importlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from minisft.common.errors import UserError
from minisft.common.outputs import check_free_space

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # a file, and a stream as `datasets` writes it
COMPRESSED = (GZIP, ZSTD)
COLUMNAR = (PARQUET, *ARROW)
ROWS_AT_A_TIME = 1000
VERSION = "3"  # the format of the unpacked file


def is_packed(path: Path) -> bool:
    """True if the first bytes of a file show a kind that is unpacked here."""
    return _magic(path) is not None


def is_columnar(path: Path) -> bool:
    """True for parquet and Arrow, whose rows have no lines."""
    return _magic(path) in COLUMNAR


def _magic(path: Path) -> bytes | None:
    with open(path, "rb") as file:
        start = file.read(8)
    return next((magic for magic in (*COMPRESSED, *COLUMNAR) if start.startswith(magic)), None)


def unpack(path: Path) -> Path:
    """The file of JSON lines (or text) for a packed file, from the cache or new."""
    status = path.stat()
    key = f"{VERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = cache_dir() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The other ranks of this machine wait here, then find the file.
        with open(target.with_suffix(".lock"), "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            # A machine that crashes may leave a part of the file, or an empty one.
            if not target.exists() or lock.read() != str(target.stat().st_size):
                _write(path, target)
                lock.truncate(0)
                lock.write(str(target.stat().st_size))
    except OSError as error:
        raise UserError(
            f"{path}: it could not be unpacked to {target.parent} ({error.strerror or error}); "
            "XDG_CACHE_HOME chooses another place"
        ) from error
    return target


def cache_dir() -> Path:
    """The folder of unpacked files. UserError for a user without a home, as in some containers."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise UserError("this user has no home folder: set XDG_CACHE_HOME to a folder for caches")
    return Path(cache) / "minisft"


def _write(path: Path, target: Path) -> None:
    """Unpack `path` to a temporary file, then rename it."""
    magic = _magic(path)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        with open(partial, "wb") as file:
            if magic in COMPRESSED:
                _decompress(path, magic, file)
            else:
                rows = _read_parquet(path) if magic == PARQUET else _read_arrow(path)
                title = f"unpacking {path.name}"
                for record in tqdm(rows, title, leave=False, delay=2, unit="row", disable=None):
                    text = json.dumps(record, ensure_ascii=False, default=str)
                    file.write(text.encode("utf-8", "surrogatepass") + b"\n")
        os.replace(partial, target)


def _decompress(path: Path, magic: bytes, file: IO[bytes]) -> None:
    module = gzip if magic == GZIP else _zstd(path)
    damage = (EOFError, zlib.error, gzip.BadGzipFile, getattr(module, "ZstdError", EOFError))
    try:
        with module.open(path) as packed:
            shutil.copyfileobj(packed, file, 2**20)
    except damage as error:
        raise UserError(f"{path}: the file is damaged ({error}); download it again") from error


def _zstd(path: Path) -> Any:
    """The module that reads zstd."""
    try:
        return importlib.import_module("compression.zstd")  # from Python 3.14 on
    except ImportError as error:
        raise UserError(
            f"{path}: Python reads zstd from version 3.14 on. Run `zstd -d {path.name}` first."
        ) from error


def require_pyarrow(path: str | Path) -> Any:
    """The module pyarrow. UserError, naming the file that needs it, if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: parquet and Arrow files need pyarrow, which is not installed: "
            "pip install -r requirements/data.txt"
        ) from error
    return pyarrow


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, one part of a row group at a time."""
    pyarrow = require_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            check_free_space(cache_dir(), sum(group.total_byte_size for group in groups))
            columns = _text_columns(path, file.schema_arrow, pyarrow)
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=columns):
                yield from map(_without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: the file is damaged ({error}); download it again") from error


def _read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file or stream, a part of a batch at a time."""
    pyarrow = require_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            if _magic(path) == ARROW[0]:
                file = pyarrow.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            else:
                batches = file = pyarrow.ipc.open_stream(source)
            columns = _text_columns(path, file.schema, pyarrow)
            for batch in batches:
                batch = batch.select(columns)
                for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                    rows = batch.slice(start, ROWS_AT_A_TIME).to_pylist()
                    yield from map(_without_nulls, rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: the file is damaged ({error}); download it again") from error


def _text_columns(path: Path, schema: Any, pyarrow: Any) -> list[str]:
    """The names of the columns. UserError if one holds bytes, such as images, or appears twice."""
    for number, name in enumerate(schema.names):
        if name in schema.names[:number]:
            raise UserError(f"{path}: two columns are called {name}. Rename or remove one.")
    for field in schema:
        if _holds_bytes(field.type, pyarrow):
            raise UserError(
                f"{path}: the column {field.name} holds binary data; minisft learns text only. "
                f"Remove the column, for instance with pandas: read_parquet, drop(columns="
                f"['{field.name}']), to_parquet"
            )
    return schema.names


def _holds_bytes(type: Any, pyarrow: Any) -> bool:
    types = pyarrow.types
    if types.is_binary(type) or types.is_large_binary(type) or types.is_fixed_size_binary(type):
        return True
    return any(_holds_bytes(type.field(k).type, pyarrow) for k in range(type.num_fields))


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns, and with null for NaN and infinity.

    All objects of a column share their names: {"role", "content", "tool_calls"} for every turn, or
    the arguments of all tools for each call. A null means that the object has no such name.
    """
    return {name: _pruned(value) for name, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        pruned = {name: _pruned(item) for name, item in value.items()}
        return {name: item for name, item in pruned.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value
