"""assistant.py: answers equal transformers', stay within the context, and repeat no work."""

import json
import shutil
import threading
from functools import partial

import pytest
import torch
import transformers
from conftest import CONFIG
from standing import HANG_SECONDS, wait_until

from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.messages import check_messages
from minisft.generation.sampling import Sampling
from minisft.generation.sharing import Caches, Turns
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora, merge_lora

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
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=sorted(assistant.stop_ids),
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
    # Random text is not always encoded to the ids it was decoded from, but mostly it is.
    assert lengths[0][0] == lengths[0][1]
    assert all(new < 0.7 * whole for new, whole in lengths[1:])


def test_unfinished_answer_does_not_change_later_answers(assistant, oracle):
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


def test_oldest_turns_are_dropped_but_not_the_system_prompt(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=150)
    turns = [SYSTEM]
    for number in range(6):
        turns += [user(f"question {number}"), {"role": "assistant", "content": f"answer {number}"}]
    kept = assistant.context.fit(turns + [user("last")], max_new_tokens=20)
    assert kept[0] == SYSTEM and kept[-1] == user("last")
    assert kept[1:] == (turns + [user("last")])[-len(kept) + 1 :]
    assert 3 < len(kept) < len(turns) and kept[1]["role"] == "user"
    assert assistant.context.fit(kept, max_new_tokens=20) == kept


@pytest.mark.parametrize(
    "template, system",
    [
        ("chatml", "Be terse."),
        ("llama2", "简洁"),
        ("alpaca", "Be terse."),
        ("chatml", "cat " * 100),
    ],
)
def test_turns_are_dropped_half_the_room_at_a_time(template, system, tiny_chat_model_dir):
    """So the beginning of the prompt, which is in the cache, rarely changes."""
    assistant = Assistant(
        tiny_chat_model_dir, template=template, device="cpu", dtype="float32", max_length=500
    )
    system = {"role": "system", "content": system}
    length = lambda *turns: len(assistant.template.encode_prompt([system, *turns]))  # noqa: E731
    half = (450 - length(user("x"))) // 2
    turns, starts, longest = [], [0], 0
    for number in range(24):
        question = user(f"question {number} " + "cat " * (5 * number % 7))
        kept = assistant.context.fit([system, *turns, question], max_new_tokens=50)
        start = len(turns) + 2 - len(kept)
        assert kept == [system, *turns[start:], question] and kept[1]["role"] == "user"
        if start:
            assert 450 - half - longest <= length(*kept[1:]) <= 450
        if start != starts[-1]:
            starts.append(start)
        turn = [question, {"role": "assistant", "content": f"answer {number}"}]
        if number % 3:
            turn[1:1] = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "7"}]
        turns += turn
        longest = max(longest, length(*turn, user("x")))
    assert starts == sorted(starts)
    assert 3 < len(starts) <= 2 + (length(*turns, user("x")) - 450) / half


def test_long_conversation_reuses_the_cache_at_most_turns(tiny_chat_model_dir):
    """Count the tokens that the model computes over 40 turns."""
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=300)
    computed, messages, costs = [], [SYSTEM], []
    assistant.model.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[1]))
    assistant.stop_ids = {260}
    dictated = assistant.tokenizer.encode("the hat") + [260]
    for number in range(40):
        messages.append(user(f"the cat {number}"))
        spoken = iter(dictated)
        assistant.model.logits = lambda hidden, spoken=spoken: one_hot(next(spoken), hidden)
        computed.clear()
        assert "".join(assistant.stream(messages, GREEDY, say=list)) == "the hat"
        costs.append(sum(computed))
        messages.append({"role": "assistant", "content": "the hat"})
    dear = [cost for cost in costs[1:] if cost > 40]
    assert 2 <= len(dear) <= 8 and max(dear) < 150


def test_message_that_is_too_long_names_the_limit(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=100)
    with pytest.raises(UserError, match="the limit is 80 tokens .of 100"):
        assistant.context.fit([SYSTEM, user("x" * 300)], max_new_tokens=20)
    # However long an answer may be, half of the context is left for the question.
    assert assistant.context.fit([user("short")], max_new_tokens=5000) == [user("short")]
    with pytest.raises(UserError, match="tokens with its template, the limit is 50"):
        assistant.context.fit([user("x" * 60)], max_new_tokens=5000)


