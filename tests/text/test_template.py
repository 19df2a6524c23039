"""Templates: the published formats, one segmentation for training and use, what is supervised."""

import functools
import json

import pytest

from minisft.common.errors import UserError
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

TINYLLAMA = "tokenizers/TinyLlama-1.1B-Chat-v0.6"
MISTRAL = "tokenizers/Mistral-7B-Instruct-v0.2"
QWEN = "tokenizers/Qwen2.5"
LLAMA3 = "tokenizers/Llama-3"
OF_CHECKPOINT = {TINYLLAMA: "zephyr", MISTRAL: "mistral", QWEN: "chatml"}

QUESTION = {"role": "user", "content": "What is </s> and <|im_end|>? "}
ANSWER = {"role": "assistant", "content": "Two *marks*.\n"}
SYSTEM = {"role": "system", "content": "Be brief.\nBe kind."}
CHAT = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "  你好\t👋"},
    dict(ANSWER, content=" Hi,  你"),
]
LONG_CHAT = [*CHAT, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "\nBye"}]
CONVERSATIONS = [CHAT[:1], CHAT[:2], CHAT[:3], CHAT, LONG_CHAT]

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"城市": {"type": "string"}}},
    },
    {"name": "time", "description": 'the "time"', "parameters": {}},
]
CALL = {"name": "weather", "arguments": {"城市": "北京", "days": 2}}
TOOL_CHAT = [
    {"role": "user", "content": "天气?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "Again.", "tool_calls": [CALL, {"function": CALL}]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 4."},
]


@functools.cache
def load(folder):
    return Tokenizer.load(folder)


@functools.cache
def transformers_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def fitting(shared_data, name):
    """The real tokenizers that have the tokens a template needs."""
    needs = {"llama3": [LLAMA3], "chatml": [QWEN]}.get(name, [TINYLLAMA, MISTRAL, QWEN, LLAMA3])
    return [load(shared_data / folder) for folder in needs]


