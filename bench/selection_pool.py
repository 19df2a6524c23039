"""The data of the selection study: a pool with rows made bad, held-out rows, and rows of two tasks.

    data = make_data(Path("data"), template, max_length=768, held_out=200, seed=0)
    data.pool[0]       # {"messages": [...], "source": "lima", "quality": "good"}

The sources are public data sets; SOURCES says which. Rows longer than `max_length` tokens are left
out, so nothing is truncated; so are rows whose first question occurs before, so no held-out row
continues a conversation of the pool. Then BAD_SHARE of the pool becomes bad, in equal parts:

    swapped     the answer of another row of the source
    cut         the answer ends in the middle
    language    the answer of a row in the other language
    talk        an answer that says nothing

`quality` holds this mark. No strategy and no training reads it. Held-out rows stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset import Row, load_rows
from minisft.data.encoding import encode_row
from minisft.text.chat_template import ChatTemplate

Record = dict[str, Any]  # a row of pool.json
BAD_SHARE = 0.15
NUM_TARGETS = 20  # rows of a task, for RDS+
CUT_SHARES = 0.25, 0.6  # of its answer, a row that is cut keeps a share between these
MAX_DONORS = 50  # other rows to try until their answer fits


@dataclass(frozen=True)
class Source:
    """A public data set."""

    file_name: str
    language: str
    origin: str  # where to get it


LLAMA_FACTORY = "github.com/hiyouga/LLaMA-Factory, folder data"
SOURCES = {
    "alpaca_en": Source("alpaca_en_demo.json", "en", LLAMA_FACTORY),
    "lima": Source("lima.json", "en", "huggingface.co/datasets/GAIR/lima, in alpaca form"),
    "cherry": Source("cherry_alpaca_5_percent.json", "en", "github.com/tianyi-lab/Cherry_LLM"),
    "tools": Source("glaive_toolcall_zh_demo.json", "zh", LLAMA_FACTORY),
    "oaast_zh": Source("oaast_sft_zh.json", "zh", f"{LLAMA_FACTORY}, before 2024"),
    "alpaca_zh": Source("alpaca_zh_demo.json", "zh", LLAMA_FACTORY),
}
# The tasks whose rows are the targets of RDS+.
TARGET_SOURCES = ("tools", "alpaca_zh")
# Answers that say nothing: an opening, then a middle, then an end.
TALK = {
    "en": [
        ["That is a great question.", "Thank you for asking.", "I am happy to help with this."],
        [
            "There are many things to consider here, and it depends on the situation.",
            "This is an important topic, and opinions about it differ.",
            "As an AI language model, I can look at this from several sides.",
        ],
        [
            "I hope this helps.",
            "Let me know if you have any other questions.",
            "In the end, the choice is yours.",
        ],
    ],
    "zh": [
        ["这是一个很好的问题。", "感谢您的提问。", "我很乐意帮助您。"],
        [
            "这里有很多方面需要考虑，要看具体情况。",
            "这是一个重要的话题，大家的看法各不相同。",
            "作为一个人工智能语言模型，我可以从多个角度来看待它。",
        ],
        ["希望这对您有所帮助。", "如果您还有其他问题，请告诉我。", "最终的选择取决于您。"],
    ],
}
Fits = Callable[[Record], bool]


@dataclass
class Data:
    """The rows of a study."""

    pool: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    targets: dict[str, list[Record]] = field(default_factory=dict)  # by source


def make_data(
    data_dir: Path,
    template: ChatTemplate,
    max_length: int,
    held_out: int,
    seed: int,
    max_rows: int | None = None,
) -> Data:
    """Read the sources, hold rows out, and make rows of the pool bad. The same for the same seed.

    held_out: rows to hold out of each source, at most a third of it. max_rows: use only the first
    rows of each source, for a quick try. UserError names the files that are missing.
    """
    check_files(data_dir)
    generator, data, known = np.random.default_rng(seed), Data(), set[str]()

    def fits(record: Record) -> bool:
        row = Row(record["messages"], record.get("tools"))
        texts = encode_row(row, template, max_length + 1)
        return bool(texts) and max(len(text.ids) for text in texts) <= max_length

    for name, source in SOURCES.items():
        records = []
        for record in read_source(data_dir / source.file_name, name)[:max_rows]:
            question = next(
                message["content"] for message in record["messages"] if message["role"] == "user"
            )
            if question not in known and fits(record):
                records.append(record)
            known.add(question)
        records = [records[number] for number in generator.permutation(len(records))]
        num_held_out = min(held_out, len(records) // 3)
        num_targets = min(NUM_TARGETS, len(records) // 6) if name in TARGET_SOURCES else 0
        data.held_out += records[:num_held_out]
        if name in TARGET_SOURCES:
            data.targets[name] = records[num_held_out : num_held_out + num_targets]
        data.pool += records[num_held_out + num_targets :]
    make_bad(data.pool, fits, generator)
    return data


def num_answer_tokens(record: Record, template: ChatTemplate) -> int:
    """The tokens of a row's answers without those that end a turn, as score.py counts them."""
    texts = encode_row(Row(record["messages"], record.get("tools")), template, 2**20)
    num_turns = sum(message["role"] == "assistant" for message in record["messages"])
    return sum(int(text.supervised.sum()) for text in texts) - num_turns


