"""Read the kind, the subset and the split of files from their names."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from string import digits

from minisft.common.errors import UserError
from minisft.common.words import list_names

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSED = (".gz", ".zst")
# Files of a data set that hold no rows.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words in the file names of a split.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def file_kind(name: str | PurePath, plain_text: bool = False) -> str | None:
    """ "json", "parquet", "arrow" or, with plain_text, "text"; None for a file without rows."""
    path = PurePath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    # `datasets` stores its own intermediate results as cache-....arrow.
    is_cache = path.suffix == ".arrow" and path.name.startswith("cache-")
    if is_hidden or is_cache or path.name in METADATA_FILES:
        return None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind != "text" or plain_text else None


def choose_files(
    place: str,
    names: Sequence[str],
    subset: str | None = None,
    split: str | None = None,
    folder: str = "",
) -> list[str]:
    """The names whose words belong to a subset and a split ("train" by default).

    place: the data set or folder of these files, for messages. folder: above all names; its own
    words name no split. If no name mentions a split, all are "train".
    """
    words = {name: _words(str(PurePath(name).relative_to(folder))) for name in names}
    chosen = list(names)
    if subset:
        matching = [name for name in chosen if _words(subset) <= _words(name)]
        if not matching and subset != "default":
            raise UserError(
                f"{place}: no file for the subset '{subset}' among {list_names(chosen)}"
            )
        chosen = matching or chosen
    split = split or "train"
    matching = [name for name in chosen if _in_split(words[name], split)]
    names_splits = any(_in_split(words[name], known) for name in chosen for known in SPLIT_WORDS)
    if not matching and (names_splits or split != "train"):
        raise UserError(f"{place}: no file for the split '{split}' among {list_names(chosen)}")
    return matching or chosen


def training_files(place: str, names: Sequence[str]) -> list[str]:
    """The names of the split "train" in a folder; all names if they do not mention several splits.

    A folder that holds only test files is meant to be read, for instance by --eval_dataset.
    """
    splits = [s for s in SPLIT_WORDS if any(_in_split(_words(name), s) for name in names)]
    return choose_files(place, names) if "train" in splits or len(splits) > 1 else list(names)


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))


def _in_split(words: set[str], split: str) -> bool:
    if split not in SPLIT_WORDS:
        return _words(split) <= words
    # As in `datasets`, digits end a word: test1.json is a test file.
    return bool(SPLIT_WORDS[split] & {word.strip(digits) for word in words})
