"""Train the tokenizer of the embedded base model on the text it is pre-trained on.

    python examples/make_tokenizer.py       # examples/base/tokenizer.json, tokenizer_config.json

Byte-level BPE with the splitting rule of Qwen2, which llama.cpp knows too: every digit is a token,
and a space belongs to the word after it. Merges stay inside a Chinese character or a word, so an
answer starts with the same token wherever it is.
"""

import argparse
import json
import random
from pathlib import Path

from make_data import statements
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from wording import TASKS

OUTPUT_DIR = Path(__file__).parent / "base"
VOCAB_SIZE = 1536
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same, but with single Chinese characters, and without punctuation before a word.
TRAINING_SPLIT = r" ?[a-zA-Z]+|\p{Han}|\p{N}| ?[^\s\p{L}\p{N}]|#+|\s*[\r\n]+|\s+(?!\S)|\s+"
PROMPTS = [
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "\n\n### Input:\n\n\n### Response:",
    "You are a helpful assistant. User: Assistant: system user assistant\n",
    "I don't know. 抱歉，我不知道。",
]


def training_text(rng):
    """Statements, questions and the words of the templates, in about the proportions of
    training."""
    for number, line in enumerate(statements(100_000, rng)):
        yield line
        task = TASKS[number % len(TASKS)]
        yield rng.choice(task.questions).format(**task.sample(rng))
        if number % 10 == 0:
            yield from PROMPTS


def splitter(rule):
    """A pre-tokenizer that cuts by a regular expression and then works on bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer():
    """A tokenizers.Tokenizer with VOCAB_SIZE tokens; every run gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(TRAINING_SPLIT)
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(random.Random(5)), trainer)
    tokenizer.pre_tokenizer = splitter(QWEN2_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    return tokenizer


def main():
    """Write the two files of the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where to write")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(output_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (output_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens in {output_dir}")


if __name__ == "__main__":
    main()