def check_files(data_dir: Path) -> None:
    """UserError, in one line, if a source is missing."""
    missing = [
        f"{source.file_name} ({source.origin})"
        for source in SOURCES.values()
        if not (data_dir / source.file_name).is_file()
    ]
    if missing:
        raise UserError(f"--data_dir {data_dir}: there is no {', no '.join(missing)}")


def read_source(path: Path, name: str) -> list[Record]:
    """The rows of a file as conversations."""
    records = []
    for row in load_rows(str(path), say=lambda line: None):
        messages = [dict(message) for message in row.messages]
        for message in messages:
            if text := message.pop("input", ""):
                message["content"] = f"{message['content']}\n{text}"
        record: Record = {"messages": messages, "source": name, "quality": "good"}
        if row.tools:
            record["tools"] = row.tools
        records.append(record)
    return records


def make_bad(pool: list[Record], fits: Fits, generator: np.random.Generator) -> None:
    """Replace the answers of BAD_SHARE of the rows, in place; `quality` names the kind."""
    order = generator.permutation(len(pool)).tolist()
    last_good = [dict(record["messages"][-1]) for record in pool]  # donors give their own answers
    num_bad, kinds = round(BAD_SHARE * len(pool)), list(BAD_KINDS)
    num_made = 0
    for number in order:
        if num_made == num_bad:
            return
        record, kind = pool[number], kinds[num_made % len(kinds)]
        if last_good[number].get("tool_calls") or not last_good[number]["content"].strip():
            continue
        for _ in range(MAX_DONORS):
            answer = BAD_KINDS[kind](number, pool, last_good, generator)
            changed = {**last_good[number], "content": answer}
            bad = {**record, "messages": [*record["messages"][:-1], changed], "quality": kind}
            if answer and answer != last_good[number]["content"] and fits(bad):
                pool[number] = bad
                num_made += 1
                break


# How a row becomes bad: (its number, the pool, good last messages, generator) -> its new answer, or
# "" if this try found none.
MakeBad = Callable[[int, list[Record], list[dict[str, Any]], np.random.Generator], str]


def swapped(
    number: int, pool: list[Record], answers: list[dict[str, Any]], generator: np.random.Generator
) -> str:
    """The answer of another row of the same source."""
    donor = int(generator.integers(len(pool)))
    same = pool[donor]["source"] == pool[number]["source"] and donor != number
    return answers[donor]["content"] if same else ""


def cut(
    number: int, pool: list[Record], answers: list[dict[str, Any]], generator: np.random.Generator
) -> str:
    """The beginning of the answer."""
    answer = answers[number]["content"]
    return answer[: int(len(answer) * generator.uniform(*CUT_SHARES))].rstrip()


def other_language(
    number: int, pool: list[Record], answers: list[dict[str, Any]], generator: np.random.Generator
) -> str:
    """The answer of a row in the other language."""
    donor = int(generator.integers(len(pool)))
    own, other = (SOURCES[pool[place]["source"]].language for place in (number, donor))
    answer = answers[donor]["content"]
    return answer if own != other and language_of(answer) == other else ""


def talk(
    number: int, pool: list[Record], answers: list[dict[str, Any]], generator: np.random.Generator
) -> str:
    """Three sentences that say nothing, in the language of the row."""
    language = SOURCES[pool[number]["source"]].language
    parts = [str(generator.choice(sentences)) for sentences in TALK[language]]
    return ("" if language == "zh" else " ").join(parts)


BAD_KINDS: dict[str, MakeBad] = {
    "swapped": swapped,
    "cut": cut,
    "language": other_language,
    "talk": talk,
}


def language_of(text: str) -> str:
    """ "zh" if more than a fifth of the letters are Chinese characters, else "en"."""
    letters = [character for character in text if character.isalpha()]
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    return "zh" if chinese > 0.2 * len(letters) else "en"