def test_answer_ends_at_the_context_length(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=60)
    messages = [user("the cat")]
    answer = assistant.stream(messages, Sampling(5000, greedy=True))
    pieces = list(answer)
    assert len(assistant.template.encode_prompt(messages)) + len(pieces) - 1 == 60
    assert answer.is_truncated and answer.num_tokens == len(pieces) - 1
    ((ids, cache),) = assistant.caches._kept
    assert len(ids) == cache.length == 59  # the model has not computed the last token
    assistant.stop_ids = set(range(300))
    answer = assistant.stream(messages, GREEDY)
    assert "".join(answer) == "" and not answer.is_truncated


def test_stop_ids_of_template_and_checkpoint(assistant, tiny_chat_model_dir, tmp_path):
    turn_end = assistant.tokenizer.token_id("<|im_end|>")
    assert assistant.stop_ids == {turn_end, assistant.tokenizer.eos_token_id, 3}
    for file in tiny_chat_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78]}))
    assert {turn_end, 77, 78} <= Assistant(tmp_path, device="cpu").stop_ids


def test_adapter_answers_like_the_merged_model(assistant, tiny_chat_model_dir, tmp_path):
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
    # Every parameter is in bfloat16, so nothing is converted for every token.
    low = Assistant(tiny_chat_model_dir, tmp_path, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
    assert answer_of(low, messages)


def test_leading_space_of_the_template_is_stripped(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, template="vicuna", device="cpu", dtype="float32")
    ids = assistant.tokenizer.encode(" the cat")
    dictated = iter(ids)
    assistant.model.logits = lambda hidden: one_hot(next(dictated), hidden)
    assert answer_of(assistant, [user("x")], Sampling(len(ids), greedy=True)) == "the cat"


def one_hot(token, hidden):
    return torch.nn.functional.one_hot(torch.full(hidden.shape[:1], token), 300).float()


def test_turn_with_tools_is_dropped_as_one(tiny_chat_model_dir):
    messages = [
        user("a"),
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "1" * 90},
        {"role": "assistant", "content": "b"},
        user("c"),
    ]
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=100)
    assert assistant.context.fit([SYSTEM, *messages], 20) == [SYSTEM, user("c")]
    assert assistant.context.fit(messages, 20) == [user("c")]
    assert assistant.context.fit([SYSTEM, *messages], 20)[1:] == assistant.context.fit(messages, 20)


CONVERSATIONS = [
    {"messages": [user("the cat")]},
    {
        "messages": [
            SYSTEM,
            user("你好 🙂 the mat"),
            {"role": "assistant", "content": "the hat"},
            user("on the mat and the rat sat on the hat"),
        ]
    },
    {
        "messages": [
            user("x"),
            {"role": "assistant", "content": "call"},
            {"role": "tool", "content": "7"},
        ],
        "tools": [{"name": "add"}],
    },
    {"messages": [user("the rat sat on the hat and the cat sat on the rat")]},
    {"messages": [user("y")]},
]


def test_inference_equals_transformers_with_its_scores(assistant, oracle):
    """Scores: the mean of compute_transition_scores, the end token counted."""
    assert [] == assistant.inference([])[0] == assistant.inference([])[1]
    responses, scores = assistant.inference(CONVERSATIONS, GREEDY, batch_size=3)
    for one, response, score in zip(CONVERSATIONS, responses, scores, strict=True):
        ids = torch.tensor([assistant.template.encode_prompt(one["messages"], one.get("tools"))])
        output = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=30,
            eos_token_id=sorted(assistant.stop_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = (
            oracle.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
            .mean()
            .item()
        )
        assert response == assistant.tokenizer.decode(output.sequences[0, ids.shape[1] :].tolist())
        assert score == pytest.approx(expected, abs=1e-4)
    assert len(set(responses)) == len(responses)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(200, greedy=True),
        Sampling(200, temperature=1.3, seed=4, repetition_penalty=1.1),
    ],
    ids=["greedy", "sampled"],
)
def test_batch_equals_single_conversations(tiny_chat_model_dir, sampling):
    """Also if every row has a different limit for its answer, and with a seed."""
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=150)
    conversations = CONVERSATIONS[:2] + CONVERSATIONS[3:]
    with pytest.warns(UserWarning, match="conversation 2: the conversation is longer than 150"):
        together = assistant.inference(conversations, sampling)
    for row, one in enumerate(conversations):
        response, score = assistant.inference([one], sampling, rows=[row], say=list)
        assert response[0] == together[0][row]
        assert score[0] == pytest.approx(together[1][row], abs=1e-4)
    alone = assistant.stream(CONVERSATIONS[0]["messages"], sampling)
    assert "".join(alone) == together[0][0]
    assert alone.is_truncated and alone.num_prompt_tokens + alone.num_tokens == 150


