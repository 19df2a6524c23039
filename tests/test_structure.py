"""The house: imports go down, scripts start fast, no flag without a reader, no stray word."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From what a script does down to what everything is made of; imports stay in a line or go down.
LAYERS = [
    "train score select export chat eval",
    "ifd selection gguf_export multiple_choice compare assistant",
    "generate run checkpoint weights batching objective metrics parallel",
    "model lora quantize tokenizer tokenizer_engines template tool_calls dataset "
    "dataset_info records formats optimizer kmeans tensor_files",
    "config training_options",
    "json_files",
    "options",
    "failure",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
SCRIPTS = [path for path in sorted(ROOT.glob("*.py"))]
ROOMS = [path for path in sorted((ROOT / "minisft").glob("*.py")) if path.stem != "__init__"]


def imported(path):
    """The rooms of minisft that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "minisft":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minisft."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names
                        if alias.name.startswith("minisft."))


def test_imports_go_down():
    graph = {path.stem: {name for name in imported(path) if name in LEVEL}
             for path in [*SCRIPTS, *ROOMS]}
    assert set(graph) <= set(LEVEL), "a room without a place in LAYERS"
    upward = [f"{name} -> {other}" for name, others in graph.items() for other in others
              if LEVEL[other] < LEVEL[name]]
    assert not upward
    done = set()
    while len(done) < len(graph):  # a cycle is what can never be put in order
        ready = {name for name, others in graph.items() if name not in done and others <= done}
        assert ready, f"imports go round: {sorted(set(graph) - done)}"
        done |= ready


CORE = {"torch", "sentencepiece", "tokenizers", "safetensors", "numpy", "gguf", "tqdm",
        "huggingface_hub", "minisft", "matplotlib", *sys.stdlib_module_names}


def test_only_the_core_libraries():
    for path in [*SCRIPTS, *ROOMS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= CORE, path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_fast_and_every_flag_is_read(script):
    began = time.monotonic()
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert time.monotonic() - began < 2.0  # far below what loading torch takes on a busy machine
    flags = set(re.findall(r"^  (?:-\w, )?--(\w+)", done.stdout, re.MULTILINE)) - {"help"}
    assert len(flags) > 5
    readers = ("options", "training_options", "assistant", "run")
    sources = [path for path in ROOMS if path.stem in readers] + [script]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unread = {flag for flag in flags
              if not re.search(rf"options\.{flag}\b|\"{flag}\"|\.{flag}\b", text)}
    assert not unread


def test_no_long_files():
    for path in [*SCRIPTS, *ROOMS]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
