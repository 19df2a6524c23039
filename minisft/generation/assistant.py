"""A model that answers conversations: what chat.py and programs talk to.

    assistant = Assistant("examples/base", adapter="runs/demo")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    for piece in assistant.stream(messages):
        print(piece, end="", flush=True)
    responses, scores = assistant.inference([{"messages": messages}], Sampling(greedy=True))

Any number of threads may use one Assistant: token by token, streams take turns in the order in
which they ask, and a batch waits for its turn.
"""

import re
import time
import warnings
from bisect import bisect_left
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from minisft.checkpoints import adapters, folders, hub
from minisft.common import tensor_files
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.generation.compiled import CompiledDecoder
from minisft.generation.generate import Sampling, generate_scored, stream
from minisft.generation.sharing import Caches, Turns, sharing_weights
from minisft.model.cache import KeyValueCache
from minisft.model.quantized import convert_parameters
from minisft.text.chat_template import trained_template
from minisft.text.tokenizer import StreamDecoder, Tokenizer, check_vocabulary

USUAL = Sampling()
# No text has so many characters to a token: a longer one is refused before it is encoded.
CHARACTERS_PER_TOKEN = 64
# What no keyboard types and no terminal should be sent: all but tab and the ends of lines, pages.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


class Assistant:
    """A checkpoint, an adapter (not merged) and a template, ready to answer.

    template: a name, or "auto" for the one that the adapter or the model was trained with by
    train.py, or else the one that the checkpoint's chat template is.
    max_length: the tokens a conversation with its answer may have; by default the model's
    `context_length`. kept_conversations: how many have their keys and values kept for the next
    turn. model: the checkpoint as `load_model` gives it, where several Assistants share it.
    turns: those of the device, where several share it. quantization_bit: 4 or 8, for less memory.
    compiled: whether streams are written by a CompiledDecoder; a conversation that is kept or in
    use then takes the memory of `max_length` tokens.
    Raises UserError where a part is missing or does not fit.
    """

    def __init__(
        self,
        path,
        adapter=None,
        template="auto",
        device="auto",
        dtype="auto",
        max_length=None,
        kept_conversations=1,
        model=None,
        turns=None,
        quantization_bit=None,
        compiled=False,
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        model_dir = hub.resolve(path)
        # The quick parts first: a mistake in them should not wait for the weights.
        adapter_dir = None
        if adapter is not None:
            adapter_dir = hub.resolve(adapter, tensor_files.ADAPTER_CONFIG)
        self.tokenizer = Tokenizer.load(model_dir)
        self.template = trained_template(template, self.tokenizer, adapter_dir or model_dir)
        if model is None:
            model = folders.load_model(model_dir, self.dtype, self.device, quantization_bit)
        else:
            model = sharing_weights(model)
        self.model, config = model, model.config
        if adapter_dir:
            adapters.load_adapter(model, adapter_dir)
            # An adapter comes in float32: convert it here, not again for every token.
            convert_parameters(model.eval(), self.dtype)
        self.stop_ids = self.template.stop_token_ids(folders.generation_eos(model_dir, config))
        self.max_length = max_length or config.context_length
        if self.max_length > config.context_length:
            raise UserError(
                f"--max_length: {path} is made for {config.context_length} tokens at "
                f"most, not {self.max_length}"
            )
        self.turns = turns or Turns()
        parts = [Path(path).resolve().name, adapter and Path(adapter).resolve().name]
        self.name = " + ".join(filter(None, parts))
        self.decoder = CompiledDecoder(model, self.max_length) if compiled else None
        new_cache = self.decoder.new_cache if compiled else partial(KeyValueCache, config)
        self.caches = Caches(new_cache, kept_conversations)

    @property
    def description(self):
        """What answers, in a line for people."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name} · template {self.template.name} · {self.device} {dtype} · context "
            f"{self.max_length}"
        )

    def fit(self, messages, max_new_tokens, tools=None):
        """`messages` less their oldest turns, so that prompt and answer fit the context.

        An answer gets room for `max_new_tokens`, but no more than half of the context. The system
        prompt stays. Raises UserError if the last turn alone is too long, if it is empty, and for
        messages that are none.
        """
        check_messages(messages, tools)
        limit = self._limit(max_new_tokens)
        if not self._excess(messages, limit, tools):
            return messages
        head = head_of(messages)
        questions = [
            place for place in range(head, len(messages)) if messages[place].get("role") == "user"
        ]
        last = messages[:head] + messages[questions[-1] if questions else head :]
        if head:
            self.check_system(last[0].get("content"), max_new_tokens)
        name = "the message with the system prompt" if head else "the message"
        self._check_length(last, limit, name, tools)
        starts = questions[self._first_kept(messages, questions, limit, tools) :]
        candidates = (messages[:head] + messages[place:] for place in starts)
        return next((one for one in candidates if not self._excess(one, limit, tools)), last)

    def check_system(self, text, max_new_tokens, name="the system prompt"):
        """UserError unless a question has room behind a system prompt; `name`: what to call it."""
        check_text(text, name)
        shortest = [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
        self._check_length(shortest, self._limit(max_new_tokens), name)

    def _limit(self, max_new_tokens):
        """How many tokens a prompt may have."""
        return self.max_length - min(max_new_tokens, self.max_length // 2)

    def _excess(self, messages, limit, tools=None):
        """The length of messages that have no room, in words; else None."""
        if (length := characters(messages, tools)) > limit * CHARACTERS_PER_TOKEN:
            return f"{length:,} characters"
        length = len(self.template.encode_prompt(messages, tools))
        return f"{length} tokens with its template" if length > limit else None

    def _check_length(self, messages, limit, name, tools=None):
        if length := self._excess(messages, limit, tools):
            raise UserError(
                f"{name} is too long: {length}, the limit is {limit} tokens (of "
                f"{self.max_length}, the rest is kept for the answer); shorten it, or "
                "allow only shorter answers"
            )

    def _first_kept(self, messages, questions, limit, tools):
        """The number of the question from which on the conversation is kept.

        As if at every answer so far, once there was no room left, turns had been left out until
        half of the room was free: most answers then have a prompt that begins as the one before
        did, and the cache spares computing it.
        """
        answered = [*messages, {"role": "assistant", "content": "x"}]
        _, supervised = self.template.encode(answered, tools)
        edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
        prompts, ends = edges[::2], edges[1::2]  # where answers begin and end, in tokens
        answers = [place for place, one in enumerate(messages) if one.get("role") == "assistant"]
        begins = [ends[bisect_left(answers, place) - 1] for place in questions[1:]]
        last = messages[: head_of(messages)] + messages[questions[-1] :]
        head = len(self.template.encode_prompt(last, tools)) - (prompts[-1] - begins[-1])
        begins, first = [head, *begins], 0
        for prompt in prompts:
            room = limit
            while head + prompt - begins[first] > room and first + 1 < bisect_left(begins, prompt):
                first, room = first + 1, limit // 2
        return first

    def stream(self, messages, sampling=USUAL, tools=None, say=warnings.warn):
        """The Answer to one conversation, to be read piece by piece; it may be left in the middle.

        Ids that it shares with a conversation before are not computed again. say: told where the
        oldest turns had to be left out. Raises UserError for messages that cannot be answered.
        """
        began = time.perf_counter()
        ids = self.prompt_ids(messages, sampling, tools, say)
        return Answer(self, ids, self._limited(sampling, ids), began)

    def inference(self, conversations, sampling=USUAL, batch_size=8, rows=None, say=warnings.warn):
        """Answer [{"messages": [...], "tools": [...] or none}, ...] -> (responses, scores).

        scores: the mean log-probability of each answer's tokens, its end included (see
        `generate_scored`); 0 is certain. Batches are of similar length, and the answers what each
        conversation gets alone. rows: the number of each, which chooses its random stream.
        """
        prompts = []
        for number, one in enumerate(conversations, start=1):
            try:
                messages, tools = parts_of(one)
                prompts.append(
                    self.prompt_ids(
                        messages,
                        sampling,
                        tools,
                        lambda text, at=number: say(f"{name_of(at)}: {text}"),
                    )
                )
            except UserError as error:
                raise UserError(f"{name_of(number)}: {error}") from error
        rows = range(len(prompts)) if rows is None else rows
        responses, scores = [""] * len(prompts), [0.0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch = [prompts[place] for place in places]
            limits = [self._limited(sampling, ids).max_new_tokens for ids in batch]
            with self.turns:
                answers, found = generate_scored(
                    self.model,
                    batch,
                    sampling,
                    self.stop_ids,
                    [rows[place] for place in places],
                    limits,
                )
            for place, answer, score in zip(places, answers, found, strict=True):
                responses[place] = self.tokenizer.decode(answer).lstrip(self.leading)
                scores[place] = score
        return responses, scores

    @property
    def leading(self):
        """A space that the template writes before every answer, which is not part of it."""
        return " " if self.template.form.answer.startswith(" ") else ""

    def prompt_ids(self, messages, sampling, tools=None, say=warnings.warn):
        """The ids of what fits; UserError also where the tokenizer is another model's."""
        kept = self.fit(messages, sampling.max_new_tokens, tools)
        if len(kept) < len(messages):
            say(
                f"the conversation is longer than {self.max_length} tokens: the oldest "
                f"{len(messages) - len(kept)} messages are not seen"
            )
        ids = self.template.encode_prompt(kept, tools)
        check_vocabulary(ids, self.model.config.vocab_size)
        return ids

    def _limited(self, sampling, ids):
        """The sampling, with no more tokens than there is room for behind `ids`."""
        room = self.max_length - len(ids)
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


