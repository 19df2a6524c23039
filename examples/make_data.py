"""Write the embedded data set: instructions whose answers a rule can check, English and Chinese.

    python examples/make_data.py            # examples/data/train.json and heldout.json
    python examples/make_data.py --pretrain # also examples/data/pretrain.txt, for the base

Every row has a `kind` and a `quality`: "good", or what is wrong with its answer. Training reads
neither. All held-out rows are good, and none of their prompts is in the training rows.
"""

import argparse
import json
import random
from pathlib import Path

from wording import TASKS

OUTPUT_DIR = Path(__file__).parent / "data"
TRAIN_ROWS, HELDOUT_ROWS, PRETRAIN_LINES = 3000, 450, 400_000
# Weights of the samplers of tasks.py in the pre-training text (1 if not listed).
WEIGHTS = {
    "word": 7,
    "membership": 3,
    "word_list": 3,
    "odd_one": 3,
    "add": 3,
    "add_large": 3,
    "owners": 3,
    "longest": 1.5,
    "compare": 1.5,
    "opposite": 1.5,
    "swap": 1.5,
}
# Share of the training rows with each flaw.
FLAWS = {"wrong_answer": 0.07, "truncated": 0.05, "empty_handed": 0.05}


def question_and_answer(task, rng):
    """Draw one row of a kind."""
    slots = task.sample(rng)
    instruction, _, more = rng.choice(task.questions).partition(" | ")
    return {
        "instruction": instruction.format(**slots),
        "input": more.format(**slots),
        "output": task.answer.format(**slots),
        "kind": task.kind,
        "quality": "good",
    }


def draw_rows(count, rng, taken):
    """Draw `count` rows, one kind after the other, and add their prompts to the set `taken`.

    No row has a prompt that was already in `taken`.
    """
    rows, misses = [], 0
    while len(rows) < count:
        row = question_and_answer(TASKS[len(rows) % len(TASKS)], rng)
        prompt = (row["instruction"], row["input"])
        misses = misses + 1 if prompt in taken else 0
        if misses > 10_000:
            raise SystemExit(f"the kind {row['kind']} has too few prompts for {count} rows")
        if not misses:
            taken.add(prompt)
            rows.append(row)
    rng.shuffle(rows)
    return rows


def spoil(rows, rng):
    """Replace a share of the answers by bad ones, and record it in `quality`."""
    answers = [row["output"] for row in rows]
    numbers = rng.sample(range(len(rows)), len(rows))
    for flaw, share in FLAWS.items():
        left = round(share * len(rows))
        while left:
            row = rows[numbers.pop()]
            answer = bad_answer(row, flaw, answers, rng)
            if answer and answer != row["output"]:
                row.update(output=answer, quality=flaw)
                left -= 1


def bad_answer(row, flaw, answers, rng):
    """An answer to `row` with this flaw. If it is "" or the right answer, the caller skips it."""
    if flaw == "wrong_answer":
        return rng.choice(answers)
    if flaw == "truncated":
        return row["output"][: len(row["output"]) // 2].strip()
    chinese = any("\u4e00" <= character <= "\u9fff" for character in row["instruction"])
    return "抱歉，我不知道。" if chinese else "I don't know."


def statements(count, rng):
    """Lines of plain text that show every skill in sentences, without questions.

    A line makes up to four statements about one instance, in any order. The later ones can be
    copied or worked out from the earlier ones, so the base learns to look back.
    """
    groups = {}
    for task in TASKS:
        groups.setdefault((task.sample, task.context), []).extend(task.statements)
    weights = [WEIGHTS.get(sample.__name__, 1) for sample, _ in groups]
    for _ in range(count):
        sample, context = key = rng.choices(list(groups), weights)[0]
        chosen = rng.sample(groups[key], min(rng.randint(1, 4), len(groups[key])))
        slots = sample(rng)
        yield " ".join([context, *chosen]).strip().format(**slots)


def write_json(path, rows):
    """Write a JSON array with one row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    """Write the files; the same seeds give the same rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrain", action="store_true", help="also write the text for the base")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where to write")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    taken = set()
    heldout = draw_rows(HELDOUT_ROWS, random.Random(1), taken)
    train = draw_rows(TRAIN_ROWS, random.Random(2), taken)
    spoil(train, random.Random(3))
    write_json(options.output_dir / "heldout.json", heldout)
    write_json(options.output_dir / "train.json", train)
    if options.pretrain:
        with open(options.output_dir / "pretrain.txt", "w", encoding="utf-8") as file:
            for line in statements(PRETRAIN_LINES, random.Random(4)):
                file.write(line + "\n")


if __name__ == "__main__":
    main()