def test_stream_and_inference_drop_old_turns_and_warn(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=150)
    turns = [SYSTEM]
    for number in range(300):
        turns += [user(f"question {number}"), {"role": "assistant", "content": f"answer {number}"}]
    messages, said = [*turns, user("last")], []
    short = assistant.context.fit(messages, 20)
    expected = answer_of(assistant, short, Sampling(20, greedy=True))
    answer = assistant.stream(messages, Sampling(20, greedy=True), say=said.append)
    assert "".join(answer) == expected
    responses, _ = assistant.inference(
        [{"messages": messages}], Sampling(20, greedy=True), say=said.append
    )
    assert responses == [expected]
    cut = f"the oldest {len(messages) - len(short)} messages are left out"
    assert [cut in line for line in said] == [True, True] and said[1].startswith("conversation 1: ")


@pytest.mark.parametrize(
    "messages, said",
    [
        (
            [user("ok"), {"role": "assistant", "content": "\x07"}, user(" \n\u3000")],
            "the message is empty",
        ),
        ([user(""), {"role": "assistant", "content": "a"}, user("b")], "message 1 is empty"),
        ([user("abc\x1b[31m")], r"the message has the control character U\+001B \(character 4\)"),
        (
            [{"role": "system", "content": "a\0"}, user("b")],
            "the system prompt has the control char",
        ),
        ([SYSTEM], "at least one user message"),
        ([], "at least one user message"),
        ([user("a"), {"role": "assistant", "content": "b"}], "the last message must be a user's"),
        ([{"role": "nobody", "content": "b"}], "message 1 .nobody.: unknown role"),
        ([{"content": "b"}], "message 1 .None.: unknown role"),
        ([user(None)], "the message is empty"),
        ([user(7)], "message 1 .user.: content is neither text nor a list of text parts"),
        ([user([{"type": "image_url", "image_url": "x"}])], "a part of type image_url; only text"),
        ([{**user("x"), "images": ["a.png"]}], "has images; only text"),
        ([{**user("x"), "input": ["y"]}], 'the "input" of the message: content is not text'),
        ([{**user("x"), "input": "y\x07"}], 'the "input" of the message has the control character'),
        ([{**user("x"), "input": "y" * 10_000_000}], "too long: 10,000,001 characters"),
        (
            [user("x"), {"role": "assistant", "tool_calls": 5}, user("y")],
            "message 2: tool_calls must",
        ),
        (
            [user("x"), {"role": "assistant", "tool_calls": ["f"]}, user("y")],
            "message 2 .assistant.: a tool call needs a name",
        ),
        ("hello", "messages must be a list"),
        (["hello"], "messages must be a list"),
        ([user("好 " * 5_000_000)], "too long: 10,000,000 characters, the limit is 19970 tokens"),
    ],
)
def test_conversation_that_cannot_be_asked_raises(assistant, messages, said):
    before = answer_of(assistant, [user("the cat")])
    with pytest.raises(UserError, match=said):
        assistant.stream(messages, GREEDY)
    with pytest.raises(UserError, match="conversation 2: .*(" + said + ")"):
        assistant.inference([{"messages": [user("x")]}, {"messages": messages}], GREEDY)
    assert answer_of(assistant, [user("the cat")]) == before


