"""From a Baichuan2 checkpoint as published to a fine-tuned one: train, score, export, answer."""

import json
import shutil

import pytest
import torch
from baichuan import SIZES, as_llama, published_model, write_checkpoint

import export
import score
import train
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.text.tokenizer import Tokenizer

VOCABULARY = 125_696
GENERATION = {"eos_token_id": 2, "user_token_id": 195, "assistant_token_id": 196, "top_k": 5}
TOKENIZER = {
    "add_bos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "tokenizer_class": "BaichuanTokenizer",
}
FILES = ("modeling_baichuan.py", "tokenization_baichuan.py")


@pytest.fixture(params=SIZES)
def checkpoint(request, shared_data, tmp_path):
    """A narrow model with the real vocabulary, and code that must not be executed."""
    folder = write_checkpoint(
        tmp_path / request.param,
        request.param,
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_attention_heads=3,
    )
    shutil.copy(shared_data / "tokenizers" / "Baichuan2" / "tokenizer.model", folder)
    for name in FILES:
        (folder / name).write_text("raise SystemExit('was executed')")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    return folder


@torch.no_grad()
def test_train_score_export_answer(checkpoint, rows_file, here, shared_data, tmp_path):
    lora, scores, merged = tmp_path / "lora", tmp_path / "scores.jsonl", tmp_path / "merged"
    model = {"model_name_or_path": checkpoint, "dtype": "float32"}
    with torch.enable_grad():
        here(
            train,
            *("--packing", "--quantization_bit", 4, "--modules_to_save", "lm_head"),
            **model,
            dataset=rows_file,
            output_dir=lora,
            max_steps=2,
            learning_rate=0.01,
        )
    adapted = json.loads((lora / "adapter_config.json").read_text())
    assert "W_pack" in adapted["target_modules"] and adapted["modules_to_save"] == ["lm_head"]

    here(score, **model, dataset=rows_file, output=scores)
    assert len(scores.read_text().splitlines()) >= 24

    here(export, **model, adapter=lora, format="hf", output_dir=merged)
    config = json.loads((merged / "config.json").read_text())
    original = json.loads((checkpoint / "config.json").read_text())
    assert {**config, **original} == config  # and the type of the weights
    assert all((merged / name).read_text() == (checkpoint / name).read_text() for name in FILES)
    assert json.loads((merged / "generation_config.json").read_text()) == GENERATION
    template = (merged / "chat_template.jinja").read_text()
    assert template == Tokenizer.load(checkpoint).chat_template

    theirs = as_llama(merged)
    if checkpoint.name == "13B":
        theirs = published_model(shared_data / "baichuan2", merged)
    assistant = Assistant(merged, device="cpu", dtype="float32")
    messages = [{"role": "user", "content": "Say <reserved_107>."}]
    ids, sampling = assistant.template.encode_prompt(messages), Sampling(8, greedy=True)
    assert (ids[0], ids[-1], ids.count(196)) == (195, 196, 1)
    answer = list(assistant.stream(messages, sampling))
    for _ in range(8):
        ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "".join(answer) == assistant.tokenizer.decode(ids[-8:])
