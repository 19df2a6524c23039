"""Log-likelihoods by lm-evaluation-harness, for test_multiple_choice.py, as JSON on its output.

    python tests/lm_eval_oracle.py MODEL_DIR TASK_DIR MAX_LENGTH LIMIT NUM_FEWSHOT...

TASK_DIR holds the YAML files of the tasks. A process of its own, since the harness must find its
environment set before it is imported. Prints {task: {number of shots: [[of A, B, C, D], ...]}}.
"""

import json
import os
import sys
import tempfile

cache = tempfile.TemporaryDirectory()
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=cache.name,
                  HF_DATASETS_CACHE=cache.name, TOKENIZERS_PARALLELISM="false")

import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def main():
    model_dir, task_dir, max_length, limit, *shots = sys.argv[1:]
    stdout, sys.stdout = sys.stdout, sys.stderr
    model = HFLM(pretrained=model_dir, max_length=int(max_length), dtype="float32", device="cpu",
                 batch_size=4)
    tasks = TaskManager(include_path=task_dir, include_defaults=False)
    names = sorted(os.path.splitext(name)[0] for name in os.listdir(task_dir))
    found = {name: {} for name in names}
    for count in shots:
        results = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=tasks, num_fewshot=int(count),
            limit=int(limit), log_samples=True, bootstrap_iters=0)
        for name in names:
            samples = sorted(results["samples"][name], key=lambda one: one["doc_id"])
            found[name][count] = [[float(option[0]) for option in one["filtered_resps"]]
                                  for one in samples]
    json.dump(found, stdout)


if __name__ == "__main__":
    main()
