"""Conversations to token ids, and which of them the model learns to write.

    template = get_template("auto", tokenizer)        # the checkpoint's own, or one of ours
    [example] = template.encode([
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
    ])
    print(template.show(example.ids, example.supervised))       # supervised text marked

A chat template is Jinja text. Ids and mask follow from what it writes for the answer messages[k]:

    prompt = render(messages[:k], add_generation_prompt=True)
    text   = render(messages[:k + 1])

The text begins with the prompt. The rest, up to and including the end-of-turn token, is supervised.
Where every text also begins the next prompt, all answers share one example. Where it does not
(Qwen3 leaves out earlier thoughts), each answer gets its own example, after the prompt that it has
in use.

Prompt and answer are tokenised separately, so a prompt has the same ids in training and in use.

The tour explains it: docs/tour/02_template.md.
"""

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from minisft.common.errors import UserError
from minisft.text.control_tokens import ControlTokens, Match
from minisft.text.conversation import Conversation, check_answers, prepare
from minisft.text.jinja_template import JinjaTemplate
from minisft.text.marked import marked, supervised_marks
from minisft.text.marks import Span
from minisft.text.messages import Message
from minisft.text.rendering import MAX_BEGUN
from minisft.text.tokenizer import Tokenizer
from minisft.text.turns import Turn, check_blocks, find_turns, renders_of


@dataclass
class TokenizedText:
    """Token ids, and True for those that the model learns to write.

    note: a remark on the prompt of its answers, for the log; usually "".
    """

    ids: list[int]
    supervised: list[bool]
    note: str = ""


