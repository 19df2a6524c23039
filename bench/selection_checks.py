"""200 prompts whose answers a program can check: form, length, language, JSON, exact fields.

    prompts = make_prompts(per_kind=25, seed=0)
    prompts[0].question, prompts[0].is_right("...")

Eight kinds. A check looks at form and facts only, so a long answer gains nothing. The prompts are
in no source of the pool.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_NEW_TOKENS = 96  # right answers need fewer

NAMES = "Ada Bruno Celia Dimitri Elif Farid Greta Hiro Ines Jonas Kavya Lorenzo Mira Nadia".split()
CITIES = "Oslo Lima Nairobi Porto Kyoto Quebec Riga Hobart Tunis Zagreb Bergen Hanoi".split()
THINGS = """fruits vegetables animals colours countries rivers sports tools planets metals birds
    drinks languages instruments cities fish trees games jobs clothes""".split()
TOPICS = """bread rain bicycles libraries honey glass bridges sleep salt trains gardens paper
    chess coffee maps clocks candles soap wool volcanoes""".split()
ENGLISH = """Why do leaves fall in autumn?|How is cheese made?|What does a judge do?|
    Why is the sea salty?|How do bees make honey?|What is a bank for?|Why do we sleep?|
    How does a lift work?|What is a comet?|Why do people dance?|What does a baker do?|
    How do magnets work?|Why do cats purr?"""
CHINESE = """为什么天会下雨？|怎样泡一杯好茶？|什么是友谊？|图书馆有什么用？|为什么要早睡？|
    怎样学好英语？|什么是春节？|为什么要吃蔬菜？|怎样保护环境？|老师的工作是什么？|
    什么是互联网？|为什么要运动？|怎样写一封信？"""
ENGLISH, CHINESE = (re.split(r"\|\s*", questions) for questions in (ENGLISH, CHINESE))
FACTS = [  # a question and whether its answer is yes
    ("Is Paris in France?", True),
    ("Is the sun cold?", False),
    ("Do fish live in water?", True),
    ("Is ten smaller than two?", False),
    ("Can birds have feathers?", True),
    ("Is ice hotter than steam?", False),
    ("Is a cow an animal?", True),
    ("Is gold a vegetable?", False),
    ("Does a year have twelve months?", True),
    ("Is the moon bigger than the sun?", False),
    ("Is snow white?", True),
    ("Do cars have wings?", False),
    ("Is water wet?", True),
]
Check = Callable[[str], bool]


@dataclass(frozen=True)
class Prompt:
    """A question and the check of its answer."""

    kind: str
    question: str
    is_right: Check


def make_prompts(per_kind: int = 25, seed: int = 0) -> list[Prompt]:
    """`per_kind` different prompts of each kind; the same for the same seed."""
    generator, prompts = np.random.default_rng(seed), list[Prompt]()
    for kind, write in KINDS.items():
        questions = set[str]()
        while len(questions) < per_kind:
            question, is_right = write(generator)
            if question not in questions:
                prompts.append(Prompt(kind, question, is_right))
            questions.add(question)
    return prompts


def pick(generator: np.random.Generator, values: list[Any]) -> Any:
    """One of the values."""
    return values[int(generator.integers(len(values)))]


def json_fields(generator: np.random.Generator) -> tuple[str, Check]:
    """A JSON object with the fields of a sentence."""
    name, city = pick(generator, NAMES), pick(generator, CITIES)
    age = int(generator.integers(18, 80))
    expected = {"name": name, "age": age, "city": city}
    question = (
        f"{name} is {age} years old and lives in {city}. Write this as a JSON object with the keys "
        '"name", "age" (a number) and "city". Answer with the JSON only.'
    )
    return question, lambda answer: read_json(answer) == expected


def json_array(generator: np.random.Generator) -> tuple[str, Check]:
    """A JSON array of N strings."""
    count, things = int(generator.integers(2, 6)), pick(generator, THINGS)
    question = f"Name {count} {things} as a JSON array of strings. Answer with the JSON only."

    def is_right(answer: str) -> bool:
        value = read_json(answer)
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return is_list and len(distinct(value)) == len(value) == count

    return question, is_right


def numbered(generator: np.random.Generator) -> tuple[str, Check]:
    """A numbered list of N lines and nothing else."""
    count, things = int(generator.integers(3, 6)), pick(generator, THINGS)
    question = f"Name {count} {things} as a numbered list, like 1. 2. 3. Write nothing else."

    def is_right(answer: str) -> bool:
        lines = [line for line in answer.splitlines() if line.strip()]
        items = [re.fullmatch(r"\s*(\d+)[.)]\s+(\S.*)", line) for line in lines]
        numbers = [int(item[1]) if item else 0 for item in items]
        names = distinct([item[2] for item in items if item])
        return numbers == list(range(1, count + 1)) and len(names) == count

    return question, is_right


def bullets(generator: np.random.Generator) -> tuple[str, Check]:
    """N lines that begin with a dash and nothing else."""
    count, topic = int(generator.integers(2, 5)), pick(generator, TOPICS)
    question = (
        f"Give {count} short facts about {topic}. Begin each line with '- ' and write nothing else."
    )

    def is_right(answer: str) -> bool:
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        is_form = all(re.match(r"-\s+\S", line) for line in lines)
        return is_form and len(distinct(lines)) == len(lines) == count

    return question, is_right


def short(generator: np.random.Generator) -> tuple[str, Check]:
    """One sentence of at most N words."""
    limit, topic = int(generator.integers(8, 16)), pick(generator, TOPICS)
    question = f"Describe {topic} in one sentence of at most {limit} words."

    def is_right(answer: str) -> bool:
        # A sentence ends before a capital letter, so "e.g. this" is inside one.
        is_one = not re.search(r"[.!?]\s+[A-Z]|\n", answer.strip())
        return is_one and 3 <= len(answer.split()) <= limit

    return question, is_right


def yes_or_no(generator: np.random.Generator) -> tuple[str, Check]:
    """The word yes or no, and the right one."""
    fact, is_true = pick(generator, FACTS)
    ending = pick(generator, ["Answer only with yes or no.", "Reply with one word, yes or no."])
    expected = "yes" if is_true else "no"
    return f"{fact} {ending}", lambda answer: answer.strip().rstrip(".!").lower() == expected


def chinese(generator: np.random.Generator) -> tuple[str, Check]:
    """An answer in Chinese, to a Chinese or an English question."""
    if generator.random() < 0.5:
        question = f"{pick(generator, CHINESE)}请用一两句话回答。"
    else:
        question = f"{pick(generator, ENGLISH)} Answer in Chinese, in one sentence."
    return question, is_chinese


def capitals(generator: np.random.Generator) -> tuple[str, Check]:
    """A sentence in capital letters."""
    topic = pick(generator, [*TOPICS, *THINGS])
    question = f"Write one sentence about {topic}. Use capital letters only."

    def is_right(answer: str) -> bool:
        return len(re.findall(r"[A-Z]{2,}", answer)) >= 2 and answer == answer.upper()

    return question, is_right


KINDS: dict[str, Callable[[np.random.Generator], tuple[str, Check]]] = {
    "JSON fields": json_fields,
    "JSON array": json_array,
    "numbered list": numbered,
    "bullet points": bullets,
    "length": short,
    "yes or no": yes_or_no,
    "Chinese": chinese,
    "capital letters": capitals,
}


def is_chinese(answer: str) -> bool:
    """True if at least four characters, and most of the letters, are Chinese."""
    letters = [character for character in answer if character.isalpha()]
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    return chinese >= 4 and chinese > len(letters) / 2


def distinct(items: list[str]) -> set[str]:
    """The items that differ in more than case and white space around them; none that is empty."""
    return {item.strip().lower() for item in items} - {""}


def read_json(answer: str) -> Any:
    """The JSON value of an answer, which may stand in a code block; None if it is none."""
    block = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer.strip(), re.DOTALL)
    try:
        return json.loads(block[1] if block else answer)
    except (ValueError, RecursionError):
        return None
