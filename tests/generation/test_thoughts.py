"""Thoughts are separated from answers: marks of real templates, text in any pieces, chat, files."""

import io
import json
import shutil
import sys
from itertools import combinations

import pytest
import tokenizers
import torch

from minisft.chat import prompts, terminal
from minisft.chat.page import Page, Session
from minisft.chat.terminal import Conversation
from minisft.chat.transcript import Transcript
from minisft.generation.answer import Response
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.generation.thoughts import AnswerDecoder, ThoughtSplitter
from minisft.text.control_tokens import ControlTokens
from minisft.text.jinja_template import JinjaTemplate
from minisft.text.template_choice import get_template
from minisft.text.thoughts import ThoughtMarks
from minisft.text.tokenizer import Tokenizer

GREEDY = Sampling(max_new_tokens=60, greedy=True)
QUESTION = {"role": "user", "content": "Q"}
THINK = ThoughtMarks("<think>", "</think>")
FINAL = "<|channel|>final<|message|>"
CHANNELS = ThoughtMarks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant" + FINAL)
# A template that keeps the thoughts of earlier turns.
KEEPS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Like DeepSeek R1: the prompt opens the thoughts, and finished turns do not show them.
OPENS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


@pytest.mark.parametrize(
    "marks, is_open, before_answer, text, thoughts, answer",
    [
        (THINK, False, "", "<think>\nHm, 1 < 2.\n</think>\n\n4 < 5", "Hm, 1 < 2.", "4 < 5"),
        (THINK, True, "", "a </thin </ b>\n</think>4</think>", "a </thin </ b>", "4</think>"),
        (THINK, False, "", "\n<think>\n\n</think>\n\nYes", "", "Yes"),
        (THINK, False, "", "<thin> is no mark", "", "<thin> is no mark"),
        (THINK, False, "", "  <thi", "", "  <thi"),
        (THINK, False, "", "Say <think>a</think>", "", "Say <think>a</think>"),
        (THINK, False, "", "<think>cut short </th", "cut short </th", ""),
        (THINK, True, "", "a\n\nb\n </think>", "a\n\nb", ""),
        (THINK, True, "", "", "", ""),
        (CHANNELS, False, FINAL, CHANNELS.opening + "Hm" + CHANNELS.closing + "4", "Hm", "4"),
        (CHANNELS, False, FINAL, FINAL + "4", "", "4"),
    ],
)  # fmt: skip
def test_any_division_into_pieces_gives_the_same(
    marks, is_open, before_answer, text, thoughts, answer
):
    """One character at a time, and in three pieces cut anywhere."""
    divisions = [list(text)] + [
        [text[:start], text[start:end], text[end:]]
        for start, end in combinations(range(len(text) + 1), 2)
    ]
    for pieces in divisions:
        splitter = ThoughtSplitter(marks, is_open, before_answer)
        parts = [*map(splitter.push, pieces), splitter.flush()]
        assert tuple(map("".join, zip(*parts, strict=True))) == (thoughts, answer), pieces


def test_text_appears_as_soon_as_it_cannot_be_a_mark():
    splitter = ThoughtSplitter(THINK, is_open=False)
    steps = [("<thi", "", ""), ("nk>\nHm", "Hm", ""), (", </", ",", ""), ("b> ", " </b>", "")]
    steps += [("</think>", "", ""), ("\n", "", ""), ("A", "", "A"), (" <", "", " <")]
    for piece, thoughts, answer in steps:
        assert splitter.push(piece) == (thoughts, answer)


