"""Checkpoints for chat templates: a small tokenizer with the control tokens that a template spells.

folder = checkpoint_for(template_text, "byte-level", shared_data, tmp_path / "model")
"""

import json
import re
import shutil

import tokenizers
import torch

from minisft.checkpoints import folders
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM

# Texts in a template that look like control tokens.
SPELLED = re.compile(
    r"<[|｜][^<>{}\s'\"]{1,60}[|｜]>|</?[a-z_]{1,20}>|\[/?[A-Z_]{2,30}\]|<[a-z]+_of_[a-z]+>|<reserved_\d+>"
    r"|<\|?[A-Z_]{3,30}\|?>|</s>|<s>"
)


def control_tokens(text):
    """The control tokens that a template seems to spell, and <s> and </s>."""
    return list(dict.fromkeys(["<s>", "</s>", *SPELLED.findall(text)]))


def byte_level(folder, control):
    """A byte-level BPE tokenizer of a few hundred tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300 + len(control),
        special_tokens=control,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the user asks the assistant who answers the user\n\n"] * 3, trainer
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab_size()


def sentencepiece(folder, control, source, **config):
    """The SentencePiece tokenizer of stories260K; config: for tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config))
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    example, known = content["added_tokens"][1], {t["content"] for t in content["added_tokens"]}
    control = [text for text in control if text not in known]
    content["added_tokens"] += [
        {**example, "id": id, "content": text} for id, text in enumerate(control, 512)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    return 512 + len(control)


# llama.cpp knows it by 32 layers. It has no tied embedding and no shared key heads.
BAICHUAN2 = {"num_hidden_layers": 32, "num_key_value_heads": 2, "tie_word_embeddings": False}


def narrow_model(folder, rows, family="llama"):
    """A checkpoint with one narrow layer and `rows` rows in its embedding."""
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig.from_dict(
            {
                "model_type": family,
                "vocab_size": rows,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
                **(BAICHUAN2 if family == "baichuan" else {}),
            }
        )
    )
    model.initialize()
    folders.save_model(model, folder)


def checkpoint_for(text, kind, shared_data, folder):
    """A checkpoint with a chat template. kind: byte-level, sentencepiece, legacy-sentencepiece."""
    if kind == "byte-level":
        rows = byte_level(folder, control_tokens(text))
    else:
        source = shared_data / "models" / "stories260K"
        rows = sentencepiece(folder, control_tokens(text), source, legacy=kind.startswith("legacy"))
    narrow_model(folder, rows)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder
