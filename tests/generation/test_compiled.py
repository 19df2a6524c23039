"""compiled.py: the compiled step gives the logits of the model; nothing compiles twice."""

import threading

import pytest
import torch
from conftest import CONFIG, as_flags, command
from standing import HANG_SECONDS
from torch._dynamo.utils import counters

from minisft.checkpoints import hub
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.compiled import CompiledDecoder, next_logits
from minisft.generation.generate import stream
from minisft.generation.sampling import Sampling
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.families import position_factors
from minisft.model.packed_weights import Int4Linear, can_pack_weights

# The fixture costs much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("compiled")
CAPACITY = 128
TYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if can_pack_weights(dtype, "cpu")]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LLAMA3},
        {"model_type": "mistral", "sliding_window": 6},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 8},
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
@torch.inference_mode()
def test_step_equals_the_logits_of_the_model(fields):
    """The cache still holds the end of a longer conversation in its later positions."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, **fields})).eval()
    model.initialize()
    tokens = torch.randint(3, 128, (1, 20))
    growing, fixed = KeyValueCache(model.config), KeyValueCache(model.config, 32)
    model(torch.randint(3, 128, (1, 25)), cache=fixed)
    fixed.truncate(0)
    for cache in (growing, fixed):
        model(tokens[:, :4], cache=cache)
    factors = position_factors(model.config, torch.arange(32), torch.float32)
    for place in range(4, 20):
        token = tokens[:, place : place + 1]
        expected = model.logits(model(token, cache=growing)[:, -1])
        x = model.model.embed_tokens(token)
        found = next_logits(model, x, torch.tensor([place]), factors, fixed.pairs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for theirs, ours in zip(growing.pairs, fixed.pairs, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(other[:, :, :20], one[:, :, :20], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def assistants(tiny_chat_model_dir):
    """The same model (without, with) a compiled step."""
    pair = [
        Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=CAPACITY)
        for _ in range(2)
    ]
    for assistant in pair:
        assistant.caches.limit = 2
    pair[1].compile()
    return pair


def converse(assistant, sampling):
    """Two conversations in turn, of two turns each -> [(text, known tokens), ...]."""
    conversations, said = (
        [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "你好"}]],
        [],
    )
    for _ in range(2):
        for messages in conversations:
            answer = assistant.stream(messages, sampling)
            messages += [
                {"role": "assistant", "content": "".join(answer)},
                {"role": "user", "content": "and?"},
            ]
            said.append((answer.text, answer.num_reused))
    return said


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(20, greedy=True),
        Sampling(20, temperature=1.3, seed=4, repetition_penalty=1.1),
    ],
    ids=["greedy", "sampled"],
)
def test_answers_equal_the_plain_model_and_nothing_is_compiled_twice(assistants, sampling):
    plain, compiled = assistants
    graphs, steps = counters["stats"]["unique_graphs"], []
    step = compiled.decoder.step
    compiled.decoder.step = lambda *given: (steps.append(1), step(*given))[1]
    expected, answers = converse(plain, sampling), []
    compiled.model.register_forward_pre_hook(lambda *_: steps.append(0))
    try:
        thread = threading.Thread(target=lambda: answers.extend(converse(compiled, sampling)))
        thread.start()  # another thread than the one that compiled, as on the web page
        thread.join(HANG_SECONDS)
    finally:
        compiled.decoder.step = step
    assert answers == expected and all(known > 15 for _, known in expected[2:])
    assert len({text for text, _ in answers}) == 4
    assert steps.count(0) <= 4 and steps.count(1) > 50  # prefills; every token after them
    assert counters["stats"]["unique_graphs"] == graphs


def test_caches_are_reused_beyond_the_limit(assistants, monkeypatch):
    """The least recently used cache is reused, with its old content."""
    plain, compiled = assistants
    made, new_cache = [], compiled.decoder.new_cache
    monkeypatch.setattr(compiled.caches, "new_cache", lambda: made.append(new_cache()) or made[-1])
    compiled.caches._kept.clear()
    graphs = counters["stats"]["unique_graphs"]
    conversations = [[{"role": "user", "content": text}] for text in ("the cat", "你好", "the rat")]
    for _ in range(2):
        for messages in conversations:
            answers = [
                "".join(one.stream(messages, Sampling(20, greedy=True))) for one in assistants
            ]
            assert answers[0] == answers[1]
            messages += [
                {"role": "assistant", "content": answers[0]},
                {"role": "user", "content": "and?"},
            ]
    assert len(made) == 2 and counters["stats"]["unique_graphs"] == graphs


def test_a_growing_cache_compiles_nothing_again(assistants):
    plain, compiled = assistants
    graphs, sampling = counters["stats"]["unique_graphs"], Sampling(90, greedy=True)
    caches = KeyValueCache(plain.model.config), compiled.decoder.new_cache()
    models = plain.model, compiled.decoder
    expected, found = (
        list(stream(model, [5, 17, 3], sampling, cache=cache))
        for model, cache in zip(models, caches, strict=True)
    )
    assert found == expected and len(found) == 90
    assert caches[1].pairs[0][0].shape[2] == 128  # 64 at first
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(not TYPES, reason="this processor has no kernels")
@torch.inference_mode()
def test_packed_weights_stay_packed(tiny_chat_model_dir, tmp_path):
    """The blocks of a GGUF file stay packed, and its embedding in the file."""
    path = tmp_path / "model.gguf"
    export_model(hub.resolve(str(tiny_chat_model_dir)), path, "q4_0")
    exact = Assistant(path, device="cpu", dtype="float32", pack=False).model
    plain = Assistant(path, device="cpu", dtype=TYPES[0]).model
    compiled = Assistant(path, device="cpu", dtype=TYPES[0], max_length=CAPACITY, compiles=True)
    compiled.compile()
    assert any(type(module) is Int4Linear for module in compiled.model.modules())
    models = exact, plain, compiled.decoder
    caches = [KeyValueCache(exact.config) for _ in models]
    differences = []
    for token in torch.randint(3, 100, (70, 1, 1)):
        expected, *found = (
            model.logits(model(token, cache=cache)).float()
            for model, cache in zip(models, caches, strict=True)
        )
        differences.append([(logits - expected).abs().mean() for logits in found])
    of_plain, of_compiled = torch.tensor(differences).mean(0)
    assert of_compiled < 1.2 * of_plain < 0.1 * expected.std(), (of_compiled, of_plain)


def test_full_cache_raises(assistants):
    decoder = assistants[1].decoder
    cache = decoder.new_cache()
    cache.length = CAPACITY
    with pytest.raises(ValueError, match="room for 128 tokens only"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_model_that_cannot_be_compiled_raises(monkeypatch):
    config = {**CONFIG, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UserError, match="--compile: the rotary angles of this model"):
        CompiledDecoder(CausalLM(ModelConfig.from_dict(config)), CAPACITY)

    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler\n\nmuch more")

    monkeypatch.setattr(torch, "compile", lambda *_, **more: fail)
    told = r"^--compile failed \(Inv.* C\+\+ compiler\). Leave out --compile.$"
    with pytest.raises(UserError, match=told):
        CompiledDecoder(CausalLM(ModelConfig.from_dict(CONFIG)).eval(), CAPACITY)


def test_chat_with_compile_gives_the_same_answer(tiny_chat_model_dir, assistants):
    flags = as_flags(
        model_name_or_path=tiny_chat_model_dir,
        greedy=True,
        max_new_tokens=20,
        max_length=CAPACITY,
        device="cpu",
        dtype="float32",
        compile=True,
        prompt="the cat",
    )
    done = command(*flags, script="chat.py")
    messages = [{"role": "user", "content": "the cat"}]
    answer = assistants[0].stream(messages, Sampling(20, greedy=True))
    assert (done.returncode, done.stdout) == (0, "".join(answer) + "\n"), done.stderr
