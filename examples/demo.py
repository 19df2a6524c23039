"""The main job in small: fine-tune the embedded model, measure what changed, talk to it.

    make demo                     # or: python examples/demo.py --output_dir runs/demo

Trains with `train.py` as anybody would, then answers the held-out questions with the base and with
the fine-tuned model and counts exact matches.
"""

import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisft.common.command_line import OptionParser  # noqa: E402
from minisft.common.script import run_script  # noqa: E402

BASE, DATA = ROOT / "examples/base", ROOT / "examples/data"
QUESTIONS = 6  # how many held-out questions the conversation at the end shows


def parse_options():
    """The options of the command line."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, _ = parser.section("demo")
    add("--recipe", default=str(ROOT / "examples/demo.toml"), help="options of train.py")
    add("--output_dir", default=str(ROOT / "runs/demo"), help="folder for the adapter and the log")
    return parser.parse_options()


def exact_match(assistant, rows):
    """Greedy answers to the rows' questions -> (share equal to the reference, answers)."""
    from minisft.generation.generate import Sampling, generate

    prompts = [assistant.template.encode_prompt(row.messages[:-1]) for row in rows]
    answers = []
    for start in range(0, len(rows), 64):
        ids = generate(
            assistant.model,
            prompts[start : start + 64],
            Sampling(max_new_tokens=48, greedy=True),
            assistant.stop_ids,
        )
        answers += [assistant.tokenizer.decode(answer).strip() for answer in ids]
    right = sum(
        answer == row.messages[-1]["content"] for answer, row in zip(answers, rows, strict=True)
    )
    return right / len(rows), answers


def main():
    """Train, measure before and after, and show a conversation."""
    options = parse_options()
    command = [
        "train.py",
        "--config",
        options.recipe,
        "--output_dir",
        options.output_dir,
        "--overwrite_output_dir",
    ]
    print("$ python", shlex.join(command), flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)

    from minisft.data.dataset import load_rows
    from minisft.generation.assistant import Assistant
    from minisft.training.metrics import read_metrics

    held_out = load_rows(DATA / "heldout.json")
    before, _ = exact_match(Assistant(BASE, template="plain"), held_out)
    tuned = Assistant(BASE, adapter=options.output_dir, template="plain")
    after, answers = exact_match(tuned, held_out)

    log = read_metrics(Path(options.output_dir) / "metrics.jsonl")
    steps = [row for row in log if "loss" in row]
    speed = statistics.median(row["tokens_per_second"] for row in steps)
    print(f"""
    rows             {len(load_rows(DATA / "train.json")):>10,}
    steps            {steps[-1]["step"]:>10,}
    loss             {steps[0]["loss"]:>10.2f}  ->{steps[-1]["loss"]:>8.2f}
    exact match      {before:>10.1%}  ->{after:>8.1%}   ({len(held_out)} held-out rows)
    tokens/s         {speed:>10,.0f}
    seconds          {time.monotonic() - began:>10.0f}
""")
    for row, answer in list(zip(held_out, answers, strict=True))[:: len(held_out) // QUESTIONS]:
        question = row.messages[-2]
        print(f"> {question['content']} {question.get('input', '')}\n{answer}\n")


if __name__ == "__main__":
    run_script(main)
