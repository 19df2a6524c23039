"""Greedy answers of llama.cpp, for bench/generate.py: its server, in this process.

    side = LlamaCpp("model.gguf", num_threads=2, batch_size=8)
    answers = side.answers(prompts, 128)

It needs xllamacpp, a test dependency.
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HANG_SECONDS = 600


class LlamaCpp:
    """A model that llama.cpp has loaded, with its own defaults for the cache and attention."""

    def __init__(self, path: str | Path, num_threads: int, batch_size: int, context: int = 1024):
        import xllamacpp  # only for this side

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.verbosity = 0
        parameters.n_ctx, parameters.n_parallel = context * batch_size, batch_size
        parameters.cpuparams.n_threads = num_threads
        parameters.cpuparams_batch.n_threads = num_threads
        self._server = xllamacpp.Server(parameters)
        self._address = self._server.listening_address + "/completion"

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
