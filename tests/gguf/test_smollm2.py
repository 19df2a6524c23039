"""SmolLM2-135M-Instruct as published for llama.cpp: real weights, tokenizer and chat template."""

import numpy as np
import torch
from conftest import CONVERSATIONS
from llama_cpp import Server
from test_gguf_vocabulary import AWKWARD

from minisft.checkpoints import hub
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.gguf_export import export_model
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ENDS = [0, 2]  # <|endoftext|> and <|im_end|>, which llama.cpp omits here


@torch.no_grad()
def test_real_weights_answer_as_in_llama_cpp(smollm2, tmp_path):
    """In float32. llama.cpp rounds activations where weights have 4 bits, and answers in French."""
    folder = hub.resolve(str(smollm2))
    template = get_template("auto", Tokenizer.load(folder))
    model, ids = load_model(folder, torch.float32), template.encode_prompt(QUESTION)
    answer, ours = [], None
    for _ in range(7):
        logits = model.logits(model(torch.tensor([ids + answer]))[0, -1])
        ours = torch.log_softmax(logits, -1).numpy() if ours is None else ours
        logits[ENDS] = -torch.inf
        answer.append(int(logits.argmax()))
    assert template.tokenizer.decode(answer) == "The capital of France is Paris."
    export_model(folder, tmp_path / "model.gguf", "f32")
    with Server(tmp_path / "model.gguf", context=512) as server:
        np.testing.assert_allclose(server.log_probabilities(ids, len(ours)), ours, atol=1e-3)
        assert server.greedy(ids, 7) == answer


def test_ids_and_prompts_are_those_of_llama_cpp(smollm2):
    tokenizer = Tokenizer.load(hub.resolve(str(smollm2)))
    template = get_template("auto", tokenizer)
    with Server(smollm2, context=512) as server:
        for text in AWKWARD:
            assert server.tokenize(text) == tokenizer.encode(text), text
        for messages in [QUESTION, *CONVERSATIONS]:
            prompt = server.tokenize(server.render(messages), parse_special=True)
            assert prompt == template.encode_prompt(messages)
    [example] = template.encode([*QUESTION, {"role": "assistant", "content": "Paris."}])
    learned = [id for id, learn in zip(example.ids, example.supervised, strict=True) if learn]
    assert tokenizer.decode(learned[:-1]) == "Paris." and learned[-1] == ENDS[1]
