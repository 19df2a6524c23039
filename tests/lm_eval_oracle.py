"""Log-likelihoods by lm-evaluation-harness, for test_multiple_choice.py.

found = log_likelihoods(model_dir, task_dir, shots=(0, 5), max_length=4096, limit=4)
found["ceval"][5]                        # of every question [of A, B, C, D]
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

# It would ask pip for the versions of everything that is installed, which takes a second each time.
evaluator.add_env_info = lambda results: None


def log_likelihoods(model_dir, task_dir, shots, max_length, limit):
    """{task: {number of shots: [[of A, B, C, D], ...]}} of the first `limit` rows of each task.

    task_dir holds the YAML files of the tasks.
    """
    model = HFLM(
        pretrained=str(model_dir),
        max_length=max_length,
        dtype="float32",
        device="cpu",
        batch_size=4,
    )
    tasks = TaskManager(include_path=str(task_dir), include_defaults=False)
    names = sorted(path.stem for path in task_dir.glob("*.yaml"))
    found = {name: {} for name in names}
    for count in shots:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=names,
            task_manager=tasks,
            num_fewshot=count,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
        for name in names:
            samples = sorted(results["samples"][name], key=lambda one: one["doc_id"])
            found[name][count] = [
                [float(option[0]) for option in one["filtered_resps"]] for one in samples
            ]
    return found