class ChatTemplate:
    """A chat template with a tokenizer.

    text: Jinja. name: how messages call the template. enable_thinking: True for prompts that ask
    for thoughts; by default only answers that have thoughts get such prompts. now: the date and
    time that the template sees, in ISO format; by default the time of the call.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Tokenizer,
        name: str = "auto",
        enable_thinking: bool | None = None,
        now: str | None = None,
    ):
        self.text, self.tokenizer, self.name = text, tokenizer, name
        self.enable_thinking = enable_thinking
        self.tokens = ControlTokens(tokenizer)
        special = {name: tokenizer.token_text(id) for name, id in tokenizer.named_ids.items()}
        self.bos_token = special.get("bos_token") or ""
        now = now or datetime.now().isoformat(timespec="seconds")
        self.jinja = JinjaTemplate(text, special, self.tokens, enable_thinking, now)
        self.facts, self.now = self.jinja.facts, now
        # Messages and tools that `begin` got last, and the conversations that they became.
        self._begun = deque[tuple[list[Message], list | None, Conversation]](maxlen=MAX_BEGUN)

    @property
    def thinking(self) -> dict[str, Any]:
        """The variables that ask the template for thoughts, or for none."""
        return self.jinja.thinking

    def encode(self, messages: list[Message], tools: list | None = None) -> list[TokenizedText]:
        """The examples of a conversation: one for all answers, or one for each.

        UserError if the template cannot express the conversation.
        """
        begun = [item[2] for item in self._begun if item[0] is messages and item[1] is tools]
        conversation = begun[0] if begun else self._prepare(messages, tools)
        check_answers(conversation)
        examples = []
        for chain in chains(find_turns(conversation, self.jinja)):
            while chain and not chain[-1].learned:
                chain.pop()
            if chain:
                examples.append(self._encode_chain(chain))
        return examples

    def begin(self, messages: list[Message], tools: list | None = None) -> None:
        """Start rendering, in the background, a conversation that `encode` gets later.

        Until then, messages and tools must not change. Conversations that are begun together cost
        less than one by one.
        """
        try:
            conversation = self._prepare(messages, tools)
        except UserError:
            return  # encode raises the error
        self._begun.append((messages, tools, conversation))
        self.jinja.begin(conversation.messages, conversation.tools, renders_of(conversation))

    def encode_prompt(self, messages: list[Message], tools: list | None = None) -> list[int]:
        """The ids before the answer to messages that end with a user's or a tool's turn."""
        conversation = self._prepare(messages, tools)
        if conversation.messages[-1]["role"] == "assistant":
            raise UserError("the last message must be a user's or a tool's, not the assistant's")
        text, spans = self._write(conversation, {"add_generation_prompt": True})
        # Cut where training cuts: before and after the earlier answers.
        try:
            earlier = find_turns(conversation, self.jinja)
        except UserError:  # the model can read them, even if it could not learn them
            earlier = []
        matches, regions, following = self.tokens.find(text, spans), [], text
        for turn in reversed(earlier):
            if not following.startswith(turn.text):
                break
            end = self._answer_end(turn, matches)
            regions += [(turn.answer, end, False), (turn.start, turn.answer, False)]
            following = turn.text[: turn.start]
        return self._tokenize(text, regions[::-1], matches).ids

    def render(
        self,
        messages: list[Message],
        tools: list | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text."""
        conversation = self._prepare(messages, tools)
        return self._write(conversation, {"add_generation_prompt": add_generation_prompt})[0]

    def encode_marker(self) -> list[int]:
        """The ids of BOS and the leading space, if a prompt begins with them, and of the text that
        opens an answer, such as `### Response:`."""
        prompt, opening = self.facts.prompt, self.facts.opening.lstrip(" ")
        begin = self.bos_token if prompt.startswith(self.bos_token) else ""
        if begin and prompt.startswith(f"{begin} "):
            begin += " "
        # SmolLM2's BOS is <|im_start|>, with which the opening begins as well.
        text = begin + opening.removeprefix(begin)
        return self.tokens.encode(text, 0, len(text), self.tokens.find(text))

    def stop_token_ids(self, generation_config_eos: list[int] | int | None = None) -> set[int]:
        """The tokens that end an answer: end of turn, EOS, and those of generation_config.json."""
        listed = generation_config_eos
        listed = listed if isinstance(listed, list) else [listed]
        ends = [self.tokens.ids.get(end or "") for end in (self.facts.end, self.facts.end_of_calls)]
        return {id for id in (*ends, self.tokenizer.eos_token_id, *listed) if id is not None}

    def show(self, ids: Sequence[int], supervised: Sequence[bool]) -> str:
        """The text of an example for people, without control characters.

        Supervised text is green on a terminal, and between [[ and ]] in a file.
        """
        return marked(self.tokenizer, ids, supervised, supervised_marks(sys.stdout))

    def _prepare(self, messages: list[Message], tools: list | None) -> Conversation:
        return prepare(messages, tools, self.facts, self.tokens)

    def _write(
        self, conversation: Conversation, variables: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """(the conversation as text, the spans of message texts in it)."""
        text = self.jinja.write(conversation.messages, conversation.tools, **variables)
        spans = self.jinja.message_spans(text, conversation, None, variables)
        return text, spans

    def _encode_chain(self, chain: list[Turn]) -> TokenizedText:
        """One example for answers that share a text: the text up to the last answer."""
        text, spans = chain[-1].text, chain[-1].message_spans
        if self.facts.end_follows:
            text += (self.facts.end_of_calls if chain[-1].has_calls else self.facts.end) or ""
        matches, regions = self.tokens.find(text, spans), []
        for turn in chain:
            end = self._answer_end(turn, matches)
            check_blocks(turn, text, end)
            regions += [(turn.start, turn.answer, False), (turn.answer, end, turn.learned)]
        result = self._tokenize(text, regions, matches)
        result.note = next((turn.note for turn in chain if turn.note), "")
        return result

    def _answer_end(self, turn: Turn, matches: Sequence[Match]) -> int:
        """The index after the token that ends an answer."""
        if self.facts.end_follows:  # it opens the next message
            stop = len(turn.text)
            return next((match.end for match in matches if match.start == stop), stop)
        place_of = attrgetter("start")
        first = bisect_left(matches, turn.answer, key=place_of)
        inside = matches[first : bisect_left(matches, len(turn.text), key=place_of)]
        usual = [match for match in inside if match.id == self.tokens.ids.get(self.facts.end or "")]
        if usual or (inside and self.facts.end):  # a tool call may have another end token
            return (usual or inside)[-1].end
        return len(turn.text.rstrip())

    def _tokenize(
        self, text: str, regions: list[tuple[int, int, bool]], matches: Sequence[Match]
    ) -> TokenizedText:
        """The ids of a text that is split at the regions (start, end, learned), in their order."""
        result, place = TokenizedText([], []), 0
        for start, end, learned in [*regions, (len(text), len(text), False)]:
            for begin, stop, supervised in ((place, start, False), (start, end, learned)):
                ids = self.tokens.encode(text, begin, stop, matches)
                result.ids += ids
                result.supervised += [supervised] * len(ids)
            place = end
        return result


def chains(turns: list[Turn]) -> list[list[Turn]]:
    """Runs of turns in which every text begins the next turn's prompt."""
    runs: list[list[Turn]] = []
    for turn in turns:
        if runs and turn.text[: turn.start].startswith(runs[-1][-1].text):
            runs[-1].append(turn)
        else:
            runs.append([turn])
    return runs