def turns(*texts):
    """Messages of user and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def spans(supervised):
    """[start, end) of every supervised run."""
    edges = [i for i in range(len(supervised)) if supervised[i] != (i > 0 and supervised[i - 1])]
    edges += [len(supervised)] * (len(edges) % 2)
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("folder", OF_CHECKPOINT)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_equals_the_checkpoints_own_chat_template(shared_data, folder, add_generation_prompt):
    oracle = transformers_tokenizer(shared_data / folder)
    template = get_template("auto", load(shared_data / folder))
    assert template.name == OF_CHECKPOINT[folder]
    leads = [[]] if folder == MISTRAL else [[], [SYSTEM]]  # Mistral's refuses a system prompt
    for messages in [lead + conversation for lead in leads for conversation in CONVERSATIONS]:
        expected = oracle.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("lead", [[], [SYSTEM]])
def test_tools_equal_qwens_chat_template(shared_data, lead):
    oracle = transformers_tokenizer(shared_data / QWEN)
    template = get_template("chatml", load(shared_data / QWEN))
    for length in (1, 2, 3, 4, 6, 7):
        messages = lead + TOOL_CHAT[:length]
        for tools in (None, TOOLS):
            expected = oracle.apply_chat_template(messages, tools=tools, tokenize=False)
            assert template.render(messages, tools) == expected
            ids, _ = template.encode(messages, tools)
            assert ids == oracle(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize("folder", OF_CHECKPOINT)
def test_prompt_ids_equal_transformers(shared_data, folder):
    """Nothing in these messages spells a control token, so transformers cuts at the same places."""
    oracle = transformers_tokenizer(shared_data / folder)
    template = get_template("auto", load(shared_data / folder))
    for text in ("Name a colour.", "  你好\t👋  ", "\nTwo\n\nlines"):
        chats = [turns(text)]
        if folder != MISTRAL:  # its answer follows "[/INST]" directly and merges with it there
            chats.append(turns(text, "Red.", "Why?"))
        for messages in chats:
            text = template.render(messages, add_generation_prompt=True)
            expected = oracle(text, add_special_tokens=folder == TINYLLAMA).input_ids
            assert template.encode_prompt(messages) == expected


def test_llama3_as_published(shared_data):
    template = get_template("llama3", load(shared_data / LLAMA3))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + head.format("system") + "Be brief.\nBe kind.<|eot_id|>"
    expected += head.format("user") + "What is </s> and <|im_end|>?<|eot_id|>"
    expected += head.format("assistant")
    assert template.render([SYSTEM, QUESTION], add_generation_prompt=True) == expected
    assert template.render([SYSTEM, QUESTION, ANSWER]) == expected + "Two *marks*.<|eot_id|>"


def test_llama3_of_a_checkpoint_of_llama_31_or_32(tiny_tokenizer_dir):
    """Its chat template opens with a system turn of two lines, whether there is a prompt or not."""
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<s>" + head.format("system") + dates + "{}<|eot_id|>"
    expected += head.format("user") + "Hi<|eot_id|>"
    tokenizer.chat_template = "'<|start_header_id|>' '<|eot_id|>' " + dates.replace("\n", "\\n")
    for name in ("auto", "llama3"):
        template = get_template(name, tokenizer)
        assert template.render(turns("Hi")) == expected.format("")
        assert template.render([SYSTEM, *turns("Hi")]) == expected.format(SYSTEM["content"])
        check_prefixes_and_spans(template)
    assert "Cutting" not in get_template("alpaca", tokenizer).render(turns("Hi"))


def test_llama2_as_published(shared_data):
    template = get_template("llama2", load(shared_data / TINYLLAMA))
    expected = (
        "<s>[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nWhat is </s> and <|im_end|>? [/INST]"
    )
    assert template.render([SYSTEM, QUESTION], add_generation_prompt=True) == expected
    expected += " Two *marks*. </s><s>[INST] 你好\t👋 [/INST] Hi,  你 </s>"
    assert template.render([SYSTEM, *CHAT]) == expected
    assert template.render([QUESTION]) == "<s>[INST] What is </s> and <|im_end|>? [/INST]"


def test_vicuna_as_published(shared_data):
    template = get_template("vicuna", load(shared_data / TINYLLAMA))
    preface = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    text = "{} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    messages = turns("Hello!", "Hi!", "How are you?")
    assert template.render(messages, add_generation_prompt=True) == text.format(preface)
    messages.insert(0, SYSTEM)
    assert template.render(messages, add_generation_prompt=True) == text.format(SYSTEM["content"])


def test_mistral_puts_the_system_prompt_into_the_first_user_turn(shared_data):
    template = get_template("mistral", load(shared_data / MISTRAL))
    assert template.render([SYSTEM, *turns("Hi")]) == "<s>[INST] Be brief.\nBe kind.\n\nHi [/INST]"


def test_alpaca_has_stanfords_two_forms(shared_data):
    template = get_template("alpaca", load(shared_data / TINYLLAMA))
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    question, answer = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}
    assert template.render([question], add_generation_prompt=True) == plain
    assert template.render([{**question, "input": "1 2"}, answer]) == with_input + "3</s>"
    own = template.render([{"role": "system", "content": "Sum up."}, question, answer, question])
    turn = "### Instruction:\nAdd.\n\n"
    assert own == f"Sum up.\n\n{turn}### Response:3</s>\n\n{turn}"


def test_other_templates_append_the_input_to_the_content(shared_data):
    template = get_template("plain", load(shared_data / TINYLLAMA), default_system="S")
    messages = [{"role": "user", "content": "Add.", "input": "1 2"}]
    assert template.render(messages) == "S\nAdd.\n1 2\n"


def check_prefixes_and_spans(template):
    """Every answer begins where its prompt ends, and is all that is supervised, with its end."""
    for messages in (LONG_CHAT, TOOL_CHAT, [SYSTEM, *LONG_CHAT], [SYSTEM, *TOOL_CHAT]):
        ids, supervised = template.encode(messages, TOOLS)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for (start, end), index in zip(spans(supervised), answers, strict=True):
            assert template.encode_prompt(messages[:index], TOOLS) == ids[:start]
            assert ids[end - 1] in template.stop_token_ids()
            assert not template.stop_token_ids() & set(ids[start : end - 1])
            if not messages[index].get("tool_calls"):
                answer = template.tokenizer.decode(ids[start:end])
                assert answer.strip() == messages[index]["content"].strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_exact_prefix_of_training(tiny_tokenizer_dir, name):
    check_prefixes_and_spans(get_template(name, load(tiny_tokenizer_dir)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_with_real_tokenizers(shared_data, name):
    for tokenizer in fitting(shared_data, name):
        check_prefixes_and_spans(get_template(name, tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_comes_exactly_once(shared_data, name):
    for tokenizer in fitting(shared_data, name):
        template, bos = get_template(name, tokenizer), tokenizer.bos_token_id
        ids, _ = template.encode([SYSTEM, *LONG_CHAT])
        if bos is not None:  # Llama 2's published format opens every exchange with one
            assert ids[0] == bos and ids.count(bos) == (3 if name == "llama2" else 1)
            assert template.encode_prompt(CHAT[:1]).count(bos) == 1


def test_encoding_the_answer_by_itself_would_differ(shared_data):
    """The negative control of the prefix test: two encodings put together are not one in place."""
    tokenizer = load(shared_data / TINYLLAMA)
    template = get_template("alpaca", tokenizer)
    rows = json.loads((shared_data / "instruct/alpaca_en_demo.json").read_text(encoding="utf-8"))
    apart = merged = 0
    for row in rows[:300]:
        question = {"role": "user", "content": row["instruction"], "input": row["input"]}
        messages = [question, {"role": "assistant", "content": row["output"]}]
        ids, supervised = template.encode(messages)
        text = template.render(messages)
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s> {text}"
        prompt = template.encode_prompt(messages[:1])
        assert ids[: len(prompt)] == prompt and supervised.index(True) == len(prompt)
        apart += prompt + tokenizer.encode(row["output"]) != ids[:-1]
        merged += [1, *tokenizer.encode(text.removesuffix("</s>"))] != ids[:-1]
    assert apart > 290 and merged > 0


def test_text_after_a_control_token_gets_a_space_only_in_legacy_tokenizers(shared_data):
    messages = [*CHAT[:2], {"role": "user", "content": "x"}]
    for folder, first in ((TINYLLAMA, "["), (MISTRAL, "▁[")):
        tokenizer = load(shared_data / folder)
        ids = get_template("mistral", tokenizer).encode_prompt(messages)
        after = ids[ids.index(tokenizer.eos_token_id) + 1]
        assert tokenizer.token_text(after) == first
        text = "x</s>[INST]"
        oracle = transformers_tokenizer(shared_data / folder)(text).input_ids
        assert tokenizer.token_text(oracle[3]) == first


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_a_message_stay_text(shared_data, name):
    for tokenizer in fitting(shared_data, name):
        template = get_template(name, tokenizer)
        spelled = "".join([tokenizer.token_text(id) for id in sorted(tokenizer.special_ids)][:12])
        spelled += "{eos}{bos}{content}<|im_end|></s>"
        plain, evil = (
            [dict(message, content=content) for message in [SYSTEM, *CHAT]]
            for content in ("x", spelled)
        )
        special = tokenizer.special_ids
        harmless = [id for id in template.encode(plain)[0] if id in special]
        assert [id for id in template.encode(evil)[0] if id in special] == harmless
        assert template.render(evil).count("{eos}{bos}{content}") == 5


def test_stop_tokens(shared_data):
    qwen, llama3 = load(shared_data / QWEN), load(shared_data / LLAMA3)
    assert get_template("chatml", qwen).stop_token_ids([151645, 151643]) == {151645, 151643}
    assert get_template("llama3", llama3).stop_token_ids(None) == {128009, 128001}
    assert get_template("llama3", llama3).stop_token_ids(128008) == {128009, 128001, 128008}
    assert get_template("alpaca", load(shared_data / TINYLLAMA)).stop_token_ids(2) == {2}


def test_chatml_default_system_prompt(shared_data, tiny_tokenizer_dir):
    question, tail = turns("Hi"), "<|im_start|>user\nHi<|im_end|>\n"
    qwen, bare = load(shared_data / QWEN), load(tiny_tokenizer_dir)
    assert "You are Qwen" in get_template("chatml", qwen).render(question)
    assert get_template("chatml", qwen, default_system="").render(question) == tail
    assert get_template("chatml", bare).render(question) == tail
    with_tools = get_template("chatml", bare).render(question, TOOLS)
    assert with_tools.startswith("<|im_start|>system\n# Tools\n")
    for text in ("You are a helpful assistant", "You are an AI named Smol, by 小明"):
        # As in Qwen1.5 (without a full stop) and in SmolLM2.
        other = Tokenizer.load(tiny_tokenizer_dir)
        other.chat_template = "{% if x %}{{ '<|im_start|>system\\n" + text + "<|im_end|>\\n' }}"
        assert get_template("auto", other).render(question) == (
            f"<|im_start|>system\n{text}<|im_end|>\n{tail}"
        )
    own = get_template("chatml", bare, default_system="Be.").render(question)
    assert own == "<|im_start|>system\nBe.<|im_end|>\n" + tail


def test_templates_that_do_not_fit_are_refused(shared_data):
    llama2, llama3 = load(shared_data / TINYLLAMA), load(shared_data / LLAMA3)
    with pytest.raises(UserError, match="llama3 needs the token <|start_header_id|>"):
        get_template("llama3", llama2)
    endless = Tokenizer.load(shared_data / TINYLLAMA)
    endless.eos_token_id = None
    with pytest.raises(UserError, match="alpaca needs an eos_token, which the tokenizer of"):
        get_template("alpaca", endless)
    with pytest.raises(UserError, match="unknown template 'lama'; choose one of: auto, llama3, .*"):
        get_template("lama", llama2)
    with pytest.raises(UserError, match="no chat template.*alpaca"):
        get_template("auto", llama3)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{{ '<|start_header_id|>' + message['role'] }}{{ '<|eot_id|>' }}", "llama3"),
        ("{{ '<<SYS>>' }}{{ '[INST] ' + content + ' [/INST]' }}", "llama2"),
        ("{{ 'USER: ' + content + ' ASSISTANT:' }}", "vicuna"),
        ("{{ '### Instruction:' }}{{ '### Response:' }}", "alpaca"),
        ("{{ '<|user|>' }}{{ '<|assistant|>' }}{{ '<|end|>' }}{{ eos_token }}", None),
        ("{{ [].__class__.__mro__ }}", None),
    ],
)
def test_auto_goes_by_markers(tiny_tokenizer_dir, text, name):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    tokenizer.chat_template = text
    if name:
        assert get_template("auto", tokenizer).name == name
    else:
        with pytest.raises(UserError, match="not known; choose --template from: llama3, chatml"):
            get_template("auto", tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one user message"),
        ([SYSTEM], "at least one user message"),
        ([ANSWER], "must alternate, user first: assistant"),
        ([QUESTION, QUESTION], "must alternate, user first: user user"),
        ([QUESTION, ANSWER, ANSWER], "must alternate"),
        ([QUESTION, SYSTEM], "a system message can only be the first"),
        ([{"role": "bot", "content": "x"}], "message 1 has the role 'bot'"),
        ([{"role": "user", "content": ["x"]}], "message 1 .user.: content is not text"),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"name": "f"}]}],
            "message 2: a tool call",
        ),
    ],
)
def test_conversations_that_do_not_fit_are_refused(tiny_tokenizer_dir, messages, message):
    template = get_template("chatml", load(tiny_tokenizer_dir))
    with pytest.raises(UserError, match=message):
        template.encode(messages)
    with pytest.raises(UserError, match="a prompt ends with"):
        template.encode_prompt(CHAT[:2])


def test_show_colours_what_is_supervised(tiny_tokenizer_dir):
    template = get_template("chatml", load(tiny_tokenizer_dir))
    assert template.show(*template.encode(turns("你", "猫 the cat"))) == (
        "<s><|im_start|>user\n你<|im_end|>\n<|im_start|>assistant\n"
        "\033[32m猫 the cat<|im_end|>\033[0m\n"
    )
    crooked = template.show(*template.encode(turns("\x1b[0m\r\n\t你\x9b", "\x00")))
    assert r"\x1b[0m\x0d" in crooked and "\n\t你\\x9b" in crooked and r"\x00" in crooked
    assert crooked.count("\x1b") == 2