# Templates with thoughts, and their marks; at the end, True if the prompt that asks for thoughts
# opens them.
MARKS = {
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>", False),
    "Cohere2MoE": ("<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>", True),
    "GLM-4.6": (*THINK, False),
    "HuggingFaceTB-SmolLM3-3B": (*THINK, False),
    "MiniMax-M3": ("<mm:think>", "</mm:think>", False),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (*THINK, True),
    "Qwen-QwQ-32B": (*THINK, True),
    "Qwen-Qwen3-0.6B": (*THINK, False),
    "Reka-Edge": (*THINK, True),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (*THINK, True),
    "deepseek-ai-DeepSeek-V3.1": (*THINK, True),
    "deepseek-ai-DeepSeek-V3.2": (*THINK, True),
    "deepseek-ai-DeepSeek-V4-Flash-0731": (*THINK, True),
    "google-gemma-4-31B-it-interleaved": ("<|channel>thought", "<channel|>", False),
    "inclusionai-ling-3.0-flash": (*THINK, True),
    "llama-cpp-deepseek-r1": (*THINK, True),
    "openai-gpt-oss-120b": (*CHANNELS, False),
    "poolside-Laguna-S-2.1": (*THINK, True),
    "poolside-Laguna-XS-2.1": (*THINK, True),
    "Qwen-Qwen2.5-7B-Instruct": None,
    "meta-llama-Llama-3.1-8B-Instruct": None,
    "mistralai-Mistral-Nemo-Instruct-2407": None,
    "classic-alpaca": None,
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_real_templates(name, shared_data, tiny_tokenizer_dir):
    text = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    tokens = ControlTokens(Tokenizer.load(tiny_tokenizer_dir))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = JinjaTemplate(text, special, tokens, None, "2026-01-02T03:04:05")
    marks = template.facts.thought_marks
    if MARKS[name] is None:
        assert marks is None
        return
    opening, closing, is_open = MARKS[name]
    assert marks == (opening, closing)
    prompts = {
        value: template.write(
            [QUESTION],
            template.facts.empty_tools,
            add_generation_prompt=True,
            enable_thinking=value,
        )
        for value in (True, False)
    }
    assert prompts[True].rstrip().endswith(opening) == is_open
    if prompts[False] != prompts[True]:
        assert not prompts[False].rstrip().endswith(opening)


@pytest.fixture
def make_assistant(tiny_chat_model_dir, tmp_path):
    """A function: the text of a template -> an Assistant with dictated answers."""

    def make(text, **more):
        folder = tmp_path / "thinker"
        if not folder.exists():
            shutil.copytree(tiny_chat_model_dir, folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
        return Assistant(folder, device="cpu", dtype="float32", **more)

    return make


def dictate(assistant, *texts):
    """Make the model write these texts, one answer after another, each with its end token."""
    end = assistant.template.tokens.ids["<|im_end|>"]
    spoken = iter([id for text in texts for id in [*assistant.tokenizer.encode(text), end]])

    def logits(hidden):
        chosen = torch.full(hidden.shape[:1], next(spoken))
        return torch.nn.functional.one_hot(chosen, 300).float()

    assistant.model.logits = logits


THOUGHTFUL = "<think>\nHm 好, 2?\n</think>\n\nTwo 🙂."


def test_stream_and_batch_keep_thoughts_apart(make_assistant):
    assistant = make_assistant(KEEPS, enable_thinking=True)
    dictate(assistant, THOUGHTFUL, THOUGHTFUL, "Plain.")
    answer = assistant.stream([QUESTION], GREEDY)
    seen = []
    for piece in answer:
        seen.append((answer.reasoning_content, answer.text))
        assert not piece or answer.reasoning_content == "Hm 好, 2?"  # all thoughts come before
    assert len({thoughts for thoughts, _ in seen}) > 3  # they come while they are written
    assert answer.text == "Two 🙂." and answer.num_tokens > 20
    said = {"role": "assistant", "content": "Two 🙂.", "reasoning_content": "Hm 好, 2?"}
    assert answer.message == said
    [response] = assistant.answer([{"messages": [QUESTION]}], GREEDY)
    assert response == Response("Two 🙂.", "Hm 好, 2?", response.score) and response.score <= 0
    assert assistant.inference([{"messages": [QUESTION]}], GREEDY)[0] == ["Plain."]


def test_prompt_that_opens_the_thoughts(make_assistant):
    assistant = make_assistant(OPENS)
    dictate(assistant, "Hm\n</think>\n\nTwo.", "and on and on")
    answer = assistant.stream([QUESTION], GREEDY)
    assert "".join(answer) == "Two." and answer.reasoning_content == "Hm"
    # Its template does not show thoughts, so they are no reason to refuse the next question.
    endless = assistant.stream([QUESTION, answer.message, QUESTION], GREEDY)
    assert "".join(endless) == "" and endless.reasoning_content == "and on and on"


def test_the_template_decides_what_the_next_prompt_shows(make_assistant, shared_data):
    path = shared_data / "chat_templates" / "Qwen-Qwen3-0.6B.jinja"
    said = {"role": "assistant", "content": "Two.", "reasoning_content": "Hm"}
    for text, shows in ((KEEPS, True), (path.read_text(), False)):
        for enable_thinking in (True, None):
            assistant = make_assistant(text, enable_thinking=enable_thinking)
            ids = assistant.prompt_ids([QUESTION, said, QUESTION], GREEDY)
            prompt = assistant.tokenizer.decode(ids, skip_special_tokens=False)
            assert ("<think>\nHm\n</think>" in prompt) == shows
            asks_for_answer = prompt.endswith("<think>\n\n</think>\n\n")
            assert asks_for_answer == (text != KEEPS and enable_thinking is None)


def test_marks_that_are_control_tokens(shared_data, tmp_path):
    """gpt-oss: channels are control tokens, which no decoded text shows."""
    words = "<|start|> <|end|> <|message|> <|channel|> <|return|> <|endoftext|>".split()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=words, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    path = shared_data / "chat_templates" / "openai-gpt-oss-120b.jinja"
    config = {"eos_token": "<|return|>", "chat_template": path.read_text()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    template = get_template("auto", tokenizer)
    prompt = template.encode_prompt([QUESTION])

    def decoded(text):
        decoder = AnswerDecoder(template, prompt)
        ids = template.tokens.encode(text, 0, len(text), template.tokens.find(text))
        parts = [*map(decoder.push, ids), decoder.flush()]
        return tuple(map("".join, zip(*parts, strict=True)))

    opening, closing = CHANNELS
    assert decoded(f"{opening}Hm.{closing}Two.") == ("Hm.", "Two.")
    assert decoded("<|channel|>final<|message|>Two.") == ("", "Two.")
    assert decoded(f"{opening}Hm<|end|> and more") == ("Hm and more", "")
    answer = {"role": "assistant", "content": "Two.", "thinking": "Hm."}
    [example] = template.encode([QUESTION, answer])
    learned = [
        id for id, is_learned in zip(example.ids, example.supervised, strict=True) if is_learned
    ]
    decoder = AnswerDecoder(template, prompt)  # training supervises the same thoughts and answer
    parts = [*map(decoder.push, learned), decoder.flush()]
    assert tuple(map("".join, zip(*parts, strict=True))) == ("Hm.", "Two.")


class Screen(io.StringIO):
    """A terminal that keeps what it shows."""

    def isatty(self):
        return True


def test_terminal_shows_thoughts_dimmed_and_a_pipe_does_not(make_assistant, monkeypatch, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assistant = make_assistant(KEEPS, enable_thinking=True)
    transcript = Transcript(tmp_path / "log.jsonl")
    conversation = Conversation(assistant, GREEDY, None, transcript)
    dictate(assistant, THOUGHTFUL, THOUGHTFUL)
    for stream in (screen := Screen(), pipe := io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert conversation.ask("Q")
    shown = screen.getvalue()
    dimmed, _, rest = shown.rpartition(terminal.dimmed("?", screen))
    assert "\033[2m" in dimmed and rest == "\n\nTwo 🙂.\n"
    assert "".join(dimmed.replace("\033[0m", "").split("\033[2m")) == "Hm 好, 2"
    assert pipe.getvalue() == "Two 🙂.\n"
    said = {"role": "assistant", "content": "Two 🙂.", "reasoning_content": "Hm 好, 2?"}
    assert conversation.turns == [QUESTION, said] * 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["role"] == "assistant"]
    assert "".join(line.get("reasoning_content", "") for line in logged) == "Hm 好, 2?" * 2


def test_file_of_prompts_keeps_thoughts_and_trains(make_assistant, tmp_path):
    assistant = make_assistant(KEEPS, enable_thinking=True)
    dictate(assistant, THOUGHTFUL, "Plain.")
    (tmp_path / "p.txt").write_text("Q\nQ\n")
    prompts.answer_file(assistant, tmp_path / "p.txt", tmp_path / "out.jsonl", GREEDY, 1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    said = {"role": "assistant", "content": "Two 🙂.", "reasoning_content": "Hm 好, 2?"}
    answers = [row["messages"][-1] for row in rows]
    assert sorted(answers, key=str) == sorted(
        [said, {"role": "assistant", "content": "Plain."}], key=str
    )


def test_page_folds_thoughts(make_assistant):
    assistant = make_assistant(KEEPS, enable_thinking=True)
    page, session = Page([assistant], GREEDY), Session()
    dictate(assistant, THOUGHTFUL, "Plain.", "Again.")
    values = (60, 1.0, 0, 1.0, 1.0, True, None)
    views = [view[0][0] for view in page.ask(session, "Q", "", *values)]
    thoughts, answer = views[-1][1:]
    assert thoughts["content"] == "Hm 好, 2?" and answer["content"] == "Two 🙂."
    assert thoughts["metadata"] == {"title": "Thoughts", "status": "done"}
    *_, ((chat,), _, _) = page.ask(session, "R", "", *values)
    assert [message["content"] for message in chat] == ["Q", "Hm 好, 2?", "Two 🙂.", "R", "Plain."]
    [row] = json.loads(page.export(session))
    assert row["messages"][1]["reasoning_content"] == "Hm 好, 2?"
    *_, ((chat,), _, _) = page.edit(session, 3, "S", "", *values)  # the second question
    assert [message["content"] for message in chat] == ["Q", "Hm 好, 2?", "Two 🙂.", "S", "Again."]
