"""Real tokenizers, as folders below shared/data."""

import functools

import transformers

from minisft.text.tokenizer import Tokenizer

TINYLLAMA = "tokenizers/TinyLlama-1.1B-Chat-v0.6"
MISTRAL = "tokenizers/Mistral-7B-Instruct-v0.2"
QWEN = "tokenizers/Qwen2.5"
LLAMA3 = "tokenizers/Llama-3"
BAICHUAN2 = "tokenizers/Baichuan2"


@functools.cache
def load_tokenizer(folder):
    """The tokenizer in a folder, loaded once."""
    return Tokenizer.load(folder)


@functools.cache
def transformers_tokenizer(folder):
    """transformers' tokenizer of a folder, loaded once."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def fitting(shared_data, name):
    """The real tokenizers that have the tokens of a named template."""
    needs = {"llama3": [LLAMA3], "chatml": [QWEN], "qwen3": [QWEN], "baichuan2": [BAICHUAN2]}
    folders = needs.get(name, [TINYLLAMA, MISTRAL, QWEN, LLAMA3])
    return [load_tokenizer(shared_data / folder) for folder in folders]
