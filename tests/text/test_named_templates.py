"""Our own templates: published texts, prompts that begin the training text, supervised spans."""

import copy
import io
import json

import pytest
import transformers
from conftest import ROOT
from real_tokenizers import LLAMA3, MISTRAL, QWEN, TINYLLAMA, fitting, load_tokenizer
from template_checkpoints import build_checkpoint

from minisft.text.chat_template import ChatTemplate, TokenizedText
from minisft.text.template_choice import NAMES, get_template
from minisft.training.options import parse_options

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")

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
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"城市": {"type": "string"}}},
    },
    {"name": "time", "description": 'the "time"', "parameters": {}},
]
STANDARD_TOOLS = [TOOLS[0], {"type": "function", "function": TOOLS[1]}]
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


def turns(*texts: str) -> list[dict]:
    """Messages of user and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def runs(example: TokenizedText) -> list[tuple[int, int]]:
    """(start, end) of each supervised run."""
    flags = [False, *example.supervised, False]
    edges = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_llama3_as_published(shared_data):
    template = get_template("llama3", load_tokenizer(shared_data / LLAMA3))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + head.format("system") + "Be brief.\nBe kind.<|eot_id|>"
    expected += head.format("user") + "What is </s> and <|im_end|>?<|eot_id|>"
    expected += head.format("assistant")
    assert template.render([SYSTEM, QUESTION], add_generation_prompt=True) == expected
    assert template.render([SYSTEM, QUESTION, ANSWER]) == expected + "Two *marks*.<|eot_id|>"


def test_llama2_as_published(shared_data):
    template = get_template("llama2", load_tokenizer(shared_data / MISTRAL))
    expected = (
        "<s>[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nWhat is </s> and <|im_end|>? [/INST]"
    )
    assert template.render([SYSTEM, QUESTION], add_generation_prompt=True) == expected
    expected += " Two *marks*. </s><s>[INST] 你好\t👋 [/INST] Hi,  你 </s>"
    assert template.render([SYSTEM, *CHAT]) == expected
    assert template.render([QUESTION]) == "<s>[INST] What is </s> and <|im_end|>? [/INST]"


def test_vicuna_as_published(shared_data):
    template = get_template("vicuna", load_tokenizer(shared_data / MISTRAL))
    preface = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    text = "<s>{} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    messages = turns("Hello!", "Hi!", "How are you?")
    assert template.render(messages, add_generation_prompt=True) == text.format(preface)
    messages.insert(0, SYSTEM)
    assert template.render(messages, add_generation_prompt=True) == text.format(SYSTEM["content"])


def test_mistral_puts_the_system_prompt_into_the_first_question(shared_data):
    template = get_template("mistral", load_tokenizer(shared_data / MISTRAL))
    assert template.render([SYSTEM, *turns("Hi")]) == "<s>[INST] Be brief.\nBe kind.\n\nHi [/INST]"


def test_alpaca_has_stanfords_two_forms(shared_data):
    template = get_template("alpaca", load_tokenizer(shared_data / MISTRAL))
    plain = (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    with_input = (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    question, answer = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}
    assert template.render([question], add_generation_prompt=True) == plain
    assert template.render([{**question, "input": "1 2"}, answer]) == with_input + "3</s>"
    own = template.render([{"role": "system", "content": "Sum up."}, question, answer, question])
    turn = "### Instruction:\nAdd.\n\n"
    assert own == f"<s>Sum up.\n\n{turn}### Response:3</s>\n\n{turn}"


def test_other_templates_append_the_input_to_the_content(shared_data):
    template = get_template("plain", load_tokenizer(shared_data / MISTRAL), default_system="S")
    messages = [{"role": "user", "content": "Add.", "input": "1 2"}]
    assert template.render(messages) == "<s>S\nAdd.\n1 2\n"


def test_zephyr_is_tinyllamas_template_after_bos(shared_data):
    """TinyLlama's own template has no BOS, so transformers and vLLM give it none."""
    tokenizer = load_tokenizer(shared_data / TINYLLAMA)
    ours, own = get_template("zephyr", tokenizer), get_template("auto", tokenizer)
    for messages in (CHAT, [SYSTEM, *LONG_CHAT]):
        assert ours.render(messages) == "<s> " + own.render(messages)
        [example], [bare] = ours.encode(messages), own.encode(messages)
        assert example.ids == [tokenizer.bos_token_id, *bare.ids]


def test_default_is_llama_factorys_form(shared_data):
    """register_template(name="default") of its template.py, after BOS."""
    template = get_template("default", load_tokenizer(shared_data / MISTRAL))
    expected = "<s>System: Be brief.\nBe kind.</s>\nHuman: Hi</s>\nAssistant:"
    messages = [SYSTEM, *turns("Hi", "Ho", "Bye")]
    assert template.render(messages[:2], add_generation_prompt=True) == expected
    expected += "Ho</s>\nHuman: Bye</s>\n"
    assert template.render(messages) == expected
    assert template.render(messages, add_generation_prompt=True) == expected + "Assistant:"


