"""examples/cherry.sh: its commands, the steps it skips when run again, and what it refuses."""

import os
import shlex
import subprocess

import pytest
from conftest import ROOT, command
from standing import HANG_SECONDS

# Replaces Python: logs the command and creates the files that the script would.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$LOG"; echo >> "$LOG"
while [ $# -gt 0 ]; do
    case $1 in
        --output) echo "$CLUSTERS" > "$2" ;;
        --output_dir) mkdir -p "$2"; echo "{}" > "$2/metrics.jsonl"
                      if [ "$kind" != full ]; then touch "$2/adapter_config.json"; fi
                      if [ -n "${FAIL:-}" ]; then exit 1; fi ;;
        --finetuning_type) kind=$2 ;;
    esac
    shift
done
"""


@pytest.fixture
def recipe(tmp_path):
    """A function: settings -> (exit status, logged commands, standard error)."""
    stand_in, log = tmp_path / "python", tmp_path / "log"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(**settings):
        log.write_text("")
        done = subprocess.run(
            ["bash", ROOT / "examples/cherry.sh"],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=os.environ
            | {
                "PYTHON": str(stand_in),
                "LOG": str(log),
                "CLUSTERS": "30",
                "OUTPUT": str(tmp_path / "with space"),
            }
            | settings,
        )
        commands = [shlex.split(line) for line in log.read_text().splitlines()]
        return done.returncode, commands, done.stderr

    return run


def test_the_steps(recipe):
    status, commands, error = recipe()
    assert status == 0, error
    assert [words[0] for words in commands] == [
        f"{name}.py" for name in ("score", "select", "train", "score", "select", "train")
    ]
    flags = {
        name: set(command("--help", script=name).stdout.split())
        for name in ("score.py", "select.py", "train.py")
    }
    for words in commands:
        assert {word for word in words if word.startswith("--")} <= flags[words[0]]


def test_all_weights(recipe, tmp_path):
    """A fully trained pre-experience is scored as a model, a LoRA as an adapter of the base."""
    for kind in ("full", "lora"):
        settings = {"TRAIN": f"--finetuning_type {kind}", "OUTPUT": str(tmp_path / kind)}
        status, commands, error = recipe(**settings)
        assert status == 0, error
        flags = [dict(zip(words[1:], words[2:], strict=False)) for words in commands]
        assert [flags[step]["--finetuning_type"] for step in (2, 5)] == [kind] * 2
        assert [flags[step]["--model_name_or_path"] for step in (0, 2, 5)] == ["examples/base"] * 3
        found = flags[3]["--model_name_or_path"], flags[3].get("--adapter")
        pre = str(tmp_path / kind / "pre")
        assert found == ((pre, None) if kind == "full" else ("examples/base", pre))


def test_finished_steps_are_skipped(recipe):
    status, commands, _ = recipe(FAIL="1")
    assert status == 1 and len(commands) == 3
    assert [words[0] for words in recipe()[1]][2] == "train.py"  # it resumes
    names = [words[0] for words in recipe()[1]]
    assert names == ["score.py", "select.py", "score.py", "select.py"]
    status, commands, _ = recipe(SAMPLE_RATE="0.1")
    trained = [words for words in commands if words[0] == "train.py"]
    assert status == 0 and len(trained) == 1
    assert "cherry-0.1.json" in " ".join(trained[0]) and "model-0.1" in " ".join(trained[0])


@pytest.mark.parametrize(
    "setting",
    [
        {"EPOCHS": "7"},
        {"TRAIN": "--learning_rate 1e-3"},
        {"HELDOUT": "other.json"},
        {"CLUSTERS": "31"},
    ],
)
def test_results_of_other_settings_are_not_shown(recipe, setting):
    assert recipe()[0] == 0
    status, _, error = recipe(**setting)
    assert status == 2 and "was trained with other settings or rows" in error