class Answer:
    """An answer as it is written: iterate for its pieces, each of whole characters.

    The figures hold for what has come so far: `text`, `num_tokens`, `seconds_to_first_token` (None
    before it) and `seconds` since the question, of whose `num_prompt_tokens` the first `num_reused`
    were known; `cut_short` where the answer ended for want of room.
    """

    def __init__(self, assistant, ids, sampling, began):
        self.num_prompt_tokens, self.num_reused, self.num_tokens = len(ids), 0, 0
        self.seconds_to_first_token, self.seconds = None, 0.0
        self.text, self.cut_short = "", False
        self._pieces = self._write(assistant, ids, sampling, began)

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self):
        """Stop here. What has been computed is kept for the next turn."""
        self._pieces.close()

    @property
    def tokens_per_second(self):
        """How fast the tokens after the first came; None before there are two."""
        if self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / max(1e-9, self.seconds - self.seconds_to_first_token)

    def figures(self):
        """The figures, in a line for people."""
        if not self.num_tokens:
            return "no answer"
        parts = [f"{self.num_tokens} tokens, the first after {self.seconds_to_first_token:.2f} s"]
        if self.tokens_per_second:
            parts.append(f"then {self.tokens_per_second:,.1f} tokens/s")
        parts.append(f"{self.num_reused} of {self.num_prompt_tokens} prompt tokens were known")
        return ", ".join(parts)

    def _write(self, assistant, ids, sampling, began):
        cache = assistant.caches.take(ids)
        self.num_reused = cache.length
        decoder, chosen, leading = StreamDecoder(assistant.tokenizer), [], assistant.leading
        steps = stream(assistant.model, ids, sampling, assistant.stop_ids, cache, assistant.decoder)
        try:
            while (token := assistant.turns.call(next, steps, None)) is not None:
                chosen.append(token)
                self._count(began)
                piece = decoder.push(token).lstrip(leading)
                leading = "" if piece else leading
                yield piece
            yield decoder.flush()
        finally:
            self.cut_short = self.num_tokens == sampling.max_new_tokens
            assistant.caches.give_back((ids + chosen)[: cache.length], cache)

    def _count(self, began):
        self.num_tokens += 1
        self.seconds = time.perf_counter() - began
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = self.seconds


