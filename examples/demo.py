"""A small end-to-end run: fine-tune the embedded model, measure the change, talk to it.

    make demo                     # or: python examples/demo.py --output_dir runs/demo

Runs `train.py` as a user would. Then the base and the fine-tuned model answer the held-out
questions, and the exact matches are counted.
"""

import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from commands import run  # noqa: E402

from minisft.common.command_line import OptionParser  # noqa: E402
from minisft.common.script import run_script  # noqa: E402

BASE, DATA = ROOT / "examples/base", ROOT / "examples/data"
NUM_SHOWN = 6  # held-out questions in the conversation at the end


def parse_options() -> Namespace:
    """The options of the command line."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, _ = parser.section("demo")
    add("--recipe", default=str(ROOT / "examples/demo.toml"), help="options of train.py")
    add("--output_dir", default=str(ROOT / "runs/demo"), help="folder for the adapter and the log")
    options = parser.parse_options()
    options.recipe, options.output_dir = (
        str(Path(path).resolve())  # the scripts run in ROOT
        for path in (options.recipe, options.output_dir)
    )
    return options


def main() -> None:
    """Train, measure before and after, and show a conversation."""
    options = parse_options()
    words = ["--config", options.recipe, "--output_dir", options.output_dir]
    began = time.monotonic()
    run("train.py", *words, "--overwrite_output_dir")

    # Imported here, so that train.py starts at once.
    from minisft.common.metric_lines import read_metrics
    from minisft.data.dataset import load_rows
    from minisft.generation.assistant import Assistant
    from minisft.generation.sampling import Sampling

    held_out = load_rows(DATA / "heldout.json")
    prompts = [{"messages": row.messages[:-1]} for row in held_out]
    references = [row.messages[-1]["content"] for row in held_out]

    def answer(assistant: Assistant) -> tuple[list[str], float]:
        """Greedy answers to the held-out questions, and the share that equals the reference."""
        greedy = Sampling(max_new_tokens=48, greedy=True)
        answers = [text.strip() for text in assistant.inference(prompts, greedy, batch_size=64)[0]]
        matches = [text == right for text, right in zip(answers, references, strict=True)]
        return answers, sum(matches) / len(matches)

    _, before = answer(Assistant(BASE, template="plain"))
    answers, after = answer(Assistant(BASE, adapter=options.output_dir, template="plain"))

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
    for row, text in list(zip(held_out, answers, strict=True))[:: len(held_out) // NUM_SHOWN]:
        question = row.messages[-2]
        print(f"> {question['content']} {question.get('input', '')}\n{text}\n")


if __name__ == "__main__":
    run_script(main)