def test_bos_and_leading_space(shared_data):
    """SentencePiece's space is after BOS: the templates were published for such tokenizers."""
    for folder, first in ((TINYLLAMA, "▁["), (MISTRAL, "▁["), (QWEN, "["), (LLAMA3, "[")):
        tokenizer = load_tokenizer(shared_data / folder)
        ids = get_template("mistral", tokenizer).encode_prompt(turns("Hi"))
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        assert ids[: len(bos)] == bos
        assert tokenizer.token_text(ids[len(bos)]).startswith(first)
    for name in NAMES:
        for tokenizer in fitting(shared_data, name):
            [example] = get_template(name, tokenizer).encode([SYSTEM, *LONG_CHAT])[:1]
            if tokenizer.bos_token_id is not None:  # Llama 2's form begins every exchange with it
                count = example.ids.count(tokenizer.bos_token_id)
                assert count == {"llama2": 3, "baichuan2": 0}.get(name, 1)


def check_prompts_and_runs(template: ChatTemplate) -> None:
    """Every answer begins where its prompt ends. Only answers and their ends are learned."""
    for messages in (LONG_CHAT, TOOL_CHAT, [SYSTEM, *LONG_CHAT], [SYSTEM, *TOOL_CHAT]):
        examples = template.encode(messages, TOOLS)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [(example.ids, *run) for example in examples for run in runs(example)]
        for (ids, start, end), index in zip(learned, answers, strict=True):
            prompt = template.encode_prompt(messages[:index], TOOLS)
            assert prompt == ids[: len(prompt)]
            between = template.tokenizer.decode(ids[len(prompt) : start])
            assert between in ("", "<think>\n\n</think>\n\n")
            assert ids[end - 1] in template.stop_token_ids()
            assert not template.stop_token_ids() & set(ids[start : end - 1])
            if not messages[index].get("tool_calls"):
                answer = template.tokenizer.decode(ids[start:end])
                assert answer.strip() == messages[index]["content"].strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_exact_prefix_of_training(shared_data, tiny_tokenizer_dir, name):
    check_prompts_and_runs(get_template(name, load_tokenizer(tiny_tokenizer_dir)))
    for tokenizer in fitting(shared_data, name):
        check_prompts_and_runs(get_template(name, tokenizer))


def test_encoding_the_answer_by_itself_would_differ(shared_data):
    """The negative control: encoding an answer alone gives other ids than encoding it in place."""
    tokenizer = load_tokenizer(shared_data / TINYLLAMA)
    template = get_template("alpaca", tokenizer)
    rows = json.loads((shared_data / "instruct/alpaca_en_demo.json").read_text(encoding="utf-8"))
    apart = merged = 0
    for row in rows[:300]:
        question = {"role": "user", "content": row["instruction"], "input": row["input"]}
        messages = [question, {"role": "assistant", "content": row["output"]}]
        [example] = template.encode(messages)
        text = template.render(messages)
        assert tokenizer.decode(example.ids, skip_special_tokens=False) == text
        prompt = template.encode_prompt(messages[:1])
        assert example.ids[: len(prompt)] == prompt and runs(example)[0][0] == len(prompt)
        apart += prompt + tokenizer.encode(row["output"]) != example.ids[:-1]
        whole = text.removeprefix("<s> ").removesuffix("</s>")
        merged += [1, *tokenizer.encode(whole)] != example.ids[:-1]
    assert apart > 290 and merged > 0


@pytest.mark.parametrize("lead", [[], [SYSTEM]])
def test_qwen3_writes_what_qwens_own_does(shared_data, tmp_path, lead):
    """The text in the shared folder, rendered by transformers."""
    text = (shared_data / "chat_templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    folder = build_checkpoint(shared_data / "models/stories260K", text, tmp_path / "qwen3")
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    bare = shared_data / QWEN  # no BOS
    ours = {
        value: get_template("qwen3", load_tokenizer(bare), enable_thinking=value)
        for value in (True, False)
    }
    thoughts = {"reasoning_content": "\nLet me\n\nsee.\n"}
    with_thoughts = [dict(m, **thoughts) if m["role"] == "assistant" else m for m in TOOL_CHAT]
    some = [dict(m, **thoughts) if m.get("content") == "Again." else m for m in TOOL_CHAT]
    long_chat = [dict(m, **thoughts) if m["role"] == "assistant" else m for m in LONG_CHAT]
    for chat in (LONG_CHAT, TOOL_CHAT, with_thoughts, some, long_chat):
        for length in range(1, len(chat) + 1):
            for tools in (None, TOOLS):
                for asks in (True, False):
                    for thinking, template in ours.items():
                        messages = lead + chat[:length]
                        expected = hf.apply_chat_template(
                            standard(messages),
                            tools=tools and STANDARD_TOOLS,
                            tokenize=False,
                            add_generation_prompt=asks,
                            enable_thinking=thinking,
                        )
                        assert template.render(messages, tools, asks) == expected


def standard(messages: list[dict]) -> list[dict]:
    """Messages whose calls have transformers' form."""
    messages = copy.deepcopy(messages)
    for message in messages:
        if calls := message.get("tool_calls"):
            functions = [call.get("function", call) for call in calls]
            message["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return messages


def test_the_recipe_of_qwen_prompts_as_transformers_does(shared_data):
    """A row without a system prompt gets the checkpoint's own, as the recipe says."""
    recipe = ROOT / "examples" / "recipes" / "qwen25_chatml.toml"
    options = parse_options(["--config", str(recipe)])
    tokenizer = load_tokenizer(shared_data / QWEN)
    template = get_template(options.template, tokenizer, options.default_system)
    hf = transformers.AutoTokenizer.from_pretrained(shared_data / QWEN)
    messages = [{"role": "user", "content": "Hi"}]
    expected = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages, None, True) == expected


@pytest.mark.parametrize("lead", [[], [SYSTEM]])
def test_tools_equal_qwens_chat_template(shared_data, lead):
    hf = transformers.AutoTokenizer.from_pretrained(shared_data / QWEN)
    template = get_template("auto", load_tokenizer(shared_data / QWEN))
    for length in (1, 2, 3, 4, 6, 7):
        messages = lead + TOOL_CHAT[:length]
        for tools in (None, TOOLS):
            expected = hf.apply_chat_template(
                standard(messages), tools=tools and STANDARD_TOOLS, tokenize=False
            )
            assert template.render(messages, tools) == expected
            if messages[-1]["role"] == "assistant":
                [example] = template.encode(messages, tools)
                assert example.ids == hf(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_tools_as_text_follow_the_templates_own_system_prompt(shared_data, name):
    template = get_template(name, load_tokenizer(shared_data / MISTRAL))
    default = template.facts.default_system
    assert default.startswith(("Below is an instruction", "A chat between"))
    text = template.render(TOOL_CHAT, TOOLS)
    assert text.startswith(f"<s>{default}\n\n# Tools\n\n")
    assert '\n{"type": "function", "function": {"name": "time"' in text
    assert "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>" in text


def test_tools_as_text_without_a_system_prompt(shared_data):
    """Mistral's own template supports none, so the tools are before the question."""
    template = get_template("auto", load_tokenizer(shared_data / MISTRAL))
    text = template.render(TOOL_CHAT, TOOLS)
    assert text.startswith("<s>[INST] # Tools\n\n") and "</tool_call>\n\n天气? [/INST]" in text


def test_markers(shared_data):
    """The marker is the generation prompt, or the text after the question."""
    for name, folder, ids in (
        ("alpaca", TINYLLAMA, [1, 835, 13291, 29901]),
        ("llama2", TINYLLAMA, [1, 518, 29914, 25580, 29962]),
        ("plain", TINYLLAMA, [1, 29871, 13]),
        ("chatml", QWEN, [151644, 77091, 198]),
        ("llama3", LLAMA3, [128000, 128006, 78191, 128007, 271]),
    ):
        assert get_template(name, load_tokenizer(shared_data / folder)).encode_marker() == ids


def test_stop_tokens(shared_data):
    qwen, llama3 = load_tokenizer(shared_data / QWEN), load_tokenizer(shared_data / LLAMA3)
    assert get_template("chatml", qwen).stop_token_ids([151645, 151643]) == {151645, 151643}
    assert get_template("llama3", llama3).stop_token_ids(None) == {128009, 128001}
    assert get_template("llama3", llama3).stop_token_ids(128008) == {128009, 128001, 128008}
    assert get_template("alpaca", load_tokenizer(shared_data / TINYLLAMA)).stop_token_ids(2) == {2}


def test_show_marks_what_is_learned(tiny_tokenizer_dir, monkeypatch):
    """In green on a terminal; with NO_COLOR, and in a file, between brackets."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    template = get_template("chatml", load_tokenizer(tiny_tokenizer_dir))
    [example] = template.encode(turns("你", "猫 the cat"))
    assert template.show(example.ids, example.supervised) == (
        "<s><|im_start|>user\n你<|im_end|>\n<|im_start|>assistant\n"
        "\033[32m猫 the cat<|im_end|>\033[0m\n"
    )
    [crooked] = template.encode(turns("\x1b[0m\r\n\t你\x9b", "\x00"))
    shown = template.show(crooked.ids, crooked.supervised)
    assert r"\x1b[0m\x0d" in shown and "\n\t你\\x9b" in shown and r"\x00" in shown
    assert shown.count("\x1b") == 2
    for no_colour, file in (("1", terminal), ("", io.StringIO())):
        monkeypatch.setenv("NO_COLOR", no_colour)
        monkeypatch.setattr("sys.stdout", file)
        shown = template.show(example.ids, example.supervised)
        assert shown.endswith("assistant\n[[猫 the cat<|im_end|>]]\n") and "\x1b" not in shown
