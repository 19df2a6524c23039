"""Every chat template of the shared folder against transformers' apply_chat_template.

Run with `-s` to see the table: cases with one example, with one per answer, and refused cases.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import transformers
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate, TokenizedText
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
PAIRS = [
    ("Hi there", "Hello."),
    ("And 2+2?", "It is four."),
    ("Write a poem", "Roses  are\nred <b>"),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "find_weather", "arguments": {"city": "Oslo"}}
TOOL_CHAT = [
    {"role": "user", "content": "Is it cold in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "3 degrees"},
    {"role": "assistant", "content": "Yes, rather."},
]
NOW = "2026-01-02T03:04:05"


class Clock(datetime):
    """transformers' clock, stopped at NOW."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        return datetime.fromisoformat(NOW)


# Templates that need more than a conversation, or whose prompt opens thoughts that a finished turn
# does not have, so that no answer follows its prompt.
PARTS = "the template's prompt is not the beginning of its conversation"
REFUSED = {
    "Apriel-1.6-15b-Thinker-fixed": PARTS,
    "Cohere2MoE": PARTS,
    "CohereForAI-c4ai-command-r-plus-tool_use": PARTS,
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": PARTS,
    "Qwen-QwQ-32B": PARTS,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": PARTS,
    "deepseek-ai-DeepSeek-V3.2": PARTS,
    "fireworks-ai-llama-3-firefunction-v2": "line 21: 'functions' is undefined",
    "google-gemma-4-31B-it-interleaved": PARTS,
    "llama-cpp-deepseek-r1": PARTS,
}
TOOL_CASES = {"tools", "system, tools"}
PARTLY_REFUSED = {
    # After a tool's result, the prompt and the conversation continue with different turns.
    "Apertus-8B-Instruct": TOOL_CASES,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": TOOL_CASES,
    # The prompt opens thoughts, but a call has none.
    "NVIDIA-Nemotron-Nano-v2": TOOL_CASES,
    "google-gemma-2-2b-it": {"system, 1 turns", "system, 3 turns"},
    # The system prompt is in the last question, and a tool's result is not a question.
    "mistralai-Mistral-Nemo-Instruct-2407": {"system, tools"},
}
# The text that may be between a prompt and an answer without thoughts.
EMPTY_THOUGHTS = (
    "",
    "<think>\n\n</think>",
    "<think></think>",
    "</think>",
    "</mm:think>",
    "<|close|>think<|sep|><|open|>response<|sep|>",
)


@dataclass
class Case:
    """A conversation, and the variables with which its answers are rendered."""

    name: str
    messages: list
    tools: list | None = None
    thoughts: bool = False


@dataclass
class Verdict:
    """The results of the cases of a template."""

    exact: list[str] = field(default_factory=list)
    per_answer: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    cut: bool = False

    @property
    def trained(self) -> list[str]:
        """The cases that give examples."""
        return [*self.exact, *self.per_answer]


def chat(num_turns: int, thoughts: bool = False) -> list[dict]:
    """A conversation, with or without thoughts before each answer."""
    messages = []
    for question, answer in PAIRS[:num_turns]:
        reply = {"role": "assistant", "content": answer}
        if thoughts:
            reply["reasoning_content"] = f"Let me see, {question}"
        messages += [{"role": "user", "content": question}, reply]
    return messages


def cases(template: ChatTemplate) -> list[Case]:
    """The conversations to try with a template."""
    cases = []
    for lead, name in (([], ""), ([SYSTEM], "system, ")):
        cases += [Case(f"{name}{n} turns", lead + chat(n)) for n in (1, 3)]
        if template.facts.knows_tools and template.facts.call_form:
            cases.append(Case(f"{name}tools", lead + TOOL_CHAT, TOOLS))
        if template.facts.knows_thoughts:
            cases += [Case(f"{name}{n} thoughts", lead + chat(n, True), None, True) for n in (1, 3)]
    return cases


