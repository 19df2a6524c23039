"""Every chat template of the shared folder against transformers' apply_chat_template.

Run with `-s` to see the table: what trains in one example, what in one per answer, what is refused.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import transformers
from template_checkpoints import build_checkpoint

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate
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
# does not have.
REFUSED = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "Qwen-QwQ-32B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-4-31B-it-interleaved",
    "llama-cpp-deepseek-r1",
}
# Templates whose answer merges with the end of its prompt if both are tokenized at once.
CUT_BEFORE_ANSWER: set[str] = set()


@dataclass
class Case:
    """A conversation, and the variables with which its answers are rendered."""

    name: str
    messages: list
    tools: list | None = None
    thoughts: bool = False


@dataclass
class Verdict:
    """What became of the cases of a template."""

    exact: list[str] = field(default_factory=list)
    per_answer: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    cut: bool = False
    end: str | None = None


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

    def apply(self, messages: list, tools: list | None, thoughts: bool, **more):
        """Ids, or text with tokenize=False."""
        facts = self.template.facts
        form = facts.call_form
        sent = []
        for message in messages:
            message = dict(message)
            if thoughts and "reasoning_content" in message:
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


def check_case(case: Case, template: ChatTemplate, oracle: Oracle, verdict: Verdict) -> None:
    """Compare one conversation with the oracle; AssertionError says what differs."""
    tokenizer, end = template.tokenizer, template.facts.end
    examples = template.encode(case.messages, case.tools)
    answers = [k for k, m in enumerate(case.messages) if m["role"] == "assistant"]
    learned = []  # the supervised runs of all examples, as (text before, run)
    for example in examples:
        edges = [
            i
            for i in range(1, len(example.ids))
            if example.supervised[i] != example.supervised[i - 1]
        ]
        edges.append(len(example.ids))
        begins = [i for i in edges if i < len(example.ids) and example.supervised[i]]
        for begin in begins:
            stop = next(i for i in edges if i > begin)
            learned.append((example.ids[:begin], example.ids[begin:stop]))
    assert len(learned) == len(answers), f"{len(learned)} answers are learned of {len(answers)}"
    texts = []
    for k, (before, run) in zip(answers, learned, strict=True):
        asked = case.messages[:k]
        arguments = (asked, case.tools, case.thoughts)
        prompt_ids = oracle.apply(*arguments, add_generation_prompt=True)
        prompt = oracle.apply(*arguments, add_generation_prompt=True, tokenize=False)
        text = oracle.apply(case.messages[: k + 1], case.tools, case.thoughts, tokenize=False)
        text_ids = oracle.apply(case.messages[: k + 1], case.tools, case.thoughts)
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
        assert skipped.strip() in (
            "",
            "<think>\n\n</think>",
            "</think>",
            "</mm:think>",
            "<think></think>",
        ), skipped
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
        runs = sum(
            b and not a
            for a, b in zip([False, *example.supervised], example.supervised, strict=False)
        )
        place += runs
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
        todo, end = cases(quick), quick.facts.end
    except UserError as error:
        return Verdict(refused={"all": str(error)})
    verdict.end = end
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
