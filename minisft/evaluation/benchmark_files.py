"""Read C-Eval, CMMLU and MMLU as their authors publish them: a folder or a zip of CSV files.

    subjects = read_subjects(BENCHMARKS["ceval"], "ceval-exam.zip", split="val", num_fewshot=5)
    print(subjects[0].name, len(subjects[0].questions))

There is a CSV file for every subject and split. C-Eval and CMMLU have header rows, which differ;
MMLU has none. `subject_mapping.json` beside the files has the name of each subject in the prompt
and its group.
"""

import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer
from minisft.evaluation.benchmarks import LETTERS, Benchmark, Question, Subject
from minisft.evaluation.text_metrics import CJK

MAPPINGS = ("subject_mapping.json", "mapping.json")
# The errors of zipfile for a file that is damaged, truncated, encrypted or compressed in a way
# that Python does not support.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


def read_subjects(
    benchmark: Benchmark,
    data_dir: str | Path,
    split: str,
    num_fewshot: int = 0,
    wanted: Sequence[str] = (),
    max_samples: int | None = None,
) -> list[Subject]:
    """The subjects of a split with their demonstrations, sorted by name.

    wanted: the names of the subjects to read; by default all. max_samples: questions of a subject,
    the first ones. Demonstrations come from the split `dev`. UserError names the file and row that
    is broken, or the subject that is missing or has too few demonstrations.
    """
    files = Files(data_dir)
    paths = files.subjects(split)
    if not paths:
        raise UserError(
            f"{data_dir}: no CSV files in a folder '{split}'. The folder has the splits: "
            f"{', '.join(files.splits()) or 'none'}."
        )
    unknown = sorted(set(wanted) - set(paths))
    if unknown:
        raise UserError(
            f"--subjects {unknown[0]}: the split '{split}' of {data_dir} has no such subject. "
            f"It has {', '.join(sorted(paths))}."
        )
    names = files.subject_names()
    demonstrations = files.subjects("dev") if num_fewshot else {}
    subjects = []
    for key in sorted(set(wanted) or paths):
        if num_fewshot and key not in demonstrations:
            raise UserError(
                f"{data_dir}: the subject {key} has no demonstrations: its file in the folder "
                "'dev' is missing. Add it, or use --num_fewshot 0."
            )
        if benchmark.needs_names and key not in names:
            raise UserError(
                f"{data_dir}: {MAPPINGS[0]} does not name the subject {key} for the prompt. "
                f'Add {{"{key}": {{"name": ..., "category": ...}}}} to it; '
                "docs/evaluation.md says where it is published."
            )
        name, group = names.get(key, (key.replace("_", " "), ""))
        shown = files.questions(demonstrations[key], need_answers=True) if num_fewshot else []
        if len(shown) < num_fewshot:
            raise UserError(
                f"{data_dir}: the subject {key} has {len(shown)} demonstrations, not "
                f"{num_fewshot}. Use --num_fewshot {len(shown)}."
            )
        questions = files.questions(paths[key])[:max_samples]
        subjects.append(Subject(key, name, group, questions, shown))
    return subjects


def language_note(benchmark: Benchmark, subjects: Sequence[Subject]) -> str:
    """A warning if most questions are not in the language of the prompt; else empty."""
    questions = [question.text for subject in subjects for question in subject.questions]
    expects_chinese = has_chinese(benchmark.heading)
    # MMLU may well ask about a Chinese word.
    num_expected = sum(has_chinese(text) == expects_chinese for text in questions)
    if 2 * num_expected >= len(questions):
        return ""
    language = "Chinese" if expects_chinese else "English"
    return (
        f"warning: the prompt of {benchmark.title} is {language}, and the questions are not. Is "
        f"--data_dir the folder of {benchmark.title}?"
    )


def has_chinese(text: str) -> bool:
    """True if the text has a Chinese character."""
    return re.search(f"[{CJK}]", text) is not None


