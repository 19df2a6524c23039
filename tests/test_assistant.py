"""assistant.py: turns answered as by transformers, within the context, without repeated work."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import CONFIG

from minisft.assistant import Assistant, common_prefix, without_oldest_turn
from minisft.config import ModelConfig
from minisft.generate import Sampling
from minisft.lora import LoraConfig, add_lora, merge_lora
from minisft.model import CausalLM
from minisft.options import UserError
from minisft.weights import load_adapter, load_model, save_adapter, save_model

GREEDY = Sampling(max_new_tokens=30, greedy=True)
SYSTEM = {"role": "system", "content": "You are terse. 简洁。"}


def user(text):
    return {"role": "user", "content": text}


def answer_of(assistant, messages, sampling=GREEDY):
    return "".join(assistant.stream(messages, sampling))


@pytest.fixture
def assistant(tiny_chat_model_dir):
    return Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def oracle(tiny_chat_model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir)


def transformers_answer(oracle, assistant, messages):
    ids = torch.tensor([assistant.template.encode_prompt(messages)])
    output = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=GREEDY.max_new_tokens, eos_token_id=sorted(assistant.stop_ids),
    )
    return assistant.tokenizer.decode(output[0, ids.shape[1] :].tolist())


def test_turns_equal_transformers_and_only_new_tokens_are_computed(assistant, oracle):
    computed = []
    assistant.model.register_forward_pre_hook(
        lambda _, arguments: computed.append(arguments[0].shape[1])
    )
    messages, lengths = [SYSTEM], []
    for question in ("the cat sat", "你好 🙂 the mat", "and then?", "the rat"):
        messages.append(user(question))
        computed.clear()
        answer = answer_of(assistant, messages)
        assert answer == transformers_answer(oracle, assistant, messages)
        lengths.append((computed[0], len(assistant.template.encode_prompt(messages))))
        messages.append({"role": "assistant", "content": answer})
    assert len({turn["content"] for turn in messages}) == len(messages)
    # Nonsense does not always come back as the ids it was written with, but most of it does.
    assert lengths[0][0] == lengths[0][1]
    assert all(new < 0.7 * whole for new, whole in lengths[1:])


def test_an_answer_left_in_the_middle_harms_nothing(assistant, oracle):
    messages = [user("the cat")]
    expected = transformers_answer(oracle, assistant, messages)
    for pieces_read in (0, 1, 7):
        pieces = assistant.stream(messages, GREEDY)
        for _ in range(pieces_read):
            next(pieces)
        pieces.close()
        assert answer_of(assistant, messages) == expected
    other = [user("the rat"), {"role": "assistant", "content": "the hat"}, user("on?")]
    assert answer_of(assistant, other) == transformers_answer(oracle, assistant, other)


def test_oldest_turns_give_way_but_never_the_system_prompt(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=150)
    turns = [SYSTEM]
    for number in range(6):
        turns += [user(f"question {number}"), {"role": "assistant", "content": f"answer {number}"}]
    kept = assistant.fit(turns + [user("last")], max_new_tokens=20)
    assert kept[0] == SYSTEM and kept[-1] == user("last")
    assert kept[1:] == (turns + [user("last")])[-len(kept) + 1 :]
    assert 3 < len(kept) < len(turns) and kept[1]["role"] == "user"
    size = len(assistant.template.encode_prompt(kept))
    one_more = [SYSTEM, *(turns + [user("last")])[-len(kept) - 1 :]]
    assert size <= 130 < len(assistant.template.encode_prompt(one_more))
    assert assistant.fit(kept, max_new_tokens=20) == kept


def test_one_message_too_long_names_the_limit(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=100)
    with pytest.raises(UserError, match="the limit is 80 .of 100"):
        assistant.fit([SYSTEM, user("x" * 300)], max_new_tokens=20)
    # However long an answer may be, half of the context is left to the question.
    assert assistant.fit([user("short")], max_new_tokens=5000) == [user("short")]
    with pytest.raises(UserError, match="tokens with its template and the system prompt, the li"):
        assistant.fit([{**SYSTEM, "content": "x" * 300}, user("short")], max_new_tokens=20)
    with pytest.raises(UserError, match="tokens with its template, the limit is 50"):
        assistant.fit([user("x" * 60)], max_new_tokens=5000)


def test_answers_end_at_the_context_and_say_so(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=60)
    messages = [user("the cat")]
    pieces = list(assistant.stream(messages, Sampling(5000, greedy=True)))
    assert len(assistant.template.encode_prompt(messages)) + len(pieces) - 1 == 60
    assert assistant.cut_short
    assistant.stop_ids = set(range(300))
    assert answer_of(assistant, messages) == "" and not assistant.cut_short


def test_stop_ids_are_the_template_s_and_the_checkpoint_s(assistant, tiny_chat_model_dir, tmp_path):
    turn_end = assistant.tokenizer.token_id("<|im_end|>")
    assert assistant.stop_ids == {turn_end, assistant.tokenizer.eos_token_id, 3}
    for file in tiny_chat_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78]}))
    assert {turn_end, 77, 78} <= Assistant(tmp_path, device="cpu").stop_ids


def test_adapter_answers_as_if_merged(assistant, tiny_chat_model_dir, tmp_path):
    model = load_model(tiny_chat_model_dir)
    lora = LoraConfig(rank=4, dropout=0.5, modules_to_save=("embed_tokens",))
    add_lora(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        model.model.embed_tokens.weight.mul_(1.1)
    save_adapter(model, tmp_path, lora, tiny_chat_model_dir)
    adapted = Assistant(tiny_chat_model_dir, tmp_path, device="cpu", dtype="float32")
    messages = [user("the cat sat on")]
    answer = answer_of(adapted, messages)
    merged = load_model(tiny_chat_model_dir)
    load_adapter(merged, tmp_path)
    merge_lora(merged)
    reference = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")
    reference.model = merged
    assert answer == answer_of(reference, messages) != answer_of(assistant, messages)
    # In bfloat16 every parameter is, so that nothing is converted again for every token.
    low = Assistant(tiny_chat_model_dir, tmp_path, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
    assert answer_of(low, messages)


def test_the_space_that_a_template_puts_is_not_the_answer_s(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, template="vicuna", device="cpu", dtype="float32")
    ids = assistant.tokenizer.encode(" the cat")
    dictated = iter(ids)
    assistant.model.logits = lambda hidden: one_hot(next(dictated), hidden)
    assert answer_of(assistant, [user("x")], Sampling(len(ids), greedy=True)) == "the cat"


def one_hot(token, hidden):
    return torch.nn.functional.one_hot(torch.full(hidden.shape[:1], token), 300).float()


def test_oldest_turn_with_tools_goes_whole():
    messages = [
        user("a"), {"role": "assistant", "content": "call"}, {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"}, user("c"),
    ]
    assert without_oldest_turn([SYSTEM, *messages]) == [SYSTEM, user("c")]
    assert without_oldest_turn(messages) == [user("c")]
    assert without_oldest_turn([SYSTEM, user("c")]) is None
    assert without_oldest_turn([]) is None


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == common_prefix([1, 2, 4], [1, 2]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


def test_auto_takes_the_template_of_the_training(tiny_chat_model_dir, tmp_path):
    """What train.py recorded beside an adapter or a model comes before the checkpoint's own."""
    folder = tmp_path / "trained"
    shutil.copytree(tiny_chat_model_dir, folder)
    assert Assistant(folder).template.name == "chatml"
    (folder / "options.toml").write_text('template = "alpaca"\ndefault_system = "Be brief."\n')
    trained = Assistant(folder)
    assert trained.template.name == "alpaca"
    assert "Be brief." in trained.template.render([{"role": "user", "content": "hi"}])
    assert Assistant(folder, template="plain").template.name == "plain"


def test_a_checkpoint_of_a_run_takes_the_template_of_the_run(tiny_chat_model_dir, tmp_path):
    model, lora = load_model(tiny_chat_model_dir), LoraConfig(rank=2)
    add_lora(model, lora)
    save_adapter(model, tmp_path / "checkpoint-10", lora, tiny_chat_model_dir)
    (tmp_path / "options.toml").write_text('template = "alpaca"\n')
    assert Assistant(tiny_chat_model_dir, tmp_path / "checkpoint-10").template.name == "alpaca"


def test_the_tokenizer_of_another_model_is_told(tiny_tokenizer_dir, tmp_path):
    model = CausalLM(ModelConfig.from_dict({**CONFIG, "vocab_size": 100}))
    model.initialize()
    save_model(model, tmp_path)
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    assistant = Assistant(tmp_path, template="plain", device="cpu", dtype="float32")
    with pytest.raises(UserError, match="vocabulary has 100; is it the tokenizer of this"):
        answer_of(assistant, [user("你好")])