def parts_of(conversation):
    """(messages, tools or None) of {"messages", "tools"}; UserError for anything else."""
    if not isinstance(conversation, dict) or "messages" not in conversation:
        raise UserError('not of the form {"messages": [{"role": ..., "content": ...}, ...]}')
    return conversation["messages"], conversation.get("tools")


def name_of(number):
    """What a conversation of a batch is called in messages."""
    return f"conversation {number}"


def check_messages(messages, tools=None):
    """UserError unless messages are such, and each question is text for people to read.

    Who speaks when is left to the template.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}')
    if not isinstance(tools or [], list) or not all(isinstance(one, dict) for one in tools or []):
        raise UserError("tools must be a list of objects, each the description of a function")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("tool_calls") or [], list):
            raise UserError(f"message {number}: tool_calls must be a list")
        name = "the message" if number == len(messages) else f"message {number}"
        if message.get("role") == "system":
            check_text(message.get("content"), "the system prompt")
        elif message.get("role") == "user":
            if not message.get("input") and not str(message.get("content") or "").strip():
                raise UserError(f"{name} is empty")
            check_text(message.get("content"), name)
            check_text(message.get("input"), f'the "input" of {name}')


def check_text(text, name):
    """UserError unless `text` is text, or None, without characters that nobody types."""
    if not isinstance(text or "", str):
        raise UserError(f"{name}: content is not text")
    if found := CONTROL_CHARACTERS.search(text or ""):
        raise UserError(
            f"{name} has the control character U+{ord(found[0]):04X} (character "
            f"{found.start() + 1}); remove it"
        )


def characters(messages, tools=None):
    """How many characters the messages and the functions that are offered have together."""
    return len(str(tools or "")) + sum(
        len(str(value or "")) for one in messages for name, value in one.items() if name != "role"
    )


def head_of(messages):
    """How many messages come before the first turn: 1 with a system prompt, else 0."""
    return int(bool(messages) and messages[0].get("role") == "system")