class Oracle:
    """transformers' apply_chat_template, with the arguments that our template uses."""

    def __init__(self, folder: Path, template: ChatTemplate):
        self.hf = transformers.AutoTokenizer.from_pretrained(folder)
        self.template = template

    def apply(self, messages: list, tools: list | None, **more):
        """Ids, or text with tokenize=False."""
        facts = self.template.facts
        form = facts.call_form
        sent = []
        for message in messages:
            message = dict(message)
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]
            if form and form.with_ids and message.get("tool_calls"):
                message["tool_calls"] = [{**message["tool_calls"][0], "id": "call00000"}]
            if form and form.with_ids and message["role"] == "tool":
                message["tool_call_id"] = "call00000"
            if form and form.arguments_as_text and message.get("tool_calls"):
                function = {**CALL, "arguments": json.dumps(CALL["arguments"])}
                message["tool_calls"] = [{"type": "function", "function": function}]
            sent.append(message)
        return self.hf.apply_chat_template(
            sent,
            tools=tools or facts.empty_tools,
            return_dict=False,
            **self.template.jinja.thinking,
            **more,
        )


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids as it is, without the space that a tokenizer adds."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def runs(example: TokenizedText) -> list[tuple[int, int]]:
    """(start, end) of each supervised run of an example."""
    flags = [False, *example.supervised, False]
    edges = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_case(case: Case, template: ChatTemplate, oracle: Oracle, verdict: Verdict) -> None:
    """Compare one conversation with the oracle; AssertionError describes the difference."""
    tokenizer, end = template.tokenizer, template.facts.end
    examples = template.encode(case.messages, case.tools)
    answers = [k for k, m in enumerate(case.messages) if m["role"] == "assistant"]
    learned = []  # the supervised runs of all examples, as (text before, run)
    for example in examples:
        learned += [(example.ids[:begin], example.ids[begin:end]) for begin, end in runs(example)]
    assert len(learned) == len(answers), f"{len(learned)} answers are learned of {len(answers)}"
    texts = []
    for k, (before, run) in zip(answers, learned, strict=True):
        asked = case.messages[:k]
        prompt_ids = oracle.apply(asked, case.tools, add_generation_prompt=True)
        prompt = oracle.apply(asked, case.tools, add_generation_prompt=True, tokenize=False)
        text = oracle.apply(case.messages[: k + 1], case.tools, tokenize=False)
        text_ids = oracle.apply(case.messages[: k + 1], case.tools)
        if not text.startswith(prompt):  # a system prompt in the last question only
            question = asked[-1]["content"]
            text = prompt + text.rpartition(question)[2].removeprefix(
                prompt.rpartition(question)[2]
            )
            text_ids = None
        texts.append((text, text_ids))
        ours = template.encode_prompt(asked, case.tools)
        assert ours == prompt_ids, f"prompt {k}: {ours} instead of {prompt_ids}"
        assert before[: len(prompt_ids)] == prompt_ids, f"answer {k} is not behind its prompt"
        skipped = text_of(tokenizer, before[len(prompt_ids) :])
        assert skipped.strip() in EMPTY_THOUGHTS, f"not learned: {skipped!r}"
        written, rest = text_of(tokenizer, run), text[len(prompt) :].removeprefix(skipped)
        if rest.startswith(written):
            rest = rest[len(written) :]
        else:  # the end token that only the next message writes
            following = {template.tokens.ids.get(end): end}
            if "tool_calls" in case.messages[k]:  # a result may follow, not a question
                following = {id: spelled for spelled, id in template.tokens.ids.items()}
            assert written == rest + following[run[-1]], f"learned {written!r} of {rest!r}"
            rest = ""
        assert not rest.replace("</s>", "").strip(), f"not learned: {rest!r}"
        has_calls = "tool_calls" in case.messages[k]
        assert end is None or has_calls or run[-1] in template.tokens.ids.values(), (
            f"no end: {written!r}"
        )
        assert case.messages[k]["content"].strip() in written
    # Each example is the conversation up to its last answer.
    place = -1
    for example in examples:
        place += len(runs(example))
        text, text_ids = texts[place]
        if text_ids is None or example.ids == text_ids:
            continue
        appended = [*text_ids, example.ids[-1]]
        if example.supervised[-1] and example.ids == appended:
            continue
        theirs = [text_of(tokenizer, ids).removeprefix(" ") for ids in (text_ids, appended)]
        assert text_of(tokenizer, example.ids).removeprefix(" ") in theirs, "another text"
        verdict.cut = True
    (verdict.exact if len(examples) == 1 else verdict.per_answer).append(case.name)