def test_system_prompt_without_room_for_a_question_raises(tiny_chat_model_dir):
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32", max_length=100)
    length = lambda text: len(  # noqa: E731
        assistant.template.encode_prompt([{"role": "system", "content": text}, user("x")])
    )
    most = max(
        (text for text in ("cat " * number for number in range(100)) if length(text) <= 70), key=len
    )
    assistant.context.check_system(most, 30)
    for text, said in (
        (most + "cat cat", f"too long: {length(most + 'cat cat')} tokens"),
        ("y" * 10_000_000, "too long: 10,000,001 characters"),
        ("be\0brief", "has the control character"),
    ):
        with pytest.raises(UserError, match=f"^--identity F .*{said}"):
            assistant.context.check_system(text, 30, "--identity F")
        with pytest.raises(UserError, match=f"^the system prompt .*{said}"):
            assistant.stream([{"role": "system", "content": text}, user("x")], Sampling(30))
    with pytest.raises(UserError, match="^the message with the system prompt is too long"):
        assistant.stream([{"role": "system", "content": most}, user("x " * 50)], Sampling(30))
    with pytest.raises(UserError, match="^the message is too long"):
        assistant.stream([user("x " * 50)], Sampling(30))


def test_wrong_tools_raise(assistant):
    for tools in ("add", [1], {"name": "add"}):
        with pytest.raises(UserError, match="tools must be a list of objects"):
            assistant.stream([user("x")], GREEDY, tools)
    with pytest.raises(UserError, match="too long: 10,000,0.. characters, the limit"):
        assistant.stream([user("x")], GREEDY, [{"description": "f" * 10_000_000}])


def test_wrong_conversation_type_raises(assistant):
    for wrong in (user("x"), [user("x")], "x", None):
        with pytest.raises(UserError, match='conversation 1: not of the form {"messages"'):
            assistant.inference([wrong])
    check_messages([user("tab\t and\r\nlines\f are text")])


def test_threads_get_the_answers_of_single_threads_in_turns(assistant, oracle):
    """Eight conversations at once: none waits for another to end."""
    questions = [f"the {word} {number}" for number, word in enumerate(["cat", "mat"] * 4)]
    expected = [transformers_answer(oracle, assistant, [user(one)]) for one in questions]
    answers, served, forward = [""] * 8, [], assistant.model.forward

    def noted(*arguments, **more):
        served.append(threading.get_ident())
        return forward(*arguments, **more)

    def ask(place):
        for piece in assistant.stream([user(questions[place])], GREEDY):
            answers[place] += piece

    assistant.model.forward = noted
    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    with assistant.turns:  # until all have asked
        for one in threads:
            one.start()
        wait_until(lambda: len(assistant.turns._waiting) == 1 + 8)
    for one in threads:
        one.join(HANG_SECONDS)
    assert answers == expected
    assert len(set(served[:8])) == 8 < len(served)  # the first token of each before any second


def test_turns_go_by_the_order_of_asking():
    turns, order = Turns(), []

    def take(number):
        for _ in range(3):
            with turns:
                # Wait until all threads that ask again are in the queue after this one.
                wait_until(lambda: len(turns._waiting) == min(3, 9 - len(order)))
                order.append(number)

    with turns:
        threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
        for number, one in enumerate(threads):
            one.start()
            wait_until(lambda number=number: len(turns._waiting) == number + 2)
    for one in threads:
        one.join(HANG_SECONDS)
    assert order == [0, 1, 2] * 3
    turns.__enter__()  # as if Ctrl-C had come right after __enter__
    with turns:
        pass
    assert not turns._waiting


def test_alternating_conversations_compute_only_new_tokens(tiny_chat_model_dir):
    """Three people take turns; the test counts the tokens that the model computes."""
    assistant = Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")
    assistant.caches.limit = 3
    computed, lengths = [], {}
    assistant.model.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[1]))
    histories = [[SYSTEM, user(f"{name} the cat sat on the mat")] for name in ("ann", "bob", "cy")]
    assistant.stop_ids = {260}  # an answer of a few whole tokens, dictated below
    dictated = assistant.tokenizer.encode("the hat") + [260]
    for turn in range(3):
        for messages in histories:
            computed.clear()
            spoken = iter(dictated)
            assistant.model.logits = lambda hidden, spoken=spoken: one_hot(next(spoken), hidden)
            answer = assistant.stream(messages, GREEDY)
            assert "".join(answer) == "the hat"
            new = answer.num_prompt_tokens - answer.num_reused
            assert computed == [new] + [1] * (len(dictated) - 1)
            if turn:  # the new text, and the template around it
                known = lengths[id(messages)] + len(dictated) - 1
                assert answer.num_reused == known and new < 25 < known
            lengths[id(messages)] = answer.num_prompt_tokens
            messages += [{"role": "assistant", "content": "the hat"}, user("on")]
    assert "prompt tokens were cached" in answer.statistics() and "tokens/s" in answer.statistics()


