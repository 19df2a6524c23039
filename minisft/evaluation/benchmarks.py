"""C-Eval, CMMLU and MMLU: how each benchmark words its questions.

    benchmark = BENCHMARKS["ceval"]
    print(benchmark.heading.format(subject="法学") + benchmark.ask(question))

benchmark_files.py reads the questions.
"""

import hashlib
import json
from dataclasses import dataclass, field

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """A question, its four options in order, and the right letter; None if it is secret."""

    id: str
    text: str
    options: tuple[str, ...]
    answer: str | None

    @property
    def digest(self) -> str:
        """A hash of everything but the id, which another version of a benchmark may use again."""
        content = json.dumps([self.text, self.options, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Subject:
    """The questions of a subject.

    key: the name of its file. name: its name in the prompt. group: its field, for averages.
    """

    key: str
    name: str
    group: str
    questions: list[Question]
    demonstrations: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, with the prompt of its authors.

    splits: the first is the one that papers usually report.
    """

    title: str
    splits: tuple[str, ...]
    heading: str  # opens the prompt; {subject} is the name of the subject
    before_question: str
    before_letter: str  # follows the options
    letter: str = "{letter}"  # how the letter follows
    needs_names: bool = True  # the prompt calls subjects by other names than their files

    def ask(self, question: Question) -> str:
        """The text of a question with its options, up to where the letter follows."""
        lines = [self.before_question + question.text]
        for letter, option in zip(LETTERS, question.options, strict=True):
            lines.append(f"{letter}. {option}")
        return "\n".join([*lines, self.before_letter])


BENCHMARKS = {
    "ceval": Benchmark(
        "C-Eval",
        ("val", "test", "dev"),
        heading="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
        before_question="",
        before_letter="答案：",
    ),
    "cmmlu": Benchmark(
        "CMMLU",
        ("test", "dev"),
        heading="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        before_question="题目：",
        before_letter="答案是：",
    ),
    "mmlu": Benchmark(
        "MMLU",
        ("test", "val", "dev"),
        heading="The following are multiple choice questions (with answers) about {subject}.\n\n",
        before_question="",
        before_letter="Answer:",
        letter=" {letter}",
        needs_names=False,
    ),
}