def judge(path: Path, base: Path, folder: Path) -> Verdict:
    """Try all cases with one template."""
    build_checkpoint(base, path.read_text(encoding="utf-8"), folder)
    tokenizer, verdict = Tokenizer.load(folder), Verdict()
    try:
        quick = get_template("auto", tokenizer, now=NOW)
        thoughtful = get_template("auto", tokenizer, enable_thinking=True, now=NOW)
        todo = cases(quick)
    except UserError as error:
        return Verdict(refused={"all": str(error)})
    oracles = {False: Oracle(folder, quick), True: Oracle(folder, thoughtful)}
    for case in todo:
        template = thoughtful if case.thoughts else quick
        try:
            check_case(case, template, oracles[case.thoughts], verdict)
        except UserError as error:
            verdict.refused[case.name] = str(error)
        except AssertionError as error:
            verdict.wrong.append(f"{case.name}: {error}")
    return verdict


def test_every_template_equals_transformers(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    base = shared_data / "models/stories260K"
    verdicts = {
        path.stem: judge(path, base, tmp_path / path.stem)
        for path in sorted((shared_data / "chat_templates").glob("*.jinja"))
    }
    print(table(verdicts))
    assert len(verdicts) == 55
    assert {name: v.wrong for name, v in verdicts.items() if v.wrong} == {}
    trained = {name for name, verdict in verdicts.items() if "1 turns" in verdict.trained}
    assert verdicts.keys() - trained == set(REFUSED)
    for name, reason in REFUSED.items():
        assert reason in list(verdicts[name].refused.values())[0]
    partly = {name: set(verdicts[name].refused) for name in trained if verdicts[name].refused}
    assert partly == PARTLY_REFUSED
    # No answer merges with its prompt here; see the next test for a larger vocabulary.
    assert not [name for name, verdict in verdicts.items() if verdict.cut]


@pytest.mark.parametrize("name", ["inclusionai-ling-3.0-flash", "poolside-Laguna-S-2.1"])
def test_an_answer_is_tokenized_after_its_prompt(name, shared_data, tmp_path, monkeypatch):
    """TinyLlama's vocabulary has "><": `<think></think>`, then `<tool_call>` if an answer calls.

    Tokenised as one text, the two merge. But in use the prompt ends in ">", so training cuts there.
    Of the templates in the shared folder, these two differ with this tokenizer, in tool calls.
    """
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    base = shared_data / "tokenizers/TinyLlama-1.1B-Chat-v0.6"
    text = (shared_data / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    folder = build_checkpoint(base, text, tmp_path / name)
    template = get_template("auto", Tokenizer.load(folder), now=NOW)
    oracle = Oracle(folder, template)
    first, last = TOOL_CHAT[:1], TOOL_CHAT[:3]
    asked = template.encode_prompt(first, TOOLS)
    assert asked == oracle.apply(first, TOOLS, add_generation_prompt=True)
    [example] = template.encode(TOOL_CHAT, TOOLS)
    later = template.encode_prompt(last, TOOLS)
    assert example.ids[: len(asked)] == asked and example.ids[: len(later)] == later
    theirs = oracle.apply(last, TOOLS, add_generation_prompt=True)
    assert theirs != later
    assert text_of(template.tokenizer, theirs) == text_of(template.tokenizer, later)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("google-gemma-4-31B-it-interleaved", {"enable_thinking": True}),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", {"enable_thinking": True}),
    ],
)
def test_template_kwargs_help(name, kwargs, shared_data, tmp_path):
    """Templates that are refused as they are train with another value of a variable."""
    text = (shared_data / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    folder = build_checkpoint(shared_data / "models/stories260K", text, tmp_path / name)
    template = get_template("auto", Tokenizer.load(folder), template_kwargs=kwargs, now=NOW)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    examples = template.encode(chat(3))
    ids = examples[-1].ids
    assert ids == hf.apply_chat_template(chat(3), return_dict=False, **kwargs)
    prompt = hf.apply_chat_template(
        chat(3)[:-1], return_dict=False, add_generation_prompt=True, **kwargs
    )
    assert template.encode_prompt(chat(3)[:-1]) == prompt == ids[: len(prompt)]
    assert sum(len(runs(example)) for example in examples) == 3


def table(verdicts: dict[str, Verdict]) -> str:
    """A table: the verdict on each conversation, for every template."""
    lines = [f"{'template':48} {'exact':>5} {'per answer':>10}  refused"]
    for name, verdict in verdicts.items():
        reasons = "; ".join(f"{case}: {why[:70]}" for case, why in verdict.refused.items())
        counts = f"{len(verdict.exact):5} {len(verdict.per_answer):10}"
        lines.append(f"{name:48} {counts}  {reasons} {' '.join(verdict.wrong)}")
    return "\n".join(lines)
