"""bench/gpu.sh goes through all its lines on the CPU, so that no mistake costs GPU time."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from forks import PRELOADED

from bench import (
    cpu,
    data,
    generate,
    gpu,
    gpu_lines,
    gpu_stages,
    kmeans,
    load,
    machines,
    multiple_choice,
    score,
    tables,
    train,
)
from bench import results as bench_results
from bench.shapes import random_model

ALIKE = {"llama3-8b lora": "tinyllama lora", "scoring 8b": "scoring"}
QUICK = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHON": sys.executable}


def dry_run(path, *flags):
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh", "--dry_run", *flags, path],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | QUICK,
    )
    return done, json.loads(path.read_text())["lines"]


def test_a_dry_run_of_a_few_stages(tmp_path):
    """Each in its own process; the last gets the limits that the first has measured."""
    few = ["tests", "k-means", "decoding compiled, all layers"]
    done, lines = dry_run(tmp_path / "results.json", "--only", *few, "--minutes", "10")
    assert done.returncode == 0, done.stdout + (tmp_path / "results.json.log").read_text()
    assert [line["name"] for line in lines] == [
        "matrix product",
        "memory copy",
        "tests/repository/test_cuda.py",
        "k-means",
        "llama3-8b decoding, batch 1, compiled",
    ]
    assert lines[2]["figure"] == 0 and "skipped" in lines[2]["note"]
    assert lines[-1]["share"] > 0


@torch.compiler.set_stance("force_eager")
def test_every_stage_fills_its_lines(tmp_path):
    """In this process, which has loaded the peers already."""
    bench = gpu_lines.Bench(True, {gpu_lines.MATMUL: 1e9, gpu_lines.COPY: 1e9})
    results = gpu.Results(tmp_path / "results.json", {})
    for name, stage in gpu.STAGES.items():
        if name in ALIKE:  # the same code with another shape
            assert stage.function == gpu.STAGES[ALIKE[name]].function
            assert stage.arguments[0] in bench.sizes
        elif stage.function and name not in ("limits", "decoding compiled, all layers"):
            for line in getattr(gpu_stages, stage.function)(bench, *stage.arguments):
                results.add(line)
    assert [line["name"] for line in results.lines] == [
        *(f"tinyllama lora, {way}" for way in ("padded", "packed", "packed, compiled")),
        "tinyllama full, padded",
        "tinyllama full, packed",
        "llama3-8b decoding, batch 1",
        "llama3-8b decoding, batch 8",
        "llama3-8b decoding, batch 32",
        "llama3-8b, 1 layers, decoding, batch 1, compiled",
        "tinyllama scoring",
        "llama3-8b full, adamw_8bit, pure_bf16, packed",
    ]
    assert results.lines[-1]["share"] > 0
    for line in results.lines[:-1]:
        assert line["ratio"] == line["figure"] / line["peer"] and line["share"] > 0, line


def test_without_time_stages_are_skipped(tmp_path):
    done, lines = dry_run(tmp_path / "results.json", "--minutes", "0.01")
    assert done.returncode == 0 and len(lines) == len(gpu.STAGES)
    assert all(line["skipped"] == "no time is left" for line in lines)


def test_every_kind_of_machine_has_the_place_of_its_table():
    page = (tables.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for kind in machines.MACHINES:
        assert [page.count(mark) for mark in (f"<!-- {kind} -->\n", f"<!-- /{kind} -->")] == [1, 1]


def test_results_become_the_table_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "benchmarks.md").write_text("a\n<!-- H100 -->\n<!-- /H100 -->\nb\n")
    speed = {"figure": 12345.6, "unit": "tokens/s", "share": 0.456, "limit": "matrix product"}
    lines = [
        {"name": "matrix product", "figure": 790, "unit": "TFLOP/s", "device": "NVIDIA H100 80GB"},
        {"name": "tests", "figure": 9, "unit": "passed"},
        {"name": "lora", **speed, "peer_name": "peft", "peer": 6000, "ratio": 2.06, "waits": 0},
        {"name": "full", "failed": "out of memory"},
        {"name": "scoring", "figure": 300, "unit": "rows/s", "minutes_of_alpaca": 2.9},
    ]
    about = {"torch": "2.13.0", "transformers": "5.23.0", "peft": None, "date": "2026-12-01"}
    machines.write_table({**about, "dry_run": False, "lines": lines})
    assert (tmp_path / "benchmarks.md").read_text() == (
        "a\n<!-- H100 -->\n"
        "**NVIDIA H100 80GB** (2026-12-01): torch 2.13.0, transformers 5.23.0.\n\n"
        "| what | minisft | compared with | ratio | share of the limit |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| matrix product | 790.0 TFLOP/s |  |  |  |\n"
        "| lora | 12,345.6 tokens/s, 0 waits in a step | peft: 6,000.0 | 2.06 "
        "| 46% of the matrix product |\n"
        "| scoring | 300.0 rows/s, 52,000 rows in 2.9 min |  |  |  |\n"
        "<!-- /H100 -->\nb\n"
    )
    with pytest.raises(SystemExit, match="no table for NVIDIA H100 80GB"):
        machines.write_table({**about, "dry_run": True, "lines": lines})


def test_a_later_run_of_a_cpu_replaces_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "benchmarks.md").write_text("<!-- AVX-512 -->\n<!-- /AVX-512 -->\n")
    path, about = (
        tmp_path / "lines.jsonl",
        {"dry_run": False, "date": "2026-12-01", "torch": "2.13.0"},
    )
    device = {"device": "2 cores of an AMD EPYC with AVX-512 and its bfloat16"}
    for speeds in ({"a": 1.0, "b": 2.0}, {"b": 30.0}):
        for name, speed in speeds.items():
            more = {"peer_name": "peft", "peer": 4.0, "ratio": speed / 4, "memory_ratio": 0.5}
            bench_results.add_figure(path, name, speed, "tokens/s", **more, **device)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        machines.write_table({**about, "lines": lines})
        path.unlink()
    assert (tmp_path / "benchmarks.md").read_text().splitlines()[1:-1] == [
        "**2 cores of an AMD EPYC with AVX-512 and its bfloat16** (2026-12-01): torch 2.13.0.",
        "",
        "| what | minisft | compared with | ratio | share of the limit |",
        "| --- | --- | --- | --- | --- |",
        "| a | 1.00 tokens/s | peft: 4.00 | 0.25, 0.50 of the memory |  |",
        "| b | 30.0 tokens/s | peft: 4.00 | 7.50, 0.50 of the memory |  |",
    ]


def test_the_table_of_another_machine_of_the_kind_is_replaced(tmp_path, monkeypatch):
    """Its lines would stand under the name of the later one."""
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "benchmarks.md").write_text("<!-- AVX-512 -->\n<!-- /AVX-512 -->\n")
    about = {"dry_run": False, "date": "2026-12-01", "torch": "2.13.0"}
    for name, processor in (("a", "AMD EPYC"), ("b", "Intel Xeon"), ("c", "Intel Xeon")):
        device = f"2 cores of an {processor} with AVX-512"
        line = {"name": name, "figure": 1.0, "unit": "tokens/s", "device": device}
        machines.write_table({**about, "lines": [line]})
    page = (tmp_path / "benchmarks.md").read_text()
    assert "Intel Xeon" in page and "EPYC" not in page
    assert "| b |" in page and "| c |" in page and "| a |" not in page


def test_the_run_on_a_cpu_gives_flags_that_its_benchmarks_know(tmp_path, monkeypatch):
    scripts = {
        "load": load,
        "train": train,
        "generate": generate,
        "score": score,
        "kmeans": kmeans,
        "multiple_choice": multiple_choice,
        "data": data,
    }
    monkeypatch.setattr(cpu, "export_model", lambda *_: None)
    arguments = ["results.json", "--dataset", "rows.json", "--ceval_dir", "ceval"]
    monkeypatch.setattr(sys, "argv", ["cpu.py", *arguments])
    seen = set()
    for script, words in cpu.benchmarks(cpu.parse_options(), tmp_path, tmp_path):
        options = scripts[script].parse_options([*words, "--results", "lines.jsonl"])
        assert options.results.name == "lines.jsonl"
        seen.add(script)
    assert seen == set(scripts)


def process_of(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_a_stage_that_hangs_is_stopped_and_keeps_its_lines():
    """Also where a process that it has started holds its output open."""
    process = process_of(
        'import subprocess, sys; print(\'{"name": "one"}\', flush=True); '
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    lines = list(gpu.run_stage("stage", process, {}, 2))
    assert lines == [{"name": "one"}, {"name": "stage", "failed": "stopped after 2 s"}]


def test_a_stage_that_crashes_says_so():
    process = process_of("import os; os._exit(7)")
    lines = list(gpu.run_stage("stage", process, {}, 60))
    assert lines == [{"name": "stage", "failed": "ended with status 7, see the log"}]


def test_failed_tests_are_named():
    said = [
        "tests/repository/test_cuda.py::test_a PASSED [ 50%]",
        "tests/repository/test_cuda.py::test_b[x] FAILED [100%]",
        "E   ModuleNotFoundError: No module named 'gguf'",
        "FAILED tests/repository/test_cuda.py::test_b[x]",
    ]
    process, log = process_of(f"print({chr(10).join(said)!r}); raise SystemExit(1)"), io.StringIO()
    (line,) = gpu.run_tests(process, 60, log)
    assert line["failed"] == (
        "1 passed, 1 failed | test_b[x] | ModuleNotFoundError: No module named 'gguf'"
    )
    assert log.getvalue().splitlines() == said


def test_the_process_that_forks_asks_for_no_gpu():
    """After that no process forked from it could use CUDA (tests/forks.py)."""
    code = f"""
import importlib, torch

def asked(*_):
    raise SystemExit("CUDA was asked for")

for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, asked)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, asked)
for name in {PRELOADED}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_measures_the_second_epoch(tmp_path):
    """Three steps each. train.py also logs the first step, which must not shift the epochs."""
    words = ["--side", "minisft", "--folder", str(tmp_path), "--batch_size", "2"]
    rows = train.synthetic_rows("tiny", [10, 12, 14, 16, 18, 20])
    model = random_model("tiny", None, torch.float32, "cpu").requires_grad_(True)
    options = train.parse_options([*words, "--finetuning_type", "full"])
    result = train.train_minisft(options, model, None, rows)
    assert result["tokens"] == [90, 90] and min(result["padding"]) >= 0
    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    speed, _, padding = train.second_epoch(result)
    assert speed == 90 / result["seconds"][1] and 0 <= padding < 0.5