class Files:
    """The files of a benchmark in a folder or a zip, at any depth."""

    def __init__(self, data_dir: str | Path):
        self.root = Path(data_dir).expanduser()
        self.archive: zipfile.ZipFile | None = None
        if self.root.is_dir():
            names = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*.*")]
        elif zipfile.is_zipfile(self.root):
            try:
                self.archive = zipfile.ZipFile(self.root)
            except ZIP_ERRORS as error:
                raise UserError(f"--data_dir {data_dir}: {error}. Download it again.") from error
            names = self.archive.namelist()
        else:
            refuse_pointer(self.root)
            state = "neither a folder nor a zip" if self.root.exists() else "no such folder"
            raise UserError(
                f"--data_dir {data_dir}: {state}. Give the folder or zip of the benchmark; unpack "
                "other archives."
            )
        paths = [PurePosixPath(name) for name in names]
        # Archives made on a Mac repeat every file name in a second tree, __MACOSX.
        self.paths = sorted(
            path for path in paths if "__MACOSX" not in path.parts and not path.name.startswith(".")
        )

    def splits(self) -> list[str]:
        """The names of the folders that hold CSV files."""
        return sorted({path.parent.name for path in self.paths if path.suffix == ".csv"})

    def subjects(self, split: str) -> dict[str, PurePosixPath]:
        """Subject -> its file in a split. Both `val/law_val.csv` and `val/law.csv` are law."""
        subjects: dict[str, PurePosixPath] = {}
        for path in self.paths:
            if path.parent.name == split and path.suffix == ".csv":
                key = path.stem.removesuffix(f"_{split}")
                if key in subjects:
                    raise UserError(
                        f"{self.root}: both {subjects[key]} and {path} are the subject {key}. "
                        "Give the folder of a single benchmark."
                    )
                subjects[key] = path
        return subjects

    def read(self, path: PurePosixPath) -> str:
        """The text of a file, without a byte order mark."""
        source = self.root / path
        if not self.archive:
            refuse_pointer(source)
        try:
            content = self.archive.read(str(path)) if self.archive else source.read_bytes()
        except ZIP_ERRORS as error:
            raise UserError(
                f"{source}: cannot be read ({error}). Download the zip again, or unpack it."
            ) from error
        return _decode(content, source)

    def subject_names(self) -> dict[str, tuple[str, str]]:
        """Subject -> (name, group), from the mapping; empty if there is none.

        It is published in two forms: {"law": {"name": "法学", "category": "Humanities"}}, and as
        C-Eval's {"law": ["Law", "法学", "Humanities"]}.
        """
        inside = [path for path in self.paths if path.name in MAPPINGS]
        beside = [self.root.parent / name for name in MAPPINGS] if self.archive else []
        beside = [path for path in beside if path.is_file()]
        if inside:
            source, text = self.root / inside[0], self.read(inside[0])
        elif beside:
            source, text = beside[0], _decode(beside[0].read_bytes(), beside[0])
        else:
            return {}
        try:
            return {key: _name_and_group(entry) for key, entry in json.loads(text).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{source}: expected {{"subject": {{"name": ..., "category": ...}}}} for every '
                f"subject ({error})"
            ) from error

    def questions(self, path: PurePosixPath, need_answers: bool = False) -> list[Question]:
        """The questions of a CSV file. need_answers: a file without answers is an error."""
        source = self.root / path
        reader = csv.reader(io.StringIO(self.read(path), newline=""), strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            raise UserError(f"{source}, line {reader.line_num}: {error}") from error
        columns, has_header = _columns(rows[0][1], source) if rows else ({}, False)
        body = rows[has_header:]
        if not body:
            raise UserError(f"{source}: the file has no questions")
        width = len(rows[0][1])
        questions = [
            _question(row, columns, width, number, f"{source}, line {line}")
            for number, (line, row) in enumerate(body)
        ]
        answers = [question.answer for question in questions]
        if None in answers and any(answers):
            line, _ = body[answers.index(None)]
            raise UserError(f"{source}, line {line}: the answer is missing; other rows have one")
        if None in answers and need_answers:
            raise UserError(f"{source}: has no answers, which demonstrations need")
        if len({question.id for question in questions}) < len(questions):
            questions = [
                replace(question, id=str(number)) for number, question in enumerate(questions)
            ]
        return questions


def _decode(content: bytes, source: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason})") from error


def _name_and_group(entry: Any) -> tuple[str, str]:
    name, group = entry[-2:] if isinstance(entry, list) else (entry["name"], entry["category"])
    if not (isinstance(name, str) and isinstance(group, str)):
        raise TypeError(f"{name!r}, {group!r}: not text")
    return name, group


def _columns(first_row: list[str], source: Path) -> tuple[dict[str, int], bool]:
    """(name -> number of the column, whether the first row is a header)."""
    names = [name.strip().lower() for name in first_row]
    needed = ["question", "a", "b", "c", "d"]
    if "question" in names:
        missing = [name for name in needed if name not in names]
        if missing:
            raise UserError(
                f"{source}: the column {missing[0]} is missing. The file has "
                f"{', '.join(filter(None, names))}."
            )
        # CMMLU's first column has numbers and no name.
        return {name or "id": index for index, name in enumerate(names)}, True
    if len(names) not in (5, 6):
        raise UserError(
            f"{source}: expected a header with question, A, B, C, D, or rows of a question, four "
            f"options and the answer, but found {len(names)} columns"
        )
    # MMLU's order. The answer may be missing.
    return {name: index for index, name in enumerate([*needed, "answer"][: len(names)])}, False


def _question(
    row: list[str], columns: dict[str, int], width: int, number: int, place: str
) -> Question:
    if len(row) != width:
        raise UserError(f"{place}: {len(row)} columns, but the first row has {width}")
    cells = {name: row[index] for name, index in columns.items()}
    # Files with secret answers have no such column, or an empty one.
    answer = cells.get("answer", "").strip() or None
    if answer not in (None, *LETTERS):
        raise UserError(f"{place}: the answer is '{answer}', not A, B, C or D")
    options = tuple(cells[letter.lower()] for letter in LETTERS)
    return Question(cells.get("id", str(number)), cells["question"].strip(), options, answer)