def test_dynamic_rotary_scaling_computes_long_conversations_anew(tiny_chat_model_dir, tmp_path):
    """Beyond the trained context all angles change, so the keys in a cache are of no use."""
    shutil.copytree(tiny_chat_model_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    config |= {"max_position_embeddings": 64, "rope_parameters": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sampling = Sampling(max_new_tokens=8, greedy=True)
    assistant, messages, reused = Assistant(tmp_path, device="cpu", dtype="float32"), [], []
    for _ in range(4):
        messages.append(user("the cat sat on the mat"))
        answer = assistant.stream(messages, sampling)
        text = "".join(answer)
        fresh = Assistant(tmp_path, device="cpu", dtype="float32")
        assert text == answer_of(fresh, messages, sampling)
        messages.append(answer.message)
        reused.append((answer.num_prompt_tokens > 64, answer.num_reused > 0))
    assert (False, True) in reused and reused[-1] == (True, False)


@torch.inference_mode()
def test_caches_keep_the_latest_and_return_the_longest_prefix():
    """A prefix that another conversation uses is copied. Numbers represent keys and values here."""
    config, made = ModelConfig.from_dict(CONFIG), []
    caches = Caches(lambda: made.append(KeyValueCache(config)) or made[-1], limit=2)

    def keep(ids):
        cache = caches.take(ids)
        known = cache.length
        held = [] if not known else cache.pairs[1][0][0, 0, :known, 0].tolist()
        assert held == ids[:known]
        new = torch.tensor(ids[known:]).float()[None, None, :, None]
        for layer in range(config.num_hidden_layers):
            cache.append(layer, new, new)
        cache.length = len(ids)
        caches.give_back(ids, cache)
        return known

    first, second = [1, *range(10, 20)], [1, *range(30, 40)]
    assert [keep(first), keep(second)] == [0, 1]
    assert keep(first) == 10 and keep(second + [5]) == 11  # never the last id; each has its own
    assert keep(first[:4] + [9]) == 4  # a copy; the one that was not used for longest goes
    assert keep(second + [5, 6]) == 12 and keep(first) == 4
    assert keep([7, 8]) == 0 and keep(first) == 10 and keep(first[:6] + [9]) == 6
    assert len(made) == 2  # at the limit: the copy replaced the cache of [7, 8]
    one = Caches(partial(KeyValueCache, config), limit=1)
    one.take(first)
    one.give_back(first, caches.take(first))
    assert one.take(first[:4] + [9]).length == 4 and not one._kept
    caches.take(second)
    assert caches.take([6]).length == 0 and len(made) == 3  # more at the same time than are kept


def test_an_answer_is_closed_while_its_thread_looks_for_a_cache():
    """Python closes a forgotten answer when it collects garbage, in whatever it does just then."""
    caches = Caches(partial(KeyValueCache, ModelConfig.from_dict(CONFIG)), limit=2)
    forgotten, found = caches.take([1]), []

    class Ids(list):
        def __len__(self):  # `take` asks for it
            if forgotten.length == 0:
                forgotten.length = 1
                caches.give_back([1], forgotten)
            return super().__len__()

    thread = threading.Thread(target=lambda: found.append(caches.take(Ids([1, 2]))), daemon=True)
    kept = caches.take([5])
    kept.length = 1
    caches.give_back(Ids([5]), kept)
    thread.start()
    thread.join(HANG_SECONDS)
    assert found and caches._num_in_use == 1  # the thread's own


def test_two_threads_give_back_caches_at_once():
    """One of them keeps both, between the other one's look at the queue and at the lock."""
    caches = Caches(partial(KeyValueCache, ModelConfig.from_dict(CONFIG)), limit=2)
    taken = [caches.take([number]) for number in range(2)]
    for cache in taken:
        cache.length = 1

    class Lock:
        def acquire(self, blocking):
            caches._lock = lock
            caches.give_back([1], taken[1])
            return lock.acquire(blocking)

    lock, caches._lock = caches._lock, Lock()
    caches.give_back([0], taken[0])
    assert caches._num_in_use == 0 and {cache for _, cache in caches._kept} == set(taken)
    assert not lock.locked()


@pytest.mark.parametrize("bits", [None, 4])
def test_adapter_and_base_share_weights(bits, tiny_chat_model_dir, tmp_path):
    model = load_model(tiny_chat_model_dir)
    lora = LoraConfig(rank=4, modules_to_save=("embed_tokens",))
    add_lora(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        model.model.embed_tokens.weight.normal_(std=0.3)
    save_adapter(model, tmp_path, lora, tiny_chat_model_dir)
    shared = load_model(tiny_chat_model_dir, quantization_bit=bits)
    options = {"device": "cpu", "dtype": "float32"}
    tuned = Assistant(tiny_chat_model_dir, tmp_path, base_model=shared, **options)
    plain = Assistant(tiny_chat_model_dir, base_model=shared, **options)
    alone, assistant = (
        Assistant(tiny_chat_model_dir, adapter, quantization_bit=bits, **options)
        for adapter in (tmp_path, None)
    )
    messages = [user("the cat sat on")]
    assert answer_of(plain, messages) == answer_of(assistant, messages)
    assert answer_of(tuned, messages) == answer_of(alone, messages) != answer_of(plain, messages)
    layers = [one.model.layers[0].mlp.up_proj for one in (shared, plain.model, tuned.model)]
    layers[2] = layers[2].base_layer
    assert len({(one.packed if bits else one.weight).data_ptr() for one in layers}) == 1


def test_quantisation_scales_stay_in_float32_with_an_adapter(tiny_chat_model_dir, tmp_path):
    """Converting the adapter must not convert the scales, which would change every weight."""
    model, lora = load_model(tiny_chat_model_dir), LoraConfig(rank=2)
    add_lora(model, lora)
    save_adapter(model, tmp_path, lora, tiny_chat_model_dir)
    made = Assistant(
        tiny_chat_model_dir, tmp_path, device="cpu", dtype="bfloat16", quantization_bit=4
    )
    layer = made.model.model.layers[0].mlp.up_proj
    assert layer.lora_A.weight.dtype == torch.bfloat16
    expected = load_model(tiny_chat_model_dir, quantization_bit=4).model.layers[0].mlp.up_proj
    assert torch.equal(layer.base_layer.weight, expected.weight)


def test_auto_takes_the_template_of_the_training(tiny_chat_model_dir, tmp_path):
    """The template that train.py recorded wins over the checkpoint's own."""
    folder = tmp_path / "trained"
    shutil.copytree(tiny_chat_model_dir, folder)
    assert Assistant(folder).template.name == "auto"  # the checkpoint's own
    (folder / "options.toml").write_text('template = "alpaca"\ndefault_system = "Be brief."\n')
    trained = Assistant(folder)
    assert trained.template.name == "alpaca"
    assert "Be brief." in trained.template.render([{"role": "user", "content": "hi"}])
    assert Assistant(folder, template="plain").template.name == "plain"


def test_checkpoint_of_a_run_uses_the_template_of_the_run(tiny_chat_model_dir, tmp_path):
    model, lora = load_model(tiny_chat_model_dir), LoraConfig(rank=2)
    add_lora(model, lora)
    save_adapter(model, tmp_path / "checkpoint-10", lora, tiny_chat_model_dir)
    (tmp_path / "options.toml").write_text('template = "alpaca"\n')
    assert Assistant(tiny_chat_model_dir, tmp_path / "checkpoint-10").template.name == "alpaca"


def test_tokenizer_of_another_model_raises(tiny_tokenizer_dir, tmp_path):
    model = CausalLM(ModelConfig.from_dict({**CONFIG, "vocab_size": 100}))
    model.initialize()
    save_model(model, tmp_path)
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    assistant = Assistant(tmp_path, template="plain", device="cpu", dtype="float32")
    with pytest.raises(UserError, match="vocabulary has 100; is it the tokenizer of this"):
        answer_of(assistant, [user("你好")])
