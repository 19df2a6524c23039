"""Record the data and the model of scores by hash, so that scores are never mixed.

record = score_record(options, rows, is_drawn, model_dir, None, scorer, torch.float32)
check_same_record("scores.jsonl", old_record, record)
check_computed_from("scores.jsonl", record["dataset"])
"""

import hashlib
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.checkpoints.folders import stored_tensors
from minisft.common.devices import dtype_name
from minisft.common.errors import UserError
from minisft.common.hashes import sha256
from minisft.common.json_files import read_json
from minisft.common.model_flags import TEMPLATE_FLAGS
from minisft.common.tensor_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minisft.data.dataset import Rows
from minisft.selection.ifd import IfdScorer
from minisft.selection.reward_scores import RewardScorer
from minisft.selection.score_files import ScorePaths
from minisft.text.saved_form import saved_text
from minisft.text.tokenizer_files import FILES as TOKENIZER_FILES


def score_record(
    options: Namespace,
    rows: Rows,
    is_drawn: np.ndarray,
    model_dir: Path,
    adapter_dir: Path | None,
    scorer: IfdScorer | RewardScorer,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that the scores of score.py depend on. "names" are for messages only."""
    return {
        **model_record(model_dir, adapter_dir),
        "dataset": dataset_record(rows, is_drawn, options.max_samples),
        "template": scorer.template.name,
        # With --enable_thinking, which changes the prompts too.
        "template_text": hashlib.sha256(saved_text(scorer.template).encode()).hexdigest(),
        "template_date": scorer.template.now,
        "cutoff_len": scorer.cutoff_len,
        "dtype": dtype_name(dtype),
        "quantization_bit": options.quantization_bit,
        "replace": options.replace,
        "kind of scores": "rewards" if options.mode == "reward" else "losses",
        "names": {
            "model": options.model_name_or_path,
            "adapter": options.adapter,
            "dataset": options.dataset,
            "template_text": scorer.template.name,
            **{name: getattr(options, name) for name in TEMPLATE_FLAGS if name != "template"},
        },
    }


def recorded_date(output: str | Path) -> str | None:
    """The date that the template saw when the first scores in this file were computed."""
    return read_json(ScorePaths(output).record, missing={}).get("template_date")


def dataset_record(
    rows: Rows, is_drawn: np.ndarray, max_samples: int | None = None
) -> list[dict[str, Any]]:
    """Per file: its hash, the number of rows, how many of them are drawn, and the column names.

    is_drawn: bool (rows,). The hash, the count and max_samples determine which rows are drawn.
    """
    record = []
    for file, drawn in zip(rows.files, np.split(is_drawn, rows.ends[:-1]), strict=True):
        entry = {
            "sha256": sha256(file.records.path),
            "rows": len(file.records),
            "opened": int(drawn.sum()),
        }
        if max_samples:
            entry["max_samples"] = max_samples
        if file.description:
            entry |= asdict(file.description)
            entry.pop("name", None)
        record.append(entry)
    return record


def model_record(model_dir: Path, adapter_dir: Path | None = None) -> dict[str, Any]:
    """The hashes of all files of the model and the adapter that a score depends on."""
    names = {tensor.path.name for tensor in stored_tensors(model_dir).values()}
    names |= {name for name in TOKENIZER_FILES if (model_dir / name).is_file()}
    names.add("config.json")
    record: dict[str, Any] = {"model": {name: sha256(model_dir / name) for name in sorted(names)}}
    record["adapter"] = adapter_dir and {
        name: sha256(adapter_dir / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    }
    return record


def read_pooling(embeddings: str | Path) -> str:
    """How score.py pooled these embeddings: "mean" or "weighted"."""
    return read_json(ScorePaths(embeddings).record, missing={}).get("pooling", "mean")


def check_same_model(target: str, embeddings: str) -> None:
    """UserError unless both files of embeddings come from the same model, template and pooling.

    RDS+ compares them, with --pooling weighted.
    """
    for path in (target, embeddings):
        if read_pooling(path) != "weighted":
            raise UserError(
                f"{path} holds means of the prompts. --strategy rds compares prompts with answers: "
                "run score.py --mode embed --pooling weighted."
            )
    records = [read_json(ScorePaths(path).record) for path in (target, embeddings)]
    # The date of a template with a date is a token or two.
    for key in records[0].keys() - {"names", "dataset", "replace", "template_date"}:
        if records[0][key] != records[1].get(key):
            raise UserError(
                f"--target {target} was computed with another {key} than --embeddings "
                f"{embeddings}. Run score.py with the same flags for both."
            )


def check_same_record(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError if the scores in `path`, computed from `old`, may not be continued with `new`.

    "names" in a record are for messages; they may differ.
    """
    for key, value in new.items():
        if key != "names" and old.get(key) != value:
            names = [record.get("names", {}).get(key, record.get(key)) for record in (old, new)]
            difference = f"({names[0]}, not {names[1]})"
            if names[0] == names[1]:
                difference = "(same name, changed content)"
            if key == "dataset" and is_other_limit(old.get(key), value):
                limits = [covered_rows(max_samples_of(dataset)) for dataset in (old[key], value)]
                key, difference = "--max_samples", f"({limits[0]}, not {limits[1]})"
            raise UserError(
                f"{path} was computed with another {key} {difference}. Choose another --output, or "
                "add --overwrite to lose these scores."
            )


def check_computed_from(path: str | Path, dataset: list[dict[str, Any]]) -> None:
    """UserError unless the scores or embeddings in `path` were computed from this data set."""
    path = Path(path)
    record_path = ScorePaths(path).record
    if not path.exists():
        raise UserError(f"{path}: no such file. Run score.py to write it.")
    if not record_path.exists():
        raise UserError(
            f"{path}: there is no {record_path.name} beside it. score.py writes it, to say which "
            "data the scores belong to."
        )
    record = read_json(record_path)
    scored = record.get("dataset", [])
    if scored != dataset and is_other_limit(scored, dataset):
        limit, wanted = max_samples_of(scored), max_samples_of(dataset)
        kind = "scores" if path.suffix == ".jsonl" else "embeddings"
        again = f"with --max_samples {wanted}" if wanted else "without it"
        change = "leave out --max_samples"
        if limit:
            change = f"{'give' if wanted else 'add'} --max_samples {limit}"
        raise UserError(
            f"{path} has the {kind} of {covered_rows(limit)}: {change}, or run score.py {again}."
        )
    if scored != dataset:
        names = record.get("names")
        name = names.get("dataset") if isinstance(names, dict) else None
        raise UserError(
            f"{path} belongs to another file than --dataset, or that file has changed (it was "
            f"computed from {name}). Run score.py on --dataset."
        )


def max_samples_of(dataset: list[dict[str, Any]]) -> int | None:
    """The --max_samples of a `dataset_record`; None if all rows were used."""
    return dataset[0].get("max_samples")


def covered_rows(max_samples: int | None) -> str:
    """The rows that --max_samples leaves, in words."""
    return f"the first {max_samples} rows" if max_samples else "all rows"


def is_other_limit(old: Any, new: list[dict[str, Any]]) -> bool:
    """True if two values of `dataset_record` differ in --max_samples, and in nothing else."""

    def files(dataset: list[dict[str, Any]]) -> list[dict[str, Any]]:
        limited = ("max_samples", "opened")
        return [{key: file[key] for key in file.keys() - limited} for file in dataset]

    # A record is a file, which somebody may have edited.
    is_record = isinstance(old, list) and old and all(isinstance(file, dict) for file in old)
    return (
        bool(is_record) and files(old) == files(new) and max_samples_of(old) != max_samples_of(new)
    )
