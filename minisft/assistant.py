"""A model that answers conversations: what chat.py and programs talk to.

    assistant = Assistant("examples/base", adapter="runs/demo")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    for piece in assistant.stream(messages, Sampling(greedy=True)):
        print(piece, end="", flush=True)
"""

from dataclasses import replace
from types import SimpleNamespace

from minisft import weights
from minisft.encoding import check_vocabulary
from minisft.generate import stream
from minisft.model import KeyValueCache
from minisft.options import UserError, recorded_options, resolve_device, resolve_dtype
from minisft.template import get_template
from minisft.tokenizer import StreamDecoder, Tokenizer


class Assistant:
    """A checkpoint, an adapter (not merged) and a template, ready to answer.

    template: a name, or "auto" for the one that the adapter or the model was trained with by
    train.py, or else the one that the checkpoint's chat template is.
    max_length: the tokens a conversation with its answer may have; by default the model's
    `context_length`. Raises UserError where a part is missing or does not fit.
    """

    def __init__(self, path, adapter=None, template="auto", device="auto", dtype="auto",
                 max_length=None):
        wanted = SimpleNamespace(device=device, bf16=False, fp16=False,
                                 dtype=str(dtype).removeprefix("torch."))
        self.device = resolve_device(wanted)
        self.dtype = resolve_dtype(wanted, self.device)
        model_dir = weights.resolve(path)
        # The quick parts first: a mistake in them should not wait for the weights.
        adapter_dir = None
        if adapter is not None:
            adapter_dir = weights.resolve(adapter, weights.ADAPTER_CONFIG)
        self.tokenizer = Tokenizer.load(model_dir)
        trained = recorded_options(adapter_dir or model_dir)
        if template == "auto":
            template = trained.get("template", "auto")
        self.template = get_template(template, self.tokenizer, trained.get("default_system"))
        self.model = weights.load_model(model_dir, self.dtype, self.device)
        if adapter_dir:
            weights.load_adapter(self.model, adapter_dir)
            # An adapter comes in float32: convert it here, not again for every token.
            self.model.to(self.dtype).eval()
        config = self.model.config
        self.stop_ids = self.template.stop_token_ids(weights.generation_eos(model_dir, config))
        self.max_length = max_length or config.context_length
        self.cut_short = False  # whether the last answer ended for want of room
        self._cache, self._cached_ids = KeyValueCache(config), []

    def fit(self, messages, max_new_tokens):
        """`messages` less their oldest turns, so that prompt and answer fit the context.

        An answer gets room for `max_new_tokens`, but no more than half of the context. The system
        prompt stays. Raises UserError if the last turn alone is too long.
        """
        limit = self.max_length - min(max_new_tokens, self.max_length // 2)
        while (length := len(self.template.encode_prompt(messages))) > limit:
            shorter = without_oldest_turn(messages)
            if shorter is None:
                raise UserError(f"the message is too long: {length} tokens with its template"
                                f"{' and the system prompt' if head_of(messages) else ''}, the "
                                f"limit is {limit} (of {self.max_length}, the rest is kept for "
                                "the answer); shorten it")
            messages = shorter
        return messages

    def stream(self, messages, sampling):
        """Yield the answer to `messages` piece by piece, each piece whole characters.

        Ids that this conversation shares with the one before are not computed again. One answer
        at a time; it may be left in the middle. Raises UserError where there is no room for one or
        the tokenizer is another model's.
        """
        ids = self.template.encode_prompt(messages)
        check_vocabulary(ids, self.model.config.vocab_size)
        room = self.max_length - len(ids)
        if room < 1:
            raise UserError(f"the conversation has {len(ids)} tokens, the limit is "
                            f"{self.max_length}")
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        # The last id is computed in any case: what follows it is wanted.
        self._cache.truncate(common_prefix(self._cached_ids, ids[:-1]))
        decoder, answer = StreamDecoder(self.tokenizer), []
        # A space that the template writes before every answer is not part of it.
        leading = " " if self.template.form.answer.startswith(" ") else ""
        try:
            for token in stream(self.model, ids, sampling, self.stop_ids, self._cache):
                answer.append(token)
                piece = decoder.push(token).lstrip(leading)
                leading = "" if piece else leading
                yield piece
            yield decoder.flush()
        finally:
            self._cached_ids = (ids + answer)[: self._cache.length]
            self.cut_short = len(answer) == sampling.max_new_tokens


def head_of(messages):
    """How many messages come before the first turn: 1 with a system prompt, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")


def without_oldest_turn(messages):
    """The conversation without its first question and all up to the next; None if it is the only.

    A system prompt at the head stays.
    """
    head = head_of(messages)
    for index in range(head + 1, len(messages)):
        if messages[index]["role"] == "user":
            return messages[:head] + messages[index:]
    return None


def common_prefix(left, right):
    """How many ids at the beginning are the same."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
