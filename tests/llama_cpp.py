"""llama.cpp as an oracle: its server, in this process, on a free port of the loopback device.

with Server("model.gguf") as server:
    server.tokenize("Hello")
    server.log_probabilities([1, 5, 7])     # of the next token, the whole vocabulary
"""

import json
import urllib.request

import numpy as np
import xllamacpp
from standing import HANG_SECONDS


class Server:
    """A running model. `lora`: an adapter's file. `flags`: others of llama.cpp's."""

    def __init__(self, path, context=256, lora=None, **flags):
        parameters = xllamacpp.CommonParams()
        for name, value in flags.items():
            setattr(parameters, name, value)
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.warmup, parameters.n_parallel = context, False, 1
        parameters.cpuparams.n_threads = 1
        # Both flags are needed so that llama.cpp computes in float32 throughout.
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if lora:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            parameters.lora_adapters = [adapter]
        self.server = xllamacpp.Server(parameters)

    def __enter__(self):
        # A server that is stopped before its main loop has started waits forever. Rendering and
        # tokenizing do not need the loop; a completion does.
        self.complete([0], 1)
        return self

    def __exit__(self, *error):
        del self.server

    def post(self, path, **content):
        """The answer to a request, both JSON objects."""
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
            return json.load(answer)

    def get(self, path):
        """The JSON object at a path."""
        address = self.server.listening_address + path
        with urllib.request.urlopen(address, timeout=HANG_SECONDS) as answer:
            return json.load(answer)

    def tokenize(self, text, add_special=False, parse_special=False):
        """The ids of a text."""
        return self.post(
            "/tokenize", content=text, add_special=add_special, parse_special=parse_special
        )["tokens"]

    def log_probabilities(self, ids, vocab_size):
        """The log-probability of every token (V,) as the next one after `ids`."""
        # The server reports no log-probabilities if the chosen token is part of a character. So
        # force another token; the reported values do not include this bias.
        whole = [[self.tokenize("the")[-1], 1e6]]
        answer = self.complete(ids, 1, n_probs=vocab_size, logit_bias=whole)
        values = np.full(vocab_size, np.nan)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values

    def greedy(self, ids, length):
        """The ids of a greedy continuation."""
        return self.complete(ids, length)["tokens"]

    def complete(self, ids, length, **more):
        """One greedy completion; see llama.cpp's server for `more`."""
        return self.post(
            "/completion",
            prompt=ids,
            n_predict=length,
            temperature=0,
            ignore_eos=True,
            return_tokens=True,
            cache_prompt=False,
            **more,
        )

    def render(self, messages):
        """A conversation up to where the answer begins, by the file's own chat template."""
        return self.post("/apply-template", messages=messages)["prompt"]
