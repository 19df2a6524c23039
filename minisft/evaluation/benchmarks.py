"""C-Eval, CMMLU and MMLU: their files as they are published, and how each asks its questions.

    benchmark = BENCHMARKS["ceval"]
    subjects = read_subjects(benchmark, "ceval-exam.zip", split="val", num_fewshot=5)
    print(subjects[0].name, len(subjects[0].questions))

A benchmark is a folder or zip of CSV files, one for each subject and split. C-Eval and CMMLU have
a header row, each its own; MMLU has none. `subject_mapping.json` beside them says what a subject
is called in the prompt and which group it belongs to.
"""

import csv
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from minisft.common.errors import UserError

LETTERS = ("A", "B", "C", "D")
MAPPINGS = ("subject_mapping.json", "mapping.json")
# What reading a zip raises where it is damaged, cut, encrypted or packed in a way unknown here.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True)
class Benchmark:
    """The wording of a benchmark's authors, and its splits with the one usually reported first."""

    title: str
    splits: tuple
    heading: str  # opens the prompt; {subject} is its name
    question: str  # before a question
    answer: str  # after its options, where the letter is to come
    letter: str = "{letter}"  # the letter behind it
    needs_names: bool = True  # whether subjects are called by other names than their files


BENCHMARKS = {
    "ceval": Benchmark(
        "C-Eval",
        ("val", "test", "dev"),
        heading="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
        question="",
        answer="答案：",
    ),
    "cmmlu": Benchmark(
        "CMMLU",
        ("test", "dev"),
        heading="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        question="题目：",
        answer="答案是：",
    ),
    "mmlu": Benchmark(
        "MMLU",
        ("test", "val", "dev"),
        heading="The following are multiple choice questions (with answers) about {subject}.\n\n",
        question="",
        answer="Answer:",
        letter=" {letter}",
        needs_names=False,
    ),
}


@dataclass(frozen=True)
class Question:
    """A question, its four options in order, and the right letter (None where it is not told)."""

    id: str
    text: str
    options: tuple
    answer: str | None

    def asked(self, benchmark):
        """The question with its options, up to where the letter is to come."""
        lines = [benchmark.question + self.text]
        lines += [f"{letter}. {one}" for letter, one in zip(LETTERS, self.options, strict=True)]
        return "\n".join([*lines, benchmark.answer])


@dataclass(frozen=True)
class Subject:
    """A subject: its file's name, its name in the prompt, its group, its rows."""

    key: str
    name: str
    group: str
    questions: list
    demonstrations: list = field(default_factory=list)


def read_subjects(benchmark, data_dir, split, num_fewshot=0, wanted=()):
    """The subjects of a split (all, or those `wanted`) with their demonstrations, by name.

    The demonstrations are the rows of the split `dev`. UserError names the file and row that
    cannot be used, the subject that is missing, or the one without demonstrations.
    """
    files = Files(data_dir)
    found = files.subjects(split)
    if not found:
        raise UserError(
            f"{data_dir}: no CSV files in a folder '{split}'; its splits are "
            f"{', '.join(files.splits()) or 'none at all'}"
        )
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise UserError(
            f"--subjects {unknown[0]}: not in the split '{split}' of {data_dir}; there "
            f"are {', '.join(sorted(found))}"
        )
    demonstrations, names = files.subjects("dev") if num_fewshot else {}, files.mapping()
    subjects = []
    for key in sorted(set(wanted) or found):
        if num_fewshot and key not in demonstrations:
            raise UserError(
                f"{data_dir}: the subject {key} has no demonstrations (a file in the "
                "folder 'dev'); add it, or give --num_fewshot 0"
            )
        if benchmark.needs_names and key not in names:
            raise UserError(
                f"{data_dir}: {MAPPINGS[0]} does not say what the subject {key} is "
                f'called in the prompt; add {{"{key}": {{"name": ..., "category": '
                "...}} to it (docs/evaluation.md says where it is published)"
            )
        name, group = names.get(key, (key.replace("_", " "), ""))
        shown = files.questions(demonstrations[key], answered=True) if num_fewshot else []
        subjects.append(Subject(key, name, group, files.questions(found[key]), shown))
    return subjects


