"""Greedy answers of llama.cpp, for bench/generate.py: its server, in a process of its own.

    with LlamaCpp("model.gguf", num_threads=2, batch_size=8) as side:
        answers = side.answers(prompts, 128)

In one process, torch and llama.cpp together would have more threads than there are cores. Those of
OpenMP then sleep between two operations, and either side decodes at 0.6 of its speed.

It needs xllamacpp, a test dependency.
"""

import json
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

HANG_SECONDS = 600


class LlamaCpp:
    """A model that llama.cpp has loaded, with its own defaults for the cache and attention."""

    def __init__(self, path: str | Path, num_threads: int, batch_size: int, context: int = 1024):
        numbers = [str(number) for number in (num_threads, batch_size, context)]
        command = [sys.executable, __file__, str(path), *numbers]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, **pipes)
        assert self._process.stdout is not None
        # llama.cpp may print before the server listens.
        lines = iter(self._process.stdout.readline, "")
        address = next((line for line in lines if line.startswith("http")), None)
        if address is None:
            sys.exit("llama.cpp has not started")
        self._address = address.strip() + "/completion"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def answers(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The ids of a greedy answer of `num_tokens` to each prompt; all prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self._answer(ids, num_tokens), prompts))

    def _answer(self, ids: list[int], num_tokens: int) -> list[int]:
        content = {
            "prompt": ids,
            "n_predict": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address, json.dumps(content).encode(), header)
        with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
            return json.load(answer)["tokens"]


def run_server(path: str, num_threads: int, batch_size: int, context: int) -> None:
    """Serve the model until standard input ends. Prints the address."""
    import xllamacpp  # only in this process

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.verbosity = 0
    parameters.n_ctx, parameters.n_parallel = context * batch_size, batch_size
    parameters.cpuparams.n_threads = num_threads
    parameters.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    run_server(sys.argv[1], *map(int, sys.argv[2:]))
