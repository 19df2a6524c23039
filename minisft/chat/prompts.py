"""Answer a file of prompts: in batches of similar length, written in the order of the file.

    answer_file(assistant, "prompts.jsonl", "answers.jsonl", Sampling(greedy=True))

Prompts are the lines of a .txt file, or the rows of a JSON or JSON-lines file: strings, rows with
one of PROMPT_COLUMNS, or rows in a format of training data, without their last answer. The output
is JSON lines that train.py reads: {"messages": [..., the answer], "score": the mean log-probability
of the answer}. Thoughts are the field "reasoning_content" of the answer. Alpaca's input follows its
instruction on a new line.

OUTPUT.partial holds the answers so far. An interrupted run continues from it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from minisft.common.devices import dtype_name
from minisft.common.errors import UserError
from minisft.common.hashes import sha256
from minisft.common.outputs import atomic_write, check_output_file
from minisft.common.progress import ProgressBar
from minisft.common.script import advice_after_ctrl_c
from minisft.common.single_writer import single_writer
from minisft.data.formats import (
    Messages,
    Tools,
    alpaca_prompt,
    parse_tools,
    parse_turns,
    question,
    turns_column,
    with_system,
)
from minisft.data.records import open_records
from minisft.data.row_forms import standard_record
from minisft.data.row_values import (
    BadRow,
    check_encodable,
    check_text_only,
    object_of,
    string_of,
    without_nulls,
)
from minisft.data.turn_order import check_order, join_turns, with_opening_as_context
from minisft.generation.answer import Response, answer_message
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.text.messages import Message
from minisft.text.tool_texts import TOOLS_AS_TEXT

PROMPT_COLUMNS = ("prompt", "question", "query", "text")
MAX_LISTED_ROWS = 10  # bad rows that an error message lists


def answer_file(
    assistant: Assistant,
    path: str | Path,
    output_path: str | Path,
    sampling: Sampling,
    batch_size: int = 8,
    system: str | None = None,
    settings: Mapping[str, Any] | None = None,
    max_samples: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write the answers to the prompts in `path`; returns their number.

    system: the system prompt of rows that have none. settings: other options that the answers
    depend on; a run continues only if they are unchanged. max_samples: only the first N.
    overwrite: replace the output, and the part of a run with other settings. Before the first
    answer, UserError lists all rows without a valid prompt.
    """
    check_output(output_path, path, overwrite)
    prompts = Prompts(path, system, max_samples)
    lengths = prompts.lengths(assistant, sampling)
    identity = {"system": system, **asdict(sampling), **(settings or {}), "sha256": sha256(path)}
    # Both decide how answers are rounded: the rows of a batch, and its number type.
    identity |= {"max_samples": max_samples, "dtype": dtype_name(assistant.dtype)}
    with contextlib.closing(Answers(f"{output_path}.partial", identity, overwrite)) as answers:
        # The longest first: if they do not fit into memory, the run fails at its start.
        order = sorted(range(len(prompts)), key=lambda row: lengths[row], reverse=True)

        def advice() -> str:
            """How to go on after Ctrl-C."""
            return (
                f"{len(answers.rows)} of {len(prompts)} answers are in {answers.path}; the same "
                "command continues from there"
            )

        with advice_after_ctrl_c(advice):
            _answer_missing(assistant, prompts, answers, order, sampling, batch_size)
        answers.finish(output_path, prompts)
    return len(prompts)


def check_output(output_path: str | Path, path: str | Path, overwrite: bool = False) -> None:
    """Raise UserError if the output is the file of prompts, or exists already.

    overwrite: accept a file that exists.
    """
    check_output_file("--output", output_path, [path], overwrite)


