"""Files of prompts: each answered, in batches of similar length, in the order of the file.

    answer_file(assistant, "prompts.jsonl", "answers.jsonl", Sampling(greedy=True))

Prompts are lines of a .txt file, or rows of JSON or JSON lines: texts, rows with a column that
PROMPT_COLUMNS names, or rows in the formats of training data (formats.py), whose answer, if they
have one, the model does not see. Answers are JSON lines that train.py reads: {"messages": [...,
the answer], "score": its mean log-probability}.

What has been answered is kept in OUTPUT.partial, and a run that was interrupted goes on from there.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from minisft.common.errors import UserError
from minisft.data.formats import ROLES, parse_conversation
from minisft.data.records import open_records
from minisft.data.row_values import BadRow

PROMPT_COLUMNS = ("prompt", "question", "query", "text")
FORMAT_COLUMNS = {"instruction", "messages", "conversations", "kind"}  # not of a bare prompt
UNSEEN = "(the answer)"  # fills the place of the answer while a row is checked
LISTED = 10  # bad rows that are named before the rest is only counted


def answer_file(assistant, path, output_path, sampling, batch_size=8, system=None, settings=None):
    """Write the answers to the prompts in `path` -> number of rows.

    system: the system prompt of rows that bring none. settings: what the answers depend on, as a
    dict; a run goes on only with those it was begun with. Raises UserError for rows that cannot be
    asked, all of them listed before the first is answered, and where the output is there already.
    """
    output_path = Path(output_path)
    if output_path.exists():
        raise UserError(f"--output {output_path}: is there already; choose another name")
    prompts = Prompts(path, system)
    lengths = prompts.lengths(assistant, sampling)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    answers = Answers(f"{output_path}.partial", {**(settings or {}), "sha256": digest(path)})
    missing = [row for row in range(len(prompts)) if row not in answers.rows]
    missing.sort(key=lengths.__getitem__)
    silent = not sys.stderr.isatty()
    with (
        contextlib.closing(answers),
        tqdm(total=len(prompts), initial=len(answers.rows), unit="prompt", disable=silent) as bar,
    ):
        # The longest first: what does not fit into memory shows at once, and time left is honest.
        for end in range(len(missing), 0, -batch_size):
            rows = missing[max(0, end - batch_size) : end]
            batch = [dict(zip(("messages", "tools"), prompts[row], strict=True)) for row in rows]
            try:
                found = assistant.inference(batch, sampling, batch_size, rows, lambda text: None)
            except KeyboardInterrupt:
                bar.write(
                    f"{len(answers.rows)} of {len(prompts)} answers are in {answers.path}; "
                    "the same command goes on from there",
                    file=sys.stderr,
                )
                raise
            answers.add(rows, *found)
            bar.update(len(rows))
    answers.finish(output_path, prompts)
    return len(prompts)


class Prompts:
    """The prompts of a file: by number (messages, tools or None); BadRow names file and row."""

    def __init__(self, path, system=None):
        self.records, self.system = open_records(path, plain_text=True), system

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        try:
            messages, tools = question_of(self.records[row])
        except BadRow as error:
            raise BadRow(f"{self.place(row)}: {error}") from error
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages, tools

    def place(self, row):
        """File and row, for people."""
        return f"{self.records.path}, {self.records.place(row)}"

    def lengths(self, assistant, sampling):
        """The tokens of each prompt; UserError lists the rows that cannot be asked."""
        lengths, faults = [], []
        for row in range(len(self)):
            try:
                messages, tools = self[row]
                ids = assistant.prompt_ids(
                    messages,
                    sampling,
                    tools,
                    lambda text, row=row: print(f"{self.place(row)}: {text}", file=sys.stderr),
                )
                lengths.append(len(ids))
            except BadRow as error:
                faults.append(str(error))
            except UserError as error:
                faults.append(f"{self.place(row)}: {error}")
        if faults:
            rest = len(faults) - LISTED
            more = [f"and {rest} more of {len(self)} rows"] if rest > 0 else []
            raise UserError(f"rows that cannot be asked: {'; '.join(faults[:LISTED] + more)}")
        return lengths


class Answers:
    """What has been answered so far, kept in a file; `rows` {row: (response, score)}.

    Raises UserError where the file was begun with other settings.
    """

    def __init__(self, path, settings):
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a last line that was cut is answered again
        try:
            begun, *answers = [json.loads(line) for line in whole.splitlines()] or [settings]
            self.rows = {row: (response, score) for row, response, score in answers}
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: is damaged ({error}); remove it") from error
        if begun != settings:
            changed = [name for name in settings if begun.get(name) != settings[name]]
            raise UserError(
                f"{self.path}: was begun with another {', '.join(changed)}; remove it, "
                "or choose another --output"
            )
        self.file = open(self.path, "ab")
        self.file.truncate(len(whole))
        self._write([] if whole else [settings])

    def add(self, rows, responses, scores):
        """Keep the answers of a batch; they are on disk when this returns."""
        answers = list(zip(rows, responses, scores, strict=True))
        self._write(answers)
        self.rows |= {row: (response, score) for row, response, score in answers}

    def close(self):
        """Leave the file as it is, to go on from."""
        self.file.close()

    def finish(self, output_path, prompts):
        """Write all answers in the order of the prompts, and remove the partial file."""
        whole = Path(f"{self.path}.whole")
        with open(whole, "w", encoding="utf-8") as file:
            for row, (response, score) in sorted(self.rows.items()):
                messages, tools = prompts[row]
                answered = [*messages, {"role": "assistant", "content": response}]
                line = {"messages": answered, "score": round(score, 6)}
                line |= {"tools": tools} if tools else {}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, output_path)
        self.path.unlink()

    def _write(self, lines):
        text = "".join([json.dumps(line, ensure_ascii=False) + "\n" for line in lines])
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def question_of(record):
    """One record -> (messages up to where the answer begins, tools or None), or BadRow."""
    record = {"prompt": record} if isinstance(record, str) else record
    messages, tools = parse_conversation(unanswered(record) if isinstance(record, dict) else record)
    return messages[:-1], tools


def unanswered(record):
    """A record in a format of training data, with UNSEEN in the place of its answer."""
    prompt = next(
        (record[name] for name in PROMPT_COLUMNS if isinstance(record.get(name), str)), None
    )
    if prompt is not None and not record.keys() & FORMAT_COLUMNS:
        record = {**record, "instruction": prompt}
    if "instruction" in record:
        return {**record, "output": UNSEEN}
    name = "conversations" if "conversations" in record else "messages"
    turns = record.get(name)
    if isinstance(turns, list) and turns:
        last = turns[-1] if isinstance(turns[-1], dict) else {}
        role = last.get("from", last.get("role"))
        role = ROLES.get(role) if isinstance(role, str) else None
        if role == "system":
            raise BadRow("there is no question")
        if role != "assistant":
            turns = [*turns, {"role": "assistant", "content": UNSEEN}]
        return {**record, name: turns}
    return {**record, "target": UNSEEN} if "input" in record else record


def digest(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