class Files:
    """The text files of a folder or of a zip, wherever in it the splits' folders are."""

    def __init__(self, data_dir):
        self.root = Path(data_dir).expanduser()
        self.archive = None
        if self.root.is_dir():
            names = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*.*")]
        elif zipfile.is_zipfile(self.root):
            try:
                self.archive = zipfile.ZipFile(self.root)
            except ZIP_ERRORS as error:
                raise UserError(f"--data_dir {data_dir}: {error}; download it again") from error
            names = self.archive.namelist()
        else:
            state = "is neither a folder nor a zip" if self.root.exists() else "no such folder"
            raise UserError(
                f"--data_dir {data_dir}: {state}; give the benchmark's folder (other "
                "archives unpacked) or zip"
            )
        paths = [PurePosixPath(name) for name in names]
        # Archives made on a Mac have a second tree of files that only look like these.
        self.paths = sorted(
            path for path in paths if "__MACOSX" not in path.parts and not path.name.startswith(".")
        )

    def splits(self):
        """The names of the folders that hold CSV files."""
        return sorted({path.parent.name for path in self.paths if path.suffix == ".csv"})

    def subjects(self, split):
        """Subject -> its file in a split: `val/law_val.csv` and `val/law.csv` are both law."""
        found = {}
        for path in self.paths:
            if path.parent.name == split and path.suffix == ".csv":
                key = path.stem.removesuffix(f"_{split}")
                if key in found:
                    raise UserError(
                        f"{self.root}: both {found[key]} and {path} are the subject "
                        f"{key}; give the folder of one benchmark"
                    )
                found[key] = path
        return found

    def text(self, path):
        """A file's text, with or without a byte order mark."""
        place = self.root / path
        try:
            content = self.archive.read(str(path)) if self.archive else place.read_bytes()
        except ZIP_ERRORS as error:
            raise UserError(
                f"{place}: cannot be read ({error}); download the zip again, or unpack it yourself"
            ) from error
        return _decoded(content, place)

    def mapping(self):
        """Subject -> (name, group), from either published form of the mapping; {} without one.

        The forms: {"law": {"name": "法学", "category": "Humanities"}}, and C-Eval's own
        {"law": ["Law", "法学", "Humanities"]}.
        """
        found = [path for path in self.paths if path.name in MAPPINGS]
        beside = [self.root.parent / name for name in MAPPINGS] if self.archive else []
        beside = [path for path in beside if path.is_file()]
        if not found and not beside:
            return {}
        place = self.root / found[0] if found else beside[0]
        text = self.text(found[0]) if found else _decoded(place.read_bytes(), place)
        try:
            return {key: _name_and_group(entry) for key, entry in json.loads(text).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{place}: expected {{"subject": {{"name": ..., '
                f'"category": ...}}}} for every subject ({error})'
            ) from error

    def questions(self, path, answered=False):
        """The Questions of a CSV file; with `answered` a file without answers is an error."""
        place = self.root / path
        rows = csv.reader(io.StringIO(self.text(path), newline=""), strict=True)
        try:
            rows = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise UserError(f"{place}, line {rows.line_num}: {error}") from error
        first = rows[0][1] if rows else []
        columns, has_header = _columns(first, place) if rows else ({}, False)
        if not rows[has_header:]:
            raise UserError(f"{place}: there are no questions in it")
        questions = [
            _question(row, columns, len(first), number, f"{place}, line {line}")
            for number, (line, row) in enumerate(rows[has_header:])
        ]
        answers = [one.answer for one in questions]
        if None in answers and any(answers):
            line = rows[has_header:][answers.index(None)][0]
            raise UserError(f"{place}, line {line}: there is no answer, though other rows have one")
        if None in answers and answered:
            raise UserError(f"{place}: has no answers, so it cannot be shown as demonstrations")
        if len({one.id for one in questions}) < len(questions):
            questions = [replace(one, id=str(number)) for number, one in enumerate(questions)]
        return questions


def _decoded(content, place):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error.reason})") from error


def _name_and_group(entry):
    name, group = entry[-2:] if isinstance(entry, list) else (entry["name"], entry["category"])
    if not (isinstance(name, str) and isinstance(group, str)):
        raise TypeError(f"{name!r}, {group!r}: no text")
    return name, group


def _columns(first, place):
    """(column name -> its place, whether that is a header); without one in MMLU's order."""
    names = [name.strip().lower() for name in first]
    needed = ["question", "a", "b", "c", "d"]
    if "question" in names:
        missing = [name for name in needed if name not in names]
        if missing:
            raise UserError(
                f"{place}: the column {missing[0]} is missing; it has "
                f"{', '.join(filter(None, names))}"
            )
        # CMMLU's first column has numbers and no name.
        return {name or "id": index for index, name in enumerate(names)}, True
    if len(names) not in (5, 6):
        raise UserError(
            f"{place}: neither a header with question, A, B, C, D nor rows of a "
            f"question, four options and the answer, but {len(names)} columns"
        )
    return {name: index for index, name in enumerate([*needed, "answer"][: len(names)])}, False


def _question(row, columns, width, number, place):
    if len(row) != width:
        raise UserError(f"{place}: {len(row)} columns where the first row has {width}")
    cells = {name: row[index] for name, index in columns.items()}
    # Where answers are kept back there is no such column, or an empty one.
    answer = cells.get("answer", "").strip() or None
    if answer not in (None, *LETTERS):
        raise UserError(f"{place}: the answer is '{answer}', which is none of A, B, C, D")
    options = tuple(cells[letter.lower()] for letter in LETTERS)
    return Question(cells.get("id", str(number)), cells["question"].strip(), options, answer)
