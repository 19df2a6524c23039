"""The next command, which score.py and select.py print at the end.

print(select_command(options))      # python select.py --dataset ... --scores scores.jsonl ...
print(train_command(options))       # python train.py --model_name_or_path ... --dataset few.json
"""

import shlex
from argparse import Namespace
from pathlib import Path

from minisft.common.json_files import read_json
from minisft.selection.score_files import ScorePaths

# The share of the rows to choose, in the example.
SAMPLE_RATE = "0.05"


def select_command(options: Namespace, has_preferences: bool = False) -> str:
    """The command that chooses rows by the scores of score.py; "" if it needs another file.

    options: of score.py. has_preferences: rows with several answers have scores.
    """
    paths = ScorePaths(options.output)
    if options.mode == "embed":
        if options.pooling == "weighted":  # --strategy rds needs a target task as well
            return ""
        scores = ["--embeddings", str(paths.embeddings), "--strategy", "cluster"]
    else:
        strategy = "ifd"
        if options.mode == "reward":
            strategy = "margin" if has_preferences else "reward"
        scores = ["--scores", str(paths.scores), "--strategy", strategy]
    words = ["--dataset", options.dataset]
    if options.dataset_dir != "data":
        words += ["--dataset_dir", options.dataset_dir]
    if options.max_samples:
        words += ["--max_samples", str(options.max_samples)]
    if options.skip_bad_rows:
        words.append("--skip_bad_rows")
    output = str(paths.scores.with_suffix(".chosen.json"))
    words += [*scores, "--sample_rate", SAMPLE_RATE, "--output", output]
    return f"python select.py {shlex.join(words)}"


def train_command(options: Namespace) -> str:
    """The command that trains on the chosen rows: the model that scored them, else M.

    options: of select.py. A reward model is not the model to train, but read the same rows.
    """
    by_reward = options.strategy in ("reward", "margin")
    scores = options.scores or options.embeddings
    record = read_json(ScorePaths(scores).record, missing={}) if scores else {}
    names = record.get("names")
    names = names if isinstance(names, dict) and not by_reward else {}
    words = ["--model_name_or_path", str(names.get("model") or "M")]
    if names and record.get("template", "auto") != "auto":
        words += ["--template", str(record["template"])]
    for flag in ("default_system", "template_kwargs", "enable_thinking"):
        if (value := names.get(flag)) is not None:
            words += [f"--{flag}", str(value).lower() if isinstance(value, bool) else str(value)]
    if record.get("replace"):
        words += ["--replace", str(record["replace"])]
    if options.strategy == "margin":
        words += ["--stage", "dpo"]
    output_dir = str(Path("runs") / Path(options.output).stem)
    words += ["--dataset", options.output, "--output_dir", output_dir]
    return f"python train.py {shlex.join(words)}"