class Prompts:
    """The prompts of a file as conversations {"messages": ..., "tools": ...}, by number.

    max_samples: only the first N.
    """

    def __init__(self, path: str | Path, system: str | None = None, max_samples: int | None = None):
        self.records, self.system = open_records(path, plain_text=True), system
        self.max_samples = max_samples or len(self.records)

    def __len__(self) -> int:
        return min(len(self.records), self.max_samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            messages, tools = parse_prompt(self.records[row])
        except BadRow as error:
            raise BadRow(f"{self.place(row)}: {error}") from error
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return {"messages": messages, "tools": tools}

    def place(self, row: int) -> str:
        """The file and the row, for messages."""
        return f"{self.records.path}, {self.records.place(row)}"

    def lengths(self, assistant: Assistant, sampling: Sampling) -> list[int]:
        """The number of tokens of each prompt. UserError lists the rows without a valid prompt."""
        lengths, problems, num_changed = [], [], 0
        for row in range(len(self)):
            place = self.place(row)
            try:
                ids = assistant.prompt_ids(
                    **self[row],
                    sampling=sampling,
                    say=lambda text, place=place: print(f"{place}: {text}", file=sys.stderr),
                )
                lengths.append(len(ids))
                num_changed += assistant.template.facts.changes_tools(**self[row])
            except BadRow as error:
                problems.append(str(error))
            except UserError as error:
                problems.append(f"{place}: {error}")
        if problems:
            num_unlisted = len(problems) - MAX_LISTED_ROWS
            listed = problems[:MAX_LISTED_ROWS]
            if num_unlisted > 0:
                listed.append(f"and {num_unlisted} more of {len(self)} rows")
            raise UserError(f"rows without a valid prompt: {'; '.join(listed)}")
        if num_changed:
            print(f"{num_changed} of {len(self)} rows have {TOOLS_AS_TEXT}", file=sys.stderr)
        return lengths


class Answers:
    """The answers so far, in a file: `rows` is {row: Response}.

    The first line of the file is the identity of the run. UserError if another run wrote the file.
    overwrite: begin anew then.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(single_writer(path))
        try:
            self._open(identity)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: Mapping[str, Any]) -> None:
        """Read the answers that are there, and open the file for more."""
        content = self.path.read_bytes() if self.path.exists() else b""
        content = content[: content.rfind(b"\n") + 1]  # without an incomplete last line
        try:
            recorded, *answers = map(json.loads, content.splitlines() or [json.dumps(identity)])
            self.rows = {row: Response(*response) for row, *response in answers}
            changed = [name for name in identity if recorded.get(name) != identity[name]]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if not self.overwrite:
                raise UserError(f"{self.path} is damaged ({error}). Remove it.") from error
            changed = ["content"]
        if changed and self.overwrite:
            content, self.rows = b"", {}
        elif changed:
            raise UserError(
                f"{self.path} belongs to a run with another {', '.join(changed)}. Add "
                "--overwrite to begin anew, or choose another --output."
            )
        self._file = self._stack.enter_context(open(self.path, "ab"))
        self._file.truncate(len(content))
        if not content:
            self._append([identity])

    def add(self, rows: Sequence[int], responses: Sequence[Response]) -> None:
        """Store the answers of a batch; they are on the disk when this returns."""
        answers = dict(zip(rows, responses, strict=True))
        self._append([[row, *astuple(response)] for row, response in answers.items()])
        self.rows |= answers

    def close(self) -> None:
        """Close the file; a later run can continue it."""
        with contextlib.suppress(OSError):  # a full disk has been reported
            self._stack.close()

    def finish(self, output_path: str | Path, prompts: Prompts) -> None:
        """Write all answers in the order of the prompts, and remove the partial file."""
        try:
            self._write_in_order(output_path, prompts)
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise  # the prompts have changed
            raise UserError(f"{error}. Make room; the same command continues.") from error
        self.path.unlink()

    def _write_in_order(self, output_path: str | Path, prompts: Prompts) -> None:
        with atomic_write(output_path, suffix=".complete") as file:
            for row in sorted(self.rows):
                prompt, response = prompts[row], self.rows[row]
                message = answer_message(response.text, response.reasoning_content)
                messages = [*map(without_input, prompt["messages"]), message]
                line = {"messages": messages, "score": round(response.score, 6)}
                if prompt["tools"]:
                    line["tools"] = prompt["tools"]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _append(self, values: Sequence[Any]) -> None:
        try:
            for value in values:
                self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: could not be written: {error.strerror}. Make room; the same command "
                "continues from there."
            ) from error


def without_input(message: Message) -> Message:
    """The message with Alpaca's input after its text: `messages` of a file have no such field."""
    rest = {name: value for name, value in message.items() if name != "input"}
    return rest | {"content": "\n".join(filter(None, [message["content"], message.get("input")]))}


def _answer_missing(
    assistant: Assistant,
    prompts: Prompts,
    answers: Answers,
    order: list[int],
    sampling: Sampling,
    batch_size: int,
) -> None:
    """Answer the rows in this order, in batches. Skips batches that an earlier run has answered."""
    with ProgressBar(len(prompts), "prompt", done=len(answers.rows)) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            missing = [row for row in rows if row not in answers.rows]
            if not missing:
                continue
            # Answer the whole batch: a low precision rounds differently in another batch.
            batch = [prompts[row] for row in rows]
            # Prompts.lengths has printed the warnings.
            responses = assistant.answer(batch, sampling, batch_size, rows, say=lambda text: None)
            response_of = dict(zip(rows, responses, strict=True))
            answers.add(missing, [response_of[row] for row in missing])
            bar.update(len(missing))


def parse_prompt(record: Any) -> tuple[Messages, Tools]:
    """The messages of a record without its last answer, and its tools."""
    record = without_nulls(object_of({"prompt": record} if isinstance(record, str) else record))
    check_text_only(record)
    column = next((name for name in PROMPT_COLUMNS if isinstance(record.get(name), str)), None)
    if column is None:
        record = standard_record(record, [])
    turns = "prompt" if isinstance(record.get("prompt"), list) else turns_column(record)
    if "instruction" in record:
        messages = alpaca_prompt(record)
    elif turns:
        messages = join_turns(parse_turns(record, turns), [])
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
    elif column and "kind" not in record:
        messages = alpaca_prompt({**record, "instruction": record[column]})
    elif "input" in record:
        messages = [question(string_of(record, "input"))]
    else:
        raise BadRow(
            f"there is no question: none of the columns {', '.join(PROMPT_COLUMNS)}, "
            "and no format of training data"
        )
    messages, tools = with_system(record, messages), parse_tools(record)
    messages = with_opening_as_context(messages, [])
    if not messages or messages[-1]["role"] == "system":
        raise BadRow("there is no question")
    check_order([*messages, {"role": "assistant", "content": "the answer"}])
    check_encodable([messages, tools])
    return messages, tools
