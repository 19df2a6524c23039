"""The plan of `train.py --dry_run` next to the run that it plans: memory and time on SmolLM2-135M.

    python bench/plan.py                             # some minutes
    python bench/plan.py --only LoRA --max_steps 5

The rows are the orders of examples/orders.py. The plan counts the memory of tensors. The run shows
the peak of its process, less what the process has before it begins: Python and torch.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from orders import draw_rows  # noqa: E402
from real import unpack_model  # noqa: E402

from bench.measure import flags, output_of  # noqa: E402

METHODS = {
    "LoRA": {},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "QLoRA": {"quantization_bit": 4},
    "full": {"finetuning_type": "full"},
}
# Trains in this process; prints its peak memory and the seconds of all steps as JSON.
RUN = """
import json, sys, time
import train
from bench.measure import forget_peak_memory, peak_memory
options = train.parse_options(sys.argv[1:])
before, seconds, step = forget_peak_memory(), 0.0, train.train_step
def timed(*arguments):
    global seconds
    began = time.monotonic()
    result = step(*arguments)
    seconds += time.monotonic() - began
    return result
train.train_step = timed
train.main(options)
print(json.dumps({"memory": peak_memory() - before, "seconds": seconds}))
"""


def main() -> None:
    """Plan and run each method, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    model = options.model_name_or_path or unpack_model()
    print("method | planned GB | process GB | planned time | time of the steps, s")
    for method in options.only:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            rows.write_text(json.dumps(draw_rows(64, seed=0)), encoding="utf-8")
            words = flags(
                model_name_or_path=model,
                dataset=rows,
                output_dir=Path(folder) / "run",
                max_steps=options.max_steps,
                per_device_train_batch_size=options.batch_size,
                dataloader_num_workers=0,
                **METHODS[method],
            )
            plan = output_of("train.py", "--dry_run", *words)
            said = output_of("-c", RUN, *words)
        result = json.loads(said.splitlines()[-1])
        print(
            method,
            figure(r"^  total +([\d.,]+)", plan),
            f"{result['memory'] / 1e9:.2f}",
            figure(r"^time +(.*?)(?:, a guess| at )", plan),
            f"{result['seconds']:.1f}",
            sep=" | ",
            flush=True,
        )


def figure(pattern: str, text: str) -> str:
    """What a pattern finds in a plan."""
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "not planned"


if __name__ == "__main__":
    main()
